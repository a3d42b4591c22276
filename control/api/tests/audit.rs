//! The audit log of a real server.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Server;
use coracle_api::audit::Settings;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

#[tokio::test]
async fn requests_are_written_down_as_the_policy_says() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (policy, log) = (folder.path().join("policy.yaml"), folder.path().join("audit.log"));
    let text = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nomitManagedFields: true\nrules:\n\
        - {level: RequestResponse, users: ['system:admin'], resources: [{group: '', resources: [configmaps]}]}\n\
        - {level: Metadata, users: ['system:admin', jane], resources: [{group: '', resources: [secrets]}]}\n";
    std::fs::write(&policy, text).expect("written");
    let settings = Settings { policy: Some(policy), log: Some(log.clone()), max_size_mb: 1, ..Settings::default() };
    server.api.audit(&settings).await.expect("it opens");
    let client = server.client().await;
    for (resource, kind) in [("configmaps", "ConfigMap"), ("secrets", "Secret"), ("serviceaccounts", "ServiceAccount")]
    {
        let object = json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": "a"}});
        let request = http::Request::post(format!("/api/v1/namespaces/default/{resource}"))
            .header("content-type", "application/json")
            .header("user-agent", "test/1")
            .body(object.to_string().into_bytes())
            .expect("a request");
        client.request::<Value>(request).await.expect("made");
    }
    let missing = http::Request::get("/api/v1/namespaces/default/configmaps/none").body(Vec::new()).expect("a request");
    client.request::<Value>(missing).await.expect_err("not there");
    let acting = http::Request::get("/api/v1/namespaces/default/secrets/a").header("impersonate-user", "jane");
    client.request::<Value>(acting.body(Vec::new()).expect("a request")).await.expect_err("she may not");
    let text = std::fs::read_to_string(&log).expect("a log");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(events.len(), 4, "{text}");
    let [whole, short, failed, acting] = events.as_slice() else { panic!("four events") };
    assert_eq!(
        (&whole["kind"], &whole["stage"], &whole["verb"]),
        (&json!("Event"), &json!("ResponseComplete"), &json!("create"))
    );
    assert_eq!(whole["user"]["username"], "system:admin");
    assert_eq!(whole["objectRef"], json!({"resource": "configmaps", "namespace": "default", "apiVersion": "v1"}));
    assert_eq!(whole["requestObject"]["metadata"]["name"], "a");
    assert!(whole["responseObject"]["metadata"]["uid"].is_string());
    assert!(whole["responseObject"]["metadata"]["managedFields"].is_null());
    assert_eq!((&whole["responseStatus"]["code"], &whole["sourceIPs"]), (&json!(201), &json!(["127.0.0.1"])));
    assert_eq!(whole["annotations"]["authorization.k8s.io/decision"], "allow");
    assert!(short["requestObject"].is_null() && short["responseObject"].is_null(), "a secret is not written down");
    assert_eq!((&short["level"], &short["userAgent"]), (&json!("Metadata"), &json!("test/1")));
    assert_eq!(
        (&failed["responseStatus"]["reason"], &failed["responseStatus"]["code"]),
        (&json!("NotFound"), &json!(404))
    );
    assert_eq!(
        (&acting["user"]["username"], &acting["impersonatedUser"]["username"]),
        (&json!("system:admin"), &json!("jane"))
    );
    assert_eq!(acting["authenticationMetadata"], json!({"impersonationConstraint": "impersonate:user-info"}));
}

/// A webhook on loopback that refuses its first request: its URL, and what it is sent.
async fn webhook() -> (String, mpsc::UnboundedReceiver<(String, Value)>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/hook", listener.local_addr().expect("an address"));
    let (sender, received) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let refused = AtomicBool::new(false);
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await.expect("a body").to_bytes();
                let mut response = http::Response::new(String::new());
                if refused.swap(true, Ordering::Relaxed) {
                    sender.send((path, serde_json::from_slice(&body).expect("JSON"))).expect("the test listens");
                } else {
                    *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
                }
                Ok::<_, std::convert::Infallible>(response)
            });
            let connection = hyper::server::conn::http1::Builder::new();
            connection.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await.expect("served");
        }
    });
    (url, received)
}

#[tokio::test]
async fn events_are_sent_to_a_webhook_in_batches_and_again_when_they_are_refused() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (policy, config) = (folder.path().join("policy.yaml"), folder.path().join("config.yaml"));
    let text = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n";
    std::fs::write(&policy, text).expect("written");
    let (url, mut received) = webhook().await;
    let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "h", "cluster": {"server": url}}], "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "h", "user": "u"}}]});
    std::fs::write(&config, kubeconfig.to_string()).expect("written");
    let settings = Settings {
        policy: Some(policy),
        webhook: Some(config),
        webhook_max_wait: Duration::from_secs(1),
        webhook_backoff: Duration::from_millis(10),
        ..Settings::default()
    };
    server.api.audit(&settings).await.expect("it opens");
    let client = server.client().await;
    for _ in 0..3 {
        let request = http::Request::get("/api/v1/namespaces/default").body(Vec::new()).expect("a request");
        client.request::<Value>(request).await.expect("an answer");
    }
    let mut events = Vec::new();
    while events.len() < 3 {
        let sent = tokio::time::timeout(Duration::from_secs(30), received.recv()).await.expect("in time");
        let (path, list) = sent.expect("the webhook listens");
        assert_eq!(
            (path.as_str(), &list["kind"], &list["apiVersion"]),
            ("/hook", &json!("EventList"), &json!("audit.k8s.io/v1"))
        );
        events.extend(list["items"].as_array().expect("events").clone());
    }
    assert!(events.iter().all(|event| event["requestURI"] == "/api/v1/namespaces/default"), "{events:?}");
}

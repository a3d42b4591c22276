//! The audit log of a real server.

mod common;

use common::Server;
use coracle_api::audit::Settings;
use serde_json::{Value, json};

#[tokio::test]
async fn requests_are_written_down_as_the_policy_says() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let (policy, log) = (folder.path().join("policy.yaml"), folder.path().join("audit.log"));
    let text = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nomitManagedFields: true\nrules:\n\
        - {level: RequestResponse, users: ['system:admin'], resources: [{group: '', resources: [configmaps]}]}\n\
        - {level: Metadata, users: ['system:admin'], resources: [{group: '', resources: [secrets]}]}\n";
    std::fs::write(&policy, text).expect("written");
    let settings =
        Settings { policy: Some(policy), log: Some(log.clone()), max_size_mb: 1, max_backups: 1, max_age_days: 0 };
    server.api.audit(&settings).expect("it opens");
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
    let text = std::fs::read_to_string(&log).expect("a log");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(events.len(), 3, "{text}");
    let [whole, short, failed] = events.as_slice() else { panic!("three events") };
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
}

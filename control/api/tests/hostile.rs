//! Clients and webhooks that mean no good, or do not care: bounded, answered clearly, and no harm to others.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Server;
use futures::AsyncReadExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, PostParams};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn post(client: &kube::Client, path: &str, kind: &str, body: impl Into<Vec<u8>>) -> (u16, Value) {
    let request = http::Request::post(path).header("content-type", kind);
    let request = request.body(kube::client::Body::from(body.into())).expect("a request");
    let response = client.send(request).await.expect("an answer");
    let code = response.status().as_u16();
    let bytes = response.into_body().collect_bytes().await.expect("a body");
    (code, serde_json::from_slice(&bytes).expect("a JSON answer"))
}

/// A TLS connection to the server, as HTTP/1.1 speaks over it.
async fn connect(server: &Server) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    let config = coracle_api::unverified_tls(None).expect("a configuration");
    let address = server.url.trim_start_matches("https://");
    let stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    let name = "localhost".try_into().expect("a name");
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await.expect("a handshake")
}

fn map(name: &str, bytes: usize) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"a": "x".repeat(bytes)}})).expect("a ConfigMap")
}

#[tokio::test]
async fn bombs_do_not_go_off() {
    let server = Server::start().await;
    let client = server.client().await;
    let mut bomb = String::from(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: bomb}\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n",
    );
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    let deep = |open: &str, n: usize| format!("{{\"kind\":\"ConfigMap\",\"data\":{}", open.repeat(n));
    for (kind, body) in [
        ("application/yaml", bomb),
        ("application/json", deep("[", 1_000_000)),
        ("application/json", deep("{\"a\":", 500_000)),
        ("application/yaml", format!("a: {}", "[".repeat(100_000))),
    ] {
        let began = Instant::now();
        let (code, status) = post(&client, MAPS, kind, body).await;
        assert_eq!(
            (code, &status["kind"], &status["reason"]),
            (400, &json!("Status"), &json!("BadRequest")),
            "{status}"
        );
        assert!(began.elapsed() < Duration::from_secs(20), "refused after {:?}", began.elapsed());
    }
    let (code, status) = post(&client, MAPS, "application/json", vec![b' '; (3 << 20) + 1]).await;
    assert_eq!((code, &status["reason"]), (413, &json!("RequestEntityTooLarge")));
    let twice = r#"{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"twice"},"data":{"a":"1","a":"2"},"data":{"b":"3"}}"#;
    let (code, status) = post(&client, &format!("{MAPS}?fieldValidation=Strict"), "application/json", twice).await;
    assert_eq!(code, 400);
    let message = status["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("duplicate field \"data.a\"") && message.contains("duplicate field \"data\""),
        "{message}"
    );
    assert!(
        Api::<ConfigMap>::namespaced(client, "default")
            .list(&ListParams::default())
            .await
            .expect("a list")
            .items
            .is_empty()
    );
}

#[tokio::test]
async fn endless_headers_and_idle_connections_hurt_nobody() {
    let server = Server::start().await;
    let mut endless = connect(&server).await;
    endless.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n").await.expect("written");
    let line = format!("x-filler: {}\r\n", "a".repeat(1000));
    let mut refused = Vec::new();
    for _ in 0..200 {
        if endless.write_all(line.as_bytes()).await.is_err() {
            break;
        }
    }
    // The answer, when the connection was not cut before it could be read.
    let _ = endless.read_to_end(&mut refused).await;
    let text = String::from_utf8_lossy(&refused);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 431"), "{text}");
    // Half a request each, and none at all.
    let mut open = Vec::new();
    for n in 0..100 {
        let mut stream = connect(&server).await;
        if n % 2 == 0 {
            stream
                .write_all(b"POST /api/v1/namespaces HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n")
                .await
                .expect("written");
        }
        open.push(stream);
    }
    server.client().await.apiserver_version().await.expect("others are served");
}

#[tokio::test]
async fn a_watcher_that_never_reads_loses_its_watch_alone() {
    const OBJECTS: usize = 400;
    const BYTES: usize = 20_000;
    let server = Server::start().await;
    let client = server.client().await;
    let watch = || async {
        let request =
            http::Request::get(format!("{MAPS}?watch=1&resourceVersion=0")).body(Vec::new()).expect("a request");
        server.client().await.request_stream(request).await.expect("a watch")
    };
    let mut idle = Box::pin(watch().await);
    let mut busy = Box::pin(watch().await);
    let reader = tokio::spawn(async move {
        let (mut seen, mut chunk) = (0, vec![0; 1 << 16]);
        while seen < OBJECTS {
            let n = busy.read(&mut chunk).await.expect("the watch goes on");
            assert!(n > 0, "the watch ended after {seen} events");
            seen += chunk[..n].iter().filter(|&&byte| byte == b'\n').count();
        }
    });
    let maps = Api::<ConfigMap>::namespaced(client.clone(), "default");
    for n in 0..OBJECTS {
        maps.create(&PostParams::default(), &map(&format!("m{n}"), BYTES)).await.expect("written");
    }
    tokio::time::timeout(Duration::from_secs(60), reader).await.expect("the other sees all").expect("it read");
    // What had been sent is there still, whatever became of the rest.
    let mut chunk = vec![0; 1 << 16];
    assert!(idle.read(&mut chunk).await.expect("readable") > 0);
}

#[tokio::test]
async fn a_webhook_that_hangs_holds_up_its_own_requests_only() {
    let server = Server::start().await;
    let client = server.client().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("https://{}", listener.local_addr().expect("an address"));
    let held = Arc::new(tokio::sync::Mutex::new(Vec::new()));
    let holding = held.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            holding.lock().await.push(stream);
        }
    });
    let hook = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "hangs"}, "webhooks": [{"name": "a.b.example.com", "clientConfig": {"url": url},
            "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 2, "failurePolicy": "Fail",
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"]}]}]});
    let hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    assert_eq!(post(&client, hooks, "application/json", hook.to_string()).await.0, 201);
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}).to_string();
    let began = Instant::now();
    let waiting = post(&client, "/api/v1/namespaces/default/secrets", "application/json", secret);
    let other = Api::<ConfigMap>::namespaced(client.clone(), "default");
    let meanwhile = async {
        other.create(&PostParams::default(), &map("meanwhile", 1)).await.expect("written");
        began.elapsed()
    };
    let ((code, status), took) = tokio::join!(waiting, meanwhile);
    assert!(took < Duration::from_secs(2), "another's request took {took:?}");
    let message = status["message"].as_str().unwrap_or_default();
    assert!(code == 500 && message.contains("context deadline exceeded"), "{code}: {message}");
    assert!(!held.lock().await.is_empty());
}

//! `metrics.k8s.io`: what a kubelet says about usage, as its clients see it.

mod common;

use common::Server;
use serde_json::{Value, json};

#[tokio::test]
async fn nodes_and_pods_tell_what_they_use() {
    let server = Server::start().await;
    let client = server.client().await;
    let ask = async |method: &str, path: &str, body: Value| -> Result<Value, kube::Error> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = http::Request::builder().method(method).uri(path).header("content-type", kind);
        client.request(request.body(body.to_string().into_bytes()).expect("a request")).await
    };
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "labels": {"disk": "ssd"}}});
    ask("POST", "/api/v1/nodes", node).await.expect("made");
    let pods = "/api/v1/namespaces/default/pods";
    for name in ["web", "new"] {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}});
        let made = ask("POST", pods, pod).await.expect("made");
        common::USAGE_UIDS
            .lock()
            .expect("no panic")
            .push((name.to_owned(), made["metadata"]["uid"].as_str().expect("a uid").to_owned()));
    }
    ask("PATCH", &format!("{pods}/web/status"), json!({"status": {"phase": "Running"}})).await.expect("patched");
    let group = "/apis/metrics.k8s.io/v1beta1";
    let nodes = ask("GET", &format!("{group}/nodes"), Value::Null).await.expect("an answer");
    assert_eq!(nodes["items"][0]["usage"], json!({"cpu": "250000000n", "memory": "2048Ki"}), "{nodes}");
    assert_eq!(nodes["items"][0]["metadata"]["labels"]["disk"], "ssd");
    let one = ask("GET", &format!("{group}/nodes/n"), Value::Null).await.expect("an answer");
    assert_eq!(one["kind"], "NodeMetrics");
    let listed = ask("GET", &format!("{group}/namespaces/default/pods"), Value::Null).await.expect("an answer");
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(1), "a pod that does not run uses nothing: {listed}");
    assert_eq!(
        listed["items"][0]["containers"][0],
        json!({"name": "c", "usage": {"cpu": "1000000n", "memory": "1024Ki"}})
    );
    let none = ask("GET", &format!("{group}/pods?labelSelector=app%3Dnew"), Value::Null).await.expect("an answer");
    assert_eq!(none["items"], json!([]));
    let missing = ask("GET", &format!("{group}/namespaces/default/pods/new"), Value::Null).await.expect_err("unknown");
    assert!(matches!(missing, kube::Error::Api(status) if status.code == 404));
    let service = ask("GET", "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.metrics.k8s.io", Value::Null).await;
    assert_eq!(service.expect("it is there")["status"]["conditions"][0]["status"], "True");
    let top = tokio::task::spawn_blocking(move || {
        std::process::Command::new(coracle_testkit::kubectl())
            .args(["top", "pods", "--no-headers"])
            .env("KUBECONFIG", &server.kubeconfig)
            .output()
            .expect("kubectl runs")
    });
    let top = top.await.expect("it ended");
    let text = String::from_utf8_lossy(&top.stdout).into_owned();
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["web", "1m", "1Mi"],
        "{}",
        String::from_utf8_lossy(&top.stderr)
    );
}

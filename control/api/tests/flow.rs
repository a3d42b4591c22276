//! Priority and fairness, and the metrics, of a real server.

mod common;

use common::Server;
use coracle_testkit::assert_eventually_async;
use serde_json::{Value, json};

const GROUP: &str = "/apis/flowcontrol.apiserver.k8s.io/v1";

async fn send(client: &kube::Client, user: &str, method: &str, path: &str, body: Value) -> http::Response<String> {
    let mut request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    if !user.is_empty() {
        request = request.header("impersonate-user", user).header("impersonate-group", "system:masters");
    }
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let response =
        client.send(request.body(kube::client::Body::from(body)).expect("a request")).await.expect("an answer");
    let (parts, body) = response.into_parts();
    let text = body.collect_bytes().await.expect("a body");
    http::Response::from_parts(parts, String::from_utf8_lossy(&text).into_owned())
}

fn uids(response: &http::Response<String>) -> [&str; 2] {
    ["x-kubernetes-pf-flowschema-uid", "x-kubernetes-pf-prioritylevel-uid"]
        .map(|name| response.headers().get(name).and_then(|uid| uid.to_str().ok()).unwrap_or_default())
}

async fn make(client: &kube::Client, resource: &str, object: Value) -> String {
    let made = send(client, "", "POST", &format!("{GROUP}/{resource}"), object).await;
    let made: Value = serde_json::from_str(made.body()).expect("JSON");
    made["metadata"]["uid"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
}

#[tokio::test]
async fn requests_are_classified_and_turned_away() {
    let server = Server::start().await;
    let client = server.client().await;
    let pods = "/api/v1/namespaces/default/pods";
    let exempt = send(&client, "", "GET", pods, Value::Null).await;
    assert!(uids(&exempt).iter().all(|uid| uid.len() == 36), "{exempt:?}");
    let level = |shares: u32| {
        json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "PriorityLevelConfiguration",
            "metadata": {"name": "small"}, "spec": {"type": "Limited", "limited": {"nominalConcurrencyShares": shares,
                "borrowingLimitPercent": 0, "limitResponse": {"type": "Reject"}}}})
    };
    let level_uid = make(&client, "prioritylevelconfigurations", level(5)).await;
    let rule = json!({"subjects": [{"kind": "User", "user": {"name": "noxu"}}],
        "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true}]});
    // Of equal precedence with `exempt`, which the user falls under, too: the name decides.
    let schema = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema", "metadata": {"name": "at-first"},
        "spec": {"matchingPrecedence": 1, "priorityLevelConfiguration": {"name": "small"},
            "distinguisherMethod": {"type": "ByUser"}, "rules": [rule]}});
    let schema_uid = make(&client, "flowschemas", schema).await;
    let wanted = [schema_uid.as_str(), level_uid.as_str()];
    assert_eventually_async!(
        20,
        uids(&send(&client, "noxu", "GET", pods, Value::Null).await) == wanted,
        "requests of noxu fall under its schema"
    );
    assert_eq!(uids(&send(&client, "", "GET", pods, Value::Null).await), uids(&exempt), "others are not concerned");
    // No share, nothing borrowed: no seat.
    send(&client, "", "PUT", &format!("{GROUP}/prioritylevelconfigurations/small"), level(0)).await;
    assert_eventually_async!(
        20,
        send(&client, "noxu", "GET", pods, Value::Null).await.status() == 429,
        "a level without seats turns requests away"
    );
    let refused = send(&client, "noxu", "GET", pods, Value::Null).await;
    assert_eq!((refused.headers()["retry-after"].as_bytes(), uids(&refused)), (&b"1"[..], wanted));
    let status: Value = serde_json::from_str(refused.body()).expect("JSON");
    assert_eq!((&status["kind"], &status["reason"]), (&json!("Status"), &json!("TooManyRequests")));
    assert_eq!(send(&client, "", "GET", pods, Value::Null).await.status(), 200);
    let metrics = send(&client, "", "GET", "/metrics", Value::Null).await.into_body();
    for line in [
        "apiserver_request_total{code=\"200\",component=\"apiserver\",dry_run=\"\",group=\"\",resource=\"pods\",scope=\"namespace\",subresource=\"\",verb=\"LIST\",version=\"v1\"} ",
        "apiserver_request_duration_seconds_bucket{component=\"apiserver\",",
        "apiserver_current_inflight_requests{request_kind=\"readOnly\"} ",
        "apiserver_flowcontrol_rejected_requests_total{component=\"apiserver\",flow_schema=\"at-first\",priority_level=\"small\",reason=\"concurrency-limit\"} ",
        "apiserver_flowcontrol_nominal_limit_seats{priority_level=\"small\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn built_in_rules_come_back_and_open_watches_are_counted() {
    let server = Server::start().await;
    let client = server.client().await;
    for resource in ["flowschemas/service-accounts", "prioritylevelconfigurations/workload-low"] {
        let path = format!("{GROUP}/{resource}");
        let deleted = send(&client, "", "DELETE", &path, Value::Null).await;
        assert_eq!(deleted.status(), 200, "{deleted:?}");
        assert_eventually_async!(
            20,
            send(&client, "", "GET", &path, Value::Null).await.status() == 200,
            "{resource} is there again"
        );
    }
    // What the server keeps has the server's spec again; what an administrator has taken over stays as it is.
    let path = format!("{GROUP}/flowschemas/service-accounts");
    let get = || async {
        let text = send(&client, "", "GET", &path, Value::Null).await.into_body();
        let mut schema = serde_json::from_str::<Value>(&text).expect("JSON");
        // Conditions are written at any time.
        schema["metadata"].as_object_mut().expect("metadata").remove("resourceVersion");
        schema
    };
    let precedence = |schema: &Value| schema["spec"]["matchingPrecedence"].as_i64();
    let mut schema = get().await;
    assert_eq!(precedence(&schema), Some(9000));
    schema["spec"]["matchingPrecedence"] = 8999.into();
    assert_eq!(send(&client, "", "PUT", &path, schema).await.status(), 200);
    assert_eventually_async!(20, precedence(&get().await) == Some(9000), "the server keeps it");
    let mut schema = get().await;
    schema["spec"]["matchingPrecedence"] = 8999.into();
    schema["metadata"]["annotations"]["apf.kubernetes.io/autoupdate-spec"] = "false".into();
    assert_eq!(send(&client, "", "PUT", &path, schema).await.status(), 200);
    // A change that comes after it has come back: so this one would have.
    let other = format!("{GROUP}/flowschemas/probes");
    assert_eq!(send(&client, "", "DELETE", &other, Value::Null).await.status(), 200);
    assert_eventually_async!(20, send(&client, "", "GET", &other, Value::Null).await.status() == 200, "it comes back");
    assert_eq!(precedence(&get().await), Some(8999));
    let open = || async {
        let metrics = send(&client, "", "GET", "/metrics", Value::Null).await.into_body();
        let of_secrets = |line: &&str| line.starts_with("apiserver_longrunning_requests") && line.contains("secrets");
        metrics.lines().find(of_secrets).and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok())
    };
    let watch = http::Request::get("/api/v1/secrets?watch=true").body(kube::client::Body::empty()).expect("a request");
    let watch = client.send(watch).await.expect("an answer");
    assert_eq!(open().await, Some(1));
    drop(watch);
    assert_eventually_async!(20, open().await == Some(0), "the watch has ended");
}

#[tokio::test]
async fn schemas_tell_whether_their_level_is_missing() {
    let server = Server::start().await;
    let client = server.client().await;
    let told = |name: &'static str| {
        let client = client.clone();
        async move {
            let text = send(&client, "", "GET", &format!("{GROUP}/flowschemas/{name}"), Value::Null).await.into_body();
            let schema: Value = serde_json::from_str(&text).expect("JSON");
            let condition = &schema["status"]["conditions"][0];
            [&condition["type"], &condition["status"], &condition["reason"]]
                .map(|text| text.as_str().unwrap_or("").to_owned())
        }
    };
    assert_eventually_async!(20, told("probes").await == ["Dangling", "False", "Found"], "its level is there");
    let schema = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema",
        "metadata": {"name": "lost"}, "spec": {"priorityLevelConfiguration": {"name": "nowhere"}}});
    assert_eq!(send(&client, "", "POST", &format!("{GROUP}/flowschemas"), schema).await.status(), 201);
    assert_eventually_async!(20, told("lost").await == ["Dangling", "True", "NotFound"], "its level is not there");
    let level = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "PriorityLevelConfiguration",
        "metadata": {"name": "nowhere"}, "spec": {"type": "Limited", "limited": {"nominalConcurrencyShares": 1,
            "limitResponse": {"type": "Reject"}}}});
    assert_eq!(send(&client, "", "POST", &format!("{GROUP}/prioritylevelconfigurations"), level).await.status(), 201);
    assert_eventually_async!(20, told("lost").await == ["Dangling", "False", "Found"], "its level is there");
}

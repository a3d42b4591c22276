//! Aggregated APIs: a service of the test's own serves a group version.

mod common;

use base64::Engine as _;
use common::Server;
use coracle_testkit::assert_eventually_async;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

async fn call(server: &Server, method: &str, path: &str, body: Value) -> (u16, Value) {
    let mut request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    if path == "/apis" {
        request = request.header("accept", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList");
    }
    // A client cannot speak in the place of the server.
    let request = request.header("x-remote-user", "mallory");
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let answer = server.client().await.send(request.body(body.into()).expect("a request")).await.expect("an answer");
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into()))
}

fn service(ca: &str) -> Value {
    json!({"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1alpha1.wardle.example.com"},
        "spec": {"group": "wardle.example.com", "version": "v1alpha1", "groupPriorityMinimum": 2000, "versionPriority": 200,
            "caBundle": base64::engine::general_purpose::STANDARD.encode(ca),
            "service": {"namespace": "default", "name": "sample", "port": 7443}}})
}

async fn condition(server: &Server) -> (String, String) {
    let (_, object) =
        call(server, "GET", "/apis/apiregistration.k8s.io/v1/apiservices/v1alpha1.wardle.example.com", Value::Null)
            .await;
    let of = |member: &str| {
        object.pointer(&format!("/status/conditions/0/{member}")).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    (of("status"), of("reason"))
}

#[tokio::test]
async fn a_service_serves_a_group_version() {
    let server = Server::start().await;
    let (code, map) = call(
        &server,
        "GET",
        "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication",
        Value::Null,
    )
    .await;
    assert_eq!((code, &map["data"]["requestheader-allowed-names"]), (200, &json!("[\"front-proxy-client\"]")));
    let proxy_ca = map["data"]["requestheader-client-ca-file"].as_str().expect("a CA").to_owned();
    let (url, ca) = common::https(&["sample.default.svc"], Some(&proxy_ca), |_, request| {
        let header = |name: &str| request.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        match request.uri.path() {
            "/apis/wardle.example.com/v1alpha1" => json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "wardle.example.com/v1alpha1",
                "resources": [{"name": "flunders", "singularName": "flunder", "namespaced": true, "kind": "Flunder", "verbs": ["get", "list"]},
                    {"name": "flunders/status", "singularName": "", "namespaced": true, "kind": "Flunder", "verbs": ["get"]}]}),
            "/apis/wardle.example.com/v1alpha1/namespaces/default/flunders" => json!({"user": header("x-remote-user"),
                "group": header("x-remote-group"), "authorization": header("authorization"), "query": request.uri.query()}),
            "/openapi/v2" => json!({"paths": {"/apis/wardle.example.com/v1alpha1/flunders": {}, "/apis/other/v1/x": {}},
                "definitions": {"com.example.wardle.v1alpha1.Flunder": {"type": "object"}}}),
            "/openapi/v3" => json!({"paths": {"apis/wardle.example.com/v1alpha1": {"serverRelativeURL": "/openapi/v3/apis/wardle.example.com/v1alpha1?hash=AB"}}}),
            "/openapi/v3/apis/wardle.example.com/v1alpha1" => json!({"openapi": "3.0.0"}),
            _ => Value::Null,
        }
    })
    .await;
    let services = "/apis/apiregistration.k8s.io/v1/apiservices";
    assert_eq!(call(&server, "POST", services, service(&ca)).await.0, 201);
    let missing = ("False".to_owned(), "ServiceNotFound".to_owned());
    assert_eventually_async!(10, condition(&server).await == missing, "the condition tells of the missing service");
    let flunders = "/apis/wardle.example.com/v1alpha1/namespaces/default/flunders";
    assert_eq!(call(&server, "GET", flunders, Value::Null).await.0, 503);
    let port: u16 = url.rsplit_once(':').expect("a port").1.parse().expect("a number");
    let front = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "sample"},
        "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}});
    assert_eq!(call(&server, "POST", "/api/v1/namespaces/default/services", front).await.0, 201);
    let patch = json!({"metadata": {"name": "v1alpha1.wardle.example.com"}, "spec": {"service": {"port": port}}});
    let client = server.client().await;
    let request = http::Request::patch(format!("{services}/v1alpha1.wardle.example.com"))
        .header("content-type", "application/merge-patch+json")
        .body(patch.to_string().into_bytes())
        .expect("a request");
    client.request::<Value>(request).await.expect("patched");
    let passed = ("True".to_owned(), "Passed".to_owned());
    assert_eventually_async!(10, condition(&server).await == passed, "the service is available");
    let (code, seen) = call(&server, "GET", &format!("{flunders}?limit=7"), Value::Null).await;
    assert_eq!(code, 200, "{seen}");
    assert_eq!(
        seen,
        json!({"user": "system:admin", "group": "system:masters", "authorization": "", "query": "limit=7"})
    );
    let (_, list) = call(&server, "GET", "/apis/wardle.example.com/v1alpha1", Value::Null).await;
    assert_eq!(list["resources"][0]["name"], "flunders");
    let (_, groups) = call(&server, "GET", "/apis", Value::Null).await;
    let group =
        groups["items"].as_array().expect("groups").iter().find(|g| g["metadata"]["name"] == "wardle.example.com");
    let version = &group.expect("the group")["versions"][0];
    assert_eq!(
        (&version["freshness"], &version["resources"][0]["subresources"][0]["subresource"]),
        (&json!("Current"), &json!("status"))
    );
    let (_, v2) = call(&server, "GET", "/openapi/v2", Value::Null).await;
    assert!(
        v2["paths"]["/apis/wardle.example.com/v1alpha1/flunders"].is_object()
            && v2["paths"]["/apis/other/v1/x"].is_null()
    );
    assert!(v2["definitions"]["com.example.wardle.v1alpha1.Flunder"].is_object());
    let (_, v3) = call(&server, "GET", "/openapi/v3", Value::Null).await;
    assert_eq!(
        v3["paths"]["apis/wardle.example.com/v1alpha1"]["serverRelativeURL"],
        "/openapi/v3/apis/wardle.example.com/v1alpha1?hash=AB"
    );
    assert_eq!(
        call(&server, "GET", "/openapi/v3/apis/wardle.example.com/v1alpha1", Value::Null).await.1["openapi"],
        "3.0.0"
    );
    // What is not theirs stays ours, and what was theirs is nobody's afterwards.
    assert_eq!(call(&server, "GET", "/apis/apps/v1", Value::Null).await.1["kind"], "APIResourceList");
    assert_eq!(call(&server, "DELETE", &format!("{services}/v1alpha1.wardle.example.com"), Value::Null).await.0, 200);
    assert_eventually_async!(10, call(&server, "GET", flunders, Value::Null).await.0 == 404, "nobody serves it");
}

#[tokio::test]
async fn custom_resources_have_their_apiservice() {
    let server = Server::start().await;
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "boats.example.com"},
        "spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": "boats", "kind": "Boat"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}}}]}});
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    assert_eq!(call(&server, "POST", definitions, definition).await.0, 201);
    let path = "/apis/apiregistration.k8s.io/v1/apiservices/v1.example.com";
    assert_eventually_async!(10, call(&server, "GET", path, Value::Null).await.0 == 200, "it comes");
    let (_, object) = call(&server, "GET", path, Value::Null).await;
    assert_eq!(object["status"]["conditions"][0]["reason"], "Local", "{object}");
    assert_eq!(call(&server, "DELETE", &format!("{definitions}/boats.example.com"), Value::Null).await.0, 200);
    assert_eventually_async!(10, call(&server, "GET", path, Value::Null).await.0 == 404, "it goes");
}

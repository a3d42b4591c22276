//! The request path as clients see it, over TLS and without a socket.

mod common;

use common::Server;
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

fn map(name: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name, "labels": {"n": name}}, "data": {"a": "1"}}))
        .expect("a ConfigMap")
}

async fn get(client: &kube::Client, path: &str, accept: &str) -> (u16, bytes::Bytes) {
    let request =
        http::Request::get(path).header("accept", accept).body(kube::client::Body::empty()).expect("a request");
    let response = client.send(request).await.expect("an answer");
    let code = response.status().as_u16();
    (code, response.into_body().collect_bytes().await.expect("a body"))
}

async fn json_of(client: &kube::Client, path: &str) -> (u16, Value) {
    let (code, bytes) = get(client, path, "application/json").await;
    (
        code,
        serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{path}: {e}: {}", String::from_utf8_lossy(&bytes))),
    )
}

#[tokio::test]
async fn objects_live_and_die() {
    let server = Server::start().await;
    for client in [server.client().await, server.api.client(coracle_api::user::UserInfo::apiserver())] {
        let maps: Api<ConfigMap> = Api::namespaced(client, "default");
        let made = maps.create(&PostParams::default(), &map("a")).await.expect("created");
        assert!(made.metadata.uid.is_some() && made.metadata.resource_version.is_some());
        let taken = maps.create(&PostParams::default(), &map("a")).await.expect_err("it is there");
        assert!(matches!(taken, kube::Error::Api(s) if s.code == 409 && s.reason == "AlreadyExists"));
        let merged = maps
            .patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"b": "2"}})))
            .await
            .expect("patched");
        assert_eq!(merged.data.as_ref().map(|d| d.len()), Some(2));
        let stale = maps.replace("a", &PostParams::default(), &made).await.expect_err("it is stale");
        assert!(matches!(stale, kube::Error::Api(s) if s.code == 409 && s.reason == "Conflict"));
        let same = maps
            .patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"b": "2"}})))
            .await
            .expect("patched");
        assert_eq!(
            same.metadata.resource_version, merged.metadata.resource_version,
            "a patch that changes nothing writes nothing"
        );
        let apply = Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"c": "3"}}));
        let applied = maps.patch("a", &PatchParams::apply("me"), &apply).await.expect("applied");
        let managers: Vec<_> =
            applied.metadata.managed_fields.iter().flatten().filter_map(|m| m.manager.clone()).collect();
        assert!(managers.contains(&"me".into()), "{managers:?}");
        maps.delete("a", &DeleteParams::default()).await.expect("deleted");
        assert!(maps.get_opt("a").await.expect("an answer").is_none());
    }
}

#[tokio::test]
async fn lists_come_in_pages_and_selections() {
    let server = Server::start().await;
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    for n in 0..5 {
        maps.create(&PostParams::default(), &map(&format!("m{n}"))).await.expect("created");
    }
    let page = maps.list(&ListParams::default().limit(2)).await.expect("a page");
    assert_eq!((page.items.len(), page.metadata.remaining_item_count), (2, Some(3)));
    maps.create(&PostParams::default(), &map("m9")).await.expect("created");
    let token = page.metadata.continue_.expect("a token");
    let rest = maps.list(&ListParams::default().continue_token(&token)).await.expect("the rest");
    let names: Vec<_> = rest.items.iter().filter_map(|m| m.metadata.name.as_deref()).collect();
    assert_eq!(names, ["m2", "m3", "m4"], "a list is of one revision");
    for selector in ["n in (m1, m3)", "n=m1", "!n", "n notin (m0),n"] {
        let got = maps.list(&ListParams::default().labels(selector)).await.expect("a list").items.len();
        assert_eq!(
            got,
            match selector {
                "n=m1" => 1,
                "!n" => 0,
                "n notin (m0),n" => 5,
                _ => 2,
            },
            "{selector}"
        );
    }
    let one = maps.list(&ListParams::default().fields("metadata.name=m3")).await.expect("a list");
    assert_eq!(one.items.len(), 1);
}

#[tokio::test]
async fn what_is_compacted_is_gone_and_a_list_may_go_on_at_the_newest() {
    let server = Server::start().await;
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    for n in 0..4 {
        maps.create(&PostParams::default(), &map(&format!("m{n}"))).await.expect("created");
    }
    let page = maps.list(&ListParams::default().limit(2)).await.expect("a page");
    let (old, token) = (page.metadata.resource_version.expect("a version"), page.metadata.continue_.expect("a token"));
    maps.delete("m2", &DeleteParams::default()).await.expect("deleted");
    maps.create(&PostParams::default(), &map("m9")).await.expect("created");
    let newest = server.api.store.revision().await.expect("a revision");
    server.api.store.compact(newest).await.expect("compacted");
    let get = async |query: &str| json_of(&client, &format!("/api/v1/namespaces/default/configmaps?{query}")).await;
    let (code, status) = get(&format!("limit=2&continue={token}")).await;
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")), "{status}");
    let token = status["metadata"]["continue"].as_str().expect("a token for the rest as it is now");
    let (code, rest) = get(&format!("continue={token}")).await;
    let items = rest["items"].as_array().expect("items");
    let names: Vec<_> = items.iter().filter_map(|item| item["metadata"]["name"].as_str()).collect();
    assert_eq!((code, names), (200, vec!["m3", "m9"]));
    let version: u64 =
        rest["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse().ok()).expect("a version");
    assert!(version >= newest, "{version} is before {newest}");
    let (code, status) = get(&format!("resourceVersion={old}&resourceVersionMatch=Exact")).await;
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")), "{status}");
    // A watch says so in its stream, and ends.
    let (code, event) = get(&format!("watch=true&resourceVersion={old}")).await;
    assert_eq!((code, &event["type"], &event["object"]["code"]), (200, &json!("ERROR"), &json!(410)), "{event}");
}

#[tokio::test]
async fn field_selectors_name_fields_of_the_version_asked_for() {
    let server = Server::start().await;
    let client = server.client().await;
    let path = "/apis/events.k8s.io/v1/namespaces/default/events";
    for (name, controller) in [("a", "mine"), ("b", "other")] {
        let event = json!({"metadata": {"name": name}, "regarding": {"namespace": "default", "kind": "Pod"}, "action": "Do",
            "eventTime": "2026-01-01T00:00:00.000000Z", "reason": "Test", "type": "Normal", "note": "n",
            "reportingController": controller, "reportingInstance": "i"});
        let request = http::Request::post(path).header("content-type", "application/json");
        let made: Value = client
            .request(request.body(serde_json::to_vec(&event).expect("JSON")).expect("a request"))
            .await
            .expect("an event");
        assert_eq!(made["reportingController"], controller);
    }
    for (selector, count) in [
        ("reportingController=mine", 1),
        ("reportingController!=mine,regarding.kind=Pod", 1),
        ("regarding.kind=Node", 0),
    ] {
        let (_, list) = json_of(&client, &format!("{path}?fieldSelector={selector}")).await;
        assert_eq!(list["items"].as_array().map(Vec::len), Some(count), "{selector}");
    }
    let (_, list) = json_of(&client, "/api/v1/namespaces/default/events?fieldSelector=source=mine").await;
    assert_eq!(list["items"].as_array().map(Vec::len), Some(1));
    let request =
        http::Request::get(format!("{path}?watch=1&fieldSelector=reportingController=other&timeoutSeconds=20"));
    let mut lines =
        client.request_stream(request.body(Vec::new()).expect("a request")).await.expect("a stream").lines();
    let first: Value = serde_json::from_str(&lines.try_next().await.expect("a line").expect("a line")).expect("JSON");
    assert_eq!(first["object"]["metadata"]["name"], "b");
}

#[tokio::test]
async fn nodes_register_with_their_status() {
    let server = Server::start().await;
    let nodes: Api<Node> = Api::all(server.client().await);
    let ready = json!({"type": "Ready", "status": "True", "reason": "Registered", "message": "here"});
    let node = json!({"metadata": {"name": "n"}, "status": {"capacity": {"cpu": "2"}, "conditions": [ready]}});
    nodes.create(&PostParams::default(), &serde_json::from_value(node).expect("a node")).await.expect("created");
    let status = nodes.get("n").await.expect("a node").status.expect("a status");
    assert_eq!(status.conditions.expect("conditions")[0].reason.as_deref(), Some("Registered"));
    assert_eq!(status.allocatable.expect("what pods can have")["cpu"].0, "2");
}

#[tokio::test]
async fn watches_have_initial_events_and_no_gap() {
    let server = Server::start().await;
    let client = server.client().await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    maps.create(&PostParams::default(), &map("old")).await.expect("created");
    let path = "/api/v1/namespaces/default/configmaps?watch=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=20";
    let request = http::Request::get(path).body(Vec::new()).expect("a request");
    let mut lines = client.request_stream(request).await.expect("a stream").lines();
    let mut next = async || -> Value {
        serde_json::from_str(&lines.try_next().await.expect("a line").expect("a line")).expect("JSON")
    };
    let first = next().await;
    assert_eq!((first["type"].as_str(), first["object"]["metadata"]["name"].as_str()), (Some("ADDED"), Some("old")));
    let bookmark = next().await;
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    maps.patch("old", &PatchParams::default(), &Patch::Merge(json!({"data": {"b": "2"}}))).await.expect("patched");
    maps.delete("old", &DeleteParams::default()).await.expect("deleted");
    let (modified, deleted) = (next().await, next().await);
    assert_eq!((modified["type"].as_str(), deleted["type"].as_str()), (Some("MODIFIED"), Some("DELETED")));
    let version =
        |event: &Value| event["object"]["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse::<u64>().ok());
    assert!(version(&deleted) > version(&modified), "a deletion has a revision of its own");
    let events = "/api/v1/namespaces/default/configmaps?watch=1&resourceVersion=1&timeoutSeconds=1";
    let (_, body) = get(&client, events, "application/json").await;
    assert!(
        body.starts_with(b"{\"type\":\"ADDED\"") || body.starts_with(b"{\"type\":\"ERROR\""),
        "{}",
        String::from_utf8_lossy(&body)
    );
}

#[tokio::test]
async fn pods_are_scaled_bound_and_evicted() {
    let server = Server::start().await;
    let client = server.client().await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"generateName": "p-"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}),
    )
    .expect("a pod");
    let made = pods.create(&PostParams::default(), &pod).await.expect("created");
    let name = made.metadata.name.expect("a name");
    assert!(name.starts_with("p-") && name.len() == 7, "{name}");
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"kind": "Node", "name": "n1"}});
    let path = format!("/api/v1/namespaces/default/pods/{name}/binding");
    let post = |path: &str, body: &Value| {
        http::Request::post(path)
            .header("content-type", "application/json")
            .body(body.to_string().into_bytes())
            .expect("a request")
    };
    let _: Value = client.request(post(&path, &binding)).await.expect("bound");
    let bound = pods.get(&name).await.expect("the pod");
    assert_eq!(bound.spec.expect("a spec").node_name.as_deref(), Some("n1"));
    let again = client.request::<Value>(post(&path, &binding)).await.expect_err("bound already");
    assert!(matches!(again, kube::Error::Api(s) if s.code == 409));
    let log = get(&client, &format!("/api/v1/namespaces/default/pods/{name}/log?tailLines=3"), "*/*").await;
    assert_eq!(log.1, format!("/containerLogs/default/{name}/c?tailLines=3"));
    let uid = made.metadata.uid.expect("a uid");
    let eviction = |uid: &str, revision: &Option<String>| {
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name},
            "deleteOptions": {"preconditions": {"uid": uid, "resourceVersion": revision}}})
    };
    let path = format!("/api/v1/namespaces/default/pods/{name}/eviction");
    let revision = pods.get(&name).await.expect("the pod").metadata.resource_version;
    client.request::<Value>(post(&path, &eviction("other", &None))).await.expect_err("another pod is meant");
    let _: Value = client.request(post(&path, &eviction(&uid, &revision))).await.expect("evicted");
    let evicted = pods.get(&name).await.expect("it waits for its grace period");
    assert_eq!(evicted.metadata.deletion_grace_period_seconds, Some(30));
    let conditions = evicted.status.and_then(|status| status.conditions).expect("conditions");
    let target = conditions.iter().find(|condition| condition.type_ == "DisruptionTarget").expect("it says why");
    assert_eq!((target.status.as_str(), target.reason.as_deref()), ("True", Some("EvictionByEvictionAPI")));
    pods.delete(&name, &DeleteParams::default().grace_period(0)).await.expect("deleted");
    assert!(pods.get_opt(&name).await.expect("an answer").is_none());
    let deployments: Api<Deployment> = Api::namespaced(client, "default");
    let deployment: Deployment = serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})).expect("a deployment");
    deployments.create(&PostParams::default(), &deployment).await.expect("created");
    let scale = deployments
        .patch_scale("d", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 3}})))
        .await
        .expect("scaled");
    assert_eq!(scale.spec.and_then(|s| s.replicas), Some(3));
    assert_eq!(deployments.get("d").await.expect("it").metadata.generation, Some(2));
}

#[tokio::test]
async fn upgrades_pass_byte_for_byte() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::start().await;
    let client = server.client().await;
    let pods: Api<Pod> = Api::namespaced(client, "default");
    let pod =
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}});
    pods.create(&PostParams::default(), &serde_json::from_value(pod).expect("a pod")).await.expect("created");
    let admin = server.api.pki.admin().expect("an identity");
    let (certs, key) = admin.rustls().expect("readable");
    let mut roots = rustls::RootCertStore::empty();
    for cert in rustls_pki_types::pem::PemObject::pem_slice_iter(server.api.pki.ca_pem.as_bytes()) {
        roots.add(cert.expect("a certificate")).expect("a root");
    }
    let tls =
        rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(certs, key)
            .expect("a client");
    let socket = tokio::net::TcpStream::connect(server.url.trim_start_matches("https://")).await.expect("connected");
    let name = rustls_pki_types::ServerName::try_from("localhost").expect("a name");
    let mut stream =
        tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls)).connect(name, socket).await.expect("TLS");
    let head = "POST /api/v1/namespaces/default/pods/p/exec?command=sh&stdin=true HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("a byte"));
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    stream.write_all(b"\x80\x03\x00\x01 any bytes \xff").await.expect("sent");
    let mut echo = [0; 16];
    stream.read_exact(&mut echo).await.expect("echoed");
    assert_eq!(&echo, b"\x80\x03\x00\x01 any bytes \xff");
}

#[tokio::test]
async fn tokens_tell_who_somebody_is() {
    let server = Server::start().await;
    let client = server.client().await;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let account = serde_json::from_value(json!({"metadata": {"name": "robot"}})).expect("an account");
    accounts.create(&PostParams::default(), &account).await.expect("created");
    let request =
        serde_json::from_value(json!({"spec": {"audiences": [], "expirationSeconds": 600}})).expect("a request");
    let answer = accounts.create_token_request("robot", &PostParams::default(), &request).await.expect("a token");
    let token = answer.status.expect("a status").token.expect("a token");
    let robot = server
        .client_with(|config| {
            config.auth_info = kube::config::AuthInfo { token: Some(token.clone().into()), ..Default::default() };
        })
        .await;
    let forbidden = Api::<Namespace>::all(robot.clone()).list(&ListParams::default()).await.expect_err("it may not");
    assert!(
        matches!(&forbidden, kube::Error::Api(s) if s.message == "namespaces is forbidden: User \"system:serviceaccount:default:robot\" cannot list resource \"namespaces\" in API group \"\" at the cluster scope"),
        "{forbidden}"
    );
    let reviewed = async |token: &str| -> Value {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        let post = http::Request::post("/apis/authentication.k8s.io/v1/tokenreviews")
            .header("content-type", "application/json")
            .body(review.to_string().into_bytes())
            .expect("a request");
        client.request(post).await.expect("reviewed")
    };
    // The second time the signature is remembered; that does not make a forged one good, nor other claims under it.
    for _ in 0..2 {
        assert_eq!(reviewed(&token).await["status"]["user"]["username"], "system:serviceaccount:default:robot");
        let (signed, signature) = token.rsplit_once('.').expect("three parts");
        let (header, claims) = signed.split_once('.').expect("three parts");
        let swap =
            |part: &str| if part.starts_with('A') { part.replacen('A', "B", 1) } else { format!("A{}", &part[1..]) };
        for forged in [format!("{signed}.{}", swap(signature)), format!("{header}.{}.{signature}", swap(claims))] {
            assert_ne!(reviewed(&forged).await["status"]["authenticated"], true, "{forged}");
        }
    }
    accounts.delete("robot", &DeleteParams::default()).await.expect("deleted");
    let gone = Api::<Namespace>::all(robot).list(&ListParams::default()).await.expect_err("its account is gone");
    assert!(matches!(gone, kube::Error::Api(s) if s.code == 401));
    let (_, keys) = json_of(&client, "/openid/v1/jwks").await;
    assert_eq!(keys["keys"][0]["kty"], "EC");
}

#[tokio::test]
async fn documents_have_forms_and_tags() {
    let server = Server::start().await;
    let client = server.client().await;
    Api::<ConfigMap>::namespaced(client.clone(), "default")
        .create(&PostParams::default(), &map("a"))
        .await
        .expect("created");
    let path = "/api/v1/namespaces/default/configmaps/a";
    let (_, protobuf) = get(&client, path, "application/vnd.kubernetes.protobuf").await;
    assert!(protobuf.starts_with(b"k8s\0"));
    let (_, yaml) = get(&client, path, "application/yaml").await;
    assert!(String::from_utf8_lossy(&yaml).contains("kind: ConfigMap"));
    let (_, table) = get(&client, path, "application/json;as=Table;v=v1;g=meta.k8s.io").await;
    let table: Value = serde_json::from_slice(&table).expect("JSON");
    assert_eq!(table["rows"][0]["cells"][1], "1");
    assert_eq!(get(&client, path, "text/html").await.0, 406);
    let (code, groups) = json_of(&client, "/apis").await;
    assert_eq!((code, groups["kind"].as_str()), (200, Some("APIGroupList")));
    let (_, aggregated) =
        get(&client, "/apis", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList").await;
    let aggregated: Value = serde_json::from_slice(&aggregated).expect("JSON");
    assert_eq!(aggregated["kind"], "APIGroupDiscoveryList");
    let document = client
        .send(http::Request::get("/openapi/v3/apis/apps/v1").body(kube::client::Body::empty()).expect("a request"))
        .await
        .expect("an answer");
    let tag = document.headers()["etag"].clone();
    let again = http::Request::get("/openapi/v3/apis/apps/v1")
        .header("if-none-match", tag)
        .body(kube::client::Body::empty())
        .expect("a request");
    assert_eq!(client.send(again).await.expect("an answer").status(), 304);
    let anonymous = server.client_with(|config| config.auth_info = Default::default()).await;
    assert_eq!(get(&anonymous, "/readyz", "*/*").await.0, 200);
    assert_eq!(get(&anonymous, "/api/v1/pods", "*/*").await.0, 403);
}

#[tokio::test]
async fn bad_bodies_get_a_status() {
    let server = Server::start().await;
    let client = server.client().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let send = async |body: Vec<u8>, kind: &'static str| {
        let request = http::Request::post(path)
            .header("content-type", kind)
            .body(kube::client::Body::from(body))
            .expect("a request");
        client.send(request).await.expect("an answer").status().as_u16()
    };
    assert_eq!(send(vec![b' '; 4 << 20], "application/json").await, 413);
    assert_eq!(send(b"[".repeat(100_000), "application/json").await, 400);
    assert_eq!(
        send(b"{\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"\xff\"}}".to_vec(), "application/json").await,
        422
    );
    assert_eq!(send(b"a: &a [*a, *a]".to_vec(), "application/yaml").await / 100, 4);
    assert_eq!(send(b"k8s\0\xff\xff\xff".to_vec(), "application/vnd.kubernetes.protobuf").await, 400);
    assert_eq!(send(b"x".to_vec(), "text/plain").await, 415);
}

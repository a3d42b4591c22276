//! As much of an API server as volumes and the node's API ask: objects by name with watches, tokens, reviews.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::client::Body as ClientBody;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

/// A fake API server.
#[derive(Clone)]
pub(crate) struct FakeApi(Arc<Inner>);

struct Inner {
    /// By `<resource>/<namespace>/<name>`.
    objects: Mutex<(u64, BTreeMap<String, Value>)>,
    events: broadcast::Sender<(String, Value)>,
    tokens: Mutex<u64>,
}

impl FakeApi {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            objects: Mutex::default(),
            events: broadcast::channel(1000).0,
            tokens: Mutex::default(),
        }))
    }

    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<ClientBody>| {
            let api = api.clone();
            async move { Ok::<_, std::convert::Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Creates or replaces an object.
    pub(crate) fn put(&self, resource: &str, namespace: &str, name: &str, mut object: Value) {
        let key = format!("{resource}/{namespace}/{name}");
        let mut objects = self.0.objects.lock().expect("lock");
        objects.0 += 1;
        object["metadata"] =
            json!({ "name": name, "namespace": namespace, "uid": key, "resourceVersion": objects.0.to_string() });
        let kind = if objects.1.insert(key.clone(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        // Nobody may be watching.
        let _heard = self.0.events.send((key, json!({ "type": kind, "object": object })));
    }

    pub(crate) fn tokens_issued(&self) -> u64 {
        *self.0.tokens.lock().expect("lock")
    }

    async fn answer(&self, request: Request<ClientBody>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let segments: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
        let json = |value: Value| {
            Response::builder()
                .header("content-type", "application/json")
                .body(Body::from(value.to_string()))
                .expect("response")
        };
        match (&parts.method, segments.as_slice()) {
            (&Method::POST, ["api", "v1", "namespaces", _, "serviceaccounts", account, "token"]) => {
                let asked: Value =
                    serde_json::from_slice(&body.collect().await.expect("body").to_bytes()).expect("JSON");
                let mut tokens = self.0.tokens.lock().expect("lock");
                *tokens += 1;
                let seconds = asked["spec"]["expirationSeconds"].as_i64().expect("seconds");
                let end = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + seconds).expect("time");
                let token = format!(
                    "{account}-{}-{}",
                    asked["spec"]["boundObjectRef"]["name"].as_str().expect("bound"),
                    *tokens
                );
                json(json!({
                    "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {}, "spec": asked["spec"],
                    "status": { "token": token, "expirationTimestamp": end.to_string() },
                }))
            }
            (&Method::POST, ["apis", "authentication.k8s.io", "v1", "tokenreviews"]) => {
                let asked: Value =
                    serde_json::from_slice(&body.collect().await.expect("body").to_bytes()).expect("JSON");
                let token = asked["spec"]["token"].as_str().expect("token");
                let known = ["admin", "reader"].contains(&token);
                json(json!({
                    "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {},
                    "status": { "authenticated": known, "user": { "username": if known { token } else { "" } } },
                }))
            }
            (&Method::POST, ["apis", "authorization.k8s.io", "v1", "subjectaccessreviews"]) => {
                let asked: Value =
                    serde_json::from_slice(&body.collect().await.expect("body").to_bytes()).expect("JSON");
                let (user, attributes) = (&asked["spec"]["user"], &asked["spec"]["resourceAttributes"]);
                assert_eq!((&attributes["resource"], &attributes["name"]), (&json!("nodes"), &json!("node-1")));
                let allowed = user == "admin"
                    || user == "system:apiserver"
                    || (user == "reader" && attributes["subresource"] == "metrics");
                json(json!({
                    "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {}, "spec": {},
                    "status": { "allowed": allowed },
                }))
            }
            (&Method::GET, ["api", "v1", "namespaces", namespace, resource]) => {
                let name = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"))
                    .expect("by name");
                let key = format!("{resource}/{namespace}/{name}");
                if query.contains("watch=true") {
                    let events = BroadcastStream::new(self.0.events.subscribe());
                    // What changed between list and watch counts as well.
                    let since: u64 = query
                        .split('&')
                        .find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok())
                        .unwrap_or(0);
                    let missed = self.0.objects.lock().expect("lock").1.get(&key).cloned().filter(|object| {
                        object["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse::<u64>().ok())
                            > Some(since)
                    });
                    let missed = missed.map(|object| json!({ "type": "MODIFIED", "object": object }));
                    let lines = futures::stream::iter(missed)
                        .chain(events.filter_map(move |event| {
                            let found = event.ok().filter(|(changed, _)| *changed == key).map(|(_, event)| event);
                            std::future::ready(found)
                        }))
                        .map(|event| Ok::<_, std::convert::Infallible>(format!("{event}\n")));
                    return Response::builder()
                        .header("content-type", "application/json")
                        .body(Body::from_stream(lines))
                        .expect("response");
                }
                let objects = self.0.objects.lock().expect("lock");
                let items: Vec<Value> = objects.1.get(&key).cloned().into_iter().collect();
                json(
                    json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": objects.0.to_string() }, "items": items }),
                )
            }
            (&Method::GET, path @ (["api", "v1", ..] | ["apis", "storage.k8s.io", "v1", ..])) => {
                let key = match path {
                    [_, _, "namespaces", namespace, resource, name] => format!("{resource}/{namespace}/{name}"),
                    [_, _, resource, name] | [_, _, _, resource, name] => format!("{resource}//{name}"),
                    _ => panic!("unexpected path {path:?}"),
                };
                match self.0.objects.lock().expect("lock").1.get(&key) {
                    Some(object) => json(object.clone()),
                    None => Response::builder()
                        .status(404)
                        .header("content-type", "application/json")
                        .body(Body::from(json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "NotFound", "code": 404, "message": "not found" }).to_string()))
                        .expect("response"),
                }
            }
            other => panic!("unexpected request {other:?}"),
        }
    }
}

//! An API server that is not there: pods with a watch, their statuses and ends; answers are lost now and then.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures::StreamExt as _;
use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use kube::client::Body as ClientBody;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Random;

struct State {
    random: Random,
    faulty: bool,
    pods: Vec<Value>,
    /// Every change; its index is its version.
    changes: Vec<Value>,
}

#[derive(Clone)]
pub(super) struct Api(Arc<(Mutex<State>, watch::Sender<usize>)>);

fn answer(code: u16, value: &Value) -> Response<Body> {
    let response = Response::builder().status(code).header("content-type", "application/json");
    response.body(Body::from(value.to_string())).expect("a response")
}

fn refusal(code: u16) -> Response<Body> {
    let reason = if code == 404 { "NotFound" } else { "InternalError" };
    answer(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason, "message": reason}),
    )
}

/// A strategic merge as far as a pod's status needs it: conditions by type, other lists whole.
fn merge(into: &mut Value, patch: &Value) {
    let (Some(held), Some(patch)) = (into.as_object_mut(), patch.as_object()) else {
        *into = patch.clone();
        return;
    };
    for (key, value) in patch {
        match value {
            Value::Null => drop(held.remove(key)),
            Value::Object(_) => merge(held.entry(key.clone()).or_insert(json!({})), value),
            Value::Array(items) if key == "conditions" => {
                let list = held.entry(key.clone()).or_insert(json!([])).as_array_mut().expect("a list");
                for item in items {
                    list.retain(|known| known["type"] != item["type"]);
                    if item.get("$patch").is_none() {
                        list.push(item.clone());
                    }
                }
            }
            Value::Array(items) => {
                let items = items.iter().filter(|item| item.get("$patch").is_none());
                held.insert(key.clone(), items.cloned().collect());
            }
            _ => drop(held.insert(key.clone(), value.clone())),
        }
    }
}

impl State {
    fn change(&mut self, kind: &str, name: &str) -> Value {
        let index = self.pods.iter().position(|pod| pod["metadata"]["name"] == name).expect("a pod");
        let version = (self.changes.len() + 1).to_string();
        self.pods[index]["metadata"]["resourceVersion"] = json!(version);
        let pod = if kind == "DELETED" { self.pods.remove(index) } else { self.pods[index].clone() };
        self.changes.push(json!({"type": kind, "object": pod}));
        pod
    }

    fn find(&mut self, name: &str) -> Option<&mut Value> {
        self.pods.iter_mut().find(|pod| pod["metadata"]["name"] == name)
    }
}

impl Api {
    pub(super) fn new(seed: u64) -> Self {
        let state = State { random: Random(seed), faulty: true, pods: Vec::new(), changes: Vec::new() };
        Self(Arc::new((Mutex::new(state), watch::Sender::new(0))))
    }

    pub(super) fn heal(&self) {
        self.0.0.lock().faulty = false;
    }

    pub(super) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<ClientBody>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    pub(super) fn create(&self, pod: Value) {
        let name = pod["metadata"]["name"].as_str().expect("a name").to_owned();
        self.changed(|state| {
            state.pods.push(pod);
            state.change("ADDED", &name);
        });
    }

    /// What somebody who deletes a pod brings about.
    pub(super) fn delete(&self, name: &str, grace: i64) {
        self.changed(|state| {
            let Some(pod) = state.find(name) else { return };
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            state.change("MODIFIED", name);
        });
    }

    pub(super) fn pod(&self, name: &str) -> Option<Value> {
        self.0.0.lock().find(name).cloned()
    }

    fn changed<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (outcome, length) = {
            let mut state = self.0.0.lock();
            let outcome = change(&mut state);
            (outcome, state.changes.len())
        };
        self.0.1.send_replace(length);
        outcome
    }

    async fn answer(&self, request: Request<ClientBody>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (pause, fate) = {
            let mut state = self.0.0.lock();
            let fate = if state.faulty { state.random.below(12) } else { u64::MAX };
            (state.random.below(20), fate)
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if fate == 0 {
            return refusal(500);
        }
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let path: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
        let answered = match (&parts.method, &path[..]) {
            (&Method::GET, ["api", "v1", "pods"]) => self.pods(&query),
            (&Method::PATCH, [_, _, _, _, "pods", name, "status"]) => self.patch(name, &body),
            (&Method::DELETE, [_, _, _, _, "pods", name]) => self.remove(name, &body),
            (&Method::GET, _) => refusal(404),
            // Events.
            _ => answer(201, &body),
        };
        if fate == 1 { refusal(500) } else { answered }
    }

    fn pods(&self, query: &str) -> Response<Body> {
        let since = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse::<usize>().ok());
        if !query.contains("watch=") {
            let state = self.0.0.lock();
            let version = state.changes.len().to_string();
            return answer(
                200,
                &json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": state.pods}),
            );
        }
        let lines = futures::stream::unfold((self.clone(), since.unwrap_or(0)), |(api, seen)| async move {
            let mut versions = api.0.1.subscribe();
            versions.wait_for(|version| *version > seen).await.ok()?;
            let line = format!("{}\n", api.0.0.lock().changes[seen]);
            Some((Ok::<_, Infallible>(line), (api, seen + 1)))
        });
        let response = Response::builder().header("content-type", "application/json");
        response.body(Body::from_stream(lines.boxed())).expect("a response")
    }

    fn patch(&self, name: &str, patch: &Value) -> Response<Body> {
        self.changed(|state| {
            let Some(pod) = state.find(name) else { return refusal(404) };
            if pod["metadata"]["uid"] != patch["metadata"]["uid"] {
                return refusal(409);
            }
            merge(&mut pod["status"], &patch["status"]);
            answer(200, &state.change("MODIFIED", name))
        })
    }

    fn remove(&self, name: &str, options: &Value) -> Response<Body> {
        self.changed(|state| {
            let Some(pod) = state.find(name) else { return refusal(404) };
            if pod["metadata"]["uid"] != options["preconditions"]["uid"] {
                return refusal(409);
            }
            answer(200, &state.change("DELETED", name))
        })
    }
}

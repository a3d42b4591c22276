//! `/pods`, `/runningpods`, `/configz`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::containers::Refused;
use super::router::Node;
use crate::cri::ContainerState;

/// `GET /pods`: a PodList as the node knows it.
pub(super) async fn pods(State(node): State<Arc<Node>>) -> Json<Value> {
    let items: Vec<_> = node.state.pods();
    Json(json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items }))
}

/// `GET /runningpods/`: what the runtime has, whatever the API says.
pub(super) async fn running(State(node): State<Arc<Node>>) -> Result<Json<Value>, Refused> {
    let containers = node.state.runtime().list_containers().await.map_err(Refused::internal)?;
    let mut pods = std::collections::BTreeMap::<_, Vec<Value>>::new();
    for container in containers.into_iter().filter(|container| container.state == ContainerState::Running) {
        let entry = json!({ "name": container.config.name, "image": container.config.image, "resources": {} });
        pods.entry(container.pod).or_default().push(entry);
    }
    let items: Vec<Value> = pods
        .into_iter()
        .map(|(key, containers)| {
            json!({
                "metadata": { "name": key.name, "namespace": key.namespace, "uid": key.uid },
                "spec": { "containers": containers },
                "status": {},
            })
        })
        .collect();
    Ok(Json(json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items })))
}

/// `GET /configz`
pub(super) async fn configz(State(node): State<Arc<Node>>) -> Json<Value> {
    Json(node.state.configz())
}

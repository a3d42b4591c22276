//! What the API knows of the drivers of a node: its CSINode, labels for topology, and an annotation.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::Mutex;

use super::api::NodeGetInfoResponse;

/// Names of the node as drivers know it, as JSON.
const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";
/// Tries of a change that others' changes cross.
const TRIES: usize = 10;
/// Pause before the CSINode is tried again.
const RETRY: Duration = Duration::from_secs(5);

pub(super) struct NodeObjects {
    client: Client,
    node: String,
    /// Changes take turns.
    turn: Mutex<()>,
}

impl NodeObjects {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.to_owned(), turn: Mutex::default() }
    }

    pub(super) async fn announce(&self) {
        while let Err(error) = self.change(|_| {}).await {
            tracing::warn!(%error, "the node's CSINode is not made yet");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Tells of a driver.
    pub(super) async fn add(&self, driver: &str, info: &NodeGetInfoResponse) -> Result<(), kube::Error> {
        let segments = info.accessible_topology.as_ref().map(|topology| &topology.segments);
        let labels = segments.cloned().unwrap_or_default();
        self.annotate(driver, Some(&info.node_id), json!(labels)).await?;
        let limit = i32::try_from(info.max_volumes_per_node).unwrap_or(i32::MAX);
        let entry = CSINodeDriver {
            name: driver.to_owned(),
            node_id: info.node_id.clone(),
            topology_keys: Some(labels.into_keys().collect()),
            allocatable: (limit > 0).then_some(VolumeNodeResources { count: Some(limit) }),
        };
        self.change(|drivers| {
            drivers.retain(|known| known.name != driver);
            drivers.push(entry.clone());
        })
        .await
    }

    /// Forgets a driver; labels stay, as volumes may still name them.
    pub(super) async fn remove(&self, driver: &str) -> Result<(), kube::Error> {
        self.change(|drivers| drivers.retain(|known| known.name != driver)).await?;
        self.annotate(driver, None, json!({})).await
    }

    async fn annotate(&self, driver: &str, id: Option<&str>, labels: serde_json::Value) -> Result<(), kube::Error> {
        let _turn = self.turn.lock().await;
        let api: Api<Node> = Api::all(self.client.clone());
        let mut tries = 0;
        loop {
            let node = api.get(&self.node).await?;
            let held = node.annotations().get(NODE_IDS).map(String::as_str).unwrap_or("{}");
            let mut ids: serde_json::Map<String, serde_json::Value> = serde_json::from_str(held).unwrap_or_default();
            match id {
                Some(id) => drop(ids.insert(driver.to_owned(), id.into())),
                None => drop(ids.remove(driver)),
            }
            let value = if ids.is_empty() { json!(null) } else { json!(json!(ids).to_string()) };
            let patch = json!({"metadata": {
                "resourceVersion": node.resource_version(), "labels": labels, "annotations": {NODE_IDS: value},
            }});
            tries += 1;
            match api.patch(&self.node, &PatchParams::default(), &Patch::Merge(patch)).await {
                Err(error) if is_conflict(&error) && tries < TRIES => {}
                other => return other.map(drop),
            }
        }
    }

    async fn change(&self, change: impl Fn(&mut Vec<CSINodeDriver>)) -> Result<(), kube::Error> {
        let _turn = self.turn.lock().await;
        let api: Api<CSINode> = Api::all(self.client.clone());
        let mut tries = 0;
        loop {
            let known = api.get_opt(&self.node).await?;
            let mut object = match &known {
                Some(object) => object.clone(),
                None => self.first().await?,
            };
            change(&mut object.spec.drivers);
            tries += 1;
            let outcome = match &known {
                Some(known) if known.spec == object.spec => return Ok(()),
                Some(_) => api.replace(&self.node, &PostParams::default(), &object).await,
                None => api.create(&PostParams::default(), &object).await,
            };
            match outcome {
                Err(error) if is_conflict(&error) && tries < TRIES => {}
                other => return other.map(drop),
            }
        }
    }

    async fn first(&self) -> Result<CSINode, kube::Error> {
        let node = Api::<Node>::all(self.client.clone()).get(&self.node).await?;
        let owner = OwnerReference {
            api_version: "v1".into(),
            kind: "Node".into(),
            name: self.node.clone(),
            uid: node.uid().unwrap_or_default(),
            ..OwnerReference::default()
        };
        Ok(CSINode {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec { drivers: Vec::new() },
        })
    }
}

/// Somebody else changed the object, or made it first.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(answer) if answer.code == 409)
}

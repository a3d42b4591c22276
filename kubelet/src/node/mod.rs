//! This node in the API: it registers itself, says how it is, and renews its Lease.

mod facts;
mod lease;
pub(crate) mod local_volumes;
pub mod status;

use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::json;

use crate::Config;

pub use facts::Facts;

/// Manager of the node's fields.
const MANAGER: &str = "kubelet";

/// What the node cannot tell the API.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A call to the API failed.
    #[error("{step} the node {node}: {source}")]
    Api {
        /// What was done.
        step: &'static str,
        /// Whose object.
        node: String,
        /// Why.
        source: kube::Error,
    },
    /// The watch for the node's pod range ended.
    #[error(
        "the node {0} was given no pod range: is the node IPAM controller running, and is --cluster-cidr large enough?"
    )]
    NoRange(String),
}

/// What the rest of the node agent knows of the node's health: asked before each report.
pub trait Health: Send + Sync + 'static {
    /// Conditions beside the usual ones, or in their place (same type): `MemoryPressure`, `DiskPressure`, … A condition
    /// `Ready` that is false makes the node not ready.
    fn conditions(&self) -> Vec<NodeCondition>;
    /// Names and sizes in bytes of the images on this node, largest first.
    fn images(&self) -> Vec<(Vec<String>, i64)>;
    /// `status.volumesInUse`.
    fn volumes_in_use(&self) -> Vec<String>;
    /// Name, capacity and allocatable of each kind of device of plugins.
    fn devices(&self) -> Vec<(String, usize, usize)>;
    /// Rung when the status is to be written before its time.
    fn news(&self) -> Arc<tokio::sync::Notify>;
}

/// The node's own object.
pub struct NodeAgent {
    config: Arc<Config>,
    client: Client,
    facts: Facts,
}

impl NodeAgent {
    /// An agent for the node that the settings describe, on the host that the facts describe.
    pub fn new(config: Arc<Config>, client: Client, facts: Facts) -> Self {
        Self { config, client, facts }
    }

    fn api(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(kube::Error) -> NodeError {
        let node = self.config.node_name.clone();
        move |source| NodeError::Api { step, node, source }
    }

    /// Makes the Node object, or brings the labels of an earlier registration up to date. What others set stays.
    pub async fn register(&self) -> Result<Node, NodeError> {
        let name = &self.config.node_name;
        if self.api().get_opt(name).await.map_err(self.failed("look for"))?.is_some() {
            let patch = json!({"metadata": {"labels": self.facts.labels(&self.config),
                "annotations": status::annotations(&self.config)}});
            let parameters = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
            return self.api().patch(name, &parameters, &Patch::Merge(patch)).await.map_err(self.failed("label"));
        }
        let node = status::first(&self.config, &self.facts);
        let parameters = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
        match self.api().create(&parameters, &node).await {
            // Another start of this agent was faster.
            Err(kube::Error::Api(answer)) if answer.reason == "AlreadyExists" => {
                self.api().get(name).await.map_err(self.failed("read"))
            }
            other => other.map_err(self.failed("register")),
        }
    }

    /// The node's pod ranges, as soon as it has been given some.
    pub async fn pod_cidrs(&self) -> Result<Vec<String>, NodeError> {
        use futures::TryStreamExt;
        let ours = watcher::Config::default().fields(&format!("metadata.name={}", self.config.node_name));
        let nodes = watcher(self.api(), ours).default_backoff().applied_objects();
        futures::pin_mut!(nodes);
        loop {
            match nodes.try_next().await {
                Ok(Some(node)) => {
                    if let Some(ranges) = node.spec.and_then(|spec| spec.pod_cidrs).filter(|ranges| !ranges.is_empty())
                    {
                        return Ok(ranges);
                    }
                }
                Ok(None) => return Err(NodeError::NoRange(self.config.node_name.clone())),
                Err(error) => tracing::debug!(%error, "watching the node again"),
            }
        }
    }

    /// Renews the Lease and reports the status until the future is dropped.
    pub async fn run(&self, health: Arc<dyn Health>) {
        tokio::join!(
            lease::keep(&self.config, &self.client),
            local_volumes::keep(&self.config, &self.client),
            self.report(health)
        );
    }

    /// Writes the status when it has changed, when others have changed what follows from theirs, and at the interval that
    /// shows that the agent lives.
    async fn report(&self, health: Arc<dyn Health>) {
        let news = health.news();
        let mut written = None;
        let mut written_at = tokio::time::Instant::now();
        let ours = watcher::Config::default().fields(&format!("metadata.name={}", self.config.node_name));
        let nodes = watcher(self.api(), ours).default_backoff().applied_objects();
        futures::pin_mut!(nodes);
        let mut tick = tokio::time::interval(self.config.lease_renew_interval);
        let mut others_changed = false;
        loop {
            let due = others_changed || written_at.elapsed() >= self.config.node_status_report_interval;
            let wanted = status::of(&self.config, &self.facts, &*health);
            if written.as_ref() != Some(&wanted) || due {
                match self.write(&wanted).await {
                    Ok(()) => {
                        written = Some(wanted.clone());
                        written_at = tokio::time::Instant::now();
                        others_changed = false;
                    }
                    // The next round tries again; pods go on meanwhile.
                    Err(error) => tracing::warn!(%error, "the node's status is not written"),
                }
            }
            loop {
                tokio::select! {
                    _ = tick.tick() => break,
                    () = news.notified() => break,
                    event = nodes.next() => {
                        let node = event.and_then(|event| {
                            event.inspect_err(|error| tracing::debug!(%error, "watching the node again")).ok()
                        });
                        let status = node.and_then(|node| node.status);
                        others_changed = status.is_some_and(|held| !status::extended(&held, &wanted).is_empty());
                        if others_changed {
                            break;
                        }
                    }
                }
            }
        }
    }

    async fn write(&self, wanted: &k8s_openapi::api::core::v1::NodeStatus) -> Result<(), NodeError> {
        let name = &self.config.node_name;
        let Some(node) = self.api().get_opt(name).await.map_err(self.failed("read"))? else {
            // Somebody deleted it while this agent runs: it comes back, as a kubelet's does.
            return self.register().await.map(drop);
        };
        let held = node.status.unwrap_or_default();
        let extended = status::extended(&held, wanted);
        let mut patch = json!({"status": status::merged(held, wanted.clone())});
        // Merged by type, two addresses of one type would become one.
        if let Some(addresses) = patch["status"]["addresses"].as_array_mut() {
            addresses.push(json!({"$patch": "replace"}));
        }
        for (name, amount) in extended {
            patch["status"]["allocatable"][name] = json!(amount);
        }
        let parameters = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let patch = Patch::Strategic(patch);
        self.api().patch_status(name, &parameters, &patch).await.map(drop).map_err(self.failed("report on"))
    }
}

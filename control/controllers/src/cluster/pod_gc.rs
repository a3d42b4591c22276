//! Collection of pods that nobody else ends: those of nodes that are gone or out of service, those that were deleted before
//! they had a node, and the oldest of too many that have finished.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, ResourceExt};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Finished pods that are kept (`--terminated-pod-gc-threshold`).
const FINISHED_MOST: usize = 12_500;
/// How often finished pods are counted.
const PERIOD: Duration = Duration::from_secs(20);
/// Time for a node that is gone to come back before its pods go.
const QUARANTINE: Duration = Duration::from_secs(40);
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

pub(crate) struct PodGc {
    host: Host,
    nodes: Arc<Informer<Node>>,
    pods: Arc<Informer<Pod>>,
    on_node: Arc<Index<Pod>>,
    finished: Index<Pod, ()>,
    /// Since when nodes that pods name have been missing; only such nodes are here.
    missing: Mutex<HashMap<String, Instant>>,
}

impl PodGc {
    pub(crate) fn new(api: &Arc<ApiServer>, on_node: &Arc<Index<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let pods: Arc<Informer<Pod>> = host.informer();
        let finished = pods.index(|pod| match pods::phase(pod) {
            "Succeeded" | "Failed" => vec![()],
            _ => Vec::new(),
        });
        Self { nodes: host.informer(), pods, on_node: on_node.clone(), finished, missing: Mutex::default(), host }
    }

    /// Why the pod must go, or how long to wait for certainty.
    async fn verdict(&self, pod: &Pod) -> Result<Verdict, Error> {
        let leaving = pod.metadata.deletion_timestamp.is_some();
        let Some(name) = pods::node_of(pod).pop() else {
            return Ok(if leaving { Verdict::Go("PodGC: pod was deleted before it was bound") } else { Verdict::Stay });
        };
        if let Some(node) = self.nodes.get("", &name) {
            self.missing.lock().remove(&name);
            let ended = leaving && is_out_of_service(&node);
            return Ok(if ended { Verdict::Go("PodGC: node is out of service") } else { Verdict::Stay });
        }
        let since = *self.missing.lock().entry(name.clone()).or_insert_with(Instant::now);
        let left = QUARANTINE.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Verdict::Wait(left));
        }
        // The cache may be behind; the API is not.
        let nodes: Api<Node> = Api::all(self.host.client.clone());
        let back = nodes.get_opt(&name).await.map_err(Error::at("look for the node"))?.is_some();
        Ok(if back { Verdict::Stay } else { Verdict::Go("PodGC: node no longer exists") })
    }

    async fn collect(&self, pod: &Pod, message: &str) -> Result<(), Error> {
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &pod.namespace().unwrap_or_default());
        if pods::phase(pod) != "Succeeded" && pods::phase(pod) != "Failed" {
            pods::mark_disrupted(&self.host, &api, pod, "DeletionByPodGC", message, true).await?;
        }
        self.host.delete_now(&api, pod).await
    }

    /// Deletes the oldest finished pods above the limit.
    async fn limit_finished(&self) -> Result<(), Error> {
        let finished = self.finished.get(&());
        let surplus = finished.len().saturating_sub(FINISHED_MOST);
        if surplus == 0 {
            return Ok(());
        }
        let mut finished: Vec<_> = finished.collect();
        finished.sort_by_key(|pod| (pod.creation_timestamp().map(|time| time.0), pod.name_any()));
        for pod in finished.iter().take(surplus) {
            let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &pod.namespace().unwrap_or_default());
            self.host.delete_now(&api, &**pod).await?;
        }
        Ok(())
    }
}

enum Verdict {
    Stay,
    Wait(Duration),
    Go(&'static str),
}

/// Whether an administrator has declared a node that does not answer to be off (KEP-2268).
fn is_out_of_service(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    !ready && taints.into_iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

impl Controller for PodGc {
    const NAME: &'static str = "pod-garbage-collector";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.queue.add(Key::new("", ""));
        sources.watch(&self.nodes, |this, delta, queue| {
            let Some(node) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            let changed = delta.new.is_none()
                || delta.old.as_ref().map(|node| is_out_of_service(node)) != Some(is_out_of_service(node));
            if changed {
                this.on_node.get(&node.name_any()).for_each(|pod| queue.add(Key::of(&*pod)));
            }
        });
        sources.watch(&self.pods, |this, delta, queue| {
            let Some(pod) = &delta.new else { return };
            let node = pods::node_of(pod).pop();
            let lost = match &node {
                None => pod.metadata.deletion_timestamp.is_some(),
                Some(node) => this
                    .nodes
                    .get("", node)
                    .is_none_or(|node| pod.metadata.deletion_timestamp.is_some() && is_out_of_service(&node)),
            };
            if lost {
                queue.add(Key::of(&**pod));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        if key.name.is_empty() {
            self.limit_finished().await?;
            self.missing.lock().retain(|name, _| !self.on_node.get(name).is_empty());
            return Ok(Outcome::After(PERIOD));
        }
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        match self.verdict(&pod).await? {
            Verdict::Stay => Ok(Outcome::Done),
            Verdict::Wait(time) => Ok(Outcome::After(time)),
            Verdict::Go(message) => {
                self.collect(&pod, message).await?;
                Ok(Outcome::Done)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_silent_nodes_are_out_of_service() {
        let node = |ready: &str, key: &str| -> Node {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "n"},
                "spec": {"taints": [{"key": key, "effect": "NoExecute"}]},
                "status": {"conditions": [{"type": "Ready", "status": ready}]},
            }))
            .expect("a node")
        };
        assert!(is_out_of_service(&node("Unknown", OUT_OF_SERVICE)));
        assert!(!is_out_of_service(&node("True", OUT_OF_SERVICE)));
        assert!(!is_out_of_service(&node("Unknown", "other")));
    }
}

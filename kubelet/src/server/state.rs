//! What the server needs of the rest of the node agent.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use crate::cri::ContainerRuntime;
use crate::images::ImageStore;
use crate::volumes::Volumes;

/// The node behind the server.
pub trait NodeState: Send + Sync + 'static {
    /// The pods of this node, with the status that this node knows.
    fn pods(&self) -> Vec<Arc<Pod>>;
    /// The container verbs.
    fn runtime(&self) -> Arc<dyn ContainerRuntime>;
    /// The images, for their disk use; `None` where there are none to count.
    fn images(&self) -> Option<Arc<ImageStore>> {
        None
    }
    /// The volumes, for their disk use.
    fn volumes(&self) -> Option<Volumes> {
        None
    }
    /// What `/configz` shows: `{"kubeletconfig": …}`.
    fn configz(&self) -> serde_json::Value;
    /// Further lines for `/metrics`, in Prometheus' text form.
    fn metrics(&self) -> String {
        String::new()
    }
    /// The lines of `/metrics/probes`.
    fn probe_metrics(&self) -> String {
        String::new()
    }

    /// One pod by name.
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.pods().into_iter().find(|pod| {
            pod.metadata.namespace.as_deref() == Some(namespace) && pod.metadata.name.as_deref() == Some(name)
        })
    }
}

//! A pod as the scheduler keeps it: the object and its shape.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use super::{Shape, Shapes};

/// A pod and what was computed from it once.
#[derive(Clone, Debug)]
pub(crate) struct PodState {
    pub(crate) pod: Arc<Pod>,
    pub(crate) uid: Arc<str>,
    pub(crate) shape: Arc<Shape>,
}

impl PodState {
    pub(crate) fn new(pod: Arc<Pod>, shapes: &mut Shapes) -> Arc<Self> {
        Arc::new(Self { uid: pod.metadata.uid.as_deref().unwrap_or_default().into(), shape: shapes.of(&pod), pod })
    }

    pub(crate) fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    pub(crate) fn is_terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// When it started, for who is the more important of two; one that has not is the youngest.
    pub(crate) fn started(&self) -> Timestamp {
        self.pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map_or(Timestamp::MAX, |time| time.0)
    }

    /// The node on which room was made for it.
    pub(crate) fn nominated(&self) -> Option<&str> {
        self.pod.status.as_ref()?.nominated_node_name.as_deref().filter(|name| !name.is_empty())
    }
}

/// Whether a pod takes room on its node.
pub(crate) fn takes_room(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

//! A pod as the scheduler keeps it: its shape, and the little beside that is its own. Not the object: of tens of thousands
//! of pods that only take room on their nodes, objects would be most of the memory.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use super::{Shape, Shapes};

/// A pod and what was computed from it once.
#[derive(Clone, Debug)]
pub(crate) struct PodState {
    pub(crate) uid: Arc<str>,
    pub(crate) name: Box<str>,
    pub(crate) shape: Arc<Shape>,
    pub(crate) generation: Option<i64>,
    /// Its resourceVersion.
    pub(crate) revision: Option<Box<str>>,
    pub(crate) created: Option<Timestamp>,
    /// When it started, for who is the more important of two; one that has not is the youngest.
    pub(crate) started: Timestamp,
    pub(crate) is_terminating: bool,
    /// The node on which room was made for it.
    pub(crate) nominated: Option<Box<str>>,
}

impl PodState {
    pub(crate) fn new(pod: &Pod, shapes: &mut Shapes) -> Arc<Self> {
        let (meta, status) = (&pod.metadata, pod.status.as_ref());
        let nominated = status.and_then(|status| status.nominated_node_name.as_deref());
        Arc::new(Self {
            uid: meta.uid.as_deref().unwrap_or_default().into(),
            name: meta.name.as_deref().unwrap_or_default().into(),
            shape: shapes.of(pod),
            generation: meta.generation,
            revision: meta.resource_version.as_deref().map(Into::into),
            created: meta.creation_timestamp.as_ref().map(|time| time.0),
            started: status.and_then(|status| status.start_time.as_ref()).map_or(Timestamp::MAX, |time| time.0),
            is_terminating: meta.deletion_timestamp.is_some(),
            nominated: nominated.filter(|name| !name.is_empty()).map(Into::into),
        })
    }
}

/// Whether a pod takes room on its node.
pub(crate) fn takes_room(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

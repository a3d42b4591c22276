//! A node as filters read it: what it has, what its pods take.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Taint};

use super::resources::units;
use super::selector::Labels;
use super::{PodState, Resources};

/// A node, the pods on it (assumed ones included), and the sums over them.
#[derive(Clone, Debug)]
pub(crate) struct NodeState {
    pub(crate) node: Arc<Node>,
    pub(crate) allocatable: Resources,
    pub(crate) allowed_pods: usize,
    pub(crate) requested: Resources,
    pub(crate) scored_requested: Resources,
    /// By UID.
    pub(crate) pods: HashMap<Arc<str>, Arc<PodState>>,
    /// Pods for which room was made here, which do not take it yet.
    pub(crate) nominated: Vec<Arc<PodState>>,
    /// Sizes of the images that are here, by name (bytes).
    pub(crate) images: HashMap<String, i64>,
}

static NO_LABELS: Labels = Labels::new();

impl NodeState {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        let mut state = Self {
            node: node.clone(),
            allocatable: Resources::default(),
            allowed_pods: 0,
            requested: Resources::default(),
            scored_requested: Resources::default(),
            pods: HashMap::new(),
            nominated: Vec::new(),
            images: HashMap::new(),
        };
        state.set_node(node);
        state
    }

    /// Takes a new version of the node; its pods stay.
    pub(crate) fn set_node(&mut self, node: Arc<Node>) {
        let status = node.status.as_ref();
        let allocatable = status.and_then(|status| status.allocatable.as_ref());
        self.allocatable = Resources::from_list(allocatable);
        let pods = allocatable.and_then(|list| list.get("pods")).map_or(0, units);
        self.allowed_pods = usize::try_from(pods).unwrap_or_default();
        let images = status.and_then(|status| status.images.as_ref()).into_iter().flatten();
        self.images = images
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or_default();
                image.names.iter().flatten().map(move |name| (name.clone(), size))
            })
            .collect();
        self.node = node;
    }

    pub(crate) fn name(&self) -> &str {
        self.node.metadata.name.as_deref().unwrap_or_default()
    }

    pub(crate) fn labels(&self) -> &Labels {
        self.node.metadata.labels.as_ref().unwrap_or(&NO_LABELS)
    }

    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.labels().get(key).map(String::as_str)
    }

    pub(crate) fn taints(&self) -> &[Taint] {
        self.node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
    }

    pub(crate) fn is_cordoned(&self) -> bool {
        self.node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
    }

    pub(crate) fn add(&mut self, pod: Arc<PodState>) {
        self.remove(&pod.uid);
        self.requested.add(&pod.shape.requests, 1);
        self.scored_requested.add(&pod.shape.scored_requests, 1);
        self.pods.insert(pod.uid.clone(), pod);
    }

    pub(crate) fn remove(&mut self, uid: &str) -> Option<Arc<PodState>> {
        let pod = self.pods.remove(uid)?;
        self.requested.add(&pod.shape.requests, -1);
        self.scored_requested.add(&pod.shape.scored_requests, -1);
        Some(pod)
    }
}

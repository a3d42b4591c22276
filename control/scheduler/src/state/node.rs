//! A node as filters read it: what it has, what its pods take.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;

use super::{PodState, Resources, quantity};

/// A node, the pods on it (assumed ones included), and the sums over them.
#[derive(Clone, Debug)]
pub(crate) struct NodeState {
    pub(crate) node: Arc<Node>,
    pub(crate) allocatable: Resources,
    pub(crate) allowed_pods: usize,
    pub(crate) requested: Resources,
    pub(crate) scored_requested: Resources,
    /// By UID.
    pub(crate) pods: HashMap<String, Arc<PodState>>,
}

impl NodeState {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        let mut state = Self {
            node: node.clone(),
            allocatable: Resources::default(),
            allowed_pods: 0,
            requested: Resources::default(),
            scored_requested: Resources::default(),
            pods: HashMap::new(),
        };
        state.set_node(node);
        state
    }

    /// Takes a new version of the node; its pods stay.
    pub(crate) fn set_node(&mut self, node: Arc<Node>) {
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        self.allocatable = Resources::from_list(allocatable);
        let pods = allocatable.and_then(|list| list.get("pods")).and_then(|pods| quantity(pods, 1)).unwrap_or_default();
        self.allowed_pods = usize::try_from(pods).unwrap_or_default();
        self.node = node;
    }

    pub(crate) fn name(&self) -> &str {
        self.node.metadata.name.as_deref().unwrap_or_default()
    }

    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.node.labels().get(key).map(String::as_str)
    }

    pub(crate) fn add(&mut self, pod: Arc<PodState>) {
        self.remove(&pod.uid());
        self.requested.add(&pod.requests, 1);
        self.scored_requested.add(&pod.scored_requests, 1);
        self.pods.insert(pod.uid(), pod);
    }

    pub(crate) fn remove(&mut self, uid: &str) {
        if let Some(pod) = self.pods.remove(uid) {
            self.requested.add(&pod.requests, -1);
            self.scored_requested.add(&pod.scored_requests, -1);
        }
    }
}

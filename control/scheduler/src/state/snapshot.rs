//! The nodes and which pods stand on them, as the caches tell and as the scheduler assumes before its bindings are seen.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;

use super::{NodeState, PodState};

/// All nodes with their pods. Nodes are shared with the snapshot of a cycle and copied when they change.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    pub(crate) nodes: BTreeMap<String, Arc<NodeState>>,
    /// On which node each pod is counted, by UID.
    placed: HashMap<String, String>,
    /// Pods on nodes that are not known (yet), by node.
    homeless: HashMap<String, HashMap<String, Arc<PodState>>>,
}

impl Cache {
    pub(crate) fn set_node(&mut self, node: &Arc<Node>) {
        let name = node.name_any();
        if let Some(known) = self.nodes.get_mut(&name) {
            Arc::make_mut(known).set_node(node.clone());
            return;
        }
        let mut state = NodeState::new(node.clone());
        for pod in self.homeless.remove(&name).into_iter().flat_map(HashMap::into_values) {
            state.add(pod);
        }
        self.nodes.insert(name, Arc::new(state));
    }

    pub(crate) fn remove_node(&mut self, name: &str) {
        if let Some(state) = self.nodes.remove(name)
            && !state.pods.is_empty()
        {
            self.homeless.insert(name.to_owned(), state.pods.clone());
        }
    }

    /// Counts a pod on a node; an assumption and its confirmation are the same.
    pub(crate) fn place(&mut self, pod: Arc<PodState>, node: &str) {
        let uid = pod.uid();
        if self.placed.get(&uid).is_some_and(|before| before != node) {
            self.remove_pod(&uid);
        }
        self.placed.insert(uid.clone(), node.to_owned());
        match self.nodes.get_mut(node) {
            Some(state) => Arc::make_mut(state).add(pod),
            None => {
                self.homeless.entry(node.to_owned()).or_default().insert(uid, pod);
            }
        }
    }

    /// Whether the pod is counted on a node.
    pub(crate) fn is_placed(&self, uid: &str) -> bool {
        self.placed.contains_key(uid)
    }

    pub(crate) fn remove_pod(&mut self, uid: &str) {
        let Some(node) = self.placed.remove(uid) else {
            return;
        };
        if let Some(state) = self.nodes.get_mut(&node) {
            Arc::make_mut(state).remove(uid);
        }
        if let Some(pods) = self.homeless.get_mut(&node) {
            pods.remove(uid);
            if pods.is_empty() {
                self.homeless.remove(&node);
            }
        }
    }
}

/// Whether a pod takes room on its node.
pub(crate) fn takes_room(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> Arc<Node> {
        Arc::new(
            serde_json::from_value(
                serde_json::json!({"metadata": {"name": name}, "status": {"allocatable": {"cpu": "4", "pods": "10"}}}),
            )
            .expect("a node"),
        )
    }

    fn pod(uid: &str) -> Arc<PodState> {
        let json = serde_json::json!({
            "metadata": {"name": uid, "uid": uid},
            "spec": {"containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}}}]},
        });
        Arc::new(PodState::new(Arc::new(serde_json::from_value(json).expect("a pod"))))
    }

    #[test]
    fn sums_follow_pods_whatever_the_order() {
        let mut cache = Cache::default();
        cache.place(pod("early"), "a");
        cache.set_node(&node("a"));
        cache.set_node(&node("b"));
        cache.place(pod("x"), "a");
        cache.place(pod("x"), "a");
        assert_eq!(cache.nodes["a"].requested.cpu_millis, 2000);
        cache.place(pod("x"), "b");
        assert_eq!((cache.nodes["a"].requested.cpu_millis, cache.nodes["b"].requested.cpu_millis), (1000, 1000));
        cache.remove_node("a");
        cache.set_node(&node("a"));
        assert_eq!(cache.nodes["a"].requested.cpu_millis, 1000);
        cache.remove_pod("early");
        cache.remove_pod("x");
        assert_eq!(cache.nodes["a"].requested.cpu_millis + cache.nodes["b"].requested.cpu_millis, 0);
    }
}

//! The nodes and which pods stand on them, as the caches tell and as the scheduler assumes before its bindings are seen.
//! What changes is numbered and logged, so that whoever has computed something looks only at what is new.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;

use super::{Column, NodeState, PodState};

/// Pods that came or went which the log remembers; who is further behind counts anew.
const LOG_MOST: usize = 8192;
/// Topology keys whose domains are kept; all are found anew when there are more.
const COLUMNS_MOST: usize = 32;

/// A pod that came to a node or left it.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) came: bool,
    pub(crate) slot: u32,
    pub(crate) pod: Arc<PodState>,
}

/// A pod on a node. The node may be unknown.
#[derive(Clone, Debug)]
struct Placed {
    pod: Arc<PodState>,
    node: Arc<str>,
}

/// UID and node.
type Users = HashMap<Arc<str>, Arc<str>>;

/// All nodes with their pods. A node has a slot, which it keeps.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    slots: Vec<Option<NodeState>>,
    /// Version of each slot: it grows with every change of the node or its pods.
    generations: Vec<u64>,
    by_name: HashMap<Arc<str>, u32>,
    free: Vec<u32>,
    clock: u64,
    /// Grows whenever nodes come, go or change labels or taints, and with labels of namespaces.
    epoch: u64,
    order: Arc<[u32]>,
    order_epoch: u64,
    columns: HashMap<Arc<str>, Arc<Column>>,
    columns_epoch: u64,
    log: VecDeque<Change>,
    log_end: u64,
    /// By namespace, then UID.
    pods: HashMap<Arc<str>, HashMap<Arc<str>, Placed>>,
    /// Those of them with terms of affinity.
    with_terms: HashMap<Arc<str>, Placed>,
    /// Pods with claims for volumes, by namespace and claim.
    claim_users: HashMap<(Arc<str>, String), Users>,
    claims_version: u64,
    /// Pods on nodes that are not known (yet), by node.
    homeless: HashMap<Arc<str>, HashMap<Arc<str>, Arc<PodState>>>,
    /// On how many nodes each image is.
    images: HashMap<String, usize>,
    /// Where room was made for pods, by UID.
    nominated: HashMap<Arc<str>, Arc<str>>,
}

impl Cache {
    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }

    pub(crate) fn slot(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn node(&self, slot: u32) -> Option<&NodeState> {
        self.slots.get(slot as usize)?.as_ref()
    }

    /// A node to try things on; whoever changes it must restore it.
    pub(crate) fn scratch(&mut self, slot: u32) -> Option<&mut NodeState> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (u32, &NodeState)> {
        (0_u32..).zip(&self.slots).filter_map(|(slot, node)| Some((slot, node.as_ref()?)))
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn generation(&self, slot: u32) -> u64 {
        self.generations[slot as usize]
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Something changed that filters across nodes have counted with.
    pub(crate) fn bump(&mut self) {
        self.epoch += 1;
    }

    /// On how many nodes an image is.
    pub(crate) fn image_nodes(&self, image: &str) -> usize {
        self.images.get(image).copied().unwrap_or_default()
    }

    /// The pods that use a claim for a volume: UID and node.
    pub(crate) fn users_of(&self, namespace: &Arc<str>, claim: &str) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.claim_users.get(&(namespace.clone(), claim.to_owned())).into_iter().flatten()
    }

    /// Grows when users of claims come or go.
    pub(crate) fn claims_version(&self) -> u64 {
        self.claims_version
    }

    /// The slots of all nodes, zones interleaved, so that the first few are spread well.
    pub(crate) fn order(&mut self) -> Arc<[u32]> {
        if self.order_epoch != self.epoch {
            let mut zones: BTreeMap<(&str, &str), Vec<u32>> = BTreeMap::new();
            for (slot, node) in (0_u32..).zip(&self.slots) {
                let Some(node) = node else { continue };
                let label = |key| node.label(key).unwrap_or_default();
                let zone = (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"));
                zones.entry(zone).or_default().push(slot);
            }
            let longest = zones.values().map(Vec::len).max().unwrap_or_default();
            let round = |at: usize| zones.values().filter_map(move |zone| zone.get(at).copied());
            self.order = (0..longest).flat_map(round).collect();
            self.order_epoch = self.epoch;
        }
        self.order.clone()
    }

    /// The domains of a topology key.
    pub(crate) fn column(&mut self, key: &Arc<str>) -> Arc<Column> {
        if self.columns_epoch != self.epoch || self.columns.len() > COLUMNS_MOST {
            self.columns.clear();
            self.columns_epoch = self.epoch;
        }
        let slots = &self.slots;
        self.columns.entry(key.clone()).or_insert_with(|| Arc::new(Column::new(key, slots))).clone()
    }

    /// The pods that came and went since the log had this length; `None` if it does not go back so far.
    pub(crate) fn changes_since(&self, seen: u64) -> Option<impl Iterator<Item = &Change>> {
        let behind = usize::try_from(self.log_end - seen).ok()?;
        let from = self.log.len().checked_sub(behind)?;
        Some(self.log.range(from..))
    }

    pub(crate) fn log_end(&self) -> u64 {
        self.log_end
    }

    /// The pods of a namespace that stand on known nodes.
    pub(crate) fn pods_of(&self, namespace: &str) -> impl Iterator<Item = (u32, &Arc<PodState>)> {
        self.located(self.pods.get(namespace).into_iter().flat_map(HashMap::values))
    }

    /// All pods that stand on known nodes.
    pub(crate) fn all_pods(&self) -> impl Iterator<Item = (u32, &Arc<PodState>)> {
        self.located(self.pods.values().flat_map(HashMap::values))
    }

    /// The pods with terms of affinity that stand on known nodes.
    pub(crate) fn pods_with_terms(&self) -> impl Iterator<Item = (u32, &Arc<PodState>)> {
        self.located(self.with_terms.values())
    }

    fn located<'a>(
        &'a self,
        placed: impl Iterator<Item = &'a Placed>,
    ) -> impl Iterator<Item = (u32, &'a Arc<PodState>)> {
        placed.filter_map(|placed| Some((*self.by_name.get(&placed.node)?, &placed.pod)))
    }

    fn touch(&mut self, slot: u32) {
        self.clock += 1;
        self.generations[slot as usize] = self.clock;
    }

    fn record(&mut self, came: bool, slot: u32, pod: Arc<PodState>) {
        if self.log.len() == LOG_MOST {
            self.log.pop_front();
        }
        self.log.push_back(Change { came, slot, pod });
        self.log_end += 1;
    }

    fn count_images(images: &mut HashMap<String, usize>, node: &NodeState, more: bool) {
        for name in node.images.keys() {
            let count = images.entry(name.clone()).or_default();
            *count = if more { *count + 1 } else { count.saturating_sub(1) };
            if *count == 0 {
                images.remove(name);
            }
        }
    }

    /// Takes a new node or a new version of one.
    pub(crate) fn set_node(&mut self, node: &Arc<Node>) {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        if let Some(slot) = self.slot(name)
            && let Some(known) = self.slots[slot as usize].as_mut()
        {
            let cordoned = known.is_cordoned();
            let old = std::mem::replace(&mut known.node, node.clone());
            let before = |node: &Node| node.spec.as_ref().and_then(|spec| spec.taints.clone());
            let moved = old.metadata.labels != node.metadata.labels
                || before(&old) != before(node)
                || cordoned != known.is_cordoned();
            Self::count_images(&mut self.images, known, false);
            known.set_node(node.clone());
            Self::count_images(&mut self.images, known, true);
            self.touch(slot);
            self.epoch += u64::from(moved);
            return;
        }
        let mut state = NodeState::new(node.clone());
        Self::count_images(&mut self.images, &state, true);
        let name: Arc<str> = name.into();
        for pod in self.homeless.remove(&name).into_iter().flat_map(HashMap::into_values) {
            state.add(pod);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.generations.push(0);
            // The number of nodes is far below what 32 bits hold.
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize] = Some(state);
        self.by_name.insert(name, slot);
        self.touch(slot);
        self.epoch += 1;
    }

    pub(crate) fn remove_node(&mut self, name: &str) {
        let Some(slot) = self.by_name.remove(name) else {
            return;
        };
        if let Some(state) = self.slots[slot as usize].take() {
            Self::count_images(&mut self.images, &state, false);
            self.nominated.retain(|_, node| **node != *name);
            if !state.pods.is_empty() {
                self.homeless.insert(name.into(), state.pods);
            }
        }
        self.free.push(slot);
        self.touch(slot);
        self.epoch += 1;
    }

    /// Counts a pod on a node; an assumption and its confirmation are the same.
    pub(crate) fn place(&mut self, pod: Arc<PodState>, node: &str) {
        self.nominate(&pod, None);
        let namespace = &pod.shape.namespace;
        if let Some(before) = self.pods.get_mut(namespace).and_then(|pods| pods.get_mut(&pod.uid)) {
            let counted = Arc::ptr_eq(&before.pod.shape, &pod.shape) && before.pod.is_terminating == pod.is_terminating;
            if *before.node == *node && counted {
                before.pod = pod.clone();
                self.replace(pod, node);
                return;
            }
            self.remove_pod(&pod);
        }
        let placed = Placed { pod: pod.clone(), node: node.into() };
        if !pod.shape.pods.is_empty() {
            self.with_terms.insert(pod.uid.clone(), placed.clone());
        }
        for (claim, _) in &pod.shape.volume_claims {
            let users = self.claim_users.entry((pod.shape.namespace.clone(), claim.clone())).or_default();
            users.insert(pod.uid.clone(), placed.node.clone());
            self.claims_version += 1;
        }
        self.pods.entry(pod.shape.namespace.clone()).or_default().insert(pod.uid.clone(), placed);
        match self.slot(node) {
            Some(slot) => {
                if let Some(state) = self.scratch(slot) {
                    state.add(pod.clone());
                }
                self.touch(slot);
                self.record(true, slot, pod);
            }
            None => {
                self.homeless.entry(node.into()).or_default().insert(pod.uid.clone(), pod);
            }
        }
    }

    /// Takes a new version of a pod that counts as the one before.
    fn replace(&mut self, pod: Arc<PodState>, node: &str) {
        if let Some(placed) = self.with_terms.get_mut(&pod.uid) {
            placed.pod = pod.clone();
        }
        let pods = match self.slot(node) {
            Some(slot) => self.scratch(slot).map(|state| &mut state.pods),
            None => self.homeless.get_mut(node),
        };
        if let Some(known) = pods.and_then(|pods| pods.get_mut(&pod.uid)) {
            *known = pod;
        }
    }

    /// The node on which the pod is counted.
    pub(crate) fn node_of(&self, pod: &PodState) -> Option<&Arc<str>> {
        self.pods.get(&pod.shape.namespace)?.get(&pod.uid).map(|placed| &placed.node)
    }

    pub(crate) fn remove_pod(&mut self, pod: &PodState) {
        let Some(pods) = self.pods.get_mut(&pod.shape.namespace) else {
            return;
        };
        let Some(placed) = pods.remove(&pod.uid) else {
            return;
        };
        if pods.is_empty() {
            self.pods.remove(&pod.shape.namespace);
        }
        self.with_terms.remove(&pod.uid);
        for (claim, _) in &placed.pod.shape.volume_claims {
            let key = (pod.shape.namespace.clone(), claim.clone());
            if let Some(users) = self.claim_users.get_mut(&key) {
                users.remove(&pod.uid);
                if users.is_empty() {
                    self.claim_users.remove(&key);
                }
            }
            self.claims_version += 1;
        }
        match self.slot(&placed.node) {
            Some(slot) => {
                if let Some(state) = self.scratch(slot) {
                    state.remove(&pod.uid);
                }
                self.touch(slot);
                self.record(false, slot, placed.pod);
            }
            None => {
                if let Some(pods) = self.homeless.get_mut(&placed.node) {
                    pods.remove(&pod.uid);
                    if pods.is_empty() {
                        self.homeless.remove(&placed.node);
                    }
                }
            }
        }
    }

    /// Notes that room was made for a pod on a node, or (`None`) no longer is.
    pub(crate) fn nominate(&mut self, pod: &Arc<PodState>, node: Option<&str>) {
        let known = self.nominated.get(&pod.uid).map(|node| &**node);
        if known == node {
            return;
        }
        if let Some(slot) = known.and_then(|name| self.slot(name)) {
            if let Some(state) = self.scratch(slot) {
                state.nominated.retain(|other| other.uid != pod.uid);
            }
            self.touch(slot);
        }
        self.nominated.remove(&pod.uid);
        if let Some((name, slot)) = node.and_then(|name| Some((name, self.slot(name)?))) {
            if let Some(state) = self.scratch(slot) {
                state.nominated.push(pod.clone());
            }
            self.nominated.insert(pod.uid.clone(), name.into());
            self.touch(slot);
        }
    }

    /// Where room was made for a pod.
    pub(crate) fn nominated(&self, uid: &str) -> Option<&str> {
        self.nominated.get(uid).map(|node| &**node)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Shapes;
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
        PodState::new(&serde_json::from_value(json).expect("a pod"), &mut Shapes::default())
    }

    #[test]
    fn sums_follow_pods_whatever_the_order() {
        let mut cache = Cache::default();
        let used = |cache: &Cache, name: &str| {
            cache.slot(name).and_then(|slot| cache.node(slot)).map(|node| node.requested.cpu_millis)
        };
        cache.place(pod("early"), "a");
        cache.set_node(&node("a"));
        cache.set_node(&node("b"));
        cache.place(pod("x"), "a");
        cache.place(pod("x"), "a");
        assert_eq!(used(&cache, "a"), Some(2000));
        cache.place(pod("x"), "b");
        assert_eq!((used(&cache, "a"), used(&cache, "b")), (Some(1000), Some(1000)));
        cache.remove_node("a");
        cache.set_node(&node("a"));
        assert_eq!(used(&cache, "a"), Some(1000));
        cache.remove_pod(&pod("early"));
        cache.remove_pod(&pod("x"));
        assert_eq!((used(&cache, "a"), used(&cache, "b")), (Some(0), Some(0)));
        assert_eq!(cache.all_pods().count(), 0);
    }

    #[test]
    fn nominations_move_and_end_with_placement() {
        let mut cache = Cache::default();
        cache.set_node(&node("a"));
        cache.set_node(&node("b"));
        let count = |cache: &Cache, name: &str| {
            cache.slot(name).and_then(|slot| cache.node(slot)).map(|node| node.nominated.len())
        };
        let x = pod("x");
        cache.nominate(&x, Some("a"));
        cache.nominate(&x, Some("b"));
        assert_eq!((count(&cache, "a"), count(&cache, "b")), (Some(0), Some(1)));
        cache.place(x.clone(), "a");
        assert_eq!((count(&cache, "b"), cache.nominated("x")), (Some(0), None));
    }
}

//! Pods as whoever keeps a number of them sees them: a digest of each, as tens of thousands are counted at every change of one.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::informer::Digests;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;

use super::owned::{orphans, owner_of};
use super::pods;

type Labels = BTreeMap<String, String>;

/// Annotation by which users rank pods for removal (KEP-2255); lower goes first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What counting, and choosing whom to give up, need of a pod.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Replica {
    pub(crate) name: Box<str>,
    pub(crate) labels: Arc<Labels>,
    pub(crate) node: Option<Box<str>>,
    /// Neither finished nor being deleted.
    pub(crate) is_active: bool,
    /// Being deleted, but not finished.
    pub(crate) is_leaving: bool,
    pub(crate) is_ready: bool,
    /// 0: not started, 1: unknown, 2: started.
    phase: u8,
    ready_since: Option<Timestamp>,
    cost: i32,
    restarts: i32,
    created: Option<Timestamp>,
}

/// The order in which pods are given up when there are too many (kube-controller `ActivePodsWithRanks`): unbound before
/// bound, pending before running, not ready before ready, cheap before dear, more doubled up on one node before less,
/// shorter ready before longer, more restarts before fewer, younger before older.
pub(crate) type Rank =
    (bool, u8, bool, i32, Reverse<usize>, Option<Reverse<Timestamp>>, Reverse<i32>, Option<Reverse<Timestamp>>);

impl Replica {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self::with(pod, Arc::new(pod.labels().clone()))
    }

    fn with(pod: &Pod, labels: Arc<Labels>) -> Self {
        let phase = pods::phase(pod);
        let is_finished = matches!(phase, "Succeeded" | "Failed");
        let is_deleted = pod.metadata.deletion_timestamp.is_some();
        let ready = pods::condition(pod, "Ready").filter(|condition| condition.status == "True");
        let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        Self {
            name: pod.metadata.name.as_deref().unwrap_or_default().into(),
            labels,
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).map(Into::into),
            is_active: !is_finished && !is_deleted,
            is_leaving: is_deleted && !is_finished,
            is_ready: ready.is_some(),
            phase: match phase {
                "Pending" | "" => 0,
                "Unknown" => 1,
                _ => 2,
            },
            ready_since: ready.and_then(|condition| condition.last_transition_time.as_ref()).map(|time| time.0),
            cost: pod.annotations().get(DELETION_COST).and_then(|cost| cost.parse().ok()).unwrap_or_default(),
            restarts: containers.map(|status| status.restart_count).max().unwrap_or_default(),
            created: pod.creation_timestamp().map(|time| time.0),
        }
    }

    /// Its place in the order of removal, the first to go the least; `doubled` is how many pods of its kind are on its node.
    pub(crate) fn rank(&self, doubled: usize) -> Rank {
        let is_bound = self.node.as_ref().is_some_and(|node| !node.is_empty());
        let (ready, created) = (self.ready_since.map(Reverse), self.created.map(Reverse));
        (is_bound, self.phase, self.is_ready, self.cost, Reverse(doubled), ready, Reverse(self.restarts), created)
    }

    /// How long it must still stay ready to count as available: zero when it does already, `None` when it is not ready.
    pub(crate) fn until_available(&self, min_ready_seconds: i32, now: Timestamp) -> Option<SignedDuration> {
        let since = self.is_ready.then_some(self.ready_since);
        since.and_then(|since| pods::left_to_wait(since, min_ready_seconds, now))
    }

    /// Whether a change between these is none to who counts: a pod that was given a node counts as before.
    pub(crate) fn counts_as(&self, other: &Self) -> bool {
        *self == Self { node: self.node.clone(), ..other.clone() }
    }
}

/// All pods by who controls them.
pub(crate) struct Replicas {
    digests: Digests<Pod, Replica>,
}

impl Replicas {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        // Pods of one template have the same labels, and mostly come one after the other.
        let last: Mutex<Arc<Labels>> = Mutex::default();
        let digest = move |pod: &Pod| {
            let mut last = last.lock();
            if **last != *pod.labels() {
                *last = Arc::new(pod.labels().clone());
            }
            (owner_of(&pod.metadata), Replica::with(pod, last.clone()))
        };
        Self { digests: api.informer::<Pod>().digests(digest) }
    }

    /// The pods that the object with this UID controls.
    pub(crate) fn of(&self, uid: &str) -> Vec<Arc<Replica>> {
        self.digests.get(uid)
    }

    /// The pods that nothing controls, in the namespace of an object.
    pub(crate) fn orphans(&self, near: &impl Resource) -> Vec<Arc<Replica>> {
        self.digests.get(&orphans(near.meta().namespace.as_deref().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: &str, ready: bool, restarts: i32) -> Replica {
        let conditions = json!([{"type": "Ready", "status": if ready { "True" } else { "False" }, "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let node = if node.is_empty() { json!(null) } else { json!(node) };
        let statuses = json!([{"name": "a", "image": "", "imageID": "", "ready": ready, "restartCount": restarts}]);
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [], "nodeName": node},
            "status": {"phase": if ready { "Running" } else { "Pending" }, "conditions": conditions, "containerStatuses": statuses},
        }))
        .expect("a pod");
        Replica::of(&pod)
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let mut pods = [
            pod("steady", "n", true, 0),
            pod("restarting", "n", true, 3),
            pod("unready", "n", false, 0),
            pod("unbound", "", false, 0),
        ];
        pods.sort_by_key(|pod| pod.rank(0));
        let names: Vec<_> = pods.iter().map(|pod| &*pod.name).collect();
        assert_eq!(names, ["unbound", "unready", "restarting", "steady"]);
    }

    #[test]
    fn availability_counts_from_readiness() {
        let pod = pod("a", "n", true, 0);
        let now: Timestamp = "2026-01-01T00:00:04Z".parse().expect("a time");
        assert_eq!(pod.until_available(0, now), Some(SignedDuration::ZERO));
        assert_eq!(pod.until_available(10, now), Some(SignedDuration::from_secs(6)));
        assert_eq!(pod.until_available(3, now), Some(SignedDuration::ZERO));
    }

    #[test]
    fn a_node_changes_no_count() {
        let (unbound, bound) = (pod("a", "", false, 0), pod("a", "n", false, 0));
        assert!(unbound.counts_as(&bound));
        assert!(!bound.counts_as(&pod("a", "n", true, 0)));
    }
}

//! The pods that wait: ready ones by priority and age, failed ones in back-off, hopeless ones until something changes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use tokio::time::Instant;

/// First wait after a failed attempt (`podInitialBackoffSeconds`); doubles with each.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// Longest wait (`podMaxBackoffSeconds`).
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// After so long a hopeless pod is tried again whatever has (not) happened.
const UNSCHEDULABLE_MOST: Duration = Duration::from_secs(300);

/// Higher priority first, then older, then by UID so that keys are unique.
type Rank = (Reverse<i32>, Option<k8s_openapi::jiff::Timestamp>, String);

#[derive(Debug)]
struct Waiting {
    pod: Arc<Pod>,
    attempts: u32,
    place: Place,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Place {
    Active(Rank),
    Backoff(Instant),
    Unschedulable {
        since: Instant,
        backoff_until: Instant,
    },
    /// Being scheduled; with whether an event came meanwhile.
    InFlight {
        event: bool,
    },
}

/// All pods without a node, by UID; bounded by the number of pods.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pods: HashMap<String, Waiting>,
    active: BTreeMap<Rank, String>,
}

fn rank(pod: &Pod) -> Rank {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default();
    (Reverse(priority), pod.creation_timestamp().map(|time| time.0), pod.uid().unwrap_or_default())
}

impl Queue {
    /// Adds a pod or takes its new version; a changed pod gets a new chance.
    pub(crate) fn add(&mut self, pod: &Arc<Pod>) {
        let uid = pod.uid().unwrap_or_default();
        if let Some(waiting) = self.pods.get_mut(&uid) {
            let same = waiting.pod.spec == pod.spec && waiting.pod.metadata.labels == pod.metadata.labels;
            waiting.pod = pod.clone();
            if !same && matches!(waiting.place, Place::Unschedulable { .. }) {
                self.activate(&uid);
            }
            return;
        }
        self.pods
            .insert(uid.clone(), Waiting { pod: pod.clone(), attempts: 0, place: Place::InFlight { event: false } });
        self.activate(&uid);
    }

    /// Forgets a pod that is bound or gone.
    pub(crate) fn remove(&mut self, uid: &str) {
        if let Some(Waiting { place: Place::Active(rank), .. }) = self.pods.remove(uid) {
            self.active.remove(&rank);
        }
    }

    /// The next pod to schedule; the caller must then remove it or call [`Queue::failed`].
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Arc<Pod>> {
        self.release(now);
        let (_, uid) = self.active.pop_first()?;
        let waiting = self.pods.get_mut(&uid)?;
        waiting.attempts += 1;
        waiting.place = Place::InFlight { event: false };
        Some(waiting.pod.clone())
    }

    /// Puts a pod back after a failed attempt: `hopeless` until an event, otherwise for the time of its back-off.
    pub(crate) fn failed(&mut self, uid: &str, hopeless: bool, now: Instant) {
        let Some(waiting) = self.pods.get_mut(uid) else {
            return;
        };
        let backoff = BACKOFF_FIRST.saturating_mul(1 << (waiting.attempts.saturating_sub(1)).min(10)).min(BACKOFF_MOST);
        let event = waiting.place == Place::InFlight { event: true };
        waiting.place = if hopeless && !event {
            Place::Unschedulable { since: now, backoff_until: now + backoff }
        } else {
            Place::Backoff(now + backoff)
        };
    }

    /// Something changed that may let hopeless pods be placed.
    pub(crate) fn event(&mut self, now: Instant) {
        let mut ready = Vec::new();
        for (uid, waiting) in &mut self.pods {
            match &mut waiting.place {
                Place::Unschedulable { backoff_until, .. } if *backoff_until <= now => ready.push(uid.clone()),
                Place::Unschedulable { backoff_until, .. } => waiting.place = Place::Backoff(*backoff_until),
                Place::InFlight { event } => *event = true,
                _ => {}
            }
        }
        for uid in ready {
            self.activate(&uid);
        }
    }

    /// When the next pod leaves its back-off.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.pods
            .values()
            .filter_map(|waiting| match waiting.place {
                Place::Backoff(until) => Some(until),
                Place::Unschedulable { since, .. } => Some(since + UNSCHEDULABLE_MOST),
                _ => None,
            })
            .min()
    }

    fn release(&mut self, now: Instant) {
        let due: Vec<_> = self
            .pods
            .iter()
            .filter(|(_, waiting)| match waiting.place {
                Place::Backoff(until) => until <= now,
                Place::Unschedulable { since, .. } => since + UNSCHEDULABLE_MOST <= now,
                _ => false,
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in due {
            self.activate(&uid);
        }
    }

    fn activate(&mut self, uid: &str) {
        if let Some(waiting) = self.pods.get_mut(uid) {
            let rank = rank(&waiting.pod);
            self.active.insert(rank.clone(), uid.to_owned());
            waiting.place = Place::Active(rank);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, priority: i32) -> Arc<Pod> {
        let json = serde_json::json!({"metadata": {"name": uid, "uid": uid}, "spec": {"containers": [], "priority": priority}});
        Arc::new(serde_json::from_value(json).expect("a pod"))
    }

    #[tokio::test(start_paused = true)]
    async fn priority_first_then_backoff_then_events() {
        let mut queue = Queue::default();
        queue.add(&pod("low", 0));
        queue.add(&pod("high", 10));
        let now = Instant::now();
        assert_eq!(queue.pop(now).expect("a pod").name_any(), "high");
        queue.failed("high", true, now);
        assert_eq!(queue.pop(now).expect("a pod").name_any(), "low");
        queue.remove("low");
        assert!(queue.pop(now).is_none());
        // An event during the back-off does not shorten it.
        queue.event(now);
        assert!(queue.pop(now).is_none());
        assert_eq!(queue.next_due(), Some(now + BACKOFF_FIRST));
        assert!(queue.pop(now + BACKOFF_FIRST).is_some());
        // An event during the attempt turns hopeless into back-off.
        queue.event(now);
        queue.failed("high", true, now + BACKOFF_FIRST);
        assert_eq!(queue.next_due(), Some(now + BACKOFF_FIRST * 3));
    }
}

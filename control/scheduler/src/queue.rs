//! The pods that wait: ready ones by priority and age, failed ones in back-off, hopeless ones until an event that can help
//! them, gated ones until their gates are gone.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::state::PodState;

/// After so long a hopeless pod is tried again whatever has (not) happened.
const UNSCHEDULABLE_MOST: Duration = Duration::from_secs(300);

/// Higher priority first, then older, then by order of arrival.
type Rank = (Reverse<i32>, Option<Timestamp>, u64);

#[derive(Debug)]
struct Waiting {
    pod: Arc<PodState>,
    attempts: u32,
    order: u64,
    /// End of the back-off.
    ready_at: Instant,
    place: Place,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Active(Rank),
    /// With whether the last attempt failed by an error, not by want of a node.
    Backoff {
        error: bool,
    },
    Unschedulable {
        since: Instant,
        rejectors: u32,
    },
    Gated,
    /// Being scheduled.
    Out,
}

/// All pods without a node, by UID; bounded by the number of pods.
#[derive(Debug)]
pub(crate) struct Queue {
    pods: HashMap<Arc<str>, Waiting>,
    active: BTreeMap<Rank, Arc<str>>,
    backoff: BTreeSet<(Instant, Arc<str>)>,
    /// Hopeless pods by the plug-ins that rejected them.
    unschedulable: HashMap<u32, BTreeSet<Arc<str>>>,
    /// When they came to be so.
    flush: BTreeSet<(Instant, Arc<str>)>,
    arrivals: u64,
    backoff_first: Duration,
    backoff_most: Duration,
}

impl Queue {
    pub(crate) fn new(backoff_first: Duration, backoff_most: Duration) -> Self {
        Self {
            pods: HashMap::new(),
            active: BTreeMap::new(),
            backoff: BTreeSet::new(),
            unschedulable: HashMap::new(),
            flush: BTreeSet::new(),
            arrivals: 0,
            backoff_first,
            backoff_most,
        }
    }

    /// Adds a pod or takes its new version; `gated` keeps it from being tried. One that has changed in what plug-ins see
    /// gets a new chance.
    pub(crate) fn add(&mut self, pod: Arc<PodState>, gated: bool, now: Instant) {
        let uid = pod.uid.clone();
        let place = if gated { Place::Gated } else { Place::Active(self.rank(&pod, self.arrivals)) };
        let Some(waiting) = self.pods.get_mut(&uid) else {
            let order = self.arrivals;
            self.arrivals += 1;
            self.pods.insert(uid.clone(), Waiting { pod, attempts: 0, order, ready_at: now, place: Place::Out });
            self.put(&uid, place);
            return;
        };
        let same = Arc::ptr_eq(&waiting.pod.shape, &pod.shape);
        waiting.pod = pod;
        let was_gated = waiting.place == Place::Gated;
        if gated {
            self.put(&uid, Place::Gated);
        } else if was_gated || (!same && matches!(waiting.place, Place::Unschedulable { .. })) {
            self.ready(&uid, now);
        }
    }

    fn rank(&self, pod: &PodState, order: u64) -> Rank {
        (Reverse(pod.shape.priority), pod.created, order)
    }

    /// Moves a pod to its place.
    fn put(&mut self, uid: &Arc<str>, place: Place) {
        let Some(waiting) = self.pods.get_mut(uid) else {
            return;
        };
        let before = std::mem::replace(&mut waiting.place, place);
        let ready_at = waiting.ready_at;
        match before {
            Place::Active(rank) => {
                self.active.remove(&rank);
            }
            Place::Backoff { .. } => {
                self.backoff.remove(&(ready_at, uid.clone()));
            }
            Place::Unschedulable { since, rejectors } => {
                self.flush.remove(&(since, uid.clone()));
                if let Some(pods) = self.unschedulable.get_mut(&rejectors) {
                    pods.remove(uid);
                    if pods.is_empty() {
                        self.unschedulable.remove(&rejectors);
                    }
                }
            }
            Place::Gated | Place::Out => {}
        }
        match place {
            Place::Active(rank) => {
                self.active.insert(rank, uid.clone());
            }
            Place::Backoff { .. } => {
                self.backoff.insert((ready_at, uid.clone()));
            }
            Place::Unschedulable { since, rejectors } => {
                self.flush.insert((since, uid.clone()));
                self.unschedulable.entry(rejectors).or_default().insert(uid.clone());
            }
            Place::Gated | Place::Out => {}
        }
    }

    /// Lets a pod be tried again, when its back-off has ended.
    fn ready(&mut self, uid: &Arc<str>, now: Instant) {
        let Some(waiting) = self.pods.get(uid) else {
            return;
        };
        let place = if waiting.ready_at > now {
            Place::Backoff { error: false }
        } else {
            Place::Active(self.rank(&waiting.pod, waiting.order))
        };
        self.put(uid, place);
    }

    /// Forgets a pod that is bound or gone.
    pub(crate) fn remove(&mut self, uid: &str) -> Option<Arc<PodState>> {
        let uid = self.pods.get_key_value(uid)?.0.clone();
        self.put(&uid, Place::Out);
        self.pods.remove(&uid).map(|waiting| waiting.pod)
    }

    /// The pod with this UID, if it waits.
    pub(crate) fn get(&self, uid: &str) -> Option<&Arc<PodState>> {
        self.pods.get(uid).map(|waiting| &waiting.pod)
    }

    /// The next pod to schedule; the caller must then remove it or put it back. When none is ready, those come early that
    /// wait only because their last attempt found no node: something has changed since.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Arc<PodState>> {
        while let Some((_, uid)) = self.backoff.first().filter(|(due, _)| *due <= now).cloned() {
            self.ready(&uid, now);
        }
        while let Some((_, uid)) = self.flush.first().filter(|(since, _)| *since + UNSCHEDULABLE_MOST <= now).cloned() {
            self.ready(&uid, now);
        }
        let uid = self.active.first_key_value().map(|(_, uid)| uid.clone()).or_else(|| {
            let early = |(_, uid): &&(Instant, Arc<str>)| {
                self.pods.get(uid).is_some_and(|waiting| waiting.place == Place::Backoff { error: false })
            };
            self.backoff.iter().find(early).map(|(_, uid)| uid.clone())
        })?;
        self.put(&uid, Place::Out);
        let waiting = self.pods.get_mut(&uid)?;
        waiting.attempts += 1;
        Some(waiting.pod.clone())
    }

    /// Puts a pod back for which there is no node: it waits for an event that helps one of its rejectors.
    pub(crate) fn unschedulable(&mut self, uid: &Arc<str>, rejectors: u32, now: Instant) {
        self.back_off(uid, now);
        self.put(uid, Place::Unschedulable { since: now, rejectors });
    }

    /// Puts a pod back whose attempt ended in an error.
    pub(crate) fn failed(&mut self, uid: &Arc<str>, now: Instant) {
        self.put(uid, Place::Out);
        self.back_off(uid, now);
        self.put(uid, Place::Backoff { error: true });
    }

    /// Sets the end of the back-off of a pod that is out.
    fn back_off(&mut self, uid: &Arc<str>, now: Instant) {
        if let Some(waiting) = self.pods.get_mut(uid) {
            let doubled = self.backoff_first.saturating_mul(1 << waiting.attempts.saturating_sub(1).min(16));
            waiting.ready_at = now + doubled.min(self.backoff_most);
        }
    }

    /// Something happened: hopeless pods that it can help may be tried again. `helps` gets the plug-ins that rejected a pod
    /// as bits.
    pub(crate) fn event(&mut self, helps: impl Fn(&PodState, u32) -> bool, now: Instant) {
        let helped = |(rejectors, uids): (&u32, &BTreeSet<Arc<str>>)| {
            let pods = uids.iter().filter(|uid| self.pods.get(*uid).is_some_and(|w| helps(&w.pod, *rejectors)));
            pods.cloned().collect::<Vec<_>>()
        };
        let ready: Vec<Arc<str>> = self.unschedulable.iter().flat_map(helped).collect();
        for uid in ready {
            self.ready(&uid, now);
        }
    }

    /// Lets one hopeless pod be tried again.
    pub(crate) fn wake(&mut self, uid: &Arc<str>, now: Instant) {
        if self.pods.get(uid).is_some_and(|waiting| matches!(waiting.place, Place::Unschedulable { .. })) {
            self.ready(uid, now);
        }
    }

    /// Whether any pod waits for an event.
    pub(crate) fn has_hopeless(&self) -> bool {
        !self.unschedulable.is_empty()
    }

    /// When the next pod may be tried again by itself.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let backoff = self.backoff.first().map(|(due, _)| *due);
        let flush = self.flush.first().map(|(since, _)| *since + UNSCHEDULABLE_MOST);
        backoff.into_iter().chain(flush).min()
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.pods.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Shapes;

    const FIRST: Duration = Duration::from_secs(1);

    fn pod(uid: &str, priority: i32) -> Arc<PodState> {
        let json = serde_json::json!({"metadata": {"name": uid, "uid": uid}, "spec": {"containers": [], "priority": priority}});
        PodState::new(&serde_json::from_value(json).expect("a pod"), &mut Shapes::default())
    }

    fn queue() -> Queue {
        Queue::new(FIRST, Duration::from_secs(10))
    }

    #[test]
    fn priority_first_then_arrival() {
        let (mut queue, now) = (queue(), Instant::now());
        for (uid, priority) in [("b", 0), ("a", 0), ("high", 10)] {
            queue.add(pod(uid, priority), false, now);
        }
        let order: Vec<String> = std::iter::from_fn(|| queue.pop(now)).map(|pod| pod.name.to_string()).collect();
        assert_eq!(order, ["high", "b", "a"]);
    }

    #[test]
    fn only_events_that_help_wake_a_pod_and_not_before_its_back_off() {
        let (mut queue, now) = (queue(), Instant::now());
        queue.add(pod("a", 0), false, now);
        queue.add(pod("busy", 0), false, now);
        let a = queue.pop(now).expect("a pod").uid.clone();
        queue.unschedulable(&a, 0b10, now);
        queue.event(|_, rejectors| rejectors & 0b01 != 0, now);
        assert!(queue.backoff.is_empty());
        queue.event(|_, rejectors| rejectors & 0b10 != 0, now);
        assert_eq!(queue.next_due(), Some(now + FIRST));
        // Others are ready, so it waits; then it comes early.
        assert_eq!(&*queue.pop(now).expect("a pod").name, "busy");
        assert_eq!(&*queue.pop(now).expect("a pod").name, "a");
        queue.failed(&a, now);
        assert!(queue.pop(now).is_none(), "after an error nobody comes early");
        assert_eq!(queue.next_due(), Some(now + 2 * FIRST));
        for _ in 0..9 {
            let due = queue.next_due().expect("it waits");
            queue.pop(due).expect("it is due");
            queue.failed(&a, due);
            assert!(queue.next_due().expect("it waits") <= due + Duration::from_secs(10));
        }
    }

    #[test]
    fn hopeless_pods_are_tried_again_after_five_minutes() {
        let (mut queue, now) = (queue(), Instant::now());
        queue.add(pod("a", 0), false, now);
        let a = queue.pop(now).expect("a pod").uid.clone();
        queue.unschedulable(&a, 1, now);
        assert!(queue.pop(now + UNSCHEDULABLE_MOST / 2).is_none());
        assert!(queue.pop(now + UNSCHEDULABLE_MOST).is_some());
    }

    #[test]
    fn gates_keep_a_pod_out_until_they_are_gone() {
        let (mut queue, now) = (queue(), Instant::now());
        queue.add(pod("a", 0), true, now);
        assert!(queue.pop(now).is_none());
        queue.event(|_, _| true, now);
        assert!(queue.pop(now).is_none());
        queue.add(pod("a", 0), false, now);
        assert!(queue.pop(now).is_some());
        queue.remove("a");
        assert_eq!(queue.len(), 0);
    }
}

//! What subscribers get: first what is there already, then what changes.

use std::collections::{HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::held::{Held, Recent};
use super::{Cached, State};

/// Objects that were there already which a subscriber takes at once.
const WALKED_AT_ONCE: usize = 64;
/// Room for changes that a subscriber keeps when none waits.
const ROOM_KEPT: usize = 256;

/// What happened to an object: `old` and `new` are the decoded versions, shared with the cache.
#[derive(Debug)]
pub struct Delta<K> {
    /// The version before; `None` when it was added.
    pub old: Option<Arc<K>>,
    /// The version now; `None` when it was deleted.
    pub new: Option<Arc<K>>,
}

impl<K> Clone for Delta<K> {
    fn clone(&self) -> Self {
        Self { old: self.old.clone(), new: self.new.clone() }
    }
}

/// The versions before and now, as the cache holds them.
type Change<K> = (Option<Arc<Held<K>>>, Option<Arc<Held<K>>>);

/// The queue of one subscriber: at most one change an object.
pub(super) struct Feed<K> {
    pending: Mutex<Pending<K>>,
    more: Notify,
}

struct Pending<K> {
    /// The last of the objects that were there already which the subscriber has taken, in order of their keys; `None` when
    /// it has taken all. What lies beyond it needs no queue: the subscriber will come by.
    walked: Option<Arc<str>>,
    order: VecDeque<Arc<str>>,
    changes: HashMap<Arc<str>, Change<K>>,
}

impl<K> Feed<K> {
    pub(super) fn new() -> Self {
        let pending = Pending { walked: Some("".into()), order: VecDeque::new(), changes: HashMap::new() };
        Self { pending: Mutex::new(pending), more: Notify::new() }
    }

    pub(super) fn push(&self, key: &Arc<str>, old: Option<&Arc<Held<K>>>, new: Option<&Arc<Held<K>>>) {
        let mut pending = self.pending.lock();
        if pending.walked.as_ref().is_none_or(|walked| key <= walked) {
            match pending.changes.get_mut(key) {
                Some((_, waiting)) => *waiting = new.cloned(),
                None => {
                    pending.changes.insert(key.clone(), (old.cloned(), new.cloned()));
                    pending.order.push_back(key.clone());
                }
            }
        }
        drop(pending);
        self.wake();
    }

    pub(super) fn wake(&self) {
        self.more.notify_one();
    }

    fn pop(&self) -> Option<Change<K>> {
        let mut pending = self.pending.lock();
        let change = loop {
            let Some(key) = pending.order.pop_front() else { break None };
            let Some(change) = pending.changes.remove(&key) else { break None };
            // Made and gone again before anybody looked.
            if change.0.is_some() || change.1.is_some() {
                break Some(change);
            }
        };
        if pending.order.is_empty() && pending.order.capacity() > ROOM_KEPT {
            pending.order.shrink_to(ROOM_KEPT);
            pending.changes.shrink_to(ROOM_KEPT);
        }
        change
    }

    /// Takes the next of the objects that were there already.
    fn walk(&self, state: &State<K>, into: &mut VecDeque<Arc<Held<K>>>) {
        let mut pending = self.pending.lock();
        let Some(walked) = pending.walked.take() else { return };
        let beyond = (Bound::Excluded(&*walked), Bound::Unbounded);
        let mut last = None;
        for (key, held) in state.objects.range::<str, _>(beyond).take(WALKED_AT_ONCE) {
            into.push_back(held.clone());
            last = Some(key.clone());
        }
        if state.loading || into.len() == WALKED_AT_ONCE {
            pending.walked = Some(last.unwrap_or(walked));
        }
    }
}

/// The deltas of one subscription.
pub struct Deltas<K> {
    pub(super) feed: Arc<Feed<K>>,
    pub(super) state: Arc<RwLock<State<K>>>,
    pub(super) recent: Arc<Recent<K>>,
    /// Objects that were there already and are next.
    pub(super) walked: VecDeque<Arc<Held<K>>>,
}

impl<K: Cached> Deltas<K> {
    /// The next delta. Never ends while the informer lives; cancel-safe.
    pub async fn next(&mut self) -> Option<Delta<K>> {
        // Subscribers that go through the same objects take turns, so that they share what is decoded.
        tokio::task::coop::consume_budget().await;
        loop {
            if let Some(delta) = self.try_next() {
                return Some(delta);
            }
            self.feed.more.notified().await;
        }
    }

    /// The next delta if one is there already.
    pub fn try_next(&mut self) -> Option<Delta<K>> {
        loop {
            if self.walked.is_empty() {
                self.feed.walk(&self.state.read(), &mut self.walked);
            }
            let (old, new) = match self.walked.pop_front() {
                Some(held) => (None, Some(held)),
                None => self.feed.pop()?,
            };
            let object = |held: Option<Arc<Held<K>>>| held.and_then(|held| held.object(&self.recent));
            let delta = Delta { old: object(old), new: object(new) };
            if delta.old.is_some() || delta.new.is_some() {
                return Some(delta);
            }
        }
    }
}

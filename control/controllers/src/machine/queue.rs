//! The work queue: keys wait once each, delayed keys come due, failed ones back off. The same contract as client-go's
//! rate-limited queue: a key that is being worked on and added again is handed out again after it is done.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// First delay after a failure; doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
/// Longest delay after a failure.
const BACKOFF_MOST: Duration = Duration::from_secs(60);

/// A deduplicating, delaying queue. Bounded by the number of distinct keys, that is, of objects.
#[derive(Debug)]
pub struct WorkQueue<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

#[derive(Debug)]
struct State<K> {
    ready: VecDeque<K>,
    /// Keys that wait or are to be handed out again once done.
    dirty: HashSet<K>,
    working: HashSet<K>,
    /// Keys whose work is done, and until when they count as worked on.
    resting: BTreeMap<(Instant, u64), K>,
    /// When a delayed key comes due; an entry of the heap that differs is stale.
    due: HashMap<K, Instant>,
    delayed: BinaryHeap<Reverse<(Instant, u64)>>,
    delayed_keys: HashMap<u64, K>,
    sequence: u64,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash> Default for WorkQueue<K> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                dirty: HashSet::new(),
                working: HashSet::new(),
                resting: BTreeMap::new(),
                due: HashMap::new(),
                delayed: BinaryHeap::new(),
                delayed_keys: HashMap::new(),
                sequence: 0,
                failures: HashMap::new(),
            }),
            changed: Notify::new(),
        }
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    /// Queues `key` unless it waits already.
    pub fn add(&self, key: K) {
        if self.state.lock().add(key) {
            self.changed.notify_one();
        }
    }

    /// Queues `key` once `delay` has passed; an earlier due time of the same key stays.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let due = Instant::now() + delay;
        let mut state = self.state.lock();
        if state.due.get(&key).is_some_and(|earlier| *earlier <= due) {
            return;
        }
        state.sequence += 1;
        let sequence = state.sequence;
        state.due.insert(key.clone(), due);
        state.delayed.push(Reverse((due, sequence)));
        state.delayed_keys.insert(sequence, key);
        drop(state);
        self.changed.notify_one();
    }

    /// Queues `key` after a delay that doubles with each failure since [`WorkQueue::forget`]; returns the delay.
    pub fn retry(&self, key: K) -> Duration {
        let delay = {
            let mut state = self.state.lock();
            let failures = state.failures.entry(key.clone()).or_default();
            let delay = BACKOFF_FIRST.saturating_mul(1 << (*failures).min(20)).min(BACKOFF_MOST);
            *failures += 1;
            delay
        };
        self.add_after(key, delay);
        delay
    }

    /// Lets the next failure of `key` start at the first delay again.
    pub fn forget(&self, key: &K) {
        self.state.lock().failures.remove(key);
    }

    /// The next key; the caller must call [`WorkQueue::done`] with it.
    pub async fn next(&self) -> K {
        loop {
            let changed = self.changed.notified();
            let wait = {
                let mut state = self.state.lock();
                state.release(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.working.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.changed.notify_one();
                    }
                    return key;
                }
                let delayed = state.delayed.peek().map(|Reverse((due, _))| *due);
                delayed.into_iter().chain(state.resting.keys().next().map(|(until, _)| *until)).min()
            };
            match wait {
                Some(due) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(due) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// Ends the work on `key`; hands it out again if it was added meanwhile.
    pub fn done(&self, key: &K) {
        if self.state.lock().done(key) {
            self.changed.notify_one();
        }
    }

    /// Ends the work on `key` when `rest` has passed: it is not handed out before, however often it is added.
    pub fn done_after(&self, key: K, rest: Duration) {
        if rest.is_zero() {
            return self.done(&key);
        }
        let mut state = self.state.lock();
        state.sequence += 1;
        let until = (Instant::now() + rest, state.sequence);
        state.resting.insert(until, key);
        drop(state);
        self.changed.notify_one();
    }

    /// How many keys wait, are delayed or are worked on.
    pub fn len(&self) -> usize {
        let state = self.state.lock();
        state.dirty.len() + state.due.len() + state.working.len()
    }

    /// Whether nothing waits, is delayed or is worked on.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    /// Whether a worker should wake.
    fn add(&mut self, key: K) -> bool {
        if !self.dirty.insert(key.clone()) || self.working.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    /// Whether a worker should wake.
    fn done(&mut self, key: &K) -> bool {
        self.working.remove(key);
        let again = self.dirty.contains(key);
        if again {
            self.ready.push_back(key.clone());
        }
        again
    }

    /// Moves what has come due to the ready keys.
    fn release(&mut self, now: Instant) {
        while let Some(rested) = self.resting.first_entry().filter(|rested| rested.key().0 <= now) {
            let key = rested.remove();
            self.done(&key);
        }
        while let Some(Reverse((due, sequence))) = self.delayed.peek().copied() {
            let Some(key) = self.delayed_keys.get(&sequence) else {
                self.delayed.pop();
                continue;
            };
            if due > now && self.due.get(key) == Some(&due) {
                return;
            }
            self.delayed.pop();
            let Some(key) = self.delayed_keys.remove(&sequence) else {
                continue;
            };
            if self.due.get(&key) == Some(&due) {
                self.due.remove(&key);
                self.add(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_waits_once_and_comes_again_after_its_work() {
        let queue = WorkQueue::default();
        queue.add("a");
        queue.add("a");
        let key = queue.next().await;
        queue.add("a");
        assert!(tokio::time::timeout(Duration::from_secs(1), queue.next()).await.is_err(), "worked on twice at once");
        queue.done(&key);
        assert_eq!(queue.next().await, "a");
        queue.done(&"a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_rests_comes_again_once_and_not_before() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add("a");
        let key = queue.next().await;
        queue.add("a");
        queue.done_after(key, Duration::from_secs(2));
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "b", "others need not wait");
        assert_eq!((queue.next().await, start.elapsed().as_secs()), ("a", 2));
        queue.done_after("a", Duration::from_secs(2));
        queue.done(&"b");
        assert!(tokio::time::timeout(Duration::from_secs(9), queue.next()).await.is_err(), "nobody asked again");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn delayed_keys_come_due_in_order_and_once() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add_after("late", Duration::from_secs(20));
        queue.add_after("early", Duration::from_secs(10));
        queue.add_after("late", Duration::from_secs(15));
        queue.add_after("late", Duration::from_secs(30));
        assert_eq!(queue.next().await, "early");
        assert_eq!(start.elapsed().as_secs(), 10);
        assert_eq!(queue.next().await, "late");
        assert_eq!(start.elapsed().as_secs(), 15);
        queue.done(&"early");
        queue.done(&"late");
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_until_forgotten() {
        let queue = WorkQueue::default();
        let delays: Vec<_> = (0..20).map(|_| queue.retry("a")).collect();
        assert_eq!(delays[0], BACKOFF_FIRST);
        assert_eq!(delays[1], BACKOFF_FIRST * 2);
        assert_eq!(delays[19], BACKOFF_MOST);
        queue.forget(&"a");
        assert_eq!(queue.retry("a"), BACKOFF_FIRST);
    }
}

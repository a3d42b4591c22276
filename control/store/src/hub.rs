//! The shared log of changes and its readers.
//!
//! One log holds the recent changes of the whole store. Each scope that somebody watches has a [`Hub`]: the recent
//! changes in this scope alone, and one signal for all who watch it. A watcher is a cursor: it reads from the hub, or
//! from the log when it starts at an older revision. So a change costs one look-up for each level of its key, whatever
//! the number of watchers, and each watcher is woken only for its own scope, once for a whole group of changes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::{Error, Event, Watch};

/// Most changes that a hub holds; who is further behind reads the log.
const HUB_EVENTS: usize = 1024;

/// Most changes that a reader of the log looks at under one hold of its lock.
const SCAN_EVENTS: usize = 8192;

/// Most changes that compaction forgets under one hold of the lock.
pub(crate) const FORGET_AT_ONCE: usize = 2048;

/// Whether `key` lies in `scope`.
pub(crate) fn in_scope(scope: &str, key: &str) -> bool {
    if scope.ends_with('/') { key.starts_with(scope) } else { key == scope }
}

/// The scopes that contain `key`: itself and each of its folders.
fn scopes(key: &str) -> impl Iterator<Item = &str> {
    key.match_indices('/').map(|(at, _)| &key[..=at]).filter(|scope| scope.len() < key.len()).chain([key])
}

/// The bounds of the log of changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Most changes.
    pub(crate) events: usize,
    /// Most bytes that the changes keep in memory.
    pub(crate) bytes: usize,
}

/// The changes after revision `oldest` up to `newest`.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) events: VecDeque<Arc<Event>>,
    pub(crate) oldest: u64,
    pub(crate) newest: u64,
    bytes: usize,
}

impl Past {
    /// The changes after `revision`.
    pub(crate) fn after(&self, revision: u64) -> impl Iterator<Item = &Arc<Event>> {
        let start = self.events.partition_point(|event| event.revision() <= revision);
        self.events.range(start..)
    }

    fn push(&mut self, event: Arc<Event>) {
        self.newest = event.revision();
        self.bytes += event.weight();
        self.events.push_back(event);
    }

    /// Forgets the oldest change; returned to be dropped outside of the lock.
    fn pop(&mut self) -> Option<Arc<Event>> {
        let event = self.events.pop_front()?;
        self.bytes -= event.weight();
        self.oldest = event.revision();
        Some(event)
    }
}

/// The log, and who reads it.
#[derive(Debug)]
pub(crate) struct Ledger {
    bounds: Bounds,
    past: RwLock<Past>,
    hubs: RwLock<HashMap<Arc<str>, Arc<Hub>>>,
    ended: RwLock<Option<Error>>,
}

/// What a reader got.
pub(crate) struct Read {
    pub(crate) events: Vec<Arc<Event>>,
    /// There is nothing else in the scope up to this revision.
    pub(crate) up_to: u64,
    /// Whether `up_to` was the newest revision.
    pub(crate) complete: bool,
}

impl Ledger {
    /// A log that begins after `revision`.
    pub(crate) fn new(revision: u64, bounds: Bounds) -> Ledger {
        Ledger {
            bounds,
            past: RwLock::new(Past { events: VecDeque::new(), oldest: revision, newest: revision, bytes: 0 }),
            hubs: RwLock::default(),
            ended: RwLock::new(None),
        }
    }

    pub(crate) fn past(&self) -> parking_lot::RwLockReadGuard<'_, Past> {
        self.past.read()
    }

    /// Adds changes in the order of their revisions. The caller is the only one to do so; [`Ledger::wake`] follows.
    /// `newest` is at least the revision of the last.
    pub(crate) fn publish(&self, events: &[Arc<Event>], newest: u64) -> Dirty {
        let hubs = self.hubs.read();
        let mut forgotten = Vec::new();
        let mut dirty: Vec<Arc<Hub>> = Vec::new();
        // Hubs first: a reader takes the newest revision from the log, then looks into its hub.
        for event in events {
            for scope in scopes(&event.entry.key) {
                if let Some(hub) = hubs.get(scope)
                    && hub.push(event)
                {
                    dirty.push(hub.clone());
                }
            }
        }
        let mut past = self.past.write();
        for event in events {
            past.push(event.clone());
        }
        past.newest = past.newest.max(newest);
        while past.events.len() > self.bounds.events || past.bytes > self.bounds.bytes {
            let Some(event) = past.pop() else { break };
            forgotten.push(event);
        }
        drop(past);
        Dirty { hubs: dirty, _forgotten: forgotten }
    }

    /// Forgets the changes up to `revision`, at most `limit`; whether all of them are forgotten now.
    pub(crate) fn forget(&self, revision: u64, limit: usize) -> bool {
        let mut forgotten = Vec::new();
        let mut past = self.past.write();
        while forgotten.len() < limit && past.events.front().is_some_and(|event| event.revision() <= revision) {
            forgotten.extend(past.pop());
        }
        let done = past.events.front().is_none_or(|event| event.revision() > revision);
        if done {
            past.oldest = past.oldest.max(revision.min(past.newest));
        }
        drop(past);
        if done {
            for hub in self.hubs.read().values() {
                hub.forget(revision);
            }
        }
        done
    }

    /// Forgets the changes up to `revision`, letting others have the lock in between.
    pub(crate) async fn forget_slowly(&self, revision: u64) {
        while !self.forget(revision, FORGET_AT_ONCE) {
            tokio::task::yield_now().await;
        }
    }

    /// Begins anew after `revision`, since changes before it are lost: who has not read up to here has to list again.
    pub(crate) fn restart(&self, revision: u64) {
        let hubs = self.hubs.write();
        {
            let mut past = self.past.write();
            *past = Past { events: VecDeque::new(), oldest: revision, newest: revision, bytes: 0 };
        }
        for hub in hubs.values() {
            hub.restart(revision);
            hub.wake();
        }
    }

    /// A watch of `scope` after `revision`.
    pub(crate) fn watch(self: &Arc<Self>, scope: &str, revision: u64) -> Result<Watch, Error> {
        let mut hubs = self.hubs.write();
        let oldest = self.past.read().oldest;
        if revision < oldest {
            return Err(Error::Compacted { requested: revision, oldest });
        }
        let hub = match hubs.get(scope) {
            Some(hub) => hub.clone(),
            None => {
                let scope: Arc<str> = scope.into();
                let hub = Arc::new(Hub::new(scope.clone(), self.past.read().newest));
                hubs.insert(scope, hub.clone());
                hub
            }
        };
        hub.watchers.fetch_add(1, Ordering::Relaxed);
        Ok(Watch::new(self.clone(), hub, revision))
    }

    /// Drops the hub with its last watcher, which calls this.
    pub(crate) fn release(&self, hub: &Arc<Hub>) {
        let mut hubs = self.hubs.write();
        if hub.watchers.fetch_sub(1, Ordering::Relaxed) == 1 {
            hubs.remove(hub.scope());
        }
    }

    /// At most `limit` changes of the hub's scope after `at`.
    pub(crate) fn read(&self, hub: &Hub, at: u64, limit: usize) -> Result<Read, Error> {
        let newest = self.past.read().newest;
        if let Some((events, more)) = hub.read(at, limit) {
            // The hub may know of changes that the log does not have yet; `newest` was read first, so it holds.
            let last = events.last().map_or(0, |event| event.revision());
            let up_to = if more { last } else { newest.max(last) };
            return Ok(Read { events, up_to, complete: !more });
        }
        let past = self.past.read();
        if at < past.oldest {
            return Err(Error::TooSlow { at, oldest: past.oldest });
        }
        let (mut events, mut up_to) = (Vec::new(), at);
        for event in past.after(at).take(SCAN_EVENTS) {
            up_to = event.revision();
            if in_scope(hub.scope(), &event.entry.key) {
                events.push(event.clone());
                if events.len() == limit {
                    break;
                }
            }
        }
        if past.events.back().is_none_or(|event| event.revision() <= up_to) {
            up_to = past.newest;
        }
        Ok(Read { events, up_to, complete: up_to == past.newest })
    }

    /// Ends all watches with `error`.
    pub(crate) fn end(&self, error: Error) {
        *self.ended.write() = Some(error);
        for hub in self.hubs.read().values() {
            hub.changed.send_modify(|_| ());
        }
    }

    /// Why there will be no more changes.
    pub(crate) fn ended(&self) -> Option<Error> {
        self.ended.read().clone()
    }
}

/// What is left to do after a publication, outside of all locks: waking the watchers of the hubs that have changes, and
/// freeing what the bounds of the log pushed out.
#[must_use]
pub(crate) struct Dirty {
    hubs: Vec<Arc<Hub>>,
    _forgotten: Vec<Arc<Event>>,
}

impl Dirty {
    /// Wakes the watchers, each once.
    pub(crate) fn wake(self) {
        for hub in self.hubs {
            hub.wake();
        }
    }
}

/// The recent changes of one scope.
#[derive(Debug)]
pub(crate) struct Hub {
    scope: Arc<str>,
    ring: RwLock<Ring>,
    changed: watch::Sender<u64>,
    /// How many watch it; changed under the lock of the ledger's hubs only.
    watchers: AtomicUsize,
}

/// All changes of the scope after `floor`.
#[derive(Debug)]
struct Ring {
    events: VecDeque<Arc<Event>>,
    floor: u64,
    dirty: bool,
}

impl Hub {
    fn new(scope: Arc<str>, floor: u64) -> Hub {
        let ring = RwLock::new(Ring { events: VecDeque::new(), floor, dirty: false });
        Hub { scope, ring, changed: watch::Sender::new(floor), watchers: AtomicUsize::new(0) }
    }

    pub(crate) fn scope(&self) -> &str {
        &self.scope
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether it was clean before.
    fn push(&self, event: &Arc<Event>) -> bool {
        let mut ring = self.ring.write();
        if ring.events.len() == HUB_EVENTS
            && let Some(oldest) = ring.events.pop_front()
        {
            ring.floor = oldest.revision();
        }
        ring.events.push_back(event.clone());
        !std::mem::replace(&mut ring.dirty, true)
    }

    fn restart(&self, revision: u64) {
        let mut ring = self.ring.write();
        ring.events.clear();
        ring.floor = revision;
    }

    /// Drops the changes up to `revision`: whoever has not read them has fallen behind.
    fn forget(&self, revision: u64) {
        let mut ring = self.ring.write();
        while ring.events.front().is_some_and(|event| event.revision() <= revision) {
            if let Some(event) = ring.events.pop_front() {
                ring.floor = event.revision();
            }
        }
    }

    fn wake(&self) {
        let newest = {
            let mut ring = self.ring.write();
            ring.dirty = false;
            ring.events.back().map_or(ring.floor, |event| event.revision())
        };
        self.changed.send_replace(newest);
    }

    /// At most `limit` changes after `at`, and whether there are more; `None` if the ring does not reach back so far.
    fn read(&self, at: u64, limit: usize) -> Option<(Vec<Arc<Event>>, bool)> {
        let ring = self.ring.read();
        if at < ring.floor {
            return None;
        }
        let start = ring.events.partition_point(|event| event.revision() <= at);
        let events = ring.events.range(start..).take(limit).cloned().collect();
        Some((events, ring.events.len() - start > limit))
    }
}

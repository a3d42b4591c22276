//! Shared, decoded caches of stored objects, for the controllers and the scheduler of the same process.
//!
//! One [`Informer`] a kind: it lists the kind's objects, watches the store from there, and decodes each version once for
//! everyone. Readers hold `Arc`s; subscribers get deltas. A subscriber that falls behind sees several changes of one object
//! as one, so its memory is bounded by the number of objects, and no delta is ever lost.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Debug;
use std::ops::Bound;
use std::sync::{Arc, Weak};
use std::time::Duration;

use coracle_store::{Entry, Error, EventKind, ListOptions, SharedStore};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};

/// Pause after a failed list, before the next.
const RETRY: Duration = Duration::from_millis(200);

/// A type whose objects can be cached.
pub trait Cached: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static {}
impl<K> Cached for K where K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{}

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

/// The informers of a server, one a kind, made when first asked for.
pub struct Informers {
    store: SharedStore,
    made: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

impl Informers {
    /// Informers over a store.
    pub fn new(store: SharedStore) -> Self {
        Self { store, made: Mutex::default() }
    }

    /// The informer of a kind whose objects lie below `prefix`. Must be called within a tokio runtime, which runs it.
    pub fn get<K: Cached>(&self, prefix: &str) -> Arc<Informer<K>> {
        let mut made = self.made.lock();
        if let Some(informer) = made.get(&TypeId::of::<K>()).and_then(|any| any.clone().downcast().ok()) {
            return informer;
        }
        let informer = Informer::start(self.store.clone(), prefix);
        made.insert(TypeId::of::<K>(), informer.clone());
        informer
    }
}

/// The cache of one kind.
pub struct Informer<K> {
    prefix: Arc<str>,
    state: RwLock<State<K>>,
    /// The revision up to which the cache has seen everything; 0 before the first list.
    revision: watch::Sender<u64>,
}

struct State<K> {
    objects: BTreeMap<Arc<str>, Arc<K>>,
    feeds: Vec<Weak<Feed<K>>>,
    indexes: Vec<Arc<IndexState<K>>>,
}

impl<K: Cached> Informer<K> {
    fn start(store: SharedStore, prefix: &str) -> Arc<Self> {
        let state = State { objects: BTreeMap::new(), feeds: Vec::new(), indexes: Vec::new() };
        let informer =
            Arc::new(Self { prefix: prefix.into(), state: RwLock::new(state), revision: watch::Sender::new(0) });
        let weak = Arc::downgrade(&informer);
        tokio::spawn(async move {
            loop {
                let Some(informer) = weak.upgrade() else { return };
                match informer.follow(&*store).await {
                    Error::Closed => return,
                    error => tracing::debug!(kind = %K::kind(&()), %error, "listing again"),
                }
                drop(informer);
                tokio::time::sleep(RETRY).await;
            }
        });
        informer
    }

    /// Lists, then follows the watch until it breaks.
    async fn follow(&self, store: &dyn coracle_store::Store) -> Error {
        let listing = match store.list(&self.prefix, ListOptions::default()).await {
            Ok(listing) => listing,
            Err(error) => return error,
        };
        let mut watch = match store.watch(&self.prefix, listing.revision).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        self.replace(&listing.entries);
        self.revision.send_replace(listing.revision);
        loop {
            match watch.next().await {
                Ok(batch) => {
                    let mut state = self.state.write();
                    for event in &batch.events {
                        let new = (event.kind == EventKind::Put).then(|| decode(&event.entry)).flatten();
                        state.change(event.entry.key.clone(), new);
                    }
                    drop(state);
                    self.revision.send_replace(batch.revision);
                }
                Err(error) => return error,
            }
        }
    }

    /// Makes the cache equal to a listing; what did not change causes no delta.
    fn replace(&self, entries: &[Entry]) {
        let listed: BTreeSet<&str> = entries.iter().map(|entry| &*entry.key).collect();
        let mut state = self.state.write();
        let gone: Vec<_> = state.objects.keys().filter(|key| !listed.contains(&***key)).cloned().collect();
        for key in gone {
            state.change(key, None);
        }
        for entry in entries {
            let revision = entry.revision.to_string();
            let known = state.objects.get(&entry.key).and_then(|object| object.meta().resource_version.as_deref());
            if known != Some(&revision) {
                let new = decode(entry);
                state.change(entry.key.clone(), new);
            }
        }
    }

    fn key(&self, namespace: &str, name: &str) -> String {
        if namespace.is_empty() {
            format!("{}{name}", self.prefix)
        } else {
            format!("{}{namespace}/{name}", self.prefix)
        }
    }

    /// An object by namespace (empty for cluster-scoped kinds) and name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.state.read().objects.get(&*self.key(namespace, name)).cloned()
    }

    /// All objects, by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.state.read().objects.values().cloned().collect()
    }

    /// The objects of one namespace, by name.
    pub fn list_ns(&self, namespace: &str) -> Vec<Arc<K>> {
        let folder = self.key(namespace, "");
        let state = self.state.read();
        let from = (Bound::Included(&*folder), Bound::Unbounded);
        state
            .objects
            .range::<str, _>(from)
            .take_while(|(key, _)| key.starts_with(&folder))
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A way to find objects by something else than their name; kept up to date with the cache.
    pub fn index(&self, keys: impl Fn(&K) -> Vec<String> + Send + Sync + 'static) -> Index<K> {
        let index = Arc::new(IndexState { keys: Box::new(keys), found: RwLock::default() });
        let mut state = self.state.write();
        for (key, object) in &state.objects {
            index.change(key, None, Some(object));
        }
        state.indexes.push(index.clone());
        Index { state: index }
    }

    /// The deltas from now on, the objects that exist first.
    pub fn subscribe(&self) -> Deltas<K> {
        let feed = Arc::new(Feed {
            pending: Mutex::new(Pending { order: VecDeque::new(), deltas: HashMap::new() }),
            more: Notify::new(),
        });
        let mut state = self.state.write();
        for (key, object) in &state.objects {
            feed.push(key, &Delta { old: None, new: Some(object.clone()) });
        }
        state.feeds.retain(|feed| feed.strong_count() > 0);
        state.feeds.push(Arc::downgrade(&feed));
        Deltas { feed }
    }

    /// Waits for the first full list.
    pub async fn synced(&self) {
        self.reached(1).await;
    }

    /// Waits until the cache shows the write with this revision, which must be one of this kind.
    pub async fn reached(&self, revision: u64) {
        // The sender lives as long as self, so waiting cannot fail.
        let _ = self.revision.subscribe().wait_for(|seen| *seen >= revision).await;
    }

    /// Waits until the cache shows that the object with this name and UID is gone or being deleted.
    pub async fn deleted(&self, namespace: &str, name: &str, uid: &str) {
        let there = || {
            self.get(namespace, name).is_some_and(|object| {
                object.meta().uid.as_deref() == Some(uid) && object.meta().deletion_timestamp.is_none()
            })
        };
        // The sender lives as long as self, so waiting cannot fail.
        let _ = self.revision.subscribe().wait_for(|_| !there()).await;
    }

    /// The revision up to which the cache has seen every change of its kind.
    pub fn revision(&self) -> u64 {
        *self.revision.borrow()
    }
}

/// The object of an entry; one that does not decode is left out and named, as one that was stored by a newer version.
fn decode<K: Cached>(entry: &Entry) -> Option<Arc<K>> {
    match serde_json::from_slice(&entry.value) {
        Ok(object) => Some(Arc::new(object)),
        Err(error) => {
            tracing::error!(key = %entry.key, %error, "a stored object is not of its kind and is left out");
            None
        }
    }
}

impl<K: Cached> State<K> {
    fn change(&mut self, key: Arc<str>, new: Option<Arc<K>>) {
        let old = match &new {
            Some(new) => self.objects.insert(key.clone(), new.clone()),
            None => self.objects.remove(&key),
        };
        if old.is_none() && new.is_none() {
            return;
        }
        for index in &self.indexes {
            index.change(&key, old.as_ref(), new.as_ref());
        }
        let delta = Delta { old, new };
        self.feeds.retain(|feed| feed.upgrade().map(|feed| feed.push(&key, &delta)).is_some());
    }
}

/// The queue of one subscriber: at most one delta an object.
struct Feed<K> {
    pending: Mutex<Pending<K>>,
    more: Notify,
}

struct Pending<K> {
    order: VecDeque<Arc<str>>,
    deltas: HashMap<Arc<str>, Delta<K>>,
}

impl<K> Feed<K> {
    fn push(&self, key: &Arc<str>, delta: &Delta<K>) {
        let mut pending = self.pending.lock();
        match pending.deltas.get_mut(key) {
            Some(waiting) => waiting.new.clone_from(&delta.new),
            None => {
                pending.deltas.insert(key.clone(), delta.clone());
                pending.order.push_back(key.clone());
            }
        }
        drop(pending);
        self.more.notify_one();
    }

    fn pop(&self) -> Option<Delta<K>> {
        let mut pending = self.pending.lock();
        loop {
            let key = pending.order.pop_front()?;
            let delta = pending.deltas.remove(&key)?;
            // Made and gone again before anybody looked.
            if delta.old.is_some() || delta.new.is_some() {
                return Some(delta);
            }
        }
    }
}

/// The deltas of one subscription.
pub struct Deltas<K> {
    feed: Arc<Feed<K>>,
}

impl<K> Deltas<K> {
    /// The next delta. Never ends while the informer lives; cancel-safe.
    pub async fn next(&mut self) -> Option<Delta<K>> {
        loop {
            if let Some(delta) = self.feed.pop() {
                return Some(delta);
            }
            self.feed.more.notified().await;
        }
    }

    /// The next delta if one is there already.
    pub fn try_next(&mut self) -> Option<Delta<K>> {
        self.feed.pop()
    }
}

/// The values by which an index knows an object.
type IndexKeys<K> = Box<dyn Fn(&K) -> Vec<String> + Send + Sync>;

/// The objects of each value, by namespace and name.
type Indexed<K> = HashMap<String, BTreeMap<Arc<str>, Arc<K>>>;

struct IndexState<K> {
    keys: IndexKeys<K>,
    found: RwLock<Indexed<K>>,
}

impl<K> IndexState<K> {
    fn change(&self, key: &Arc<str>, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        let mut found = self.found.write();
        for value in old.map(|old| (self.keys)(old)).into_iter().flatten() {
            if let Some(objects) = found.get_mut(&value) {
                objects.remove(key);
                if objects.is_empty() {
                    found.remove(&value);
                }
            }
        }
        if let Some(new) = new {
            for value in (self.keys)(new) {
                found.entry(value).or_default().insert(key.clone(), new.clone());
            }
        }
    }
}

/// Objects by a value computed from them.
pub struct Index<K> {
    state: Arc<IndexState<K>>,
}

impl<K> Index<K> {
    /// The objects with this value, by namespace and name.
    pub fn get(&self, value: &str) -> Vec<Arc<K>> {
        self.state.found.read().get(value).map(|objects| objects.values().cloned().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(name: &str, value: &str) -> Arc<ConfigMap> {
        let json = serde_json::json!({"metadata": {"name": name, "namespace": "n"}, "data": {"value": value}});
        Arc::new(serde_json::from_value(json).expect("a ConfigMap"))
    }

    fn informer() -> Informer<ConfigMap> {
        let state = State { objects: BTreeMap::new(), feeds: Vec::new(), indexes: Vec::new() };
        Informer { prefix: "/r/".into(), state: RwLock::new(state), revision: watch::Sender::new(0) }
    }

    fn value(delta: &Option<Arc<ConfigMap>>) -> Option<String> {
        delta.as_ref().and_then(|map| map.data.as_ref()?.get("value").cloned())
    }

    #[test]
    fn a_slow_subscriber_sees_changes_of_one_object_as_one() {
        let informer = informer();
        informer.state.write().change("/r/n/a".into(), Some(object("a", "0")));
        let mut deltas = informer.subscribe();
        informer.state.write().change("/r/n/a".into(), Some(object("a", "1")));
        informer.state.write().change("/r/n/b".into(), Some(object("b", "1")));
        informer.state.write().change("/r/n/b".into(), None);
        let first = deltas.try_next().expect("a delta");
        assert_eq!((value(&first.old), value(&first.new)), (None, Some("1".into())));
        assert!(deltas.try_next().is_none(), "an object that came and went is no news");
        informer.state.write().change("/r/n/a".into(), Some(object("a", "2")));
        informer.state.write().change("/r/n/a".into(), None);
        let last = deltas.try_next().expect("a delta");
        assert_eq!((value(&last.old), value(&last.new)), (Some("1".into()), None));
    }

    #[test]
    fn indexes_follow_the_cache() {
        let informer = informer();
        informer.state.write().change("/r/n/a".into(), Some(object("a", "x")));
        let index = informer.index(|map| map.data.iter().flat_map(|data| data.values().cloned()).collect());
        assert_eq!(index.get("x").len(), 1);
        informer.state.write().change("/r/n/a".into(), Some(object("a", "y")));
        assert!(index.get("x").is_empty());
        assert_eq!(index.get("y").len(), 1);
        assert_eq!(informer.list_ns("n").len(), 1);
        assert!(informer.list_ns("").is_empty() || informer.len() == 1);
    }
}

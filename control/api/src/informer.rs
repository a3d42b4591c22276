//! Shared caches of stored objects, for the controllers and the scheduler of the same process.
//!
//! One [`Informer`] a kind: it lists the kind's objects and watches the store from there. It holds the store's own bytes, so
//! that an object costs its memory once; who looks at one gets it decoded, and whoever looks soon after shares it. Readers
//! hold `Arc`s; subscribers get deltas. A subscriber that falls behind sees several changes of one object as one, so its
//! memory is bounded by the number of objects, and no delta is ever lost.

mod held;

mod feed;
mod index;

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Debug;
use std::ops::Bound;
use std::sync::{Arc, Weak};
use std::time::Duration;

use coracle_store::{Entry, Error, EventKind, ListOptions, SharedStore};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

pub use feed::{Delta, Deltas};
pub use held::Objects;
pub use index::{Digests, Index};

use feed::Feed;
use held::{Held, Recent};
use index::{DigestState, Follow, IndexState};

/// Pause after a failed list, before the next.
const RETRY: Duration = Duration::from_millis(200);
/// Changes that are taken in under one hold of the lock.
const CHANGES_AT_ONCE: usize = 256;

/// A type whose objects can be cached.
pub trait Cached: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static {}
impl<K> Cached for K where K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{}

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
    state: Arc<RwLock<State<K>>>,
    recent: Arc<Recent<K>>,
    /// The revision up to which the cache has seen everything; 0 before the first list.
    revision: watch::Sender<u64>,
}

struct State<K> {
    objects: BTreeMap<Arc<str>, Arc<Held<K>>>,
    /// Before the first list has been taken in, which is done in order of the keys.
    loading: bool,
    feeds: Vec<Weak<Feed<K>>>,
    indexes: Vec<Arc<dyn Follow<K>>>,
}

/// An object's newest version, or `None` when it is gone.
type Change<K> = (Arc<str>, Option<Arc<Held<K>>>);

impl<K: Cached> Informer<K> {
    fn new(prefix: &str) -> Self {
        let state = State { objects: BTreeMap::new(), loading: true, feeds: Vec::new(), indexes: Vec::new() };
        Self {
            prefix: prefix.into(),
            state: Arc::new(RwLock::new(state)),
            recent: Arc::default(),
            revision: watch::Sender::new(0),
        }
    }

    fn start(store: SharedStore, prefix: &str) -> Arc<Self> {
        let informer = Arc::new(Self::new(prefix));
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
        for changes in self.differences(&listing.entries).chunks(CHANGES_AT_ONCE) {
            self.change(changes);
            tokio::task::yield_now().await;
        }
        self.state.write().loaded();
        self.revision.send_replace(listing.revision);
        drop(listing);
        loop {
            let batch = match watch.next().await {
                Ok(batch) => batch,
                Err(error) => return error,
            };
            let held =
                |event: &coracle_store::Event| (event.kind == EventKind::Put).then(|| Held::new(event.entry.clone()));
            let changes: Vec<Change<K>> =
                batch.events.iter().map(|event| (event.entry.key.clone(), held(event))).collect();
            self.change(&changes);
            self.revision.send_replace(batch.revision);
        }
    }

    /// What makes the cache equal to a listing, by key.
    fn differences(&self, entries: &[Entry]) -> Vec<Change<K>> {
        let listed: BTreeSet<&str> = entries.iter().map(|entry| &*entry.key).collect();
        let state = self.state.read();
        let gone = state.objects.keys().filter(|key| !listed.contains(&***key)).map(|key| (key.clone(), None));
        let known = |entry: &Entry| state.objects.get(&entry.key).map(|held| held.revision());
        let new = entries.iter().filter(|entry| known(entry) != Some(entry.revision));
        gone.chain(new.map(|entry| (entry.key.clone(), Some(Held::new(entry.clone()))))).collect()
    }

    /// Takes changes in; this is done by one task alone.
    fn change(&self, changes: &[Change<K>]) {
        // What several will look at is decoded once, and not under the lock.
        let state = self.state.read();
        if !state.feeds.is_empty() || state.indexes.len() > 1 {
            let old: Vec<_> = changes.iter().filter_map(|(key, _)| state.objects.get(key)).cloned().collect();
            drop(state);
            for held in old.iter().chain(changes.iter().filter_map(|(_, held)| held.as_ref())) {
                let _ = held.object(&self.recent);
            }
        } else {
            drop(state);
        }
        let mut state = self.state.write();
        for (key, held) in changes {
            state.change(key, held.as_ref());
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
        let held = self.state.read().objects.get(&*self.key(namespace, name)).cloned();
        held?.object(&self.recent)
    }

    /// All objects, by namespace and name.
    pub fn list(&self) -> Objects<K> {
        Objects::new(self.state.read().objects.values().cloned().collect(), &self.recent)
    }

    /// The objects of one namespace, by name.
    pub fn list_ns(&self, namespace: &str) -> Objects<K> {
        let folder = self.key(namespace, "");
        let state = self.state.read();
        let from = (Bound::Included(&*folder), Bound::Unbounded);
        let inside = state.objects.range::<str, _>(from).take_while(|(key, _)| key.starts_with(&folder));
        Objects::new(inside.map(|(_, held)| held.clone()).collect(), &self.recent)
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
    pub fn index<V: Ord + Send + Sync + 'static>(
        &self,
        values: impl Fn(&K) -> Vec<V> + Send + Sync + 'static,
    ) -> Index<K, V> {
        let index = Arc::new(IndexState::new(values));
        self.attach(index.clone());
        Index { state: index, recent: self.recent.clone() }
    }

    /// What is computed of each object, with a value to find it by; kept up to date with the cache.
    pub fn digests<V: Ord + Send + Sync + 'static, D: Send + Sync + 'static>(
        &self,
        digest: impl Fn(&K) -> (V, D) + Send + Sync + 'static,
    ) -> Digests<K, D, V> {
        let state = Arc::new(DigestState::new(digest));
        self.attach(state.clone());
        Digests { state }
    }

    fn attach(&self, index: Arc<dyn Follow<K>>) {
        // Objects are decoded without the lock; few change meanwhile.
        let known = self.state.read().objects.clone();
        for (key, held) in &known {
            index.change(key, None, Some(held));
        }
        let mut state = self.state.write();
        let same = |there: Option<&Arc<Held<K>>>, held| there.is_some_and(|there| Arc::ptr_eq(there, held));
        for (key, held) in known.iter().filter(|(key, held)| !same(state.objects.get(*key), held)) {
            index.change(key, Some(held), None);
        }
        for (key, held) in state.objects.iter().filter(|(key, held)| !same(known.get(*key), held)) {
            index.change(key, None, Some(held));
        }
        state.indexes.push(index);
    }

    /// The deltas from now on, the objects that exist first.
    pub fn subscribe(&self) -> Deltas<K> {
        let feed = Arc::new(Feed::new());
        let mut state = self.state.write();
        state.feeds.retain(|feed| feed.strong_count() > 0);
        state.feeds.push(Arc::downgrade(&feed));
        Deltas { feed, state: self.state.clone(), recent: self.recent.clone(), walked: VecDeque::new() }
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

impl<K> State<K> {
    fn change(&mut self, key: &Arc<str>, new: Option<&Arc<Held<K>>>) {
        let old = match new {
            Some(new) => self.objects.insert(key.clone(), new.clone()),
            None => self.objects.remove(key),
        };
        if old.is_none() && new.is_none() {
            return;
        }
        for index in &self.indexes {
            index.change(key, old.as_ref(), new);
        }
        self.feeds.retain(|feed| feed.upgrade().map(|feed| feed.push(key, old.as_ref(), new)).is_some());
    }

    /// The first list has been taken in.
    fn loaded(&mut self) {
        self.loading = false;
        self.feeds.iter().filter_map(Weak::upgrade).for_each(|feed| feed.wake());
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;

    fn put(informer: &Informer<ConfigMap>, name: &str, value: &str) {
        let json = json!({"metadata": {"name": name, "namespace": "n"}, "data": {"value": value}}).to_string();
        let key: Arc<str> = format!("/r/n/{name}").into();
        let entry = Entry { key: key.clone(), revision: 1, create_revision: 1, value: json.into(), splice: 0 };
        informer.change(&[(key, Some(Held::new(entry)))]);
    }

    fn remove(informer: &Informer<ConfigMap>, name: &str) {
        informer.change(&[(format!("/r/n/{name}").into(), None)]);
    }

    fn informer() -> Informer<ConfigMap> {
        let informer = Informer::new("/r/");
        informer.state.write().loaded();
        informer
    }

    fn value(delta: &Option<Arc<ConfigMap>>) -> Option<String> {
        delta.as_ref().and_then(|map| map.data.as_ref()?.get("value").cloned())
    }

    #[test]
    fn a_slow_subscriber_sees_changes_of_one_object_as_one() {
        let informer = informer();
        put(&informer, "a", "0");
        let mut deltas = informer.subscribe();
        put(&informer, "a", "1");
        put(&informer, "b", "1");
        remove(&informer, "b");
        let first = deltas.try_next().expect("a delta");
        assert_eq!((value(&first.old), value(&first.new)), (None, Some("1".into())));
        assert!(deltas.try_next().is_none(), "an object that came and went is no news");
        put(&informer, "a", "2");
        put(&informer, "b", "2");
        remove(&informer, "b");
        remove(&informer, "a");
        let last = deltas.try_next().expect("a delta");
        assert_eq!((value(&last.old), value(&last.new)), (Some("1".into()), None));
        assert!(deltas.try_next().is_none(), "an object that came and went is no news");
    }

    #[test]
    fn a_subscriber_walks_through_what_is_there_while_it_changes() {
        let informer = Informer::new("/r/");
        let mut deltas = informer.subscribe();
        assert!(deltas.try_next().is_none());
        for number in 100..300 {
            put(&informer, &number.to_string(), "0");
        }
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        let mut take = |deltas: &mut Deltas<ConfigMap>, most: usize| {
            for _ in 0..most {
                let Some(delta) = deltas.try_next() else { break };
                let object = delta.new.clone().or(delta.old.clone()).expect("an object");
                let name = object.metadata.name.clone().expect("a name");
                let before = match value(&delta.new) {
                    Some(value) => seen.insert(name, value),
                    None => seen.remove(&name),
                };
                assert_eq!(before, value(&delta.old), "each delta begins where the one before ended");
            }
            seen.clone()
        };
        take(&mut deltas, 10);
        put(&informer, "105", "1");
        put(&informer, "160", "1");
        put(&informer, "250", "1");
        remove(&informer, "106");
        remove(&informer, "251");
        informer.state.write().loaded();
        put(&informer, "999", "1");
        let seen = take(&mut deltas, 1000);
        let there: BTreeMap<_, _> = informer
            .list()
            .map(|map| (map.metadata.name.clone().expect("a name"), map.data.clone().expect("data")["value"].clone()))
            .collect();
        assert_eq!(seen, there);
        assert_eq!(there.len(), 199);
    }

    #[test]
    fn indexes_follow_the_cache() {
        let informer = informer();
        put(&informer, "a", "x");
        let index = informer.index(|map| map.data.iter().flat_map(|data| data.values().cloned()).collect());
        assert_eq!(index.get("x").count(), 1);
        put(&informer, "a", "y");
        put(&informer, "b", "z");
        assert_eq!(index.get("x").count(), 0);
        assert_eq!(index.get("y").count(), 1);
        let names =
            |objects: Objects<ConfigMap>| objects.filter_map(|map| map.metadata.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(index.select("x".to_owned().., |value| value != "y")), ["b"]);
        remove(&informer, "b");
        assert_eq!(names(index.select("x".to_owned().., |_| true)), ["a"]);
        assert_eq!(informer.list_ns("n").count(), 1);
        assert_eq!(informer.list_ns("m").count(), 0);
    }
}

//! Finding cached objects by something else than their names.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::RangeBounds;
use std::sync::Arc;

use parking_lot::RwLock;

use super::Cached;
use super::held::{Held, Objects, Recent};

/// The values by which an index knows an object.
type Values<K, V> = Box<dyn Fn(&K) -> Vec<V> + Send + Sync>;

/// The objects of each value, by namespace and name.
type Found<K, V> = BTreeMap<V, BTreeMap<Arc<str>, Arc<Held<K>>>>;

/// An index without the type of its values: what keeping it up to date needs.
pub(super) trait Follow<K>: Send + Sync {
    fn change(&self, key: &Arc<str>, old: Option<&Arc<Held<K>>>, new: Option<&Arc<Held<K>>>);
}

pub(super) struct IndexState<K, V> {
    values: Values<K, V>,
    found: RwLock<Found<K, V>>,
}

impl<K, V: Ord> IndexState<K, V> {
    pub(super) fn new(values: impl Fn(&K) -> Vec<V> + Send + Sync + 'static) -> Self {
        Self { values: Box::new(values), found: RwLock::default() }
    }
}

impl<K: Cached, V: Ord + Send + Sync> Follow<K> for IndexState<K, V> {
    fn change(&self, key: &Arc<str>, old: Option<&Arc<Held<K>>>, new: Option<&Arc<Held<K>>>) {
        let values = |held: &Arc<Held<K>>| held.glance().map(|object| (self.values)(&object)).unwrap_or_default();
        let (before, now) = (old.map(values).unwrap_or_default(), new.map(values).unwrap_or_default());
        let mut found = self.found.write();
        for value in before.iter().filter(|value| !now.contains(value)) {
            if let Some(objects) = found.get_mut(value) {
                objects.remove(key);
                if objects.is_empty() {
                    found.remove(value);
                }
            }
        }
        if let Some(new) = new {
            for value in now {
                found.entry(value).or_default().insert(key.clone(), new.clone());
            }
        }
    }
}

/// Objects by a value computed from them.
pub struct Index<K, V = String> {
    pub(super) state: Arc<IndexState<K, V>>,
    pub(super) recent: Arc<Recent<K>>,
}

impl<K, V: Ord> Index<K, V> {
    /// The objects with this value, by namespace and name.
    pub fn get<Q: Ord + ?Sized>(&self, value: &Q) -> Objects<K>
    where
        V: Borrow<Q>,
    {
        let found = self.state.found.read();
        Objects::new(found.get(value).into_iter().flat_map(BTreeMap::values).cloned().collect(), &self.recent)
    }

    /// The objects with a value among these that is wanted; asked once a value, however many objects have it.
    pub fn select(&self, among: impl RangeBounds<V>, mut wanted: impl FnMut(&V) -> bool) -> Objects<K> {
        let found = self.state.found.read();
        let selected = found.range(among).filter(|(value, _)| wanted(value));
        Objects::new(selected.flat_map(|(_, objects)| objects.values()).cloned().collect(), &self.recent)
    }
}

/// How a digest is computed: the value by which it is found, and itself.
type Digest<K, V, D> = Box<dyn Fn(&K) -> (V, D) + Send + Sync>;

/// The digests of each value, by namespace and name.
type Digested<V, D> = BTreeMap<V, BTreeMap<Arc<str>, Arc<D>>>;

pub(super) struct DigestState<K, V, D> {
    digest: Digest<K, V, D>,
    found: RwLock<Digested<V, D>>,
}

impl<K, V: Ord, D> DigestState<K, V, D> {
    pub(super) fn new(digest: impl Fn(&K) -> (V, D) + Send + Sync + 'static) -> Self {
        Self { digest: Box::new(digest), found: RwLock::default() }
    }
}

impl<K: Cached, V: Ord + Send + Sync, D: Send + Sync> Follow<K> for DigestState<K, V, D> {
    fn change(&self, key: &Arc<str>, old: Option<&Arc<Held<K>>>, new: Option<&Arc<Held<K>>>) {
        let digest = |held: &Arc<Held<K>>| held.glance().map(|object| (self.digest)(&object));
        let (before, now) = (old.and_then(digest), new.and_then(digest));
        let mut found = self.found.write();
        if let Some((value, _)) = before
            && now.as_ref().is_none_or(|(now, _)| *now != value)
            && let Some(digests) = found.get_mut(&value)
        {
            digests.remove(key);
            if digests.is_empty() {
                found.remove(&value);
            }
        }
        if let Some((value, digest)) = now {
            found.entry(value).or_default().insert(key.clone(), Arc::new(digest));
        }
    }
}

/// What was computed of objects, for who goes through many again and again: the objects are decoded once a version, and need
/// not be kept.
pub struct Digests<K, D, V = String> {
    pub(super) state: Arc<DigestState<K, V, D>>,
}

impl<K, D, V: Ord> Digests<K, D, V> {
    /// The digests of the objects with this value, by namespace and name.
    pub fn get<Q: Ord + ?Sized>(&self, value: &Q) -> Vec<Arc<D>>
    where
        V: Borrow<Q>,
    {
        self.state.found.read().get(value).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }
}

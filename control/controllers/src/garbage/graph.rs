//! Who owns whom: every stored object with its owners, found by UID. A pure value that events change.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::Deserialize;

/// Finalizer of an object that goes after its dependents.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents stay.
pub(super) const ORPHAN: &str = "orphan";

/// What collection needs of an object; everything else in its JSON is skipped.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(super) struct Item {
    #[serde(default)]
    pub(super) api_version: String,
    #[serde(default)]
    pub(super) kind: String,
    pub(super) metadata: Metadata,
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) uid: Arc<str>,
    pub(super) deletion_timestamp: Option<String>,
    pub(super) finalizers: Vec<String>,
    pub(super) owner_references: Vec<Owner>,
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Owner {
    pub(super) uid: Arc<str>,
    pub(super) block_owner_deletion: bool,
}

impl Item {
    fn waits(&self, finalizer: &str) -> bool {
        self.metadata.deletion_timestamp.is_some() && self.metadata.finalizers.iter().any(|held| held == finalizer)
    }
}

/// What is to be done about one object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// Nothing.
    Keep,
    /// All its owners are gone or wait for it: delete it, after its own dependents if `foreground`. If one of these waits for
    /// its own dependents it may be in a circle with this one: then it is to hold up its owners no longer (`unblock`).
    Delete { foreground: bool, unblock: bool },
    /// Some owners live: only the references to the others go.
    Disown(Vec<Arc<str>>),
    /// Its dependents stay: take the references to it from these, then its finalizer.
    Orphan(Vec<Arc<str>>),
    /// It goes after its dependents and none blocks it any more: take its finalizer.
    Release(&'static str),
}

/// All objects, by their keys in the store.
#[derive(Debug, Default)]
pub(super) struct Graph {
    items: HashMap<Arc<str>, Arc<Item>>,
    by_uid: HashMap<Arc<str>, Arc<str>>,
    dependents: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
}

impl Graph {
    pub(super) fn get(&self, key: &str) -> Option<Arc<Item>> {
        self.items.get(key).cloned()
    }

    /// Takes a change in; returns the keys that it gives a reason to look at.
    pub(super) fn change(&mut self, key: &Arc<str>, new: Option<Item>) -> Vec<Arc<str>> {
        let mut touched = Vec::new();
        // Most changes are of a status, which is nothing to owners.
        if new.is_some() && self.items.get(key).map(|item| &**item) == new.as_ref() {
            return touched;
        }
        if let Some(old) = self.items.remove(key) {
            for owner in &old.metadata.owner_references {
                if let Some(dependents) = self.dependents.get_mut(&owner.uid) {
                    dependents.remove(key);
                    if dependents.is_empty() {
                        self.dependents.remove(&owner.uid);
                    }
                }
                // An owner that waits for its dependents has one less to wait for.
                touched.extend(self.by_uid.get(&owner.uid).cloned());
            }
            let replaced = new.as_ref().is_none_or(|new| new.metadata.uid != old.metadata.uid);
            if replaced {
                self.by_uid.remove(&old.metadata.uid);
                touched.extend(self.dependents_of(&old.metadata.uid));
            }
        }
        if let Some(new) = new {
            for owner in &new.metadata.owner_references {
                self.dependents.entry(owner.uid.clone()).or_default().insert(key.clone());
            }
            self.by_uid.insert(new.metadata.uid.clone(), key.clone());
            if new.waits(FOREGROUND) || new.waits(ORPHAN) {
                touched.extend(self.dependents_of(&new.metadata.uid));
                touched.push(key.clone());
            } else if !new.metadata.owner_references.is_empty() {
                touched.push(key.clone());
            }
            self.items.insert(key.clone(), Arc::new(new));
        }
        touched
    }

    fn dependents_of(&self, uid: &str) -> Vec<Arc<str>> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// All keys.
    pub(super) fn keys(&self) -> Vec<Arc<str>> {
        self.items.keys().cloned().collect()
    }

    /// The owner, if it is where its dependent may refer to it: in the same namespace, or in none.
    fn owner(&self, dependent: &Item, uid: &str) -> Option<&Arc<Item>> {
        let owner = self.items.get(self.by_uid.get(uid)?)?;
        let reachable = owner.metadata.namespace.is_empty() || owner.metadata.namespace == dependent.metadata.namespace;
        reachable.then_some(owner)
    }

    /// Whether an object refers to an owner that is in a namespace which the object may not refer into.
    pub(super) fn refers_astray(&self, item: &Item) -> bool {
        let known = |uid: &str| self.by_uid.contains_key(uid);
        item.metadata.owner_references.iter().any(|owner| known(&owner.uid) && self.owner(item, &owner.uid).is_none())
    }

    /// What is to be done about an object.
    pub(super) fn judge(&self, key: &str) -> Verdict {
        let Some(item) = self.items.get(key) else { return Verdict::Keep };
        if item.waits(ORPHAN) {
            return Verdict::Orphan(self.dependents_of(&item.metadata.uid));
        }
        if item.waits(FOREGROUND) {
            let blocked =
                self.dependents_of(&item.metadata.uid).iter().filter_map(|key| self.items.get(key)).any(|dependent| {
                    let blocks = |owner: &Owner| owner.uid == item.metadata.uid && owner.block_owner_deletion;
                    dependent.metadata.owner_references.iter().any(blocks)
                });
            return if blocked { Verdict::Keep } else { Verdict::Release(FOREGROUND) };
        }
        if item.metadata.deletion_timestamp.is_some() || item.metadata.owner_references.is_empty() {
            return Verdict::Keep;
        }
        let mut gone = Vec::new();
        let mut waiting = false;
        let mut solid = false;
        for reference in &item.metadata.owner_references {
            match self.owner(item, &reference.uid) {
                None => gone.push(reference.uid.clone()),
                Some(owner) if owner.waits(FOREGROUND) => {
                    waiting = true;
                    gone.push(reference.uid.clone());
                }
                Some(_) => solid = true,
            }
        }
        match (gone.is_empty(), solid) {
            (true, _) => Verdict::Keep,
            (false, true) => Verdict::Disown(gone),
            (false, false) => {
                let dependents = self.dependents_of(&item.metadata.uid);
                let circle = || {
                    let mut held = dependents.iter().filter_map(|key| self.items.get(key));
                    held.any(|dependent| dependent.waits(FOREGROUND))
                };
                let blocks = item.metadata.owner_references.iter().any(|owner| owner.block_owner_deletion);
                let foreground = waiting && !dependents.is_empty();
                Verdict::Delete { foreground, unblock: foreground && blocks && circle() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn item(uid: &str, owners: &[&str], finalizers: &[&str]) -> Item {
        let owners: Vec<_> = owners.iter().map(|uid| json!({"uid": uid, "blockOwnerDeletion": true})).collect();
        let deletion = (!finalizers.is_empty()).then_some("2026-01-01T00:00:00Z");
        let json = json!({"apiVersion": "v1", "kind": "A", "metadata": {
            "name": uid, "uid": uid, "ownerReferences": owners, "finalizers": finalizers, "deletionTimestamp": deletion,
        }});
        serde_json::from_value(json).expect("an item")
    }

    fn key(uid: &str) -> Arc<str> {
        format!("/{uid}").into()
    }

    fn graph(items: &[Item]) -> Graph {
        let mut graph = Graph::default();
        for item in items {
            graph.change(&key(&item.metadata.uid), Some(item.clone()));
        }
        graph
    }

    #[test]
    fn dependents_follow_their_owner() {
        let mut graph = graph(&[
            item("owner", &[], &[]),
            item("child", &["owner"], &[]),
            item("shared", &["owner", "other"], &[]),
            item("other", &[], &[]),
        ]);
        assert_eq!(graph.judge("/child"), Verdict::Keep);
        let mut touched = graph.change(&key("owner"), None);
        touched.sort();
        assert_eq!(touched, [key("child"), key("shared")]);
        assert_eq!(graph.judge("/child"), Verdict::Delete { foreground: false, unblock: false });
        assert_eq!(graph.judge("/shared"), Verdict::Disown(vec!["owner".into()]));
    }

    #[test]
    fn a_foreground_deletion_waits_for_the_last_dependent() {
        let mut graph = graph(&[
            item("owner", &[], &[FOREGROUND]),
            item("child", &["owner"], &[]),
            item("grandchild", &["child"], &[]),
        ]);
        assert_eq!(graph.judge("/owner"), Verdict::Keep);
        assert_eq!(graph.judge("/child"), Verdict::Delete { foreground: true, unblock: false });
        assert!(graph.change(&key("child"), None).contains(&key("owner")));
        assert_eq!(graph.judge("/owner"), Verdict::Release(FOREGROUND));
    }

    #[test]
    fn a_circle_is_broken_where_it_closes() {
        let mut graph = graph(&[item("a", &["c"], &[FOREGROUND]), item("b", &["a"], &[]), item("c", &["b"], &[])]);
        assert_eq!(graph.judge("/b"), Verdict::Delete { foreground: true, unblock: false });
        graph.change(&key("b"), Some(item("b", &["a"], &[FOREGROUND])));
        assert_eq!(graph.judge("/c"), Verdict::Delete { foreground: true, unblock: true });
        let mut freed = item("c", &["b"], &[FOREGROUND]);
        freed.metadata.owner_references[0].block_owner_deletion = false;
        graph.change(&key("c"), Some(freed));
        assert_eq!(graph.judge("/b"), Verdict::Release(FOREGROUND));
        graph.change(&key("b"), None);
        assert_eq!(graph.judge("/a"), Verdict::Release(FOREGROUND));
        graph.change(&key("a"), None);
        assert_eq!(graph.judge("/c"), Verdict::Release(FOREGROUND));
    }

    #[test]
    fn orphans_stay() {
        let graph = graph(&[item("owner", &[], &[ORPHAN]), item("child", &["owner"], &[])]);
        assert_eq!(graph.judge("/owner"), Verdict::Orphan(vec![key("child")]));
        assert_eq!(graph.judge("/child"), Verdict::Keep);
    }

    proptest! {
        /// Carrying out verdicts until none is left collects exactly what has owners and no living one.
        #[test]
        fn collection_ends_with_what_has_a_living_owner(edges in prop::collection::vec((0..8_usize, 0..8_usize), 0..20), dead in prop::collection::btree_set(0..8_usize, 0..4)) {
            let names: Vec<String> = (0..8).map(|index| format!("u{index}")).collect();
            let owners_of = |child: usize| edges.iter().filter(|(owner, of)| *of == child && *owner < child).map(|(owner, _)| *owner).collect::<BTreeSet<_>>();
            let mut graph = Graph::default();
            for child in 0..8 {
                let owners: Vec<&str> = owners_of(child).into_iter().map(|owner| names[owner].as_str()).collect();
                graph.change(&key(&names[child]), Some(item(&names[child], &owners, &[])));
            }
            for dead in &dead {
                graph.change(&key(&names[*dead]), None);
            }
            loop {
                let next = graph.keys().into_iter().map(|key| (graph.judge(&key), key)).find(|(verdict, _)| *verdict != Verdict::Keep);
                match next {
                    None => break,
                    Some((Verdict::Delete { .. }, key)) => { graph.change(&key, None); }
                    Some((Verdict::Disown(gone), key)) => {
                        let mut item = (*graph.get(&key).expect("an item")).clone();
                        item.metadata.owner_references.retain(|owner| !gone.contains(&owner.uid));
                        graph.change(&key, Some(item));
                    }
                    Some((verdict, _)) => prop_assert!(false, "{verdict:?}"),
                }
            }
            let mut alive = [true; 8];
            for child in 0..8 {
                let owners = owners_of(child);
                alive[child] = !dead.contains(&child) && (owners.is_empty() || owners.iter().any(|owner| alive[*owner]));
            }
            for child in 0..8 {
                prop_assert_eq!(graph.get(&key(&names[child])).is_some(), alive[child], "object {}", child);
            }
        }
    }
}

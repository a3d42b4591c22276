//! Random operations beside a slow, obvious model: the full state of every revision.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_store::{Entry, Error, EventKind, ListOptions, Precondition, Store};
use rand::prelude::*;

use crate::backends::{draft, text};

const STEPS: usize = 250;

/// All that ever was: the state after each revision.
struct Model {
    states: BTreeMap<u64, BTreeMap<String, Entry>>,
    changes: Vec<(u64, String, EventKind)>,
    oldest: u64,
}

impl Model {
    fn now(&self) -> (u64, &BTreeMap<String, Entry>) {
        let (revision, state) = self.states.last_key_value().expect("there is a first state");
        (*revision, state)
    }

    fn change(&mut self, revision: u64, key: &str, entry: Option<Entry>) {
        let mut state = self.now().1.clone();
        let kind = if entry.is_some() { EventKind::Put } else { EventKind::Delete };
        match entry {
            Some(entry) => state.insert(key.to_owned(), entry),
            None => state.remove(key),
        };
        self.states.insert(revision, state);
        self.changes.push((revision, key.to_owned(), kind));
    }

    /// As the contract says: everything below a folder, or one key.
    fn in_scope(scope: &str, key: &str) -> bool {
        key == scope || scope.ends_with('/') && key.starts_with(scope)
    }

    fn list(&self, scope: &str, options: &ListOptions, revision: u64) -> Vec<Entry> {
        let state = self.states.range(..=revision).next_back().expect("there is a first state").1;
        let after = options.start_after.as_deref().unwrap_or("");
        state
            .iter()
            .filter(|(key, _)| Self::in_scope(scope, key) && key.as_str() > after)
            .map(|(_, entry)| entry.clone())
            .collect()
    }
}

pub(crate) async fn check(store: Arc<dyn Store>) {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let first = store.revision().await.unwrap();
    let mut model = Model { states: BTreeMap::from([(first, BTreeMap::new())]), changes: Vec::new(), oldest: first };
    let mut watches = Vec::new();
    let scopes = ["/", "/r/", "/r/a/", "/r/a/x/", "/r/a", "/r/a/x/1", "/r/ab/", "/r/b/y/2", "/none/"];
    let keys = ["/r/a/x/1", "/r/a/x/2", "/r/a/x/10", "/r/a/y/1", "/r/ab/x/1", "/r/b/y/2", "/r/b/y/20", "/s"];
    for step in 0..STEPS {
        let key = *keys.choose(&mut random).unwrap();
        let scope = *scopes.choose(&mut random).unwrap();
        let (newest, state) = model.now();
        let current = state.get(key).cloned();
        let known = current.as_ref().map_or(3, |entry| entry.revision);
        let precondition = *[
            Precondition::Absent,
            Precondition::Any,
            Precondition::Revision(known),
            Precondition::Revision(known.saturating_sub(1)),
        ]
        .choose(&mut random)
        .unwrap();
        let holds = match precondition {
            Precondition::Absent => current.is_none(),
            Precondition::Any => true,
            Precondition::Revision(revision) => current.as_ref().is_some_and(|entry| entry.revision == revision),
        };
        match random.random_range(0..12) {
            0..4 => match store.put(key, draft(&step.to_string()), precondition).await {
                Ok(entry) => {
                    assert!(holds && entry.revision > newest, "step {step}");
                    assert_eq!(entry.value, text(&step.to_string(), entry.revision));
                    let created = current.map_or(entry.revision, |entry| entry.create_revision);
                    assert_eq!(entry.create_revision, created);
                    model.change(entry.revision, key, Some(entry));
                }
                Err(Error::Conflict { current: found, .. }) => assert!(!holds && found == current, "step {step}"),
                Err(error) => panic!("step {step}: {error}"),
            },
            4..6 => match store.delete(key, precondition).await {
                Ok(deleted) => {
                    assert!(holds && Some(deleted.prev) == current, "step {step}");
                    model.change(deleted.revision, key, None);
                }
                Err(Error::Conflict { current: found, .. }) => {
                    assert!((!holds || current.is_none()) && found == current, "step {step}");
                }
                Err(error) => panic!("step {step}: {error}"),
            },
            6 => assert_eq!(store.get(key).await.unwrap(), current),
            7..9 => {
                let asked =
                    random.random_bool(0.7).then(|| random.random_range(model.oldest.saturating_sub(2)..=newest + 1));
                let asked = asked.filter(|revision| *revision > 0);
                let options = ListOptions {
                    limit: random.random_range(0..4),
                    start_after: random.random_bool(0.4).then(|| key.to_owned()),
                    revision: asked,
                };
                let wanted = model.list(scope, &options, asked.unwrap_or(newest));
                match store.list(scope, options.clone()).await {
                    Ok(listing) => {
                        assert_eq!(listing.revision, asked.unwrap_or(newest));
                        assert!(listing.revision >= model.oldest && listing.revision <= newest, "step {step}");
                        let count = if options.limit == 0 { wanted.len() } else { options.limit.min(wanted.len()) };
                        assert_eq!(listing.entries, wanted[..count], "step {step}: {scope} {options:?}");
                        assert_eq!(listing.remaining, (wanted.len() - count) as u64, "step {step}");
                        assert_eq!(listing.more, listing.remaining > 0);
                    }
                    Err(Error::Compacted { .. }) => assert!(asked.unwrap() < model.oldest, "step {step}"),
                    Err(Error::Future { .. }) => assert!(asked.unwrap() > newest, "step {step}"),
                    Err(error) => panic!("step {step}: {error}"),
                }
            }
            9..11 => {
                let after = random.random_range(model.oldest..=newest);
                watches.push((scope, after, store.watch(scope, after).await.unwrap()));
            }
            _ if random.random_bool(0.2) => {
                let revision = random.random_range(model.oldest..=newest);
                // Those that have not read what is forgotten now end; the others are told apart below.
                watches.retain(|(_, after, _)| *after >= revision);
                store.compact(revision).await.unwrap();
                model.oldest = revision;
            }
            _ => {}
        }
    }
    assert!(model.changes.len() > STEPS / 8, "too few changes to judge by");
    for (scope, after, mut watch) in watches {
        let wanted: Vec<_> = model
            .changes
            .iter()
            .filter(|(revision, key, _)| *revision > after && Model::in_scope(scope, key))
            .cloned()
            .collect();
        let mut seen = Vec::new();
        while seen.len() < wanted.len() {
            let batch = tokio::time::timeout(std::time::Duration::from_secs(10), watch.next()).await;
            for event in batch.expect("the events come").unwrap().events {
                let before = model.states.range(..event.revision()).next_back().unwrap().1.get(&*event.entry.key);
                assert_eq!(event.prev.as_ref(), before);
                seen.push((event.revision(), event.entry.key.to_string(), event.kind));
            }
        }
        assert_eq!(seen, wanted, "{scope} after {after}");
        assert!(watch.try_next().unwrap().is_none());
    }
}

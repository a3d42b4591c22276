//! What every backend promises: the same checks on the embedded store and on a real etcd.

mod backends;
mod cluster;
mod linearizable;
mod model;

use std::sync::Arc;

use backends::{Backend, draft, text};
use coracle_store::{Error, Event, EventKind, ListOptions, Precondition, Store, Watch};

/// Reads `count` events.
async fn take(watch: &mut Watch, count: usize) -> Vec<Arc<Event>> {
    let mut events = Vec::new();
    let all = async {
        while events.len() < count {
            events.extend(watch.next().await.unwrap().events);
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), all).await.expect("the events come");
    events
}

fn at(revision: u64) -> ListOptions {
    ListOptions { revision: Some(revision), ..ListOptions::default() }
}

async fn preconditions(store: Arc<dyn Store>) {
    let key = "/registry/pods/ns/a";
    assert!(store.get(key).await.unwrap().is_none());
    let missing = store.put(key, draft("0"), Precondition::Revision(7)).await;
    assert!(matches!(missing, Err(Error::Conflict { current: None, .. })), "{missing:?}");
    let first = store.put(key, draft("1"), Precondition::Absent).await.unwrap();
    assert_eq!(first.create_revision, first.revision);
    assert_eq!(store.get(key).await.unwrap().as_ref(), Some(&first));
    assert_eq!(first.value, text("1", first.revision));
    let twice = store.put(key, draft("2"), Precondition::Absent).await;
    assert!(matches!(twice, Err(Error::Conflict { current: Some(ref now), .. }) if *now == first), "{twice:?}");
    let second = store.put(key, draft("2"), Precondition::Revision(first.revision)).await.unwrap();
    assert!(second.revision > first.revision);
    assert_eq!(second.create_revision, first.revision);
    let stale = store.delete(key, Precondition::Revision(first.revision)).await;
    assert!(matches!(stale, Err(Error::Conflict { current: Some(ref now), .. }) if *now == second), "{stale:?}");
    let third = store.put(key, draft("3"), Precondition::Any).await.unwrap();
    assert_eq!(third.create_revision, first.revision);
    let deleted = store.delete(key, Precondition::Revision(third.revision)).await.unwrap();
    assert_eq!(deleted.prev, third);
    assert!(deleted.revision > third.revision);
    let gone = store.delete(key, Precondition::Any).await;
    assert!(matches!(gone, Err(Error::Conflict { current: None, .. })), "{gone:?}");
    assert_eq!(store.revision().await.unwrap(), deleted.revision);
    for key in ["registry", "/a/", &format!("/{}", "x".repeat(2000))] {
        let refused = store.put(key, draft("1"), Precondition::Any).await;
        assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    }
}

async fn lists(store: Arc<dyn Store>) {
    for name in ["c", "a", "b", "d"] {
        store.put(&format!("/registry/pods/ns/{name}"), draft(name), Precondition::Absent).await.unwrap();
    }
    store.put("/registry/pods/ns2/e", draft("e"), Precondition::Absent).await.unwrap();
    store.put("/registry/podsets/x", draft("x"), Precondition::Absent).await.unwrap();
    let keys = |listing: &coracle_store::Listing| -> Vec<String> {
        listing.entries.iter().map(|entry| entry.key.rsplit_once('/').unwrap().1.to_owned()).collect()
    };
    let all = store.list("/registry/pods/", ListOptions::default()).await.unwrap();
    assert_eq!(keys(&all), ["a", "b", "c", "d", "e"]);
    assert!(!all.more && all.remaining == 0);
    let one = store.list("/registry/pods/ns/a", ListOptions::default()).await.unwrap();
    assert_eq!(keys(&one), ["a"], "a scope without a slash at its end is one key");

    // Pages of one snapshot, whatever happens in between.
    let page = ListOptions { limit: 2, ..ListOptions::default() };
    let first = store.list("/registry/pods/", page).await.unwrap();
    assert_eq!((keys(&first), first.more, first.remaining), (vec!["a".into(), "b".into()], true, 3));
    store.delete("/registry/pods/ns/c", Precondition::Any).await.unwrap();
    store.put("/registry/pods/ns/d", draft("changed"), Precondition::Any).await.unwrap();
    store.put("/registry/pods/ns/bb", draft("new"), Precondition::Any).await.unwrap();
    let next = |after: &coracle_store::Listing| ListOptions {
        limit: 2,
        start_after: after.entries.last().map(|entry| entry.key.to_string()),
        revision: Some(first.revision),
    };
    let second = store.list("/registry/pods/", next(&first)).await.unwrap();
    assert_eq!((keys(&second), second.more, second.revision), (vec!["c".into(), "d".into()], true, first.revision));
    assert_eq!(second.entries[..], all.entries[2..4]);
    let third = store.list("/registry/pods/", next(&second)).await.unwrap();
    assert_eq!((keys(&third), third.more, third.remaining), (vec!["e".into()], false, 0));
    let now = store.list("/registry/pods/", ListOptions::default()).await.unwrap();
    assert_eq!(keys(&now), ["a", "b", "bb", "d", "e"]);

    let future = store.list("/registry/pods/", at(now.revision + 100)).await;
    assert!(matches!(future, Err(Error::Future { .. })), "{future:?}");
    store.compact(now.revision).await.unwrap();
    store.compact(now.revision).await.expect("again is no error");
    let forgotten = store.list("/registry/pods/", at(first.revision)).await;
    assert!(matches!(forgotten, Err(Error::Compacted { .. })), "{forgotten:?}");
    assert_eq!(store.list("/registry/pods/", at(now.revision)).await.unwrap().entries, now.entries);
}

async fn watches(store: Arc<dyn Store>) {
    let before = store.revision().await.unwrap();
    let mut live = store.watch("/registry/pods/", before).await.unwrap();
    let mut single = store.watch("/registry/pods/ns/b", before).await.unwrap();
    let mut revisions = Vec::new();
    for (name, value) in [("a", "1"), ("b", "1"), ("a", "2"), ("bb", "1")] {
        let entry = store.put(&format!("/registry/pods/ns/{name}"), draft(value), Precondition::Any).await.unwrap();
        revisions.push(entry.revision);
    }
    store.put("/registry/other/x", draft("x"), Precondition::Any).await.unwrap();
    let deleted = store.delete("/registry/pods/ns/b", Precondition::Any).await.unwrap();
    revisions.push(deleted.revision);
    let seen = take(&mut live, 5).await;
    assert_eq!(seen.iter().map(|event| event.revision()).collect::<Vec<_>>(), revisions);
    assert!(seen[0].prev.is_none());
    assert_eq!(seen[2].prev.as_ref().unwrap(), &seen[0].entry);
    assert_eq!(seen[4].kind, EventKind::Delete);
    assert_eq!(seen[4].prev.as_ref().unwrap(), &deleted.prev);
    assert_eq!(seen[4].entry.value, text("1", deleted.revision), "a deletion has its own revision in the object");
    assert_eq!(live.progress(), deleted.revision);
    assert_eq!(take(&mut single, 2).await, [seen[1].clone(), seen[4].clone()]);

    // From the past, from the middle, and from a moment that has not come yet.
    let mut replay = store.watch("/registry/pods/", before).await.unwrap();
    assert_eq!(take(&mut replay, 5).await, seen);
    let mut middle = store.watch("/registry/pods/", revisions[2]).await.unwrap();
    assert_eq!(take(&mut middle, 2).await, seen[3..]);
    let mut future = store.watch("/registry/pods/", deleted.revision + 1).await.unwrap();
    store.put("/registry/pods/ns/c", draft("skipped"), Precondition::Any).await.unwrap();
    let next = store.put("/registry/pods/ns/c", draft("seen"), Precondition::Any).await.unwrap();
    assert_eq!(take(&mut future, 1).await[0].entry, next);

    // Compaction: no watch from before it; a live one goes on.
    take(&mut live, 2).await;
    store.compact(next.revision).await.unwrap();
    let gone = store.watch("/registry/pods/", before).await;
    assert!(matches!(gone, Err(Error::Compacted { .. })), "{gone:?}");
    let late = store.put("/registry/pods/ns/c", draft("late"), Precondition::Any).await.unwrap();
    assert_eq!(take(&mut live, 1).await[0].entry, late);
    // A watcher that has not read what was forgotten hears of it.
    assert!(matches!(replay.next().await, Ok(_) | Err(Error::TooSlow { .. })));
}

/// Sixteen writers, one watcher: every change once, in order, and the end of it is what a list says.
async fn concurrent(store: Arc<dyn Store>) {
    const WRITERS: usize = 16;
    const WRITES: usize = 25;
    let before = store.revision().await.unwrap();
    let mut watch = store.watch("/registry/", before).await.unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut done = Vec::new();
                for round in 0..WRITES {
                    let key = format!("/registry/pods/ns{}/p{}", writer % 3, (writer + round) % 7);
                    let revision = if round % 5 == 4 {
                        match store.delete(&key, Precondition::Any).await {
                            Ok(deleted) => deleted.revision,
                            Err(Error::Conflict { current: None, .. }) => continue,
                            Err(error) => panic!("{error}"),
                        }
                    } else {
                        let value = format!("{writer}-{round}");
                        store.put(&key, draft(&value), Precondition::Any).await.unwrap().revision
                    };
                    done.push(revision);
                }
                done
            })
        })
        .collect();
    let mut done = Vec::new();
    for writer in writers {
        done.extend(writer.await.unwrap());
    }
    done.sort_unstable();
    let seen = take(&mut watch, done.len()).await;
    assert_eq!(seen.iter().map(|event| event.revision()).collect::<Vec<_>>(), done);
    let mut state = std::collections::BTreeMap::new();
    for event in &seen {
        let before = match event.kind {
            EventKind::Put => state.insert(event.entry.key.clone(), event.entry.clone()),
            EventKind::Delete => state.remove(&event.entry.key),
        };
        assert_eq!(event.prev, before);
    }
    let listed = store.list("/registry/", ListOptions::default()).await.unwrap().entries;
    assert_eq!(listed, state.into_values().collect::<Vec<_>>());
}

macro_rules! on_both {
    ($($name:ident),*) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let backend = super::backends::Embedded::start().await;
                super::$name(backend.store()).await;
            })*
        }
        mod etcd {
            use super::Backend as _;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let backend = super::backends::Etcd::start().await;
                super::$name(backend.store()).await;
            })*
        }
    };
}

on_both!(preconditions, lists, watches, concurrent, linearizable, model);

async fn linearizable(store: Arc<dyn Store>) {
    linearizable::check(store).await;
}

async fn model(store: Arc<dyn Store>) {
    model::check(store).await;
}

//! What the contract of the store says, step by step, on the embedded backend.

use coracle_store::{Draft, Embedded, EmbeddedOptions, Error, EventKind, ListOptions, Precondition, Store};
use serde_json::json;

fn draft(text: &str) -> Draft {
    Draft::encode(&json!({"kind": "Test", "metadata": {"name": "n", "uid": "u"}, "text": text})).unwrap()
}

#[test]
fn the_revision_stands_in_the_metadata() {
    let draft =
        Draft::encode(&json!({"a": {"resourceVersion": ""}, "metadata": {"resourceVersion": "3", "z": 1}, "spec": {}}));
    let draft = draft.unwrap();
    let text = std::str::from_utf8(&draft.json).unwrap();
    assert_eq!(text, r#"{"a":{"resourceVersion":""},"metadata":{"resourceVersion":"","z":1},"spec":{}}"#);
    assert_eq!(&text[..draft.splice], r#"{"a":{"resourceVersion":""},"metadata":{"resourceVersion":""#);
    let empty = Draft::encode(&json!({"metadata": {}})).unwrap();
    assert_eq!(&empty.json[..], br#"{"metadata":{"resourceVersion":""}}"#);
    Draft::encode(&json!({"kind": "Test"})).expect_err("an object without metadata");
}

#[tokio::test]
async fn write_read_watch_and_reopen() {
    let folder = tempfile::tempdir().unwrap();
    let store = Embedded::open(folder.path(), EmbeddedOptions::default()).unwrap();
    assert_eq!(store.revision().await.unwrap(), 1);
    let mut watch = store.watch("/registry/pods/", 1).await.unwrap();
    let a = store.put("/registry/pods/ns/a", draft("1"), Precondition::Absent).await.unwrap();
    assert_eq!((a.revision, a.create_revision), (2, 2));
    assert!(std::str::from_utf8(&a.value).unwrap().contains(r#""resourceVersion":"2""#));
    let refused = store.put("/registry/pods/ns/a", draft("2"), Precondition::Absent).await;
    assert!(matches!(refused, Err(Error::Conflict { current: Some(entry), .. }) if entry == a));
    let changed = store.put("/registry/pods/ns/a", draft("2"), Precondition::Revision(2)).await.unwrap();
    assert_eq!((changed.revision, changed.create_revision), (3, 2));
    store.put("/registry/podsx/b", draft("x"), Precondition::Any).await.unwrap();
    let deleted = store.delete("/registry/pods/ns/a", Precondition::Any).await.unwrap();
    assert_eq!((deleted.revision, &deleted.prev), (5, &changed));
    let gone = store.delete("/registry/pods/ns/a", Precondition::Any).await;
    assert!(matches!(gone, Err(Error::Conflict { current: None, .. })));

    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(watch.next().await.unwrap().events);
    }
    let kinds: Vec<_> = seen.iter().map(|event| (event.kind, event.revision())).collect();
    assert_eq!(kinds, [(EventKind::Put, 2), (EventKind::Put, 3), (EventKind::Delete, 5)]);
    assert!(std::str::from_utf8(&seen[2].entry.value).unwrap().contains(r#""resourceVersion":"5""#));
    assert_eq!(watch.progress(), 5);

    let then = ListOptions { revision: Some(3), ..ListOptions::default() };
    assert_eq!(store.list("/registry/pods/", then).await.unwrap().entries.first(), Some(&changed));
    drop(store);
    assert!(matches!(watch.next().await, Err(Error::Closed)));

    let store = Embedded::open(folder.path(), EmbeddedOptions::default()).unwrap();
    assert_eq!(store.revision().await.unwrap(), 5);
    assert!(store.get("/registry/pods/ns/a").await.unwrap().is_none());
    let mut again = store.watch("/registry/pods/", 1).await.unwrap();
    assert_eq!(again.next().await.unwrap().events, seen, "the history survives");
    store.compact(4).await.unwrap();
    assert!(matches!(store.watch("/", 3).await, Err(Error::Compacted { oldest: 4, .. })));
    let second = Embedded::open(folder.path(), EmbeddedOptions::default());
    assert!(second.is_err_and(|error| error.to_string().contains("in use by another process")));
}

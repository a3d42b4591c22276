//! What happens when the disk fails: injected into the file operations of the log.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;
use serde_json::json;

use super::log::Medium;
use super::{Embedded, EmbeddedOptions};
use crate::{Draft, Error, ListOptions, Precondition, Store};

const SOUND: u8 = 0;
const FULL: u8 = 1;
const FLUSH_FAILS: u8 = 2;
const WRITE_FAILS: u8 = 3;

/// A disk with a switch.
struct Faulty(Arc<AtomicU8>);

impl Medium for Faulty {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            FULL => {
                // As a full disk does it: some of the bytes get there.
                file.write_all_at(&bytes[..bytes.len() / 2], offset)?;
                Err(io::ErrorKind::StorageFull.into())
            }
            WRITE_FAILS => Err(io::Error::from_raw_os_error(5)),
            _ => file.write_all_at(bytes, offset),
        }
    }

    fn flush(&self, file: &File) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) == FLUSH_FAILS {
            return Err(io::Error::from_raw_os_error(5));
        }
        file.sync_data()
    }
}

/// A disk that keeps only what was flushed: of the rest, some random part, as when the power goes.
#[derive(Default)]
struct Forgetful(Mutex<Vec<(u64, Vec<u8>)>>);

impl Medium for Forgetful {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut pending = self.0.lock();
        if rand::random_bool(0.3) {
            let some = rand::random_range(0..=bytes.len());
            file.write_all_at(&bytes[..some], offset)?;
        }
        pending.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn flush(&self, file: &File) -> io::Result<()> {
        for (offset, bytes) in self.0.lock().drain(..) {
            file.write_all_at(&bytes, offset)?;
        }
        Ok(())
    }
}

fn draft(text: &str) -> Draft {
    Draft::encode(&json!({"metadata": {}, "text": text})).unwrap()
}

fn open(folder: &std::path::Path) -> (Embedded, Arc<AtomicU8>) {
    let switch = Arc::new(AtomicU8::new(SOUND));
    let options = EmbeddedOptions { segment_bytes: 4096, ..EmbeddedOptions::default() };
    (Embedded::open_on(folder, options, Box::new(Faulty(switch.clone()))).unwrap(), switch)
}

#[tokio::test]
async fn a_full_disk_stops_writes_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let (store, switch) = open(folder.path());
    let mut watch = store.watch("/", 1).await.unwrap();
    let mut written = Vec::new();
    for round in 0..30 {
        written.push(store.put(&format!("/a/{round}"), draft("yes"), Precondition::Absent).await.unwrap());
        switch.store(FULL, Ordering::Relaxed);
        for _ in 0..3 {
            let refused = store.put(&format!("/b/{round}"), draft("no"), Precondition::Absent).await;
            assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        }
        assert_eq!(store.get(&format!("/a/{round}")).await.unwrap().as_ref(), written.last());
        assert_eq!(store.revision().await.unwrap(), written.last().unwrap().revision);
        switch.store(SOUND, Ordering::Relaxed);
    }
    let mut seen = Vec::new();
    while let Some(batch) = watch.try_next().unwrap() {
        seen.extend(batch.events.iter().map(|event| event.entry.clone()));
    }
    assert_eq!(seen, written, "watchers see what happened and nothing else");
    drop(store);
    let (store, _) = open(folder.path());
    let mut found = store.list("/", ListOptions::default()).await.unwrap().entries;
    found.sort_by_key(|entry| entry.revision);
    assert_eq!(found, written);
}

#[tokio::test]
async fn a_failed_flush_or_write_poisons() {
    for fault in [FLUSH_FAILS, WRITE_FAILS] {
        let folder = tempfile::tempdir().unwrap();
        let (store, switch) = open(folder.path());
        let kept = store.put("/a", draft("1"), Precondition::Absent).await.unwrap();
        let mut watch = store.watch("/", kept.revision).await.unwrap();
        switch.store(fault, Ordering::Relaxed);
        let failed = store.put("/a", draft("2"), Precondition::Any).await;
        assert!(matches!(failed, Err(Error::Poisoned { .. })), "{failed:?}");
        switch.store(SOUND, Ordering::Relaxed);
        let later = store.put("/b", draft("3"), Precondition::Any).await;
        assert!(matches!(later, Err(Error::Poisoned { .. })), "no write is acknowledged after it: {later:?}");
        assert_eq!(store.get("/a").await.unwrap(), Some(kept.clone()));
        assert!(watch.try_next().unwrap().is_none());
        drop(store);
        // After a restart the failed write may be there or not, everything before it is.
        let (store, _) = open(folder.path());
        let found = store.get("/a").await.unwrap().unwrap();
        assert!(found == kept || found.revision == kept.revision + 1);
        assert!(store.get("/b").await.unwrap().is_none());
    }
}

/// What a folder holds now, in a folder of its own.
fn copied(folder: &std::path::Path) -> std::io::Result<tempfile::TempDir> {
    let copy = tempfile::tempdir()?;
    let mut files = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    files.sort();
    for path in files {
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap_or_default()))?;
    }
    Ok(copy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_acknowledged_before_its_flush() {
    let folder = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions { segment_bytes: 16 << 10, ..EmbeddedOptions::default() };
    let medium = Box::new(Forgetful::default());
    let store = Arc::new(Embedded::open_on(folder.path(), options.clone(), medium).unwrap());
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, acknowledged) = (store.clone(), acknowledged.clone());
            tokio::spawn(async move {
                for number in 0..150 {
                    let key = format!("/{writer}/{number}");
                    let entry = store.put(&key, draft("text"), Precondition::Absent).await.unwrap();
                    acknowledged.lock().push(entry);
                }
            })
        })
        .collect();
    for _ in 0..20 {
        // What the disk would hold if the power went now.
        let known = acknowledged.lock().clone();
        let copy = loop {
            match copied(folder.path()) {
                // A new segment took its final name, or an old one went, after its folder was read.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copy => break copy.unwrap(),
            }
        };
        let found = Embedded::open(copy.path(), options.clone()).unwrap();
        for entry in known {
            assert_eq!(found.get(&entry.key).await.unwrap().as_ref(), Some(&entry));
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

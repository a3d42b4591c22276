//! The compaction thread: forgets what is older than the history to be kept, and when the log has much of that, writes
//! a snapshot and removes the files before it.
//!
//! The snapshot is of the oldest revision that is kept, so that a start after it reads the kept history back from the
//! log. It is written page by page; writers wait for no more than one page or one piece of the log.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::log::{log_path, sync_folder};
use super::recover::{Files, FolderLock};
use super::seal::Cipher;
use super::snapshot::{Writer, snapshot_path};
use super::{EmbeddedOptions, Shared};
use crate::hub::FORGET_AT_ONCE;
use crate::state::Objects;
use crate::{Entry, Error, OpenError};

/// As many log files without use make a new snapshot worth while, however small they are: each start leaves one.
const RECLAIM_FILES: usize = 16;

/// Objects that are read under one hold of the lock.
const PAGE_OBJECTS: usize = 512;

/// Changes that are read under one hold of the lock.
const PAGE_EVENTS: usize = 4096;

/// The history is kept to this fraction of its duration exactly.
const STEPS: u32 = 10;

/// Something that a thread waits for, with a way to stop it.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct BellState {
    rung: bool,
    stopped: bool,
}

impl Bell {
    pub(super) fn notify_one(&self) {
        self.state.lock().rung = true;
        self.rung.notify_one();
    }

    fn stop(&self) {
        self.state.lock().stopped = true;
        self.rung.notify_one();
    }

    fn stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Waits for a ring or the time to pass; whether to go on.
    fn wait(&self, time: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.rung && !state.stopped {
            self.rung.wait_for(&mut state, time);
        }
        state.rung = false;
        !state.stopped
    }
}

/// The compaction thread.
#[derive(Debug)]
pub(super) struct Compactor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Compactor {
    pub(super) fn start(
        shared: Arc<Shared>,
        folder: &Path,
        cipher: Arc<Cipher>,
        options: &EmbeddedOptions,
        lock: FolderLock,
    ) -> Result<Compactor, OpenError> {
        let (history, reclaim_bytes) = (options.history, options.segment_bytes);
        let work = Work { shared: shared.clone(), folder: folder.to_owned(), cipher, reclaim_bytes, _lock: lock };
        let thread = std::thread::Builder::new()
            .name("store-compact".to_owned())
            .spawn(move || work.run(history))
            .map_err(OpenError::io("start the compaction thread of", folder))?;
        Ok(Compactor { shared, thread: Some(thread) })
    }

    pub(super) fn stop(&mut self) {
        self.shared.rolled.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the compaction thread of the store has panicked");
        }
    }
}

struct Work {
    shared: Arc<Shared>,
    folder: PathBuf,
    cipher: Arc<Cipher>,
    /// The least size of log files without use that makes a new snapshot worth while.
    reclaim_bytes: u64,
    _lock: FolderLock,
}

/// Why a snapshot was not taken.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error("{0}")]
    Store(#[from] Error),
}

impl Work {
    fn run(self, history: Duration) {
        let step = history / STEPS;
        // What the newest revision was, once a step.
        let mut marks: VecDeque<(Instant, u64)> = VecDeque::new();
        while self.shared.rolled.wait(step) {
            if marks.back().is_none_or(|(at, _)| at.elapsed() >= step) {
                marks.push_back((Instant::now(), self.shared.ledger.past().newest));
            }
            while let Some((_, revision)) = marks.pop_front_if(|(at, _)| at.elapsed() >= history) {
                while !self.shared.ledger.forget(revision, FORGET_AT_ONCE) {
                    std::thread::yield_now();
                }
            }
            if let Err(error) = self.reclaim() {
                tracing::warn!(%error, folder = %self.folder.display(), "cannot compact the store now, will try again");
            }
        }
    }

    /// Writes a snapshot if that lets enough log files go.
    fn reclaim(&self) -> Result<(), Failure> {
        let files = Files::scan(&self.folder)?;
        let oldest = self.shared.ledger.past().oldest;
        let size = |path: PathBuf| fs::metadata(path).map_or(0, |data| data.len());
        let obsolete = files.obsolete_logs(oldest);
        let useless: u64 = obsolete.iter().map(|base| size(log_path(&self.folder, *base))).sum();
        let last = files.snapshots.last().copied();
        let cost = last.map_or(0, |revision| size(snapshot_path(&self.folder, revision)));
        let worthwhile = useless >= self.reclaim_bytes.max(cost) || obsolete.len() >= RECLAIM_FILES;
        if worthwhile && last.is_none_or(|last| last < oldest) {
            self.snapshot(oldest)?;
        }
        self.clean()
    }

    /// Writes the snapshot at `revision`.
    fn snapshot(&self, revision: u64) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut writer = Writer::create(&snapshot_path(&self.folder, revision), revision)?;
        let mut pages = Pages::new(revision);
        while let Some(page) = pages.next(&self.shared)? {
            for entry in &page {
                writer.add(entry, &self.cipher)?;
            }
            if self.shared.rolled.stopped() {
                return Ok(());
            }
        }
        writer.finish()?;
        tracing::info!(revision, took_ms = begun.elapsed().as_millis() as u64, "the store has a new snapshot");
        Ok(())
    }

    /// Removes the files that the newest snapshot makes useless.
    fn clean(&self) -> Result<(), Failure> {
        let files = Files::scan(&self.folder)?;
        let Some((newest, older)) = files.snapshots.split_last() else {
            return Ok(());
        };
        let logs = files.obsolete_logs(*newest).iter().map(|base| log_path(&self.folder, *base));
        let snapshots = older.iter().map(|revision| snapshot_path(&self.folder, *revision));
        let useless: Vec<PathBuf> = logs.chain(snapshots).collect();
        for path in &useless {
            fs::remove_file(path)?;
        }
        if !useless.is_empty() {
            sync_folder(&self.folder)?;
        }
        Ok(())
    }
}

/// The objects as of a revision, page by page, while writes go on.
struct Pages {
    /// The changes up to here are in `then`.
    seen: u64,
    /// What stood at the keys that have changed since the revision.
    then: BTreeMap<Arc<str>, Option<Entry>>,
    /// The last key given.
    last: Option<Arc<str>>,
}

impl Pages {
    fn new(revision: u64) -> Pages {
        Pages { seen: revision, then: BTreeMap::new(), last: None }
    }

    /// The next objects in key order; `None` after the last.
    fn next(&mut self, shared: &Shared) -> Result<Option<Vec<Entry>>, Error> {
        loop {
            let objects = shared.objects.read();
            if self.catch_up(shared)? {
                return Ok(self.page(&objects));
            }
        }
    }

    /// Takes in some of the changes since; whether that was all.
    fn catch_up(&mut self, shared: &Shared) -> Result<bool, Error> {
        let past = shared.ledger.past();
        if self.seen < past.oldest {
            return Err(Error::Compacted { requested: self.seen, oldest: past.oldest });
        }
        for event in past.after(self.seen).take(PAGE_EVENTS) {
            self.then.entry(event.entry.key.clone()).or_insert_with(|| event.prev.clone());
            self.seen = event.revision();
        }
        if past.events.back().is_none_or(|event| event.revision() <= self.seen) {
            self.seen = past.newest;
        }
        Ok(self.seen == past.newest)
    }

    fn page(&mut self, objects: &Objects) -> Option<Vec<Entry>> {
        let start = self.last.clone();
        let start = start.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let mut page: Vec<Entry> = Vec::with_capacity(PAGE_OBJECTS);
        let mut present = objects.range::<str, _>((start, Bound::Unbounded)).peekable();
        let mut changed = self.then.range::<str, _>((start, Bound::Unbounded)).peekable();
        let mut last = None;
        for _ in 0..PAGE_OBJECTS {
            let (key, entry) = match (present.peek(), changed.peek()) {
                (None, None) => break,
                (Some((key, _)), Some((other, _))) if key >= other => {
                    let same = key == other;
                    if same {
                        present.next();
                    }
                    let Some((key, then)) = changed.next() else {
                        break;
                    };
                    (key, then.as_ref())
                }
                (None, Some(_)) => {
                    let Some((key, then)) = changed.next() else {
                        break;
                    };
                    (key, then.as_ref())
                }
                (Some(_), _) => {
                    let Some((key, entry)) = present.next() else {
                        break;
                    };
                    (key, Some(entry))
                }
            };
            last = Some(key.clone());
            page.extend(entry.cloned());
        }
        self.last = Some(last?);
        Some(page)
    }
}

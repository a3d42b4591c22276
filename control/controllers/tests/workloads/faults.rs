//! A store between the API and the real one that makes trouble on purpose: answers to writes are late, so that they overtake
//! each other; writes fail; and writes are told to have failed though they happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_store::{Deleted, Draft, Entry, Error, ListOptions, Listing, Precondition, SharedStore, Store, Watch};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// What only controllers write: users and nodes of a test need not expect trouble.
const TROUBLED: [&str; 3] = ["/registry/apps/replicasets/", "/registry/apps/controllerrevisions/", "/registry/pods/"];
/// Longest time by which an answer is late.
const LATE_MS: u64 = 20;

pub(crate) struct Faulty {
    inner: SharedStore,
    random: Mutex<StdRng>,
    /// Whether there is trouble just now.
    on: Arc<AtomicBool>,
}

/// What becomes of one write.
enum Fate {
    Done,
    Lost,
    DoneButNotTold,
}

impl Faulty {
    /// A store with trouble as long as `on` says so.
    pub(crate) fn over(inner: SharedStore, seed: u64, on: Arc<AtomicBool>) -> SharedStore {
        Arc::new(Self { inner, random: Mutex::new(StdRng::seed_from_u64(seed)), on })
    }

    fn fate(&self, key: &str) -> (Fate, Duration) {
        if !self.on.load(Ordering::Relaxed) || !TROUBLED.iter().any(|prefix| key.starts_with(prefix)) {
            return (Fate::Done, Duration::ZERO);
        }
        let mut random = self.random.lock();
        let late = Duration::from_millis(random.random_range(0..LATE_MS));
        let fate = match random.random_range(0..20) {
            0 => Fate::Lost,
            1 => Fate::DoneButNotTold,
            _ => Fate::Done,
        };
        (fate, late)
    }

    async fn through<T>(&self, key: &str, write: impl Future<Output = Result<T, Error>> + Send) -> Result<T, Error> {
        let failed = || Err(Error::Unavailable { step: "put", reason: "trouble on purpose".into() });
        let (fate, late) = self.fate(key);
        if matches!(fate, Fate::Lost) {
            return failed();
        }
        let written = write.await;
        tokio::time::sleep(late).await;
        if matches!(fate, Fate::DoneButNotTold) { failed() } else { written }
    }
}

#[async_trait::async_trait]
impl Store for Faulty {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        self.inner.get(key).await
    }

    async fn put(&self, key: &str, draft: Draft, precondition: Precondition) -> Result<Entry, Error> {
        self.through(key, self.inner.put(key, draft, precondition)).await
    }

    async fn delete(&self, key: &str, precondition: Precondition) -> Result<Deleted, Error> {
        self.through(key, self.inner.delete(key, precondition)).await
    }

    async fn list(&self, scope: &str, options: ListOptions) -> Result<Listing, Error> {
        self.inner.list(scope, options).await
    }

    async fn watch(&self, scope: &str, after: u64) -> Result<Watch, Error> {
        self.inner.watch(scope, after).await
    }

    async fn revision(&self) -> Result<u64, Error> {
        self.inner.revision().await
    }

    async fn compacted(&self) -> Result<u64, Error> {
        self.inner.compacted().await
    }

    async fn compact(&self, revision: u64) -> Result<(), Error> {
        self.inner.compact(revision).await
    }
}

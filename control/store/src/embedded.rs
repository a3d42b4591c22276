//! The embedded store: objects in memory, a log on disk.

mod recover;

mod commit;
mod log;

mod frame;
mod seal;

mod compact;
mod snapshot;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::RwLock;

use crate::hub::{Bounds, Ledger};
use crate::state::{self, Objects};
use crate::{
    Deleted, Draft, Entry, Error, ListOptions, Listing, OpenError, Precondition, Store, Watch, check_draft, check_key,
};
use commit::{Committer, Write};
use compact::{Bell, Compactor};
use log::{Disk, Log, Medium};
use seal::Cipher;

pub use snapshot::{SnapshotSummary, restore, save, verify};

/// How an [`Embedded`] store behaves.
#[derive(Clone, Debug)]
pub struct EmbeddedOptions {
    /// How long the past is kept: lists at and watches after a revision younger than this succeed, within the bounds
    /// below.
    pub history: Duration,
    /// Most changes of the past to keep.
    pub history_events: usize,
    /// Most bytes of superseded versions to keep in memory.
    pub history_bytes: usize,
    /// Size of a log file; a snapshot follows when about as much of the log is useless.
    pub segment_bytes: u64,
    /// A file with 32 random bytes (or 64 hexadecimal digits) to encrypt the objects in `encrypted_scopes` on disk.
    /// Objects written without it are encrypted when they are written again.
    pub key_file: Option<PathBuf>,
    /// Which objects to encrypt when there is a key file.
    pub encrypted_scopes: Vec<String>,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        EmbeddedOptions {
            history: crate::HISTORY,
            history_events: crate::HISTORY_EVENTS,
            history_bytes: crate::HISTORY_BYTES,
            segment_bytes: 64 << 20,
            key_file: None,
            encrypted_scopes: vec!["/registry/secrets/".to_owned()],
        }
    }
}

/// What the commit thread changes and everyone reads.
#[derive(Debug)]
struct Shared {
    objects: RwLock<Objects>,
    ledger: Arc<Ledger>,
    /// Rung when a log file is full.
    rolled: Bell,
}

/// A store in a folder of this host.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<Shared>,
    committer: Committer,
    compactor: Compactor,
}

fn bounds(options: &EmbeddedOptions) -> Bounds {
    Bounds { events: options.history_events, bytes: options.history_bytes }
}

fn cipher(options: &EmbeddedOptions) -> Result<Cipher, OpenError> {
    match &options.key_file {
        Some(file) => Cipher::load(file, &options.encrypted_scopes),
        None => Ok(Cipher::default()),
    }
}

impl Embedded {
    /// Opens the store in `folder`, which is made if it does not exist, and reads all of it. Blocks.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing is changed on disk then.
    pub fn open(folder: impl AsRef<Path>, options: EmbeddedOptions) -> Result<Embedded, OpenError> {
        Self::open_on(folder.as_ref(), options, Box::new(Disk))
    }

    fn open_on(folder: &Path, options: EmbeddedOptions, medium: Box<dyn Medium>) -> Result<Embedded, OpenError> {
        let cipher = Arc::new(cipher(&options)?);
        let lock = recover::lock(folder)?;
        let recovered = recover::load(folder, &cipher, bounds(&options))?;
        recover::tidy(folder, &recovered)?;
        let log = Log::create(folder, medium, options.segment_bytes, recovered.ledger.past().newest)?;
        let shared = Arc::new(Shared {
            objects: RwLock::new(recovered.objects),
            ledger: Arc::new(recovered.ledger),
            rolled: Bell::default(),
        });
        let compactor = Compactor::start(shared.clone(), folder, cipher.clone(), &options, lock)?;
        let committer = Committer::start(shared.clone(), log, cipher)?;
        Ok(Embedded { shared, committer, compactor })
    }
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        Ok(self.shared.objects.read().get(key).cloned())
    }

    async fn put(&self, key: &str, draft: Draft, precondition: Precondition) -> Result<Entry, Error> {
        check_key(key)?;
        check_draft(key, &draft)?;
        let event = self.committer.write(Write { key: key.into(), draft: Some(draft), precondition }).await?;
        Ok(event.entry.clone())
    }

    async fn delete(&self, key: &str, precondition: Precondition) -> Result<Deleted, Error> {
        check_key(key)?;
        let event = self.committer.write(Write { key: key.into(), draft: None, precondition }).await?;
        let prev = event.prev.clone().expect("a deletion has a version before");
        Ok(Deleted { prev, revision: event.revision() })
    }

    async fn list(&self, scope: &str, options: ListOptions) -> Result<Listing, Error> {
        let objects = self.shared.objects.read();
        let past = self.shared.ledger.past();
        state::list(&objects, &past, scope, &options)
    }

    async fn watch(&self, scope: &str, after: u64) -> Result<Watch, Error> {
        self.shared.ledger.watch(scope, after)
    }

    async fn revision(&self) -> Result<u64, Error> {
        Ok(self.shared.ledger.past().newest)
    }

    async fn compacted(&self) -> Result<u64, Error> {
        Ok(self.shared.ledger.past().oldest)
    }

    async fn compact(&self, revision: u64) -> Result<(), Error> {
        let newest = self.shared.ledger.past().newest;
        if revision > newest {
            return Err(Error::Future { requested: revision, newest });
        }
        self.shared.ledger.forget_slowly(revision).await;
        Ok(())
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.committer.stop();
        self.compactor.stop();
        self.shared.ledger.end(Error::Closed);
    }
}

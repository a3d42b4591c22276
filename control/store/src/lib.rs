//! The state store: etcd's semantics behind one trait.
//!
//! One revision counts every change of the whole store and is the `resourceVersion` of the objects. Writes are
//! compare-and-swap; lists are snapshots at a revision, also of a past one and page by page; a watch starts after a
//! revision and sees each later change once, without a gap; compaction forgets the past, and who asks for it gets
//! [`Error::Compacted`] (410 Gone).
//!
//! Objects are bytes. The store keeps each version's JSON once; readers, lists and all watchers share it.
//!
//! A *scope* says which keys a list or watch means: ending in `/` it means every key below, otherwise that one key.
#![forbid(unsafe_code)]

mod error;
pub mod json;
mod object;

mod event;
mod hub;
mod state;

mod embedded;
mod etcd;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use embedded::{Embedded, EmbeddedOptions, SnapshotSummary, restore, save, verify};
pub use error::{Error, OpenError};
pub use etcd::{Etcd, EtcdOptions};
pub use event::{Batch, Event, EventKind, Watch};
pub use object::{Deleted, Draft, DraftError, Entry, ListOptions, Listing, Precondition};

/// Largest key, in bytes: a resource, a namespace (63), a name (253) and room for API groups.
pub const KEY_LIMIT_BYTES: usize = 1024;

/// Largest object, in bytes. The API takes bodies up to 3 MiB; status, defaults and managed fields add to them.
pub const VALUE_LIMIT_BYTES: usize = 8 << 20;

/// How long the past is kept, unless set otherwise: as long as a Kubernetes API server keeps it.
pub const HISTORY: Duration = Duration::from_secs(300);

/// Most changes of the past that are kept, unless set otherwise.
pub const HISTORY_EVENTS: usize = 250_000;

/// Most bytes of superseded versions that are kept, unless set otherwise.
pub const HISTORY_BYTES: usize = 64 << 20;

/// A store of objects. All methods are cancel-safe for the caller, but a cancelled write may still happen.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The object at `key`, as of the newest acknowledged write.
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error>;

    /// Writes `draft` at `key` when `precondition` holds; durable when it returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] with the object that stands there when the precondition does not hold.
    async fn put(&self, key: &str, draft: Draft, precondition: Precondition) -> Result<Entry, Error>;

    /// Removes the object at `key` when `precondition` holds; durable when it returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] with the object that stands there when the precondition does not hold, with `None` when
    /// there is nothing to delete.
    async fn delete(&self, key: &str, precondition: Precondition) -> Result<Deleted, Error>;

    /// The objects in `scope`, in key order, all as of one revision.
    ///
    /// # Errors
    /// [`Error::Compacted`] and [`Error::Future`] when the revision asked for is gone or not yet there.
    async fn list(&self, scope: &str, options: ListOptions) -> Result<Listing, Error>;

    /// Every change in `scope` with a revision greater than `after`.
    ///
    /// # Errors
    /// [`Error::Compacted`] when changes after `after` have been forgotten already.
    async fn watch(&self, scope: &str, after: u64) -> Result<Watch, Error>;

    /// The revision of the newest acknowledged write; at least 1.
    async fn revision(&self) -> Result<u64, Error>;

    /// The oldest revision that can still be listed and watched after.
    async fn compacted(&self) -> Result<u64, Error>;

    /// Forgets all states before `revision`: lists at an older revision and watches after one fail from now on.
    /// An already compacted revision is no error.
    async fn compact(&self, revision: u64) -> Result<(), Error>;
}

/// The store as everyone holds it.
pub type SharedStore = Arc<dyn Store>;

fn check_key(key: &str) -> Result<(), Error> {
    if key.len() > KEY_LIMIT_BYTES || !key.starts_with('/') || key.ends_with('/') {
        return Err(Error::Refused {
            key: key.chars().take(KEY_LIMIT_BYTES).collect(),
            problem: "a key begins with a slash, does not end in one and has at most 1024 bytes",
        });
    }
    Ok(())
}

fn check_draft(key: &str, draft: &Draft) -> Result<(), Error> {
    let problem = if draft.json.len() > VALUE_LIMIT_BYTES {
        "it has more than 8 MiB"
    } else if draft.splice > draft.json.len() {
        "it has no place for its revision"
    } else {
        return Ok(());
    };
    Err(Error::Refused { key: key.to_owned(), problem })
}

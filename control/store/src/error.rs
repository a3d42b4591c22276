//! What can go wrong, one variant for each step.

use std::io;
use std::path::PathBuf;

use crate::Entry;

/// A failed operation on a store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The precondition of a write does not hold.
    #[error("{key} is not as the write expects it: {}", current.as_ref().map_or_else(|| "it does not exist".to_owned(), |entry| format!("it is at revision {}", entry.revision)))]
    Conflict {
        /// The key of the write.
        key: String,
        /// What stands there.
        current: Option<Entry>,
    },
    /// The revision asked for has been forgotten.
    #[error("revision {requested} has been compacted, the oldest is {oldest}")]
    Compacted {
        /// The revision asked for.
        requested: u64,
        /// The oldest revision that is left.
        oldest: u64,
    },
    /// A watcher read so slowly that the changes it needs next have been forgotten; it must list again.
    #[error("the watcher fell behind: it stands at revision {at}, the oldest is {oldest}")]
    TooSlow {
        /// The last revision that the watcher saw.
        at: u64,
        /// The oldest revision that is left.
        oldest: u64,
    },
    /// The revision asked for does not exist yet.
    #[error("revision {requested} is greater than the newest, {newest}")]
    Future {
        /// The revision asked for.
        requested: u64,
        /// The newest revision.
        newest: u64,
    },
    /// The key or the object is not one the store takes.
    #[error("{key} cannot be stored: {problem}")]
    Refused {
        /// The key of the write.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The disk is full. Reads go on, this write did not happen, later ones are tried again.
    #[error("no space left for {path}: free some, reads go on meanwhile")]
    NoSpace {
        /// The file that could not grow.
        path: PathBuf,
    },
    /// A flush failed, so what is on disk is unknown: reads go on, nothing is written until a restart.
    #[error("the store takes no writes since a flush failed ({reason}): check the disk, then restart")]
    Poisoned {
        /// What failed.
        reason: String,
    },
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
    /// The etcd behind it cannot be reached or refused the request; whether a write happened is unknown.
    #[error("etcd {step}: {reason}")]
    Unavailable {
        /// The request.
        step: &'static str,
        /// What the client library said.
        reason: String,
    },
}

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A system call failed.
    #[error("{step} {path}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process: stop it first, or give another data folder")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A record does not match its checksum, and whole records follow it, so this is no torn tail.
    #[error(
        "{path} is damaged at byte {offset}: {problem}; restore a snapshot with `coracle snapshot restore`, and check the disk"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What does not fit.
        problem: String,
    },
    /// The file is of another version or kind.
    #[error("{path} is not a file of this version of the store: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// There are encrypted objects, but no key or another one.
    #[error("{path} holds encrypted objects: {problem}; give the key file that was used when they were written")]
    Key {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// The etcd endpoints cannot be used.
    #[error("connect to etcd: {0}")]
    Etcd(String),
}

impl OpenError {
    /// For `map_err` on system calls.
    pub(crate) fn io(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> OpenError {
        let path = path.into();
        move |source| OpenError::Io { step, path, source }
    }
}

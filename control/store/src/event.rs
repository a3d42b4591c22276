//! Changes, and watching them.

use std::sync::Arc;

use tokio::sync::watch;

use crate::hub::{Hub, Ledger};
use crate::{Entry, Error};

/// Whether an object was written or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Created, when there is no version before, or changed.
    Put,
    /// Removed.
    Delete,
}

/// One change. All watchers share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The new version; of a deletion the last version, with the deletion's revision as its own.
    pub entry: Entry,
    /// The version before; `None` for a creation.
    pub prev: Option<Entry>,
}

impl Event {
    /// The revision of the change.
    pub fn revision(&self) -> u64 {
        self.entry.revision
    }

    /// The event of a write.
    pub(crate) fn put(entry: Entry, prev: Option<Entry>) -> Event {
        Event { kind: EventKind::Put, entry, prev }
    }

    /// The event of a deletion by `revision`.
    pub(crate) fn delete(prev: Entry, revision: u64) -> Event {
        Event { kind: EventKind::Delete, entry: prev.at_revision(revision), prev: Some(prev) }
    }

    /// The bytes that this event alone keeps in memory.
    pub(crate) fn weight(&self) -> usize {
        let prev = self.prev.as_ref().map_or(0, |entry| entry.value.len());
        let own = if self.kind == EventKind::Delete { self.entry.value.len() } else { 0 };
        size_of::<Event>() + prev + own
    }
}

/// Changes in the order of their revisions.
#[derive(Clone, Debug)]
pub struct Batch {
    /// At least one, at most [`Watch::BATCH_EVENTS`].
    pub events: Vec<Arc<Event>>,
    /// All changes of the scope up to here have been delivered.
    pub revision: u64,
}

/// A watch: a place in the shared log. It owns no queue, so a slow reader costs no memory; the log's own bounds decide
/// when it has fallen behind too far ([`Error::TooSlow`]).
#[derive(Debug)]
pub struct Watch {
    ledger: Arc<Ledger>,
    hub: Arc<Hub>,
    changed: watch::Receiver<u64>,
    /// Everything up to here has been delivered.
    at: u64,
}

impl Watch {
    /// Largest number of events in one batch.
    pub const BATCH_EVENTS: usize = 256;

    pub(crate) fn new(ledger: Arc<Ledger>, hub: Arc<Hub>, at: u64) -> Watch {
        let changed = hub.subscribe();
        Watch { ledger, hub, changed, at }
    }

    /// Waits for changes. Cancel-safe: a call that is dropped loses nothing.
    ///
    /// # Errors
    /// [`Error::TooSlow`] when changes it has not delivered are forgotten already, [`Error::Closed`] when the store
    /// ends. After an error it gives no more events.
    pub async fn next(&mut self) -> Result<Batch, Error> {
        loop {
            self.changed.borrow_and_update();
            if let Some(batch) = self.try_next()? {
                return Ok(batch);
            }
            if self.changed.changed().await.is_err() {
                return Err(Error::Closed);
            }
        }
    }

    /// The changes that are there already, `None` if there are none.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub fn try_next(&mut self) -> Result<Option<Batch>, Error> {
        loop {
            if let Some(error) = self.ledger.ended() {
                return Err(error);
            }
            let read = self.ledger.read(&self.hub, self.at, Self::BATCH_EVENTS)?;
            self.at = self.at.max(read.up_to);
            if !read.events.is_empty() {
                return Ok(Some(Batch { events: read.events, revision: self.at }));
            }
            if read.complete {
                return Ok(None);
            }
        }
    }

    /// The revision up to which every change has been delivered, for a bookmark. Moves on also when nothing in this
    /// scope changes; it stays where it is while changes wait to be read.
    pub fn progress(&mut self) -> u64 {
        if let Ok(read) = self.ledger.read(&self.hub, self.at, 1)
            && read.events.is_empty()
        {
            self.at = self.at.max(read.up_to);
        }
        self.at
    }

    /// The scope that it watches.
    pub fn scope(&self) -> &str {
        self.hub.scope()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ledger.release(&self.hub);
    }
}

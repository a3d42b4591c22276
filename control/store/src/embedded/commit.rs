//! The commit thread: the only writer. It takes the writes that wait, decides each against the state that those before
//! it leave, makes all of them durable with one flush, then shows them to readers, answers, and wakes watchers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Shared;
use super::frame::FrameBuffer;
use super::log::{AppendError, Log};
use super::seal::Cipher;
use crate::{Draft, Entry, Error, Event, OpenError, Precondition};

/// Most writes that wait for the commit thread; more wait in [`Committer::write`].
const QUEUE_WRITES: usize = 4096;

/// Most writes that share a flush.
const GROUP_WRITES: usize = 1024;

/// A group is full with this many bytes.
const GROUP_BYTES: usize = 4 << 20;

/// Longest wait for those whose last write was just answered to come with their next one. Only after a group of
/// several: a lone writer never waits.
const GATHER: Duration = Duration::from_micros(500);

/// A wish to change one object; without a draft, to remove it.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) key: Arc<str>,
    pub(super) draft: Option<Draft>,
    pub(super) precondition: Precondition,
}

type Answer = Result<Arc<Event>, Error>;

struct Request {
    write: Write,
    answer: oneshot::Sender<Answer>,
    /// Its place in the queue, free again when the write is answered.
    _place: OwnedSemaphorePermit,
}

/// The way to the commit thread.
#[derive(Debug)]
pub(super) struct Committer {
    places: Arc<Semaphore>,
    queue: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    pub(super) fn start(shared: Arc<Shared>, log: Log, cipher: Arc<Cipher>) -> Result<Committer, OpenError> {
        let (queue, requests) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store-commit".to_owned())
            .spawn(move || CommitThread { shared, cipher, log, poisoned: None }.run(&requests))
            .map_err(OpenError::io("start the commit thread of", ""))?;
        Ok(Committer { places: Arc::new(Semaphore::new(QUEUE_WRITES)), queue: Some(queue), thread: Some(thread) })
    }

    /// Does `write`; durable when it returns.
    pub(super) async fn write(&self, write: Write) -> Answer {
        let place = self.places.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        let (answer, answered) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(Error::Closed)?;
        queue.send(Request { write, answer, _place: place }).map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// Ends the thread after the writes that wait.
    pub(super) fn stop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the commit thread of the store has panicked");
        }
    }
}

struct CommitThread {
    shared: Arc<Shared>,
    cipher: Arc<Cipher>,
    log: Log,
    /// The failure after which nothing is written any more.
    poisoned: Option<String>,
}

/// Decided writes of one group.
#[derive(Default)]
struct Group {
    events: Vec<Arc<Event>>,
    /// Where the objects will stand, of the keys that the group changes.
    changed: HashMap<Arc<str>, Option<Entry>>,
}

impl CommitThread {
    fn run(mut self, requests: &Receiver<Request>) {
        let mut last_group = 1;
        let mut frame = FrameBuffer::new(self.log.tag());
        while let Ok(first) = requests.recv() {
            let group = gather(first, requests, last_group);
            last_group = group.len();
            self.commit(group, &mut frame);
        }
        if self.poisoned.is_none() {
            self.log.close();
        }
    }

    fn commit(&mut self, requests: Vec<Request>, frame: &mut FrameBuffer) {
        let mut group = Group::default();
        let first_revision = self.shared.ledger.past().newest + 1;
        let mut answers = Vec::with_capacity(requests.len());
        if let Err(error) = self.make_room(first_revision - 1) {
            for request in requests {
                let _ = request.answer.send(Err(error.clone()));
            }
            return;
        }
        frame.clear(self.log.tag());
        for Request { write, answer, _place } in requests {
            let revision = first_revision + group.events.len() as u64;
            let decided = self.decide(write, revision, &mut group);
            if let Ok(event) = &decided {
                match event.kind {
                    crate::EventKind::Put => frame.put(&event.entry, &self.cipher),
                    crate::EventKind::Delete => frame.delete(&event.entry.key, revision),
                }
            }
            answers.push((answer, decided, _place));
        }
        let written =
            if frame.is_empty() { Ok(()) } else { self.log.append(frame).map_err(|error| self.failed(error)) };
        let dirty = written.is_ok().then(|| self.show(group));
        for (answer, decided, _place) in answers {
            // Conflicts are answered as such only now: what they met is durable now, or else never was.
            let _ = answer.send(written.clone().and(decided));
        }
        if let Some(dirty) = dirty {
            dirty.wake();
        }
    }

    /// Refuses when poisoned, and begins a new log file when the current one is full.
    fn make_room(&mut self, newest: u64) -> Result<(), Error> {
        if let Some(reason) = &self.poisoned {
            return Err(Error::Poisoned { reason: reason.clone() });
        }
        if self.log.is_full() {
            self.log.roll(newest).map_err(|error| self.failed(error))?;
            self.shared.rolled.notify_one();
        }
        Ok(())
    }

    fn failed(&mut self, error: AppendError) -> Error {
        match error {
            AppendError::NoSpace(path) => Error::NoSpace { path },
            AppendError::Broken(reason) => {
                tracing::error!(reason, "the store takes no more writes: check the disk, then restart");
                self.poisoned = Some(reason.clone());
                Error::Poisoned { reason }
            }
        }
    }

    /// Whether `write` may happen, as of the state that the group leaves so far; if so, it is part of the group.
    fn decide(&self, write: Write, revision: u64, group: &mut Group) -> Answer {
        let current = match group.changed.get(&write.key) {
            Some(changed) => changed.clone(),
            None => self.shared.objects.read().get(&write.key).cloned(),
        };
        let missing = write.draft.is_none() && current.is_none();
        if missing || !write.precondition.holds(current.as_ref().map(|entry| entry.revision)) {
            return Err(Error::Conflict { key: write.key.to_string(), current });
        }
        let event = match (write.draft, current) {
            (Some(draft), current) => {
                // One allocation of the key serves all versions of an object.
                let key = current.as_ref().map_or(write.key, |entry| entry.key.clone());
                let entry = Entry {
                    key,
                    revision,
                    create_revision: current.as_ref().map_or(revision, |entry| entry.create_revision),
                    value: draft.finish(revision),
                    splice: u32::try_from(draft.splice).expect("drafts are checked to be short"),
                };
                Event::put(entry, current)
            }
            (None, Some(current)) => Event::delete(current, revision),
            (None, None) => {
                return Err(Error::Conflict { key: write.key.to_string(), current: None });
            }
        };
        let stands = (event.kind == crate::EventKind::Put).then(|| event.entry.clone());
        group.changed.insert(event.entry.key.clone(), stands);
        let event = Arc::new(event);
        group.events.push(event.clone());
        Ok(event)
    }

    /// Lets readers see the group, all at once.
    fn show(&self, group: Group) -> crate::hub::Dirty {
        let newest = group.events.last().map_or(0, |event| event.revision());
        let mut objects = self.shared.objects.write();
        for (key, stands) in group.changed {
            match stands {
                Some(entry) => objects.insert(key, entry),
                None => objects.remove(&key),
            };
        }
        self.shared.ledger.publish(&group.events, newest)
    }
}

/// The writes that wait, and those that are likely about to come.
fn gather(first: Request, requests: &Receiver<Request>, last_group: usize) -> Vec<Request> {
    let size = |request: &Request| request.write.draft.as_ref().map_or(0, |draft| draft.json.len());
    let mut bytes = size(&first);
    let mut group = vec![first];
    let mut until = None;
    while group.len() < GROUP_WRITES && bytes < GROUP_BYTES {
        let request = match requests.try_recv() {
            Ok(request) => request,
            Err(_) if group.len() >= last_group => break,
            Err(_) => {
                let left =
                    until.get_or_insert_with(|| Instant::now() + GATHER).saturating_duration_since(Instant::now());
                match requests.recv_timeout(left) {
                    Ok(request) => request,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                }
            }
        };
        bytes += size(&request);
        group.push(request);
    }
    group
}

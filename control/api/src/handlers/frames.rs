//! What the watchers of one change share: the object as a value, and the event as bytes, both made once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{BufMut as _, Bytes, BytesMut};
use coracle_store::Entry;
use parking_lot::Mutex;
use serde_json::Value;

use crate::http::{Media, Shape};
use crate::kinds::Kind;
use crate::status::Status;
use crate::wire;

/// Changes that are kept for other watchers.
const SLOTS: usize = 512;
/// Most bytes that are kept; with the next one all are let go.
const KEPT_BYTES: usize = 32 << 20;
/// A value takes about so many times the memory of its JSON.
const VALUE_FACTOR: usize = 8;

/// What happened, as a watcher sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Added,
    Modified,
    Deleted,
}

impl Change {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// The form in which a watcher gets objects.
#[derive(Clone)]
pub(super) struct Form {
    pub(super) kind: Arc<Kind>,
    pub(super) media: Media,
}

impl Form {
    /// Whether watchers of this form get the same bytes: rows of a Table tell ages, and the first has the columns.
    pub(super) fn is_shared(&self) -> bool {
        self.media.shape != Shape::Table
    }

    fn is(&self, other: &Form) -> bool {
        let parts = |form: &Form| (form.media.format, form.media.shape, form.media.meta);
        Arc::ptr_eq(&self.kind, &other.kind) && parts(self) == parts(other)
    }
}

/// What is kept of the change with this revision. A revision belongs to one object only.
#[derive(Default)]
struct Slot {
    revision: u64,
    value: Option<Arc<Value>>,
    frames: Vec<(Change, Form, Bytes)>,
}

/// The newest changes.
pub(crate) struct Frames {
    slots: Box<[Mutex<Slot>]>,
    bytes: AtomicUsize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { slots: (0..SLOTS).map(|_| Mutex::default()).collect(), bytes: AtomicUsize::new(0) }
    }
}

impl Frames {
    fn slot(&self, revision: u64) -> parking_lot::MutexGuard<'_, Slot> {
        let mut slot = self.slots[usize::try_from(revision).unwrap_or(0) % SLOTS].lock();
        if slot.revision != revision {
            *slot = Slot { revision, ..Slot::default() };
        }
        slot
    }

    /// Makes room for so many more bytes.
    fn reserve(&self, bytes: usize) {
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > KEPT_BYTES {
            self.bytes.store(0, Ordering::Relaxed);
            self.slots.iter().for_each(|slot| *slot.lock() = Slot::default());
        }
    }

    /// A stored object as a value.
    pub(super) fn value(&self, entry: &Entry) -> Result<Arc<Value>, Status> {
        // Under the lock: whoever comes meanwhile would do the same work.
        let mut slot = self.slot(entry.revision);
        if let Some(value) = &slot.value {
            return Ok(value.clone());
        }
        let value = Arc::new(wire::parse_stored(&entry.value)?);
        slot.value = Some(value.clone());
        drop(slot);
        self.reserve(entry.value.len() * VALUE_FACTOR);
        Ok(value)
    }

    /// The frame of a change, if a watcher of the same form had it.
    pub(super) fn frame(&self, change: Change, entry: &Entry, form: &Form) -> Option<Bytes> {
        let slot = self.slot(entry.revision);
        let same = slot.frames.iter().find(|(kept, of, _)| *kept == change && of.is(form));
        same.map(|(_, _, frame)| frame.clone())
    }

    /// Keeps the frame of a change for other watchers.
    pub(super) fn keep(&self, change: Change, entry: &Entry, form: &Form, frame: &Bytes) {
        self.reserve(frame.len());
        self.slot(entry.revision).frames.push((change, form.clone(), frame.clone()));
    }
}

/// `{"type":…,"object":…}` and a line feed.
pub(super) fn json(change: Change, object: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(object.len() + 40);
    frame.put_slice(b"{\"type\":\"");
    frame.put_slice(change.as_str().as_bytes());
    frame.put_slice(b"\",\"object\":");
    frame.put_slice(object);
    frame.put_slice(b"}\n");
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Format;

    #[test]
    fn forms_of_one_change_stand_beside_each_other_within_bounds() {
        let frames = Frames::default();
        let entry = |revision: u64, json: String| Entry {
            key: "/r/a".into(),
            revision,
            create_revision: 1,
            value: json.into(),
            splice: 0,
        };
        let kind = crate::kinds::builtin()[0].clone();
        let plain = Form { kind: kind.clone(), media: Media::JSON };
        let proto = Form { media: Media { format: Format::Protobuf, ..Media::JSON }, ..plain.clone() };
        let first = entry(7, "{\"a\":1}".into());
        frames.keep(Change::Added, &first, &plain, &"json".into());
        frames.keep(Change::Added, &first, &proto, &"proto".into());
        assert_eq!(frames.frame(Change::Added, &first, &plain), Some("json".into()));
        assert_eq!(frames.frame(Change::Added, &first, &proto), Some("proto".into()));
        assert_eq!(frames.frame(Change::Modified, &first, &plain), None);
        let value = frames.value(&first).expect("a value");
        assert!(Arc::ptr_eq(&value, &frames.value(&first).expect("a value")));
        // A change that falls into the same slot takes its place.
        assert_eq!(frames.frame(Change::Added, &entry(7 + SLOTS as u64, "{}".into()), &plain), None);
        assert_eq!(frames.frame(Change::Added, &first, &plain), None);
        let large = Bytes::from(vec![b' '; KEPT_BYTES / 2]);
        for revision in 10..20 {
            frames.keep(Change::Added, &entry(revision, "{}".into()), &plain, &large);
            let kept = frames.slots.iter().flat_map(|slot| slot.lock().frames.clone()).map(|(_, _, frame)| frame.len());
            assert!(kept.sum::<usize>() <= KEPT_BYTES + large.len());
        }
    }
}

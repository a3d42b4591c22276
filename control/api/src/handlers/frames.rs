//! Watch events as bytes. Many watchers of the same change share one frame.

use bytes::{BufMut as _, Bytes, BytesMut};
use coracle_store::Entry;
use parking_lot::Mutex;

/// Frames that are kept for other watchers of the same change.
const SLOTS: usize = 512;

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

/// The frame last made in a slot, with the revision and the change that it tells.
type Slot = Mutex<Option<(u64, Change, Bytes)>>;

/// The newest frames.
pub(crate) struct Frames(Box<[Slot]>);

impl Default for Frames {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| Mutex::new(None)).collect())
    }
}

impl Frames {
    /// The JSON frame of a change; `entry` is the object as the watcher sees it. A revision belongs to one object only.
    pub(super) fn json(&self, change: Change, entry: &Entry) -> Bytes {
        let slot = &self.0[usize::try_from(entry.revision).unwrap_or(0) % SLOTS];
        if let Some((revision, kept, frame)) = &*slot.lock()
            && *revision == entry.revision
            && *kept == change
        {
            return frame.clone();
        }
        let frame = json(change, &entry.value);
        *slot.lock() = Some((entry.revision, change, frame.clone()));
        frame
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

//! What goes into the store and comes out of it.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use crate::json;

/// One version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Such as `/registry/pods/default/web-1`.
    pub key: Arc<str>,
    /// The revision that wrote this version: the object's `resourceVersion`.
    pub revision: u64,
    /// The revision that created the object.
    pub create_revision: u64,
    /// The object's JSON, its `metadata.resourceVersion` included.
    pub value: Bytes,
    /// Where in `value` the digits of the revision stand.
    pub splice: u32,
}

impl Entry {
    /// The JSON before and after the digits of its revision.
    pub(crate) fn halves(&self) -> (&[u8], &[u8]) {
        let (head, tail) = self.value.split_at(self.splice as usize);
        (head, &tail[digits(self.revision)..])
    }

    /// The same object as if written by `revision`: what a watcher of its deletion gets to see.
    pub fn at_revision(&self, revision: u64) -> Entry {
        let (head, tail) = self.halves();
        Entry { revision, value: splice(head, revision, tail), ..self.clone() }
    }
}

/// An object about to be written: JSON with a place for the revision that only the commit knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// The JSON, with `"resourceVersion":""` in its metadata.
    pub json: Bytes,
    /// The offset between these two quotes.
    pub splice: usize,
}

/// An object that cannot become a [`Draft`].
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// It is not a JSON object with a `metadata` object.
    #[error("the object has no metadata")]
    NoMetadata,
    /// It cannot be encoded.
    #[error("encode the object: {0}")]
    Encode(#[from] serde_json::Error),
}

impl Draft {
    /// Encodes `object`, whatever its `metadata.resourceVersion` is or if it has none.
    ///
    /// # Errors
    /// When `object` has no `metadata`.
    pub fn encode(object: &Value) -> Result<Draft, DraftError> {
        const FIELD: &str = "resourceVersion";
        let fields = object.as_object().ok_or(DraftError::NoMetadata)?;
        let metadata = fields.get("metadata").and_then(Value::as_object).ok_or(DraftError::NoMetadata)?;
        let mut json = Vec::with_capacity(1024);
        let mut splice = 0;
        let mut separator = b'{';
        for (name, value) in fields {
            json.push(separator);
            separator = b',';
            json::append(&mut json, name)?;
            json.push(b':');
            if name != "metadata" {
                json::append(&mut json, value)?;
                continue;
            }
            // Sorted like everything else: the field goes before the first name that is greater.
            let mut inner = b'{';
            let mut names = metadata.iter().filter(|(name, _)| *name != FIELD).peekable();
            loop {
                if splice == 0 && names.peek().is_none_or(|(name, _)| name.as_str() > FIELD) {
                    json.push(inner);
                    json.extend_from_slice(b"\"resourceVersion\":\"");
                    splice = json.len();
                    json.push(b'"');
                    inner = b',';
                }
                let Some((name, value)) = names.next() else {
                    break;
                };
                json.push(inner);
                inner = b',';
                json::append(&mut json, name)?;
                json.push(b':');
                json::append(&mut json, value)?;
            }
            json.push(b'}');
        }
        json.push(b'}');
        Ok(Draft { json: json.into(), splice })
    }

    /// The bytes as written by `revision`.
    pub(crate) fn finish(&self, revision: u64) -> Bytes {
        splice(&self.json[..self.splice], revision, &self.json[self.splice..])
    }
}

/// The number of decimal digits of `revision`.
pub(crate) fn digits(revision: u64) -> usize {
    revision.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// `head`, the digits of `revision`, `tail`: in one allocation of exactly this size, since it lives long.
pub(crate) fn splice(head: &[u8], revision: u64, tail: &[u8]) -> Bytes {
    use std::io::Write as _;
    let mut bytes = Vec::with_capacity(head.len() + digits(revision) + tail.len());
    bytes.extend_from_slice(head);
    write!(bytes, "{revision}").expect("a Vec takes any write");
    bytes.extend_from_slice(tail);
    bytes.into()
}

/// What must be true of a key for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// There is no object.
    Absent,
    /// The object's newest version is this one.
    Revision(u64),
    /// Nothing.
    Any,
}

impl Precondition {
    /// Whether it holds for an object last written by `revision`, `None` for no object.
    pub(crate) fn holds(self, revision: Option<u64>) -> bool {
        match self {
            Precondition::Absent => revision.is_none(),
            Precondition::Revision(wanted) => revision == Some(wanted),
            Precondition::Any => true,
        }
    }
}

/// A deletion that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The object's last version.
    pub prev: Entry,
    /// The revision of the deletion.
    pub revision: u64,
}

/// Which part of a scope to list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// At most so many objects; 0 for all.
    pub limit: usize,
    /// Only keys greater than this one: the last key of the page before.
    pub start_after: Option<String>,
    /// As of this revision; the newest when `None`.
    pub revision: Option<u64>,
}

/// Objects as of one revision.
#[derive(Clone, Debug)]
pub struct Listing {
    /// In key order.
    pub entries: Vec<Entry>,
    /// The revision of the snapshot: where a watch goes on, what the next page asks for.
    pub revision: u64,
    /// Whether the limit left some out.
    pub more: bool,
    /// How many it left out.
    pub remaining: u64,
}

//! How changes stand in a file: frames of records, each frame with its checksum.
//!
//! A file begins with a header (magic, kind, tag, revision, checksum). The tag is random, and every frame begins with
//! it, so zeros, leftovers and other files' frames are never taken for one of this file. One frame is what one flush
//! made durable: only the last one can be torn.
//!
//! ```text
//! header: magic 8 | kind 1 | zero 3 | tag 8 | revision 8 | crc 4            (numbers little endian)
//! frame:  tag 8 | length 4 | crc 4 (of length and payload) | payload
//! record: kind 1 | key length 2 | value length 4 | splice 4 | revision 8 | create revision 8 | key | value
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::seal::{Cipher, SEAL_OVERHEAD_BYTES};
use crate::object::digits;
use crate::{Entry, KEY_LIMIT_BYTES, OpenError, VALUE_LIMIT_BYTES};

const MAGIC: [u8; 8] = *b"coracle\x01";
pub(super) const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 16;
const RECORD_HEADER_BYTES: usize = 27;

/// Largest payload of a frame: beyond that its length is a damaged one.
pub(super) const FRAME_LIMIT_BYTES: usize = 64 << 20;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    /// All changes after the header's revision.
    Log = 1,
    /// All objects as of the header's revision.
    Snapshot = 2,
}

/// The first bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: FileKind,
    pub(super) tag: u64,
    pub(super) revision: u64,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = self.kind as u8;
        bytes[12..20].copy_from_slice(&self.tag.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.revision.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Header, &'static str> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err("it is too short");
        };
        if bytes[..8] != MAGIC {
            return Err("it does not begin as one");
        }
        let mut reader = Reader(&bytes[8..]);
        let (kind, _, tag, revision, crc) = (reader.u8(), reader.take(3), reader.u64(), reader.u64(), reader.u32());
        if crc != Some(crc32fast::hash(&bytes[..28])) {
            return Err("its header does not match its checksum");
        }
        let kind = match kind {
            Some(1) => FileKind::Log,
            Some(2) => FileKind::Snapshot,
            _ => return Err("it is of an unknown kind"),
        };
        Ok(Header { kind, tag: tag.unwrap_or_default(), revision: revision.unwrap_or_default() })
    }
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// An object was written.
    Put(Entry),
    /// The object at a key was removed by a revision.
    Delete(Arc<str>, u64),
    /// A snapshot is complete with this many objects.
    End(u64),
}

const PUT: u8 = 1;
const DELETE: u8 = 2;
const END: u8 = 3;
/// Of a [`PUT`] whose value is encrypted.
const SEALED: u8 = 4;

/// A frame being filled.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    tag: u64,
    bytes: Vec<u8>,
}

impl FrameBuffer {
    pub(super) fn new(tag: u64) -> FrameBuffer {
        let mut frame = FrameBuffer { tag, bytes: Vec::new() };
        frame.clear(tag);
        frame
    }

    /// Empties it, for the file with this tag.
    pub(super) fn clear(&mut self, tag: u64) {
        self.tag = tag;
        self.bytes.clear();
        self.bytes.extend_from_slice(&tag.to_le_bytes());
        self.bytes.resize(FRAME_HEADER_BYTES, 0);
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.len() == FRAME_HEADER_BYTES
    }

    pub(super) fn put(&mut self, entry: &Entry, cipher: &Cipher) {
        match cipher.seal(entry) {
            None => self.record(PUT, &entry.key, entry.splice, entry.revision, entry.create_revision, &entry.value),
            Some(sealed) => {
                self.record(SEALED, &entry.key, entry.splice, entry.revision, entry.create_revision, &sealed);
            }
        }
    }

    pub(super) fn delete(&mut self, key: &str, revision: u64) {
        self.record(DELETE, key, 0, revision, 0, &[]);
    }

    pub(super) fn end(&mut self, count: u64) {
        self.record(END, "", 0, count, 0, &[]);
    }

    fn record(&mut self, kind: u8, key: &str, splice: u32, revision: u64, create_revision: u64, value: &[u8]) {
        let key_length = u16::try_from(key.len()).expect("keys are checked to be short");
        let value_length = u32::try_from(value.len()).expect("values are checked to be short");
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&key_length.to_le_bytes());
        self.bytes.extend_from_slice(&value_length.to_le_bytes());
        self.bytes.extend_from_slice(&splice.to_le_bytes());
        self.bytes.extend_from_slice(&revision.to_le_bytes());
        self.bytes.extend_from_slice(&create_revision.to_le_bytes());
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.extend_from_slice(value);
    }

    /// The whole frame, ready to be written.
    pub(super) fn finish(&mut self) -> &[u8] {
        let length = u32::try_from(self.bytes.len() - FRAME_HEADER_BYTES).expect("frames are bounded");
        self.bytes[8..12].copy_from_slice(&length.to_le_bytes());
        let crc = checksum(length, &self.bytes[FRAME_HEADER_BYTES..]);
        self.bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        &self.bytes
    }
}

fn checksum(length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// Numbers and slices off the front of a slice.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// What a record cannot be decoded for.
enum Fault {
    Damaged(&'static str),
    Key(&'static str),
}

fn decode_record(reader: &mut Reader<'_>, cipher: &Cipher) -> Result<Record, Fault> {
    let short = Fault::Damaged("a record ends early");
    let parts = (|| {
        let kind = reader.u8()?;
        let (key_length, value_length) = (reader.u16()?, reader.u32()?);
        let (splice, revision, create_revision) = (reader.u32()?, reader.u64()?, reader.u64()?);
        let (key, value) = (reader.take(key_length.into())?, reader.take(value_length as usize)?);
        Some((kind, splice, revision, create_revision, key, value))
    })();
    let (kind, splice, revision, create_revision, key, value) = parts.ok_or(short)?;
    let key = std::str::from_utf8(key).map_err(|_| Fault::Damaged("a key is not UTF-8"))?;
    if key.len() > KEY_LIMIT_BYTES || value.len() > VALUE_LIMIT_BYTES + SEAL_OVERHEAD_BYTES + RECORD_HEADER_BYTES {
        return Err(Fault::Damaged("a record is larger than any"));
    }
    let value = match kind {
        PUT => Bytes::copy_from_slice(value),
        SEALED => cipher.open(key, revision, value).map_err(Fault::Key)?.into(),
        DELETE => return Ok(Record::Delete(key.into(), revision)),
        END => return Ok(Record::End(revision)),
        _ => return Err(Fault::Damaged("a record is of an unknown kind")),
    };
    if splice as usize + digits(revision) > value.len() {
        return Err(Fault::Damaged("an object has no place for its revision"));
    }
    Ok(Record::Put(Entry { key: key.into(), revision, create_revision, value, splice }))
}

/// Where the good part of a file ends, and whether something torn follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) offset: u64,
    pub(super) torn: bool,
}

/// Reads a file record by record into `visit`, whose error is the problem with a record.
///
/// # Errors
/// [`OpenError::Damaged`] when a frame is not whole though a whole one follows it.
pub(super) fn read(
    path: &Path,
    kind: FileKind,
    cipher: &Cipher,
    mut visit: impl FnMut(Record) -> Result<(), String>,
) -> Result<(Header, End), OpenError> {
    let file = File::open(path).map_err(OpenError::io("open", path))?;
    let length = file.metadata().map_err(OpenError::io("examine", path))?.len();
    let mut start = [0; HEADER_BYTES];
    let format = |problem: &str| OpenError::Format { path: path.to_owned(), problem: problem.to_owned() };
    if length < HEADER_BYTES as u64 {
        return Err(format("it is too short"));
    }
    file.read_exact_at(&mut start, 0).map_err(OpenError::io("read", path))?;
    let header = Header::decode(&start).map_err(format)?;
    if header.kind != kind {
        return Err(format("it is of another kind"));
    }
    let mut offset = HEADER_BYTES as u64;
    let mut payload = Vec::new();
    let damaged = |offset, problem: String| OpenError::Damaged { path: path.to_owned(), offset, problem };
    loop {
        match read_frame(&file, offset, length, header.tag, &mut payload).map_err(OpenError::io("read", path))? {
            Frame::Whole => {}
            Frame::None => {
                // Nothing but zeros and the pieces of one torn frame may follow.
                return match find_frame(&file, offset, length, header.tag).map_err(OpenError::io("read", path))? {
                    None => Ok((header, End { offset, torn: false })),
                    Some(next) => Err(damaged(offset, format!("a frame is missing before the whole one at {next}"))),
                };
            }
            Frame::Broken => {
                return match find_frame(&file, offset + 1, length, header.tag).map_err(OpenError::io("read", path))? {
                    None => Ok((header, End { offset, torn: true })),
                    Some(next) => Err(damaged(
                        offset,
                        format!("a frame does not match its checksum, a whole one follows at {next}"),
                    )),
                };
            }
        }
        let mut reader = Reader(&payload);
        while !reader.0.is_empty() {
            let record = decode_record(&mut reader, cipher).map_err(|fault| match fault {
                Fault::Damaged(problem) => damaged(offset, problem.to_owned()),
                Fault::Key(problem) => OpenError::Key { path: path.to_owned(), problem: problem.to_owned() },
            })?;
            visit(record).map_err(|problem| damaged(offset, problem))?;
        }
        offset += (FRAME_HEADER_BYTES + payload.len()) as u64;
    }
}

enum Frame {
    Whole,
    Broken,
    /// There is no frame here.
    None,
}

fn read_frame(file: &File, offset: u64, length: u64, tag: u64, payload: &mut Vec<u8>) -> std::io::Result<Frame> {
    if offset + FRAME_HEADER_BYTES as u64 > length {
        return Ok(if offset == length { Frame::None } else { Frame::Broken });
    }
    let mut header = [0; FRAME_HEADER_BYTES];
    file.read_exact_at(&mut header, offset)?;
    let mut reader = Reader(&header);
    let (found, size, crc) = (reader.u64(), reader.u32().unwrap_or_default(), reader.u32());
    if found != Some(tag) {
        return Ok(if header == [0; FRAME_HEADER_BYTES] { Frame::None } else { Frame::Broken });
    }
    let end = offset + FRAME_HEADER_BYTES as u64 + u64::from(size);
    if size as usize > FRAME_LIMIT_BYTES || end > length {
        return Ok(Frame::Broken);
    }
    payload.resize(size as usize, 0);
    file.read_exact_at(payload, offset + FRAME_HEADER_BYTES as u64)?;
    Ok(if crc == Some(checksum(size, payload)) { Frame::Whole } else { Frame::Broken })
}

/// The offset of the first whole frame at or after `from`.
fn find_frame(file: &File, from: u64, length: u64, tag: u64) -> std::io::Result<Option<u64>> {
    const WINDOW_BYTES: usize = 1 << 20;
    let tag_bytes = tag.to_le_bytes();
    let mut window = vec![0; WINDOW_BYTES];
    let mut payload = Vec::new();
    let mut offset = from;
    while offset + FRAME_HEADER_BYTES as u64 <= length {
        let size = WINDOW_BYTES.min((length - offset) as usize);
        file.read_exact_at(&mut window[..size], offset)?;
        for (at, found) in window[..size].windows(tag_bytes.len()).enumerate() {
            if found == tag_bytes
                && matches!(read_frame(file, offset + at as u64, length, tag, &mut payload)?, Frame::Whole)
            {
                return Ok(Some(offset + at as u64));
            }
        }
        // Overlap, so that a tag across the border is seen.
        offset += (size - tag_bytes.len() + 1) as u64;
    }
    Ok(None)
}

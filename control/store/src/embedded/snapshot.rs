//! Snapshots: all objects as of one revision in one file, for the store itself and to carry away.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::frame::{self, FileKind, FrameBuffer, Header, Record};
use super::log::{new_tag, sync_folder};
use super::recover;
use super::seal::Cipher;
use super::{EmbeddedOptions, bounds, cipher};
use crate::{Entry, OpenError};

/// Size of the frames in a snapshot.
const FRAME_BYTES: usize = 256 << 10;

/// What a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotSummary {
    /// The revision of the store that it was taken at.
    pub revision: u64,
    /// How many objects.
    pub objects: u64,
    /// How many bytes of JSON.
    pub bytes: u64,
}

/// The path of the store's own snapshot at `revision`.
pub(super) fn snapshot_path(folder: &Path, revision: u64) -> PathBuf {
    folder.join(format!("snapshot-{revision:020}"))
}

/// Writes a snapshot under a temporary name; [`Writer::finish`] gives it the real one.
pub(super) struct Writer {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
    frame: FrameBuffer,
    tag: u64,
    count: u64,
    finished: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_file(&self.unfinished)
        {
            tracing::warn!(path = %self.unfinished.display(), %error, "cannot remove an unfinished snapshot");
        }
    }
}

impl Writer {
    pub(super) fn create(path: &Path, revision: u64) -> io::Result<Writer> {
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".tmp");
        let unfinished = PathBuf::from(unfinished);
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        let tag = new_tag();
        file.write_all(&Header { kind: FileKind::Snapshot, tag, revision }.encode())?;
        Ok(Writer {
            path: path.to_owned(),
            unfinished,
            file,
            frame: FrameBuffer::new(tag),
            tag,
            count: 0,
            finished: false,
        })
    }

    pub(super) fn add(&mut self, entry: &Entry, cipher: &Cipher) -> io::Result<()> {
        self.frame.put(entry, cipher);
        self.count += 1;
        if self.frame.len() >= FRAME_BYTES { self.write_frame() } else { Ok(()) }
    }

    fn write_frame(&mut self) -> io::Result<()> {
        self.file.write_all(self.frame.finish())?;
        self.frame.clear(self.tag);
        Ok(())
    }

    /// Makes it durable and gives it its name.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.frame.end(self.count);
        self.write_frame()?;
        self.file.sync_all()?;
        fs::rename(&self.unfinished, &self.path)?;
        self.finished = true;
        sync_folder(self.path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new(".")))
    }
}

/// Reads the snapshot at `path` object by object.
pub(super) fn read(path: &Path, cipher: &Cipher, mut visit: impl FnMut(Entry)) -> Result<SnapshotSummary, OpenError> {
    let (mut objects, mut bytes, mut ended) = (0, 0, false);
    let mut last: Option<std::sync::Arc<str>> = None;
    let (header, end) = frame::read(path, FileKind::Snapshot, cipher, |record| match record {
        _ if ended => Err("a record follows the end of the snapshot".to_owned()),
        Record::Put(entry) => {
            if last.replace(entry.key.clone()).is_some_and(|last| last >= entry.key) {
                return Err(format!("{} is out of order", entry.key));
            }
            objects += 1;
            bytes += entry.value.len() as u64;
            visit(entry);
            Ok(())
        }
        Record::Delete(..) => Err("a snapshot has no deletions".to_owned()),
        Record::End(count) if count != objects => Err(format!("it has {objects} objects instead of {count}")),
        Record::End(_) => {
            ended = true;
            Ok(())
        }
    })?;
    if !ended || end.torn {
        return Err(OpenError::Damaged {
            path: path.to_owned(),
            offset: end.offset,
            problem: "the snapshot is incomplete".to_owned(),
        });
    }
    Ok(SnapshotSummary { revision: header.revision, objects, bytes })
}

/// How often [`save`] starts anew when the store's own compaction removes a file under it.
const SAVE_ATTEMPTS: usize = 5;

/// Saves the store in `folder`, also of a running server, to the file `to`. Encrypted objects stay encrypted with the
/// same key. Blocks.
///
/// # Errors
/// When the store cannot be read or the file not written.
pub fn save(folder: &Path, to: &Path, options: &EmbeddedOptions) -> Result<SnapshotSummary, OpenError> {
    let cipher = cipher(options)?;
    let mut attempt = 0;
    let recovered = loop {
        attempt += 1;
        match recover::load(folder, &cipher, bounds(options)) {
            Err(OpenError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && attempt < SAVE_ATTEMPTS => {}
            result => break result?,
        }
    };
    let revision = recovered.ledger.past().newest;
    let mut writer = Writer::create(to, revision).map_err(OpenError::io("create", to))?;
    for entry in recovered.objects.values() {
        writer.add(entry, &cipher).map_err(OpenError::io("write", to))?;
    }
    writer.finish().map_err(OpenError::io("finish", to))?;
    verify(to, options)
}

/// Reads all of the snapshot file `path`. Blocks.
///
/// # Errors
/// When it is not a snapshot, damaged or encrypted with another key.
pub fn verify(path: &Path, options: &EmbeddedOptions) -> Result<SnapshotSummary, OpenError> {
    read(path, &cipher(options)?, |_| ())
}

/// Makes a store in `folder` out of the snapshot file `from`. Its revision is that of the snapshot plus `bump`, which
/// should be more than the writes that happened since: so no client takes an old state for a newer one. Blocks.
///
/// # Errors
/// When the snapshot is no good, or `folder` holds a store already.
pub fn restore(from: &Path, folder: &Path, bump: u64, options: &EmbeddedOptions) -> Result<SnapshotSummary, OpenError> {
    let cipher = cipher(options)?;
    let mut summary = read(from, &cipher, |_| ())?;
    summary.revision = summary.revision.saturating_add(bump);
    let _lock = recover::lock(folder)?;
    let files = recover::Files::scan(folder)?;
    if !files.logs.is_empty() || !files.snapshots.is_empty() {
        return Err(OpenError::Format {
            path: folder.to_owned(),
            problem: "it holds a store already: move that away first".to_owned(),
        });
    }
    let path = snapshot_path(folder, summary.revision);
    let mut writer = Writer::create(&path, summary.revision).map_err(OpenError::io("create", &path))?;
    let mut failed = None;
    read(from, &cipher, |entry| {
        if failed.is_none() {
            failed = writer.add(&entry, &cipher).err();
        }
    })?;
    match failed {
        Some(source) => Err(OpenError::Io { step: "write", path, source }),
        None => writer.finish().map(|()| summary).map_err(OpenError::io("finish", path)),
    }
}

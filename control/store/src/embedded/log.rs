//! The log: every change, appended and flushed, in files of bounded size.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom as _, SystemRandom};

use super::frame::{FileKind, FrameBuffer, HEADER_BYTES, Header};
use crate::OpenError;

/// How far ahead of the writes the file is filled with zeros. A flush of bytes in a file that does not grow needs no
/// change of the file system's own journal, and a full disk shows itself before a write is under way.
/// This part of a file's full size.
const AHEAD_PART: u64 = 16;

/// The file operations of the log, so that tests can let them fail.
pub(super) trait Medium: Send + Sync {
    /// Makes a file of its own.
    fn create(&self, path: &Path) -> io::Result<File> {
        fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)
    }
    /// Writes all of `bytes`.
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }
    /// Makes what was written durable.
    fn flush(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }
}

/// The disk as it is.
pub(super) struct Disk;

impl Medium for Disk {}

/// Why an append failed.
#[derive(Debug)]
pub(super) enum AppendError {
    /// Nothing was written, the next append may succeed.
    NoSpace(PathBuf),
    /// What is on disk is unknown.
    Broken(String),
}

impl AppendError {
    fn new(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AppendError {
        move |error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => AppendError::NoSpace(path.to_owned()),
            _ => AppendError::Broken(format!("{step} {}: {error}", path.display())),
        }
    }
}

/// The file of the log that is being written.
pub(super) struct Log {
    folder: PathBuf,
    medium: Box<dyn Medium>,
    /// When a file is full and the next one begins.
    segment_bytes: u64,
    segment: Segment,
}

struct Segment {
    path: PathBuf,
    file: File,
    tag: u64,
    /// Where the next frame goes.
    offset: u64,
    /// Up to where the file has been written before.
    filled: u64,
}

/// The path of the log file with the changes after `revision`.
pub(super) fn log_path(folder: &Path, revision: u64) -> PathBuf {
    folder.join(format!("log-{revision:020}"))
}

/// A random tag that is never zero.
pub(super) fn new_tag() -> u64 {
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).expect("the kernel gives random bytes");
    u64::from_le_bytes(bytes) | 1 << 63
}

/// Makes the names in `folder` durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

impl Segment {
    /// A new file for the changes after `revision`. Its name is durable when it returns.
    fn create(
        folder: &Path,
        medium: &dyn Medium,
        revision: u64,
    ) -> Result<Segment, (&'static str, PathBuf, io::Error)> {
        let path = log_path(folder, revision);
        let unfinished = path.with_extension("tmp");
        let step = |step, path: &Path| {
            let path = path.to_owned();
            move |error| (step, path, error)
        };
        let _ = fs::remove_file(&unfinished);
        let file = medium.create(&unfinished).map_err(step("create", &unfinished))?;
        let tag = new_tag();
        let header = Header { kind: FileKind::Log, tag, revision }.encode();
        medium.write(&file, &header, 0).map_err(step("write", &unfinished))?;
        medium.flush(&file).map_err(step("flush", &unfinished))?;
        fs::rename(&unfinished, &path).map_err(step("rename", &unfinished))?;
        sync_folder(folder).map_err(step("flush", folder))?;
        Ok(Segment { path, file, tag, offset: HEADER_BYTES as u64, filled: HEADER_BYTES as u64 })
    }
}

impl Log {
    /// Begins a new file for the changes after `revision`.
    pub(super) fn create(
        folder: &Path,
        medium: Box<dyn Medium>,
        segment_bytes: u64,
        revision: u64,
    ) -> Result<Log, OpenError> {
        let segment = Segment::create(folder, &*medium, revision).map_err(|(step, path, source)| OpenError::Io {
            step,
            path,
            source,
        })?;
        Ok(Log { folder: folder.to_owned(), medium, segment_bytes, segment })
    }

    /// The tag that frames for it begin with.
    pub(super) fn tag(&self) -> u64 {
        self.segment.tag
    }

    /// Whether the file is full: [`Log::roll`] then.
    pub(super) fn is_full(&self) -> bool {
        self.segment.offset >= self.segment_bytes
    }

    /// Goes on in a new file for the changes after `revision`.
    pub(super) fn roll(&mut self, revision: u64) -> Result<(), AppendError> {
        let next = Segment::create(&self.folder, &*self.medium, revision)
            .map_err(|(step, path, error)| AppendError::new(step, &path)(error))?;
        let old = std::mem::replace(&mut self.segment, next);
        // Only zeros go; they are found to be the end of the log if this does not happen.
        if let Err(error) = old.file.set_len(old.offset) {
            tracing::warn!(path = %old.path.display(), %error, "cannot give back the unused end of a log file");
        }
        Ok(())
    }

    /// Appends a frame; durable when it returns.
    pub(super) fn append(&mut self, frame: &mut FrameBuffer) -> Result<(), AppendError> {
        let Segment { path, file, offset, filled, .. } = &mut self.segment;
        let bytes = frame.finish();
        let end = *offset + bytes.len() as u64;
        if end > *filled {
            static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
            let goal = end + self.segment_bytes / AHEAD_PART;
            while *filled < goal {
                let size = ZEROS.len().min((goal - *filled) as usize);
                self.medium.write(file, &ZEROS[..size], *filled).map_err(AppendError::new("extend", path))?;
                *filled += size as u64;
            }
        }
        self.medium.write(file, bytes, *offset).map_err(AppendError::new("write", path))?;
        self.medium.flush(file).map_err(|error| AppendError::Broken(format!("flush {}: {error}", path.display())))?;
        *offset = end;
        Ok(())
    }

    /// Ends the file properly, so that damage to its last frame is told from a torn tail.
    pub(super) fn close(&mut self) {
        let mut frame = FrameBuffer::new(self.segment.tag);
        let closed = self
            .append(&mut frame)
            .map_err(|error| format!("{error:?}"))
            .and_then(|()| self.segment.file.set_len(self.segment.offset).map_err(|error| error.to_string()));
        if let Err(error) = closed {
            tracing::warn!(path = %self.segment.path.display(), error, "cannot close the log properly, nothing is lost");
        }
    }
}

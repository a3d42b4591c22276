//! What makes the way of a line from pipe to file survive a `kill -9` at any instruction.
//!
//! The pump looks at a pipe's content without taking it (`tee`), writes it to the log, then takes it. The journal, a small file on
//! tmpfs, says before the write where it will go and is cleared after the taking, so the next supervisor can tell which of the
//! three steps was the last and neither loses nor repeats a line.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::frame::{Stream, text_of};
use super::logfile::LogFile;

/// Bytes of one stream's record.
const RECORD_BYTES: usize = 24;

/// A chunk on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Size of the log file before it.
    pub before: u64,
    /// Bytes of the program's text.
    pub taken: u64,
}

/// The journal of one container's two streams.
#[derive(Debug)]
pub struct Journal {
    file: File,
}

impl Journal {
    /// Opens (or makes) the journal.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file })
    }

    /// Notes that a chunk is about to be written, or (`None`) that the last one is done with.
    ///
    /// # Errors
    /// Those of `pwrite(2)`.
    pub fn note(&self, stream: Stream, pending: Option<Pending>) -> io::Result<()> {
        let mut record = [0; RECORD_BYTES];
        if let Some(pending) = pending {
            record[..8].copy_from_slice(&1_u64.to_le_bytes());
            record[8..16].copy_from_slice(&pending.before.to_le_bytes());
            record[16..].copy_from_slice(&pending.taken.to_le_bytes());
        }
        self.file.write_all_at(&record, Self::offset(stream))
    }

    /// The chunk that was on its way, if any.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    pub fn pending(&self, stream: Stream) -> io::Result<Option<Pending>> {
        let mut record = [0; RECORD_BYTES];
        if self.file.metadata()?.len() < Self::offset(stream) + RECORD_BYTES as u64 {
            return Ok(None);
        }
        self.file.read_exact_at(&mut record, Self::offset(stream))?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&record[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        Ok((number(0) == 1).then(|| Pending { before: number(8), taken: number(16) }))
    }

    fn offset(stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => 0,
            Stream::Stderr => RECORD_BYTES as u64,
        }
    }
}

/// What is to be done about a chunk that was on its way when the last supervisor died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing of it is in the log, or only a part, which was cut off: pump it as if new.
    PumpAgain,
    /// It is in the log and still in the pipe: take this many bytes.
    Take(u64),
    /// It is in the log and was taken.
    Done,
}

/// Compares log and pipe (`head`: what is in it now) and undoes a partly written chunk.
///
/// # Errors
/// When the log cannot be read or cut.
pub fn judge(pending: Pending, log: &mut LogFile, head: &[u8]) -> io::Result<Verdict> {
    if log.size() <= pending.before {
        return Ok(Verdict::PumpAgain);
    }
    let taken = usize::try_from(pending.taken).unwrap_or(usize::MAX);
    let written = text_of(&log.tail(pending.before)?);
    match written {
        Some(text) if text.len() >= taken => {
            let still_there = head.get(..taken) == Some(text.as_slice());
            Ok(if still_there { Verdict::Take(pending.taken) } else { Verdict::Done })
        }
        _ => {
            log.cut(pending.before)?;
            Ok(Verdict::PumpAgain)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::frame;
    use super::super::logfile::Limits;
    use super::*;

    /// Each point at which a supervisor can die, and that the next one neither loses nor repeats the chunk.
    #[test]
    fn every_crash_point_is_told_apart() {
        let folder = tempfile::tempdir().expect("folder");
        let limits = Limits { max_size_bytes: 1 << 20, max_files: 2 };
        let time = "2016-10-06T00:17:09.669794202Z";
        let chunk = b"one\ntwo\n";
        let (mut old, mut new) = (Vec::new(), Vec::new());
        frame(b"zero\n", Stream::Stdout, time, false, &mut old);
        frame(chunk, Stream::Stdout, time, false, &mut new);
        for (name, written, head, wanted) in [
            ("before the write", 0, &b"one\ntwo\nthree"[..], Verdict::PumpAgain),
            ("amid the write", new.len() - 3, b"one\ntwo\n", Verdict::PumpAgain),
            ("after the write", new.len(), b"one\ntwo\nthree", Verdict::Take(8)),
            ("after the taking", new.len(), b"three", Verdict::Done),
            ("after the taking, nothing more", new.len(), b"", Verdict::Done),
        ] {
            let mut log = LogFile::open(&folder.path().join(name), limits).expect("open");
            log.append(&old).expect("append");
            let pending = Pending { before: log.size(), taken: chunk.len() as u64 };
            let journal = Journal::open(&folder.path().join("journal")).expect("journal");
            journal.note(Stream::Stderr, Some(pending)).expect("note");
            log.append(&new[..written]).expect("append");
            let pending = journal.pending(Stream::Stderr).expect("read").expect("pending");
            assert_eq!(judge(pending, &mut log, head).expect("judge"), wanted, "{name}");
            assert_eq!(
                log.size(),
                if wanted == Verdict::PumpAgain { old.len() } else { old.len() + new.len() } as u64,
                "{name}"
            );
            assert_eq!(journal.pending(Stream::Stdout).expect("read"), None);
        }
    }
}

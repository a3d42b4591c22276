//! From a container's pipe or terminal to its log, and to whoever is attached.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_sys::pipe;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::frame::{Stream, frame};
use super::journal::{Journal, Pending, Verdict, judge};
use super::logfile::LogFile;

/// Bytes looked at in one go: what a pipe holds.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks of one stream before others get their turn.
const TURN_CHUNKS: usize = 16;

/// What all pumps of the process share: buffers and the pipe into which chunks are duplicated.
pub struct Pump {
    scratch: (File, File),
    null: File,
    chunk: Vec<u8>,
    lines: Vec<u8>,
}

/// What a turn of a pump came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// All there is has been taken (a piece of a line may be left); the next event will come.
    Drained,
    /// There is more; come again.
    More,
    /// The stream has ended.
    Ended,
}

/// A client that gets a copy of the output.
#[derive(Debug)]
pub struct Attached {
    /// For standard output.
    pub stdout: Option<File>,
    /// For standard error.
    pub stderr: Option<File>,
}

/// One source of output.
#[derive(Debug)]
pub struct Source {
    fd: File,
    stream: Stream,
    /// Bytes at the head of the pipe that attached clients have already got.
    shown: usize,
    /// Of a terminal, which cannot be looked into: bytes read that are not yet a whole line. `None` for a pipe.
    kept: Option<Vec<u8>>,
}

impl Source {
    /// A pipe's read end.
    pub fn pipe(fd: OwnedFd, stream: Stream) -> Self {
        Self { fd: fd.into(), stream, shown: 0, kept: None }
    }

    /// A terminal's master.
    pub fn terminal(fd: OwnedFd) -> Self {
        Self { fd: fd.into(), stream: Stream::Stdout, shown: 0, kept: Some(Vec::new()) }
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether it is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.kept.is_some()
    }
}

/// Where a source's lines go.
pub struct Sink<'a> {
    /// The log.
    pub log: &'a mut LogFile,
    /// Its journal.
    pub journal: &'a Journal,
    /// Attached clients; one that does not keep up or has left is removed.
    pub attached: &'a mut Vec<Attached>,
    /// Set to what went wrong when lines could not be written and were dropped.
    pub lost: &'a mut Option<io::Error>,
}

impl Pump {
    /// Buffers and descriptors.
    ///
    /// # Errors
    /// When a descriptor cannot be made.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
        Ok(Self {
            scratch: (reader.into(), writer.into()),
            null: File::options().write(true).open("/dev/null")?,
            chunk: vec![0; CHUNK_BYTES],
            lines: Vec::with_capacity(2 * CHUNK_BYTES),
        })
    }

    /// Moves what is there. `hung_up`: the poll said that no writer is left.
    ///
    /// # Errors
    /// When the pipe itself or the journal fails; a log that cannot be written is told through [`Sink::lost`].
    pub fn turn(&mut self, source: &mut Source, sink: &mut Sink<'_>) -> io::Result<Turn> {
        for _ in 0..TURN_CHUNKS {
            let turn = if source.kept.is_some() { self.terminal(source, sink)? } else { self.pipe(source, sink)? };
            if turn != Turn::More {
                return Ok(turn);
            }
        }
        Ok(Turn::More)
    }

    /// Settles what a supervisor that died had on its way.
    ///
    /// # Errors
    /// As [`Self::turn`].
    pub fn recover(&mut self, source: &mut Source, log: &mut LogFile, journal: &Journal) -> io::Result<()> {
        let Some(pending) = journal.pending(source.stream)? else { return Ok(()) };
        let length = if source.kept.is_some() { 0 } else { self.look(source)?.unwrap_or(0) };
        if let Verdict::Take(bytes) = judge(pending, log, &self.chunk[..length])? {
            self.take(source, usize::try_from(bytes).unwrap_or(0))?;
        }
        journal.note(source.stream, None)
    }

    fn pipe(&mut self, source: &mut Source, sink: &mut Sink<'_>) -> io::Result<Turn> {
        let length = match self.look(source)? {
            None => return Ok(Turn::Drained),
            Some(0) => return Ok(Turn::Ended),
            Some(length) => length,
        };
        fan_out(sink.attached, source.stream, &self.chunk[source.shown.min(length)..length]);
        source.shown = length;
        let time = format!("{:.9}", jiff::Timestamp::now());
        self.lines.clear();
        let mut taken = frame(&self.chunk[..length], source.stream, &time, false, &mut self.lines);
        if taken == 0 {
            if !has_hung_up(source.as_fd())? {
                return Ok(Turn::Drained);
            }
            // A writer may have written between the look and its end.
            let Some(length) = self.look(source)? else { return Ok(Turn::Drained) };
            fan_out(sink.attached, source.stream, &self.chunk[source.shown.min(length)..length]);
            source.shown = length;
            taken = frame(&self.chunk[..length], source.stream, &time, true, &mut self.lines);
        }
        match sink.log.prepare(self.lines.len()) {
            Ok(before) => {
                sink.journal.note(source.stream, Some(Pending { before, taken: taken as u64 }))?;
                if let Err(error) = sink.log.append(&self.lines) {
                    *sink.lost = Some(error);
                }
            }
            Err(error) => *sink.lost = Some(error),
        }
        self.take(source, taken)?;
        sink.journal.note(source.stream, None)?;
        source.shown = source.shown.saturating_sub(taken);
        Ok(Turn::More)
    }

    fn terminal(&mut self, source: &mut Source, sink: &mut Sink<'_>) -> io::Result<Turn> {
        let Some(kept) = source.kept.as_mut() else { return Ok(Turn::Drained) };
        let length = match source.fd.read(&mut self.chunk) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Drained),
            // Linux says EIO when the last other side of a terminal is closed.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => 0,
            Err(error) => return Err(error),
        };
        fan_out(sink.attached, source.stream, &self.chunk[..length]);
        kept.extend_from_slice(&self.chunk[..length]);
        self.lines.clear();
        let time = format!("{:.9}", jiff::Timestamp::now());
        let taken = frame(kept, source.stream, &time, length == 0, &mut self.lines);
        kept.drain(..taken);
        kept.shrink_to(super::frame::LINE_LIMIT_BYTES);
        if taken > 0
            && let Err(error) = sink.log.prepare(self.lines.len()).and_then(|_| sink.log.append(&self.lines))
        {
            *sink.lost = Some(error);
        }
        Ok(if length == 0 { Turn::Ended } else { Turn::More })
    }

    /// Copies the head of the pipe into `chunk`; `None`: nothing there now, 0: the end.
    fn look(&mut self, source: &Source) -> io::Result<Option<usize>> {
        let length = match pipe::tee(source.as_fd(), self.scratch.1.as_fd(), CHUNK_BYTES) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        self.scratch.0.read_exact(&mut self.chunk[..length])?;
        Ok(Some(length))
    }

    /// Takes bytes from the pipe that have been dealt with.
    fn take(&self, source: &Source, mut bytes: usize) -> io::Result<()> {
        while bytes > 0 {
            match pipe::splice(source.as_fd(), self.null.as_fd(), bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                done => bytes -= done,
            }
        }
        Ok(())
    }
}

fn has_hung_up(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLHUP)))
}

/// Gives new output to attached clients. A client whose pipe is full loses its place rather than stopping the container.
fn fan_out(attached: &mut Vec<Attached>, stream: Stream, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    attached.retain_mut(|client| {
        let file = match stream {
            Stream::Stdout => client.stdout.as_mut(),
            Stream::Stderr => client.stderr.as_mut(),
        };
        file.is_none_or(|file| file.write_all(bytes).is_ok())
    });
}

#[cfg(test)]
mod tests {
    use super::super::frame::text_of;
    use super::super::logfile::Limits;
    use super::*;

    struct Fixture {
        folder: tempfile::TempDir,
        pump: Pump,
        log: LogFile,
        journal: Journal,
        attached: Vec<Attached>,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("folder");
            let limits = Limits { max_size_bytes: 64 << 20, max_files: 2 };
            Self {
                pump: Pump::new().expect("pump"),
                log: LogFile::open(&folder.path().join("0.log"), limits).expect("log"),
                journal: Journal::open(&folder.path().join("journal")).expect("journal"),
                attached: Vec::new(),
                folder,
            }
        }

        fn turn(&mut self, source: &mut Source) -> Turn {
            let mut lost = None;
            let mut sink =
                Sink { log: &mut self.log, journal: &self.journal, attached: &mut self.attached, lost: &mut lost };
            let turn = self.pump.turn(source, &mut sink).expect("turn");
            assert!(lost.is_none(), "{lost:?}");
            turn
        }

        fn text(&self) -> String {
            let bytes = std::fs::read(self.folder.path().join("0.log")).expect("read");
            String::from_utf8(text_of(&bytes).expect("whole lines")).expect("text")
        }
    }

    fn pipe() -> (Source, File) {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("pipe");
        (Source::pipe(reader, Stream::Stdout), writer.into())
    }

    #[test]
    fn a_piece_of_a_line_waits_in_the_pipe_but_is_shown_at_once() {
        let mut f = Fixture::new();
        let (mut source, mut writer) = pipe();
        let (mut shown, client) = io::pipe().expect("pipe");
        f.attached.push(Attached { stdout: Some(File::from(OwnedFd::from(client))), stderr: None });
        assert_eq!(f.turn(&mut source), Turn::Drained);
        for (text, log) in [("one\ntw", "one\n"), ("o", "one\n"), ("\nthree", "one\ntwo\n")] {
            writer.write_all(text.as_bytes()).expect("write");
            assert_eq!(f.turn(&mut source), Turn::Drained);
            assert_eq!(f.text(), log);
            let mut got = vec![0; text.len()];
            shown.read_exact(&mut got).expect("read");
            assert_eq!(got, text.as_bytes());
        }
        drop(writer);
        assert_eq!(f.turn(&mut source), Turn::Ended);
        assert_eq!(f.text(), "one\ntwo\nthree", "nobody ended the last line");
    }

    #[test]
    fn the_next_pump_goes_on_where_the_last_was_killed() {
        let mut f = Fixture::new();
        let (mut source, mut writer) = pipe();
        writer.write_all(b"one\ntwo\nthree\n").expect("write");
        // Killed between writing and taking.
        let before = f.log.prepare(100).expect("prepare");
        f.journal.note(Stream::Stdout, Some(Pending { before, taken: 8 })).expect("note");
        let mut lines = Vec::new();
        frame(b"one\ntwo\n", Stream::Stdout, "2016-10-06T00:17:09.669794202Z", false, &mut lines);
        f.log.append(&lines).expect("append");
        f.pump.recover(&mut source, &mut f.log, &f.journal).expect("recover");
        assert_eq!(f.turn(&mut source), Turn::Drained);
        assert_eq!(f.text(), "one\ntwo\nthree\n");
        assert_eq!(f.journal.pending(Stream::Stdout).expect("read"), None);
    }

    #[test]
    fn a_client_that_does_not_read_is_dropped() {
        let mut f = Fixture::new();
        let (mut source, mut writer) = pipe();
        let (_shown, client) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK).expect("pipe");
        f.attached.push(Attached { stdout: Some(client.into()), stderr: None });
        for _ in 0..3 {
            writer.write_all(&[b"x".repeat(40_000).as_slice(), b"\n"].concat()).expect("write");
            f.turn(&mut source);
        }
        assert!(f.attached.is_empty());
        assert_eq!(f.text().len(), 3 * 40_001);
    }
}

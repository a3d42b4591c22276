//! A log as a stream of bytes, as `kubectl logs` shows it.

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::files;
use super::follow::Watcher;
use super::line::{self, Stream};

/// Read buffer.
const READ_BYTES: usize = 64 << 10;
/// Output is handed on in pieces of about this size.
const PIECE_BYTES: usize = 32 << 10;
/// Pieces under way to a client that reads slowly.
const PIECES_BUFFERED: usize = 8;
/// A line longer than this is no CRI line, which end at 16 KiB of text; it is passed over.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Which streams are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamFilter {
    /// Both.
    #[default]
    All,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What is wanted of a log: `PodLogOptions`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on as the log grows, until the container has ended.
    pub follow: bool,
    /// Only lines from then on.
    pub since: Option<jiff::Timestamp>,
    /// Only the last lines.
    pub tail: Option<u64>,
    /// Put the time before each line.
    pub timestamps: bool,
    /// End after so many bytes.
    pub limit_bytes: Option<u64>,
    /// Only one of the streams.
    pub stream: StreamFilter,
}

/// Reads the log at `path`. `ended` becomes ready once the container has ended and its log is complete; it is looked at
/// only when following. An error ends the stream.
pub fn read(
    path: PathBuf,
    options: LogOptions,
    ended: impl Future<Output = ()> + Send + 'static,
) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(PIECES_BUFFERED);
    tokio::spawn(async move {
        let failed = sender.clone();
        if let Err(error) = pump(path, options, ended, sender).await
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            // Nobody listens any more: then there is nobody to tell.
            let _told = failed.send(Err(error)).await;
        }
    });
    receiver
}

async fn pump(
    path: PathBuf,
    options: LogOptions,
    ended: impl Future<Output = ()> + Send,
    sender: mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    // Watching begins before reading, so nothing that is written meanwhile goes unnoticed.
    let watcher = if options.follow { Some(Watcher::new(&path)?) } else { None };
    let mut format = Format::new(options, sender.clone());
    let history = path.clone();
    let (returned, outcome) = tokio::task::spawn_blocking(move || {
        let outcome = read_history(&history, &mut format);
        (format, outcome)
    })
    .await
    .map_err(io::Error::other)?;
    format = returned;
    let mut current = outcome?;
    let Some(watcher) = watcher else { return Ok(()) };
    tokio::pin!(ended);
    let mut last_round = false;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        // Everything there is, through as many rotations as there were.
        loop {
            let count = match &mut current {
                Some(file) => file.read(&mut buffer)?,
                None => 0,
            };
            if count > 0 {
                format.feed(&buffer[..count]);
                format.hand_on().await?;
                if format.done() {
                    return Ok(());
                }
                continue;
            }
            match successor(&path, current.as_ref())? {
                // The old file may have been written to between the read above and its rotation.
                Some(next) => {
                    if let Some(file) = &mut current {
                        let mut rest = Vec::new();
                        file.read_to_end(&mut rest)?;
                        format.feed(&rest);
                        for missed in between(&path, file, &next)? {
                            let mut reader = files::open(&missed, 0)?;
                            loop {
                                let count = reader.read(&mut buffer)?;
                                if count == 0 {
                                    break;
                                }
                                format.feed(&buffer[..count]);
                                format.hand_on().await?;
                            }
                        }
                    }
                    current = Some(next);
                }
                None => break,
            }
        }
        format.flush().await?;
        if last_round {
            return Ok(());
        }
        tokio::select! {
            changed = watcher.changed() => changed?,
            // One more round: the last lines were written before the end was told.
            () = &mut ended => last_round = true,
            () = sender.closed() => return Ok(()),
        }
    }
}

/// The file at `path` if it is another one than `current`.
fn successor(path: &Path, current: Option<&File>) -> io::Result<Option<File>> {
    let next = match File::open(path) {
        Ok(file) => file,
        // Between a rotation's two steps, or removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(current) = current else { return Ok(Some(next)) };
    let (old, new) = (current.metadata()?, next.metadata()?);
    Ok(((old.ino(), old.dev()) != (new.ino(), new.dev())).then_some(next))
}

/// The rotated files that came after `old` and before `new`: a fast writer can rotate more than once between two looks.
fn between(path: &Path, old: &File, new: &File) -> io::Result<Vec<PathBuf>> {
    let (old, new) = (old.metadata()?.ino(), new.metadata()?.ino());
    let mut found = Vec::new();
    let mut behind_old = false;
    for file in files::rotated(path)? {
        let inode = match fs::metadata(&file) {
            Ok(meta) => meta.ino(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if inode == new {
            break;
        }
        if behind_old {
            found.push(file);
        }
        behind_old |= inode == old;
    }
    Ok(found)
}

/// What is there already; returns the current file at its end.
fn read_history(path: &Path, format: &mut Format) -> io::Result<Option<File>> {
    let mut current = match File::open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let mut starts: Vec<(PathBuf, u64)> = files::rotated(path)?.into_iter().map(|file| (file, 0)).collect();
    let mut current_start = 0;
    if let Some(mut wanted) = format.options.tail {
        if current.is_some() {
            let (start, found) = files::tail_start(path, wanted)?;
            current_start = start;
            wanted -= found;
        }
        let mut kept = Vec::new();
        while wanted > 0 {
            let Some((file, _)) = starts.pop() else { break };
            let (start, found) = files::tail_start(&file, wanted)?;
            wanted -= found;
            kept.push((file, start));
        }
        kept.reverse();
        starts = kept;
    } else if let Some(since) = format.options.since {
        // A file last written before then holds nothing of interest.
        starts.retain(|(file, _)| fs::metadata(file).map_or(true, |meta| meta.mtime() >= since.as_second()));
    }
    let mut buffer = vec![0; READ_BYTES];
    for (file, start) in starts {
        let mut reader = match files::open(&file, start) {
            Ok(reader) => reader,
            // Removed by rotation since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        drain(&mut *reader, &mut buffer, format)?;
        if format.done() {
            return Ok(None);
        }
    }
    if let Some(file) = &mut current {
        io::Seek::seek(file, io::SeekFrom::Start(current_start))?;
        drain(file, &mut buffer, format)?;
    }
    format.hand_on_blocking(true)?;
    Ok(current)
}

fn drain(reader: &mut dyn Read, buffer: &mut [u8], format: &mut Format) -> io::Result<()> {
    loop {
        let count = reader.read(buffer)?;
        if count == 0 || format.done() {
            return Ok(());
        }
        format.feed(&buffer[..count]);
        format.hand_on_blocking(false)?;
    }
}

/// Turns log bytes into output bytes.
struct Format {
    options: LogOptions,
    /// The beginning of a line whose end has not come.
    pending: Vec<u8>,
    /// The pending line is too long and passed over.
    skipping: bool,
    out: Vec<u8>,
    left: Option<u64>,
    sender: mpsc::Sender<io::Result<Bytes>>,
    /// Lines come in order of time, so once one is late enough all are.
    since_reached: bool,
}

impl Format {
    fn new(options: LogOptions, sender: mpsc::Sender<io::Result<Bytes>>) -> Self {
        let left = options.limit_bytes;
        Self { options, pending: Vec::new(), skipping: false, out: Vec::new(), left, sender, since_reached: false }
    }

    fn done(&self) -> bool {
        self.left == Some(0)
    }

    fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(at) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = (&bytes[..at], &bytes[at + 1..]);
            if self.skipping {
                self.skipping = false;
            } else if self.pending.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.pending);
                whole.extend_from_slice(line);
                self.line(&whole);
                whole.clear();
                self.pending = whole;
            }
            bytes = rest;
        }
        if self.skipping {
            return;
        }
        self.pending.extend_from_slice(bytes);
        if self.pending.len() > MAX_LINE_BYTES {
            self.pending = Vec::new();
            self.skipping = true;
        }
    }

    fn line(&mut self, line: &[u8]) {
        let Some(parsed) = line::parse(line) else {
            tracing::debug!(bytes = line.len(), "a line of a container's log is not of the CRI form");
            return;
        };
        let wanted = match self.options.stream {
            StreamFilter::All => true,
            StreamFilter::Stdout => parsed.stream == Stream::Stdout,
            StreamFilter::Stderr => parsed.stream == Stream::Stderr,
        };
        if !wanted || self.done() {
            return;
        }
        if let Some(since) = self.options.since
            && !self.since_reached
        {
            if parsed.timestamp().is_none_or(|time| time < since) {
                return;
            }
            self.since_reached = true;
        }
        let before = self.out.len();
        if self.options.timestamps {
            self.out.extend_from_slice(parsed.time.as_bytes());
            self.out.push(b' ');
        }
        self.out.extend_from_slice(parsed.text);
        if !parsed.partial {
            self.out.push(b'\n');
        }
        if let Some(left) = &mut self.left {
            let added = (self.out.len() - before) as u64;
            let kept = added.min(*left);
            *left -= kept;
            self.out.truncate(before + usize::try_from(kept).unwrap_or(usize::MAX));
        }
    }

    fn piece(&mut self) -> Bytes {
        Bytes::from(std::mem::take(&mut self.out))
    }

    /// Sends what has gathered, if it is worth a piece.
    async fn hand_on(&mut self) -> io::Result<()> {
        if self.out.len() >= PIECE_BYTES || self.done() { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> io::Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let piece = self.piece();
        self.sender.send(Ok(piece)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn hand_on_blocking(&mut self, all: bool) -> io::Result<()> {
        if self.out.is_empty() || !(all || self.out.len() >= PIECE_BYTES || self.done()) {
            return Ok(());
        }
        let piece = self.piece();
        self.sender.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    fn line(second: u32, stream: &str, tag: &str, text: &str) -> String {
        format!("2026-01-31T00:00:{second:02}.000000000Z {stream} {tag} {text}\n")
    }

    async fn collect(mut receiver: mpsc::Receiver<io::Result<Bytes>>) -> String {
        let mut all = Vec::new();
        while let Some(piece) = receiver.recv().await {
            all.extend_from_slice(&piece.expect("piece"));
        }
        String::from_utf8(all).expect("text")
    }

    fn sample() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("0.log");
        fs::write(
            dir.path().join("0.log.20260131-000002"),
            line(1, "stdout", "F", "one") + &line(2, "stderr", "F", "two"),
        )
        .expect("write");
        fs::write(
            &path,
            line(3, "stdout", "P", "thr")
                + &line(3, "stdout", "F", "ee")
                + "garbage\n"
                + &line(4, "stdout", "F", "four"),
        )
        .expect("write");
        (dir, path)
    }

    #[tokio::test]
    async fn options_choose_lines() {
        let (_dir, path) = sample();
        let ask = |options: LogOptions| collect(read(path.clone(), options, std::future::ready(())));
        let base = LogOptions::default;
        assert_eq!(ask(base()).await, "one\ntwo\nthree\nfour\n");
        assert_eq!(ask(LogOptions { stream: StreamFilter::Stderr, ..base() }).await, "two\n");
        assert_eq!(ask(LogOptions { tail: Some(1), ..base() }).await, "four\n");
        assert_eq!(ask(LogOptions { tail: Some(5), ..base() }).await, "two\nthree\nfour\n");
        assert_eq!(ask(LogOptions { tail: Some(0), ..base() }).await, "");
        assert_eq!(ask(LogOptions { limit_bytes: Some(6), ..base() }).await, "one\ntw");
        let since = "2026-01-31T00:00:03Z".parse().ok();
        assert_eq!(ask(LogOptions { since, ..base() }).await, "three\nfour\n");
        assert_eq!(
            ask(LogOptions { tail: Some(1), timestamps: true, ..base() }).await,
            "2026-01-31T00:00:04.000000000Z four\n"
        );
    }

    #[tokio::test]
    async fn following_loses_nothing_across_rotations() {
        const LINES: u32 = 2000;
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("0.log");
        fs::write(&path, "").expect("write");
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let receiver = read(path.clone(), options, async {
            let _closed = ended.await;
        });
        let reading = tokio::spawn(collect(receiver));
        let writer = tokio::task::spawn_blocking(move || {
            let mut file = fs::OpenOptions::new().append(true).open(&path).expect("open");
            for number in 0..LINES {
                if number % 300 == 299 {
                    fs::rename(&path, path.with_file_name(format!("0.log.20260131-{number:06}"))).expect("rename");
                    file = fs::OpenOptions::new().create(true).append(true).open(&path).expect("open");
                }
                file.write_all(line(1, "stdout", "F", &number.to_string()).as_bytes()).expect("write");
            }
        });
        writer.await.expect("writer");
        end.send(()).expect("reader waits");
        let text = tokio::time::timeout(Duration::from_secs(10), reading).await.expect("ends").expect("reader");
        let numbers: Vec<u32> = text.lines().map(|line| line.parse().expect("number")).collect();
        // Rotation may outrun the reader by more than one file only if it stands still; here it does not lose a line.
        assert_eq!(numbers, (0..LINES).collect::<Vec<_>>());
    }
}

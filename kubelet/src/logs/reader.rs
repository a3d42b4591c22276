//! A log as a stream of bytes, as `kubectl logs` shows it.

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Read, Seek, SeekFrom};
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
    let mut position = outcome?;
    let Some(watcher) = watcher else { return Ok(()) };
    tokio::pin!(ended);
    let mut last_round = false;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        // Everything there is, through as many rotations as there were.
        loop {
            if let Some(file) = &mut position.current {
                follow_through(file, &mut buffer, &mut format).await?;
            }
            let Some(next) = position.after(&path)? else { break };
            // The old file may have been written to between the read above and its rotation.
            if let Some(file) = &mut position.current {
                follow_through(file, &mut buffer, &mut format).await?;
            }
            for missed in next.missed {
                let Some(mut file) = unless_gone(files::open(&missed, 0))? else { continue };
                follow_through(&mut *file, &mut buffer, &mut format).await?;
            }
            position = next.position;
        }
        format.flush().await?;
        if last_round || format.done() {
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

/// Hands on what a file holds from where it was left.
async fn follow_through(file: &mut (dyn Read + Send), buffer: &mut [u8], format: &mut Format) -> io::Result<()> {
    loop {
        let count = file.read(buffer)?;
        if count == 0 || format.done() {
            return Ok(());
        }
        format.feed(&buffer[..count]);
        format.hand_on().await?;
    }
}

/// How far a log was read.
struct Position {
    /// The newest rotated file that lies behind; names sort by age.
    behind: Option<PathBuf>,
    /// The file that was the log's last one; `None` between the two steps of a rotation.
    current: Option<File>,
}

/// What follows a position after rotations.
struct Next {
    /// Rotated files that nobody has looked at: a fast writer can rotate more than once between two looks.
    missed: Vec<PathBuf>,
    /// With the file that is the log's last one now.
    position: Position,
}

impl Position {
    /// What came after the current file, if another one has taken its place.
    fn after(&self, path: &Path) -> io::Result<Option<Next>> {
        let Some(next) = unless_gone(File::open(path))? else { return Ok(None) };
        let (old, new) = (self.current.as_ref().map(identity).transpose()?, identity(&next)?);
        if old == Some(new) {
            return Ok(None);
        }
        let (mut behind, mut missed) = (self.behind.clone(), Vec::new());
        for file in files::rotated(path)?.into_iter().filter(|file| Some(file) > self.behind.as_ref()) {
            let Some(seen) = unless_gone(File::open(&file))? else { continue };
            let seen = identity(&seen)?;
            // It was rotated again since it was opened: it and what follows it come in the next round.
            if seen == new {
                break;
            }
            behind = Some(file.clone());
            if Some(seen) != old {
                missed.push(file);
            }
        }
        Ok(Some(Next { missed, position: Self { behind, current: Some(next) } }))
    }
}

/// Inode and device, which stay a file's own while it is open.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|meta| (meta.ino(), meta.dev()))
}

/// `None` for what rotation has taken away.
fn unless_gone<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// What is there already; returns how far that goes.
fn read_history(path: &Path, format: &mut Format) -> io::Result<Position> {
    let mut current = unless_gone(File::open(path))?;
    let mut rotated = files::rotated(path)?;
    if let Some(current) = current.as_ref().map(identity).transpose()? {
        for (index, file) in rotated.iter().enumerate() {
            // Rotated since it was opened: it is read as the current one, and what follows it when following.
            if let Some(file) = unless_gone(File::open(file))?
                && identity(&file)? == current
            {
                rotated.truncate(index);
                break;
            }
        }
    }
    let behind = rotated.last().cloned();
    let mut starts: Vec<(PathBuf, u64)> = rotated.into_iter().map(|file| (file, 0)).collect();
    if let Some(mut wanted) = format.options.tail {
        if let Some(file) = &mut current {
            let (start, found) = files::tail_start(file, wanted)?;
            file.seek(SeekFrom::Start(start))?;
            wanted -= found;
        }
        let mut kept = Vec::new();
        while wanted > 0 {
            let Some((file, _)) = starts.pop() else { break };
            let Some((start, found)) = unless_gone(files::tail_start_at(&file, wanted))? else { continue };
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
        let Some(mut reader) = unless_gone(files::open(&file, start))? else { continue };
        drain(&mut *reader, &mut buffer, format)?;
    }
    if let Some(file) = &mut current {
        drain(file, &mut buffer, format)?;
    }
    format.hand_on_blocking(true)?;
    Ok(Position { behind, current })
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
        assert_eq!(numbers, (0..LINES).collect::<Vec<_>>());
    }

    /// A reader that stands still at the worst moments finds each line once.
    #[tokio::test]
    async fn rotations_between_two_looks_are_made_up_for() {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("0.log");
        let old = |name: &str| path.with_file_name(format!("0.log.{name}"));
        let write = |path: &Path, text: &str| fs::write(path, line(1, "stdout", "F", text)).expect("write");
        let (sender, mut receiver) = mpsc::channel(PIECES_BUFFERED);
        let mut format = Format::new(LogOptions::default(), sender);
        let history = |mut format: Format| {
            let path = path.clone();
            tokio::task::spawn_blocking(move || (read_history(&path, &mut format).expect("history"), format))
        };
        let names = |next: &Next| -> Vec<String> {
            let name = |path: &PathBuf| path.extension().expect("time").to_string_lossy().into_owned();
            next.missed.iter().map(name).collect()
        };
        // Between the two steps of a rotation there is no current file.
        write(&old("1"), "one");
        let (position, format_) = history(format).await.expect("read");
        format = format_;
        assert_eq!(receiver.recv().await.expect("piece").expect("bytes"), "one\n");
        assert!(position.after(&path).expect("look").is_none());
        write(&old("2"), "two");
        write(&path, "three");
        let next = position.after(&path).expect("look").expect("news");
        assert_eq!(names(&next), ["2"]);
        // Twice more, with the file that was open.
        fs::rename(&path, old("3")).expect("rename");
        assert!(next.position.after(&path).expect("look").is_none());
        write(&old("4"), "four");
        write(&path, "five");
        let next = next.position.after(&path).expect("look").expect("news");
        assert_eq!(names(&next), ["4"]);
        assert!(next.position.after(&path).expect("look").is_none());
        // The open file may be beyond the limit of files by then.
        fs::rename(&path, old("5")).expect("rename");
        fs::remove_file(old("5")).expect("remove");
        write(&old("6"), "six");
        write(&path, "seven");
        assert_eq!(names(&next.position.after(&path).expect("look").expect("news")), ["6"]);
        // What was rotated while its history was read is not read twice.
        let (position, _format) = history(format).await.expect("read");
        assert_eq!(receiver.recv().await.expect("piece").expect("bytes"), "one\ntwo\nthree\nfour\nsix\nseven\n");
        assert_eq!(position.behind, Some(old("6")));
    }
}

//! The log file: one JSON object a line, rotated by size, old files removed by number and age.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

/// Where the log goes, and how much of it stays.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    pub(super) path: PathBuf,
    /// Bytes of a file.
    pub(super) size_bytes: u64,
    /// Old files, 0 for all.
    pub(super) backups: usize,
    /// Age of old files, zero for any.
    pub(super) age: Duration,
}

/// The open log.
pub(super) struct Log {
    bounds: Bounds,
    open: Mutex<(File, u64)>,
}

impl Log {
    pub(super) fn open(bounds: Bounds) -> io::Result<Self> {
        let open = Mutex::new(append(&bounds.path)?);
        Ok(Self { bounds, open })
    }

    /// Writes a line. It is handed to the system before this returns, so that what was done is not answered unseen.
    pub(super) fn write(&self, mut line: Vec<u8>) -> io::Result<()> {
        line.push(b'\n');
        let mut open = self.open.lock();
        let length = line.len() as u64;
        if open.1 > 0 && open.1 + length > self.bounds.size_bytes {
            self.rotate()?;
            *open = append(&self.bounds.path)?;
        }
        open.0.write_all(&line)?;
        open.1 += length;
        Ok(())
    }

    /// Moves the file aside under the time, as `audit-2026-01-02T15-04-05.000.log`, and removes what is too much.
    fn rotate(&self) -> io::Result<()> {
        let path = &self.bounds.path;
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H-%M-%S%.9f").to_string();
        fs::rename(path, self.beside(&now))?;
        let mut old = self.backups()?;
        old.sort();
        let many = match self.bounds.backups {
            0 => 0,
            most => old.len().saturating_sub(most),
        };
        for (at, path) in old.iter().enumerate() {
            let made = fs::metadata(path)?.modified()?;
            let age = SystemTime::now().duration_since(made).unwrap_or_default();
            if at < many || (!self.bounds.age.is_zero() && age > self.bounds.age) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn parts(&self) -> (String, String) {
        let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        (part(self.bounds.path.file_stem()), part(self.bounds.path.extension()))
    }

    fn beside(&self, time: &str) -> PathBuf {
        let (stem, extension) = self.parts();
        let dot = if extension.is_empty() { "" } else { "." };
        self.bounds.path.with_file_name(format!("{stem}-{time}{dot}{extension}"))
    }

    fn backups(&self) -> io::Result<Vec<PathBuf>> {
        let (stem, extension) = self.parts();
        let folder = self.bounds.path.parent().unwrap_or(Path::new("."));
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let same = path.extension().unwrap_or_default().to_string_lossy() == extension;
            if same && name.strip_prefix(&stem).is_some_and(|rest| rest.starts_with("-2")) {
                found.push(path);
            }
        }
        Ok(found)
    }
}

fn append(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_rotated_and_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("audit.log");
        let bounds = Bounds { path: path.clone(), size_bytes: 10, backups: 2, age: Duration::ZERO };
        let log = Log::open(bounds.clone()).expect("it opens");
        for n in 0..6 {
            log.write(format!("line {n}").into_bytes()).expect("written");
        }
        assert_eq!(fs::read_to_string(&path).expect("a file"), "line 5\n");
        let mut kept = log.backups().expect("a folder");
        kept.sort();
        let texts: Vec<String> = kept.iter().map(|path| fs::read_to_string(path).expect("a file")).collect();
        assert_eq!(texts, ["line 3\n", "line 4\n"]);
        // What was there goes on.
        Log::open(bounds).expect("it opens").write(b"x".to_vec()).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("a file"), "line 5\nx\n");
    }
}

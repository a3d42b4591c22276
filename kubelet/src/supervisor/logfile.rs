//! One container's log file and the older ones beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Time in the name of a rotated file.
const NAME_FORMAT: &str = "%Y%m%d-%H%M%S.%9f";

/// When a log is rotated and how much of it is kept.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of one file.
    pub max_size_bytes: u64,
    /// Files kept, the current one included.
    pub max_files: u32,
}

/// An open log file.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    limits: Limits,
}

impl LogFile {
    /// Opens (or makes) the log at `path` with its folders.
    ///
    /// # Errors
    /// When a folder or the file cannot be made.
    pub fn open(path: &Path, limits: Limits) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, limits })
    }

    /// Makes room for `length` bytes, rotating if they would not fit, and returns the file's size.
    ///
    /// # Errors
    /// When the old file cannot be renamed or the new one not be made; the old one is then written on.
    pub fn prepare(&mut self, length: usize) -> io::Result<u64> {
        if self.size > 0 && self.size + length as u64 > self.limits.max_size_bytes {
            self.rotate()?;
        }
        Ok(self.size)
    }

    /// Appends whole log lines. After an error the file is as it was before.
    ///
    /// # Errors
    /// Those of `write(2)`, such as a full disk.
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        match self.file.write_all(lines) {
            Ok(()) => {
                self.size += lines.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.file.set_len(self.size)?;
                Err(error)
            }
        }
    }

    /// The bytes from `start` to the end.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    pub fn tail(&self, start: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.size.saturating_sub(start)).unwrap_or(0)];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    }

    /// Cuts the file at `size` if it is longer.
    ///
    /// # Errors
    /// Those of `ftruncate(2)`.
    pub fn cut(&mut self, size: u64) -> io::Result<()> {
        if self.size > size {
            self.file.set_len(size)?;
            self.size = size;
        }
        Ok(())
    }

    /// Bytes in the current file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Opens the path anew, after something else moved the file away.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(&self.path, self.limits)?;
        Ok(())
    }

    /// Renames the current file to `<n>.log.<yyyymmdd-hhmmss.nanoseconds>`, makes a new one and removes the oldest beyond the limit.
    fn rotate(&mut self) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".");
        let prefix = name.as_encoded_bytes().len();
        let time_of = |path: &PathBuf| {
            let time = std::str::from_utf8(path.as_os_str().as_encoded_bytes().get(prefix..)?).ok()?;
            jiff::civil::DateTime::strptime(NAME_FORMAT, time).ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()
        };
        // Names keep the order in which files were written, also when the clock was set back.
        let newest = self.rotated()?.last().and_then(time_of).map(|time| time.timestamp());
        let after_newest = newest.and_then(|time| time.checked_add(jiff::SignedDuration::from_nanos(1)).ok());
        let time = after_newest.map_or_else(jiff::Timestamp::now, |time| time.max(jiff::Timestamp::now()));
        name.push(time.strftime(NAME_FORMAT).to_string());
        let target = PathBuf::from(name);
        fs::rename(&self.path, &target)?;
        self.reopen()?;
        let mut older = self.rotated()?;
        let keep = self.limits.max_files.saturating_sub(1) as usize;
        while older.len() > keep {
            fs::remove_file(older.remove(0))?;
        }
        Ok(())
    }

    /// The rotated files, oldest first.
    fn rotated(&self) -> io::Result<Vec<PathBuf>> {
        let (Some(folder), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Ok(Vec::new());
        };
        let prefix = [name.as_encoded_bytes(), b"."].concat();
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(&prefix) {
                files.push(entry.path());
            }
        }
        files.sort();
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_every_line_until_the_limit_of_files() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("app/0.log");
        let mut log = LogFile::open(&path, Limits { max_size_bytes: 100, max_files: 4 }).expect("open");
        for n in 0..12 {
            let line = format!("{n:039}\n");
            log.prepare(line.len()).expect("prepare");
            log.append(line.as_bytes()).expect("append");
        }
        // Two lines a file, four files: the newest eight lines.
        let mut text = String::new();
        for file in log.rotated().expect("list") {
            text += &fs::read_to_string(file).expect("read");
        }
        text += &fs::read_to_string(&path).expect("read");
        let numbers: Vec<u32> = text.lines().map(|l| l.parse().expect("number")).collect();
        assert_eq!(numbers, (4..12).collect::<Vec<_>>());
    }

    #[test]
    fn rotated_files_stay_in_order_when_the_clock_is_set_back() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("0.log");
        let future = folder.path().join("0.log.29991231-235959.999999999");
        fs::write(&future, "").expect("a file of the time before");
        let mut log = LogFile::open(&path, Limits { max_size_bytes: 1, max_files: 3 }).expect("open");
        for line in ["a\n", "b\n", "c\n"] {
            log.prepare(line.len()).expect("prepare");
            log.append(line.as_bytes()).expect("append");
        }
        let rotated = log.rotated().expect("list");
        let texts: Vec<_> = rotated.iter().map(|path| fs::read_to_string(path).expect("read")).collect();
        assert_eq!(texts, ["a\n", "b\n"]);
    }
}

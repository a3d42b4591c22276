//! From files to memory: the newest snapshot, then the log after it.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::frame::{self, FileKind, Record};
use super::log::{log_path, sync_folder};
use super::seal::Cipher;
use super::snapshot::{self, snapshot_path};
use crate::hub::{Bounds, Ledger};
use crate::state::Objects;
use crate::{Event, OpenError};

/// The revision of an empty store, as etcd has it: the first write gets 2.
const FIRST_REVISION: u64 = 1;

/// A folder that no other process uses.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a process forked a moment ago still holds it open until it executes its program.
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "cannot unlock the folder of the store");
        }
    }
}

/// Makes `folder` if need be and locks it.
pub(super) fn lock(folder: &Path) -> Result<FolderLock, OpenError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(OpenError::io("create the folder", folder))?;
    let path = folder.join("lock");
    let file = File::create(&path).map_err(OpenError::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(FolderLock(file)),
        Err(fs::TryLockError::WouldBlock) => Err(OpenError::Locked { path }),
        Err(fs::TryLockError::Error(source)) => Err(OpenError::Io { step: "lock", path, source }),
    }
}

/// The files of a store, by the revisions in their names, ascending.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) snapshots: Vec<u64>,
    pub(super) logs: Vec<u64>,
    pub(super) unfinished: Vec<PathBuf>,
}

impl Files {
    pub(super) fn scan(folder: &Path) -> Result<Files, OpenError> {
        let mut files = Files::default();
        for entry in fs::read_dir(folder).map_err(OpenError::io("read the folder", folder))? {
            let path = entry.map_err(OpenError::io("read the folder", folder))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            if name.ends_with(".tmp") {
                files.unfinished.push(path);
            } else if let Some(revision) = name.strip_prefix("log-").and_then(|digits| digits.parse().ok()) {
                files.logs.push(revision);
            } else if let Some(revision) = name.strip_prefix("snapshot-").and_then(|digits| digits.parse().ok()) {
                files.snapshots.push(revision);
            }
        }
        files.logs.sort_unstable();
        files.snapshots.sort_unstable();
        Ok(files)
    }

    /// The log files that hold nothing after `revision`: those before the last one that begins at or before it.
    pub(super) fn obsolete_logs(&self, revision: u64) -> &[u64] {
        let begun = self.logs.partition_point(|base| *base <= revision);
        &self.logs[..begun.saturating_sub(1)]
    }
}

/// A store read into memory.
pub(super) struct Recovered {
    pub(super) objects: Objects,
    pub(super) ledger: Ledger,
    /// The last log file and where its good part ends, if that is not its end.
    pub(super) cut: Option<(PathBuf, u64)>,
    /// A log file without any change in it.
    pub(super) empty: Option<PathBuf>,
}

/// Reads what is in `folder`, changing nothing.
pub(super) fn load(folder: &Path, cipher: &Cipher, bounds: Bounds) -> Result<Recovered, OpenError> {
    let files = Files::scan(folder)?;
    let mut objects = Objects::new();
    let mut base = FIRST_REVISION;
    if let Some(&revision) = files.snapshots.last() {
        let path = snapshot_path(folder, revision);
        base = snapshot::read(&path, cipher, |entry| {
            objects.insert(entry.key.clone(), entry);
        })?
        .revision;
    }
    let ledger = Ledger::new(base, bounds);
    let (mut cut, mut empty) = (None, None);
    let obsolete = files.obsolete_logs(base).len();
    let mut newest = base;
    for (index, &after) in files.logs.iter().enumerate().skip(obsolete) {
        let path = log_path(folder, after);
        if after > newest {
            return Err(OpenError::Damaged {
                path,
                offset: 0,
                problem: format!("the changes after revision {newest} up to {after} are missing"),
            });
        }
        let mut count = 0_u64;
        let (_, end) = frame::read(&path, FileKind::Log, cipher, |record| {
            count += 1;
            let (key, revision) = match &record {
                Record::Put(entry) => (entry.key.clone(), entry.revision),
                Record::Delete(key, revision) => (key.clone(), *revision),
                Record::End(_) => return Err("a log has no end record".to_owned()),
            };
            if revision <= base {
                return Ok(());
            }
            if revision != newest + 1 {
                return Err(format!("revision {revision} follows {newest}"));
            }
            newest = revision;
            let event = match record {
                Record::Put(entry) => {
                    let prev = objects.insert(key, entry.clone());
                    Event::put(entry, prev)
                }
                Record::Delete(..) => {
                    let prev = objects.remove(&key).ok_or_else(|| format!("{key} is deleted but does not exist"))?;
                    Event::delete(prev, revision)
                }
                Record::End(_) => return Err("a log has no end record".to_owned()),
            };
            ledger.publish(&[Arc::new(event)], revision).wake();
            Ok(())
        })?;
        let last = index + 1 == files.logs.len();
        if end.torn {
            if !last {
                return Err(OpenError::Damaged {
                    path,
                    offset: end.offset,
                    problem: "a frame does not match its checksum, and a later log file follows".to_owned(),
                });
            }
            cut = Some((path.clone(), end.offset));
        }
        if last && count == 0 {
            empty = Some(path);
        }
    }
    Ok(Recovered { objects, ledger, cut, empty })
}

/// Removes what a crash left: unfinished files, a torn tail, a log without a change.
pub(super) fn tidy(folder: &Path, recovered: &Recovered) -> Result<(), OpenError> {
    for path in Files::scan(folder)?.unfinished {
        fs::remove_file(&path).map_err(OpenError::io("remove", &path))?;
    }
    if let Some((path, offset)) = &recovered.cut {
        tracing::warn!(path = %path.display(), offset, "cut a torn tail off the log: no write in it was acknowledged");
        let file = File::options().write(true).open(path).map_err(OpenError::io("open", path))?;
        file.set_len(*offset).map_err(OpenError::io("truncate", path))?;
        file.sync_all().map_err(OpenError::io("flush", path))?;
    }
    if let Some(path) = &recovered.empty {
        fs::remove_file(path).map_err(OpenError::io("remove", path))?;
    }
    sync_folder(folder).map_err(OpenError::io("flush", folder))
}

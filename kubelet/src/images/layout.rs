//! Where things stand in the store, and how they get there: staging, locks, atomic replacement.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::digest::Digest;
use super::error::{ImageError, IoContext};

/// The folders and files of a store.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Opens (and where needed makes) the folders under `root`, and removes unfinished work whose owner is gone.
    pub(super) fn open(root: &Path) -> Result<Self, ImageError> {
        let layout = Self { root: root.to_owned() };
        for folder in [
            layout.root.clone(),
            layout.root.join("blobs/sha256"),
            layout.root.join("blobs/sha512"),
            layout.layers(),
            layout.snapshots(),
            layout.staging(),
        ] {
            DirBuilder::new().recursive(true).mode(0o700).create(&folder).step("create folder", &folder)?;
        }
        layout.clear_staging()?;
        Ok(layout)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(super) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(super) fn table(&self) -> PathBuf {
        self.root.join("images.json")
    }

    /// A folder for unfinished work, removed when dropped and by the next opening after a crash.
    pub(super) fn stage(&self) -> Result<Stage, ImageError> {
        let folder = self.staging();
        let dir = tempfile::Builder::new().prefix("").tempdir_in(&folder).step("create folder in", &folder)?;
        let handle = File::open(dir.path()).step("open", dir.path())?;
        let lock = Flock::lock(handle, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| ImageError::io("lock", dir.path(), errno))?;
        Ok(Stage { dir, _lock: lock })
    }

    fn clear_staging(&self) -> Result<(), ImageError> {
        let folder = self.staging();
        for entry in fs::read_dir(&folder).step("read folder", &folder)? {
            let path = entry.step("read folder", &folder)?.path();
            let handle = match File::open(&path) {
                Ok(handle) => handle,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(ImageError::io("open", &path, error)),
            };
            // A lock that can be had means that its owner is gone. The moment between creation and lock of a new
            // folder is covered by the shared store lock that whoever adds holds, and the exclusive one taken here.
            let Some(_collector) = self.lock(FlockArg::LockExclusiveNonblock)? else {
                return Ok(());
            };
            if let Ok(_held) = Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
                fs::remove_dir_all(&path).step("remove unfinished", &path)?;
            }
        }
        Ok(())
    }

    /// Held while content is added that no image refers to yet: no garbage is collected meanwhile. Blocks while
    /// garbage is being collected, so call it where blocking is allowed.
    pub(super) fn adding(&self) -> Result<StoreLock, ImageError> {
        self.lock(FlockArg::LockShared)?
            .ok_or_else(|| ImageError::io("lock", self.root.join("lock"), Errno::EWOULDBLOCK))
    }

    /// Held while garbage is collected; waits for all who add.
    pub(super) fn collecting(&self) -> Result<StoreLock, ImageError> {
        self.lock(FlockArg::LockExclusive)?
            .ok_or_else(|| ImageError::io("lock", self.root.join("lock"), Errno::EWOULDBLOCK))
    }

    /// Held around a change of the table.
    pub(super) fn table_turn(&self) -> Result<StoreLock, ImageError> {
        let path = self.root.join("table.lock");
        lock_file(&path, FlockArg::LockExclusive)?.ok_or_else(|| ImageError::io("lock", &path, Errno::EWOULDBLOCK))
    }

    fn lock(&self, how: FlockArg) -> Result<Option<StoreLock>, ImageError> {
        lock_file(&self.root.join("lock"), how)
    }
}

fn lock_file(path: &Path, how: FlockArg) -> Result<Option<StoreLock>, ImageError> {
    let mut file =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).step("open", path)?;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(Some(StoreLock { _lock: lock })),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(ImageError::io("lock", path, errno)),
        }
    }
}

/// A hold on the whole store; see [`Layout::adding`] and [`Layout::collecting`].
#[derive(Debug)]
pub(super) struct StoreLock {
    _lock: Flock<File>,
}

/// A folder of unfinished work.
#[derive(Debug)]
pub(super) struct Stage {
    dir: tempfile::TempDir,
    _lock: Flock<File>,
}

impl Stage {
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Makes the directory entries of `folder` durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    File::open(folder).and_then(|handle| handle.sync_all()).step("sync", folder)
}

/// Replaces `path` by `bytes` so that after a crash either the old or the new content is there, whole.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(folder).step("create file in", folder)?;
    file.write_all(bytes).step("write", path)?;
    file.as_file().sync_all().step("sync", path)?;
    file.persist(path).map_err(|error| ImageError::io("rename to", path, error.error))?;
    sync_folder(folder)
}

//! The sockets in a folder, now and after each change.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Sockets looked at in one folder; further ones are left out, and the log says so.
const MAX_SOCKETS: usize = 512;

/// A socket; one that was made anew under an old name is another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Socket {
    pub(crate) path: PathBuf,
    /// Inode and time of its making in nanoseconds.
    made: (u64, i64, i64),
}

struct Fd(Inotify);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A folder that is watched.
pub(crate) struct Changes {
    folder: PathBuf,
    inotify: AsyncFd<Fd>,
    first: bool,
}

/// Watches a folder, which is made if there is none.
pub(crate) fn follow(folder: &Path) -> io::Result<Changes> {
    fs::create_dir_all(folder)?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let changes = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE_SELF;
    inotify.add_watch(folder, changes)?;
    #[expect(deprecated, reason = "its successor is unsafe; what it warns of does not befall an owned descriptor")]
    let inotify = AsyncFd::new(Fd(inotify))?;
    Ok(Changes { folder: folder.to_owned(), inotify, first: true })
}

impl Changes {
    /// The sockets as they are at first, then after each change; `None` when the folder is gone.
    pub(crate) async fn next(&mut self) -> io::Result<Option<BTreeSet<Socket>>> {
        if !std::mem::take(&mut self.first) {
            loop {
                let mut ready = self.inotify.readable().await?;
                match ready.get_inner().0.read_events() {
                    Ok(_) => break,
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        match sockets(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }
}

fn sockets(folder: &Path) -> io::Result<BTreeSet<Socket>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // It may be gone already.
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if !meta.file_type().is_socket() || path.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.') {
            continue;
        }
        if found.len() >= MAX_SOCKETS {
            tracing::warn!(folder = %folder.display(), limit = MAX_SOCKETS, "too many sockets; some are left out");
            break;
        }
        found.insert(Socket { made: (meta.ino(), meta.ctime(), meta.ctime_nsec()), path });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_are_seen_as_they_come_and_go() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("registry");
        let mut changes = follow(&folder).expect("watched");
        let mut next = async || changes.next().await.expect("read").expect("there").len();
        assert_eq!(next().await, 0);
        let path = folder.join("a.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert_eq!(next().await, 1);
        fs::write(folder.join("file"), "").expect("a file");
        assert_eq!(next().await, 1, "a plain file is no socket");
        drop(listener);
        fs::remove_file(&path).expect("removed");
        assert_eq!(next().await, 0);
    }
}

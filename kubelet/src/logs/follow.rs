//! Waiting for a log to grow or to be rotated, by inotify.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Room for some two hundred events.
const EVENTS_BYTES: usize = 8 << 10;

/// Wakes up when something happens in the folder of a log.
pub(super) struct Watcher {
    inotify: AsyncFd<OwnedFd>,
}

impl Watcher {
    /// Watches the folder of `path`: writes to files in it as well as their coming and going.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let wanted = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF;
        inotify.add_watch(folder, wanted)?;
        Ok(Self { inotify: crate::streaming::register(inotify.into())? })
    }

    /// Returns after at least one event since the last call.
    pub(super) async fn changed(&self) -> io::Result<()> {
        // What happened does not matter, the files tell; the events are only taken.
        let mut events = [0; EVENTS_BYTES];
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.try_io(|fd| nix::unistd::read(fd.get_ref(), &mut events).map_err(io::Error::from)) {
                Ok(Ok(_events)) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

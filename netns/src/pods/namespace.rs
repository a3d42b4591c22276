//! Network namespaces pinned by a bind mount, without a process in them (namespaces(7)).

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, PathExt};

/// What containers may do in a namespace of their own, as other runtimes set it: bind any port without privilege, and ping.
const SETTINGS: [(&str, &str); 2] =
    [("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"), ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")];

/// Gives the calling thread a new network namespace, or the one at `given`, and pins it at `path`. The thread must end afterwards: it is no longer
/// where the process is.
pub(crate) fn enter(given: Option<&Path>, path: &Path) -> Result<(), Error> {
    match given {
        None => unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Unshare { errno })?,
        Some(given) => File::open(given)
            .and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from))
            .at("enter the network namespace at", given)?,
    }
    for (file, value) in SETTINGS {
        fs::write(file, value).at("write", Path::new(file))?;
    }
    File::create(path).at("create", path)?;
    mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(io::Error::from)
        .at("pin the network namespace at", path)
}

/// Removes a pin; the namespace goes when nothing uses it any more. No pin is no error.
pub(crate) fn unpin(path: &Path) -> Result<(), Error> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a file that was not mounted on yet.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(io::Error::from(errno)).at("unmount", path),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.at("remove", path),
    }
}

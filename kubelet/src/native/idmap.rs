//! Id-mapped mounts: files that belong to id 0 on disk belong to the root of a pod's user namespace where that pod sees them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use coracle_sys::Errno;
use coracle_sys::mount::{Attributes, MOUNT_ATTR_IDMAP, attach, clone_tree, set_attributes};
use nix::libc::{O_DIRECTORY, O_PATH};

use super::namespaces::unmount;
use crate::images::Snapshot;

/// Does `work` (a mount of overlayfs) with a snapshot of the image store at `store` whose lower layers show the ids of the
/// user namespace at `user`: overlayfs itself cannot be id-mapped, but takes layers that are, and keeps them for itself. The
/// upper one is as it is: overlayfs writes to it as root of the host, who has no id in such a namespace. `aside` is a folder of
/// the caller's for the time being.
pub(crate) fn with_layers(
    store: &Path,
    snapshot: &Snapshot,
    user: &Path,
    aside: &Path,
    work: impl FnOnce(&Snapshot) -> io::Result<()>,
) -> io::Result<()> {
    fs::create_dir_all(aside)?;
    // Left by an attempt that was killed here.
    unmount(aside)?;
    map(store, user, aside)?;
    let moved = |path: &Path| path.strip_prefix(store).map_or_else(|_| path.to_owned(), |inside| aside.join(inside));
    let mapped =
        Snapshot { lowerdirs: snapshot.lowerdirs.iter().map(|path| moved(path)).collect(), ..snapshot.clone() };
    let done = work(&mapped);
    unmount(aside)?;
    fs::remove_dir(aside)?;
    done
}

/// Shows `source` at `target` with the ids of the user namespace at `user`.
fn map(source: &Path, user: &Path, target: &Path) -> io::Result<()> {
    let userns = File::open(user)?;
    let userns_fd = u64::from(userns.as_raw_fd().unsigned_abs());
    let attributes = Attributes { set: MOUNT_ATTR_IDMAP, userns_fd, ..Attributes::default() };
    let attached = || -> coracle_sys::Result<()> {
        let tree = clone_tree(None, &c_string(source)?, false)?;
        set_attributes(tree.as_fd(), &attributes, false)?;
        let place = coracle_sys::path::open(&c_string(target)?, O_PATH | O_DIRECTORY)?;
        attach(tree.as_fd(), place.as_fd())
    };
    attached().map_err(|errno| {
        let advice = match errno {
            Errno::EINVAL => {
                " (pods with hostUsers: false need it on a file system that can be id-mapped, such as ext4, xfs or btrfs)"
            }
            _ => "",
        };
        io::Error::other(format!("map the ids of {}: {}{advice}", source.display(), errno.desc()))
    })
}

fn c_string(path: &Path) -> coracle_sys::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

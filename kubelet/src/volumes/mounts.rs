//! Mounts that volumes need in the node's own mount namespace.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::error::{IoContext, VolumeError};
use crate::images::Snapshot;
use crate::native::idmap;

/// Mount points below one pod; a pod cannot have more.
const MAX_POD_MOUNTS: usize = 10_000;

/// Whether a file system of its own is mounted at `path`. (A bind mount from the same file system does not count.)
pub(super) fn is_mount_point(path: &Path) -> Result<bool, VolumeError> {
    let own = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).step("look at", path),
    };
    let parent = path.parent().unwrap_or(Path::new("/"));
    Ok(own.dev() != fs::symlink_metadata(parent).step("look at", parent)?.dev())
}

fn make(folder: &Path) -> Result<(), VolumeError> {
    DirBuilder::new().recursive(true).mode(0o755).create(folder).step("create folder", folder)
}

/// Mounts a tmpfs at `folder` unless there is one; returns whether it is new.
pub(super) fn ensure_tmpfs(folder: &Path, size_bytes: Option<u64>) -> Result<bool, VolumeError> {
    if is_mount_point(folder)? {
        return Ok(false);
    }
    make(folder)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let size = size_bytes.map(|bytes| format!(",size={bytes}")).unwrap_or_default();
    // Secrets must not reach a swap device; kernels before 6.4 do not know the option.
    let attempts = [format!("mode=0755{size},noswap"), format!("mode=0755{size}")];
    match mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some(attempts[0].as_str())) {
        Err(Errno::EINVAL) => {
            mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some(attempts[1].as_str()))
                .step("mount tmpfs at", folder)?;
        }
        other => other.step("mount tmpfs at", folder)?,
    }
    Ok(true)
}

/// Mounts huge pages at `folder` unless they are; returns whether it is new.
pub(super) fn ensure_hugetlbfs(folder: &Path, page_bytes: Option<u64>) -> Result<bool, VolumeError> {
    if is_mount_point(folder)? {
        return Ok(false);
    }
    make(folder)?;
    let options = page_bytes.map(|bytes| format!("pagesize={bytes}"));
    mount(Some("nodev"), folder, Some("hugetlbfs"), MsFlags::empty(), options.as_deref())
        .step("mount huge pages at", folder)?;
    Ok(true)
}

/// Mounts an image's layers read-only at `folder` unless they are, with the ids of the user namespace at `user` if there is one.
/// `store` is the image store.
pub(crate) fn ensure_layers(
    folder: &Path,
    snapshot: &Snapshot,
    store: &Path,
    user: Option<&Path>,
) -> Result<(), VolumeError> {
    if is_mount_point(folder)? {
        return Ok(());
    }
    make(folder)?;
    // With the empty upper folder as one more lower one there are always two, as overlayfs wants, and it is read-only.
    let mut layers = snapshot.clone();
    layers.lowerdirs.insert(0, snapshot.upper.clone());
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    let overlay = |layers: &Snapshot| {
        let options = layers.lower_option();
        mount(Some("overlay"), folder, Some("overlay"), flags, Some(options.as_str())).map_err(io::Error::from)
    };
    let mounted = match user {
        None => overlay(&layers),
        Some(user) => idmap::with_layers(store, &layers, user, &folder.with_extension("layers"), overlay),
    };
    mounted.step("mount image at", folder)
}

/// Binds `source` (a path through a descriptor, for instance) to `target`.
pub(super) fn bind(source: &Path, target: &Path) -> Result<(), VolumeError> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).step("bind to", target)
}

/// Makes mounts below `folder` show wherever it is mounted with propagation, as containers of drivers mount it: where the
/// host's own mounts are not shared, the folder becomes one that is.
pub(crate) fn ensure_shared(folder: &Path) -> Result<(), VolumeError> {
    make(folder)?;
    let folder = &fs::canonicalize(folder).step("resolve", folder)?;
    let table = mount_table()?;
    // Of mounts at one point the last one is seen.
    let of_folder = table.lines().filter_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let point = PathBuf::from(OsString::from_vec(unescape(fields.get(4)?)));
        let shared =
            fields.iter().skip(6).take_while(|field| **field != b"-").any(|field| field.starts_with(b"shared:"));
        folder.starts_with(&point).then_some((point, shared))
    });
    let (point, shared) = of_folder.fold((PathBuf::new(), false), |best, next| {
        if next.0.as_os_str().len() >= best.0.as_os_str().len() { next } else { best }
    });
    if shared {
        return Ok(());
    }
    if point != *folder {
        bind(folder, folder)?;
    }
    mount(None::<&str>, folder, None::<&str>, MsFlags::MS_SHARED, None::<&str>).step("share mounts of", folder)
}

/// Takes away all that is mounted at or below `folder`.
pub(crate) fn unmount_all(folder: &Path) -> Result<(), VolumeError> {
    below(folder)?.iter().try_for_each(|point| unmount(point))
}

/// Takes away whatever is mounted at `target`.
pub(super) fn unmount(target: &Path) -> Result<(), VolumeError> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno).step("unmount", target),
        }
    }
}

/// The mount points at or below `folder`, deepest first.
pub(super) fn below(folder: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let mut points: Vec<PathBuf> = mount_table()?
        .lines()
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .filter(|point| point.starts_with(folder))
        .collect();
    if points.len() > MAX_POD_MOUNTS {
        return Err(VolumeError::TooMany { what: "number of mounts below a pod", limit: MAX_POD_MOUNTS });
    }
    points.reverse();
    Ok(points)
}

/// `proc_pid_mountinfo(5)`, one line a mount.
fn mount_table() -> Result<MountTable, VolumeError> {
    let table = Path::new("/proc/thread-self/mountinfo");
    fs::read(table).step("read", table).map(MountTable)
}

struct MountTable(Vec<u8>);

impl MountTable {
    fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'\n')
    }
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'\\'
            && let Some(digits) = tail.get(..3)
            && let Some(value) = std::str::from_utf8(digits).ok().and_then(|text| u8::from_str_radix(text, 8).ok())
        {
            plain.push(value);
            rest = &tail[3..];
        } else {
            plain.push(*first);
            rest = tail;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_the_kernel_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c"), b"/a b\\c");
        assert_eq!(unescape(br"/a\9"), br"/a\9");
    }
}

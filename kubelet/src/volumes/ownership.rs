//! fsGroup: the group of a pod gets a volume. Source: kubernetes `pkg/volume/volume_linux.go`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, fchownat};

use super::error::{IoContext, VolumeError};

/// When a volume's files are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    /// Each time.
    Always,
    /// Only if the root does not have the group and mode yet.
    OnRootMismatch,
}

/// `spec.securityContext.fsGroupChangePolicy`
pub(super) fn policy(pod: &Pod) -> Policy {
    let given = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref()?.fs_group_change_policy.as_deref());
    if given == Some("OnRootMismatch") { Policy::OnRootMismatch } else { Policy::Always }
}

/// Group and group permissions for everything below `root`; new files inherit the group.
pub(super) async fn apply(root: &Path, group: u32, read_only: bool, policy: Policy) -> Result<(), VolumeError> {
    let root = root.to_owned();
    let walk = move || {
        if policy == Policy::OnRootMismatch {
            let meta = std::fs::symlink_metadata(&root).step("look at", &root)?;
            let wanted = mask(true, read_only);
            if meta.gid() == group && meta.mode() & wanted == wanted {
                return Ok(());
            }
        }
        walk(&root, group, read_only)
    };
    tokio::task::spawn_blocking(walk).await.map_err(|error| VolumeError::Task(error.to_string()))?
}

/// Permission bits that are added.
fn mask(folder: bool, read_only: bool) -> u32 {
    let bits = if read_only { 0o440 } else { 0o660 };
    if folder { bits | 0o2110 } else { bits }
}

fn walk(root: &Path, group: u32, read_only: bool) -> Result<(), VolumeError> {
    let device = std::fs::symlink_metadata(root).step("look at", root)?.dev();
    // The root comes last: its attributes say that the walk was finished.
    let mut pending: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(&folder).step("read folder", &folder)? {
            let path = entry.step("read folder", &folder)?.path();
            let meta = match std::fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                // Containers of the pod may be running.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).step("look at", &path),
            };
            if meta.dev() != device {
                continue;
            }
            own(&path, &meta, group, read_only)?;
            if meta.is_dir() {
                pending.push(path);
            }
        }
    }
    let meta = std::fs::symlink_metadata(root).step("look at", root)?;
    own(root, &meta, group, read_only)
}

fn own(path: &Path, meta: &std::fs::Metadata, group: u32, read_only: bool) -> Result<(), VolumeError> {
    let cwd = nix::fcntl::AT_FDCWD;
    fchownat(cwd, path, None, Some(Gid::from_raw(group)), AtFlags::AT_SYMLINK_NOFOLLOW).step("set group of", path)?;
    let wanted = meta.mode() & 0o7777 | mask(meta.is_dir(), read_only);
    if wanted == meta.mode() & 0o7777 || !(meta.is_dir() || meta.is_file()) {
        return Ok(());
    }
    // Not by name: a container might have put a symbolic link in its place.
    let fd =
        openat(cwd, path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
            .step("open", path)?;
    fchmod(&fd, Mode::from_bits_truncate(wanted)).step("set mode of", path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn the_group_gets_files_and_folders() {
        let dir = tempfile::tempdir().expect("temp folder");
        std::fs::create_dir(dir.path().join("d")).expect("mkdir");
        std::fs::write(dir.path().join("d/f"), "x").expect("write");
        std::fs::set_permissions(dir.path().join("d/f"), std::fs::Permissions::from_mode(0o600)).expect("chmod");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("d/link")).expect("link");
        let before = std::fs::metadata("/etc/passwd").expect("meta").gid();
        apply(dir.path(), 4321, false, Policy::Always).await.expect("apply");
        let meta = |name: &str| std::fs::metadata(dir.path().join(name)).expect("meta");
        assert_eq!((meta("d/f").gid(), meta("d/f").mode() & 0o7777), (4321, 0o660));
        assert_eq!((meta("d").gid(), meta("d").mode() & 0o2770), (4321, 0o2770));
        assert_eq!(std::fs::metadata("/etc/passwd").expect("meta").gid(), before, "links are not followed");
    }
}

//! A pod's namespaces without a process in them: made in a thread that ends at once, kept by a mount.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;

/// Makes IPC and (for a host name) UTS namespaces and pins them as `folder/ipc` and `folder/uts`. What is already pinned stays.
///
/// # Errors
/// The step that failed.
pub fn pin(folder: &Path, hostname: Option<&str>, ipc: bool) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let wanted: Vec<(&'static str, CloneFlags)> =
        [(ipc, "ipc", CloneFlags::CLONE_NEWIPC), (hostname.is_some(), "uts", CloneFlags::CLONE_NEWUTS)]
            .into_iter()
            .filter(|(wanted, name, _)| *wanted && !is_pinned(&folder.join(name)))
            .map(|(_, name, flag)| (name, flag))
            .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let hostname = hostname.map(CString::new).transpose().map_err(io::Error::other)?;
    let folder = folder.to_owned();
    // unshare(2) of these concerns the calling thread alone; this one has no other use and ends.
    let thread =
        std::thread::Builder::new().name("pin".into()).stack_size(128 << 10).spawn(move || -> io::Result<()> {
            let flags = wanted.iter().fold(CloneFlags::empty(), |all, (_, flag)| all | *flag);
            coracle_sys::namespace::unshare(flags.bits())?;
            if let (Some(name), true) = (&hostname, flags.contains(CloneFlags::CLONE_NEWUTS)) {
                coracle_sys::namespace::set_hostname(name)?;
            }
            for (name, _) in wanted {
                let target = folder.join(name);
                File::create(&target)?;
                let source = PathBuf::from("/proc/thread-self/ns").join(name);
                mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            }
            Ok(())
        })?;
    thread.join().map_err(|_| io::Error::other("the thread that makes namespaces panicked"))?
}

/// Pins namespaces of a process, by their names in `/proc/PID/ns`, in a folder.
///
/// # Errors
/// The step that failed.
pub fn pin_of(pid: i32, folder: &Path, names: &[&str]) -> io::Result<()> {
    for name in names {
        let target = folder.join(name);
        File::create(&target)?;
        let source = PathBuf::from(format!("/proc/{pid}/ns/{name}"));
        mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

/// Whether pods can have user namespaces of their own on this host.
pub fn user_namespaces_work() -> bool {
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces");
    limit.ok().and_then(|limit| limit.trim().parse::<u64>().ok()).is_some_and(|limit| limit > 0)
}

/// Undoes [`pin`] and [`pin_of`].
///
/// # Errors
/// When a mount cannot be taken away.
pub fn unpin(folder: &Path) -> io::Result<()> {
    for name in ["ipc", "uts", "pid", "net", "user"] {
        unmount(&folder.join(name))?;
    }
    Ok(())
}

/// Takes a mount away if there is one.
///
/// # Errors
/// Those of `umount2(2)` other than that nothing is mounted there.
pub fn unmount(path: &Path) -> io::Result<()> {
    use nix::errno::Errno;
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a namespace is mounted at `path` (`NSFS_MAGIC`).
fn is_pinned(path: &Path) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type().0 == NSFS_MAGIC)
}

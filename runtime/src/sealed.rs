//! Running from a copy of the own executable that nobody can write to (CVE-2019-5736).
//!
//! The first process of a container is an image of the runtime until it executes the program, and an image of the
//! container's choice can make it execute the runtime again (`#!/proc/self/exe`). Through `/proc/PID/exe` the container
//! could then open the runtime's file on the host and overwrite it. A sealed file in memory cannot be overwritten.

use crate::error::{Error, Result};
use coracle_sys::mount::{self, Attributes};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

const SEALS: SealFlag =
    SealFlag::F_SEAL_SEAL.union(SealFlag::F_SEAL_SHRINK).union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_WRITE);
const CHUNK_BYTES: usize = 1 << 30;

/// Executes this program again from where its file cannot be written to, unless that has been done. To be called first
/// in `main`.
///
/// What comes back is the mount that this program runs from. A detached mount that is closed makes the kernel wait for
/// a grace period; [`crate::spawn_gated`] attaches it where the old root is let go anyway, which costs nothing.
pub fn ensure() -> Result<Option<OwnedFd>> {
    let path = std::path::PathBuf::from("/proc/self/exe");
    let read = |source: std::io::Error| Error::Read { path: path.clone(), source };
    let own = std::fs::File::open(&path).map_err(read)?;
    let readonly = fstatvfs(&own).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_RDONLY));
    // Only a file in memory can have seals at all.
    if readonly
        || fcntl(&own, FcntlArg::F_GET_SEALS).is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SEALS))
    {
        return own_mount(&own).map_err(|errno| read(errno.into()));
    }
    let file = match readonly_mount() {
        Ok(mount) => mount,
        Err(_) => sealed_copy(&own).map_err(|errno| read(errno.into()))?,
    };
    let string =
        |text: std::ffi::OsString| CString::new(text.into_vec()).expect("the kernel gave it without a null byte");
    let arguments = std::env::args_os().map(string).collect();
    let environment = std::env::vars_os()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            string(name)
        })
        .collect();
    let errno = coracle_sys::process::execve_fd(
        file.as_fd(),
        &coracle_sys::process::StringArray::new(arguments),
        &coracle_sys::process::StringArray::new(environment),
    );
    Err(read(errno.into()))
}

/// The descriptor that this program was executed through, if it is its own file.
fn own_mount(own: &std::fs::File) -> coracle_sys::Result<Option<OwnedFd>> {
    let Some(number) = coracle_sys::process::executed_descriptor() else { return Ok(None) };
    let Ok(mount) = coracle_sys::process::adopt(number) else { return Ok(None) };
    let (there, here) = (coracle_sys::path::stat(mount.as_fd())?, coracle_sys::path::stat(own.as_fd())?);
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino) {
        // Somebody else's descriptor, which stays theirs.
        std::mem::forget(mount);
        return Ok(None);
    }
    coracle_sys::process::set_close_on_exec(mount.as_fd(), true)?;
    // The kernel has named this process after the descriptor's number.
    nix::sys::prctl::set_name(c"corun")?;
    Ok(Some(mount))
}

fn readonly_mount() -> coracle_sys::Result<OwnedFd> {
    let tree = mount::clone_tree(None, c"/proc/self/exe", false)?;
    let readonly = Attributes { set: mount::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), &readonly, false)?;
    coracle_sys::process::set_close_on_exec(tree.as_fd(), false)?;
    Ok(tree)
}

fn sealed_copy(own: &std::fs::File) -> coracle_sys::Result<OwnedFd> {
    let copy = memfd_create(c"corun", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    while coracle_sys::path::sendfile(copy.as_fd(), own.as_fd(), CHUNK_BYTES)? > 0 {}
    fcntl(&copy, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(copy)
}

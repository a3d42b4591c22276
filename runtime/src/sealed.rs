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
pub fn ensure() -> Result<()> {
    let path = std::path::PathBuf::from("/proc/self/exe");
    let read = |source: std::io::Error| Error::Read { path: path.clone(), source };
    let own = std::fs::File::open(&path).map_err(read)?;
    let readonly = fstatvfs(&own).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_RDONLY));
    // Only a file in memory can have seals at all.
    if readonly
        || fcntl(&own, FcntlArg::F_GET_SEALS).is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SEALS))
    {
        return Ok(());
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

fn readonly_mount() -> coracle_sys::Result<OwnedFd> {
    let tree = mount::clone_tree(None, c"/proc/self/exe", false)?;
    let readonly = Attributes { set: mount::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), &readonly, false)?;
    Ok(tree)
}

fn sealed_copy(own: &std::fs::File) -> coracle_sys::Result<OwnedFd> {
    let copy = memfd_create(c"corun", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    while coracle_sys::path::sendfile(copy.as_fd(), own.as_fd(), CHUNK_BYTES)? > 0 {}
    fcntl(&copy, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(copy)
}

//! `tmpcopyup`: what an image has at the place of a tmpfs is copied into it, with modes, owners and links.

use coracle_sys::path::{self, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV};
use coracle_sys::{Errno, Result};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

/// Deeper trees are refused rather than overrunning the stack.
const MAX_DEPTH: u32 = 64;
const ENTRIES_BYTES: usize = 2048;
const COPY_BYTES: usize = 1 << 20;
const WITHIN: u64 = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;

/// Copies the folder behind `from` into the empty folder behind `to`.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let from = path::openat2(from, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0, WITHIN)?;
    let to = path::openat2(to, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0, RESOLVE_NO_SYMLINKS)?;
    folder(from.as_fd(), to.as_fd(), 0)
}

fn folder(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::ELOOP);
    }
    path::for_each_entry::<ENTRIES_BYTES>(from, &mut |name| entry(from, to, name, depth))
}

fn entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: u32) -> Result<()> {
    let there = path::openat2(from, name, libc::O_PATH | libc::O_NOFOLLOW, 0, WITHIN)?;
    let stat = path::stat(there.as_fd())?;
    let (kind, mode) = (stat.st_mode & libc::S_IFMT, stat.st_mode & 0o7777);
    match kind {
        libc::S_IFDIR => {
            let inner = path::openat2(from, name, libc::O_RDONLY | libc::O_DIRECTORY, 0, WITHIN)?;
            path::mkdirat(to, name, mode)?;
            let target = path::openat2(to, name, libc::O_RDONLY | libc::O_DIRECTORY, 0, WITHIN)?;
            folder(inner.as_fd(), target.as_fd(), depth + 1)?;
        }
        libc::S_IFLNK => {
            let mut buffer = [0_u8; libc::PATH_MAX as usize];
            let length = path::readlink(there.as_fd(), &mut buffer[..libc::PATH_MAX as usize - 1])?;
            buffer[length] = 0;
            path::symlinkat(CStr::from_bytes_until_nul(&buffer).map_err(|_| Errno::EINVAL)?, to, name)?;
        }
        libc::S_IFREG => {
            let source = path::openat2(from, name, libc::O_RDONLY | libc::O_NOFOLLOW, 0, WITHIN)?;
            let target = path::openat2(to, name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL, mode, WITHIN)?;
            while path::sendfile(target.as_fd(), source.as_fd(), COPY_BYTES)? > 0 {}
        }
        // Devices, fifos and sockets are made anew.
        _ => path::mknodat(to, name, stat.st_mode, stat.st_rdev)?,
    }
    path::chownat(to, name, stat.st_uid, stat.st_gid)?;
    if kind != libc::S_IFLNK {
        // A change of owner clears the set-id bits.
        path::chmodat(to, name, mode)?;
    }
    Ok(())
}

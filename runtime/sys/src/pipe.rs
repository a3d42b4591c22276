//! Looking into a pipe without taking from it: `tee(2)` and `splice(2)`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Duplicates up to `length` bytes of the pipe `from` into the pipe `to` without consuming them; returns how many. Never waits:
/// 0 is the end of `from`, `WouldBlock` says that it is empty now (or `to` full).
///
/// # Errors
/// Those of `tee(2)`.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are borrowed and open; tee refers to no memory.
    let done = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), length, libc::SPLICE_F_NONBLOCK) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Moves up to `length` bytes from the pipe `from` to `to` without copying them; returns how many. Never waits on the pipe.
///
/// # Errors
/// Those of `splice(2)`.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are borrowed and open; both offsets are null, so splice refers to no memory.
    let done = unsafe {
        libc::splice(
            from.as_raw_fd(),
            std::ptr::null_mut(),
            to.as_raw_fd(),
            std::ptr::null_mut(),
            length,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

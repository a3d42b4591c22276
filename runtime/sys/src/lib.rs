//! Typed wrappers around the kernel interfaces that neither the standard library nor `nix` offers.
//!
//! This is the only crate with `unsafe`. Each wrapper is thin: it takes borrowed descriptors and C strings, returns
//! owned descriptors, and neither allocates nor locks, so that every one of them may be called between `clone3` and
//! `execve`. Errors are bare [`Errno`]s; the caller knows which step failed and says so.

pub mod bpf;
pub mod channel;
#[cfg(target_arch = "x86_64")]
pub mod entry;
pub mod identity;
pub mod mount;
pub mod namespace;
pub mod net;
pub mod packet;
pub mod path;
pub mod pause;
pub mod pidfd;
pub mod pipe;
pub mod process;
pub mod ring;
pub mod schedule;
pub mod seccomp;
pub mod tty;

pub use nix::errno::Errno;

/// What every wrapper answers.
pub type Result<T> = std::result::Result<T, Errno>;

/// Turns the kernel's "negative is an error" into a result; `libc::syscall` has already put the number into `errno`.
#[inline]
fn check(value: libc::c_long) -> Result<libc::c_long> {
    if value < 0 { Err(Errno::last()) } else { Ok(value) }
}

/// Takes ownership of a descriptor that a system call has just made.
#[inline]
fn own(value: libc::c_long) -> Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    let fd = check(value)?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows its number.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd as i32) })
}

//! Entering and leaving namespaces.

use crate::{Result, check};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Joins a namespace (a descriptor of `/proc/PID/ns/*`) or, with a pidfd, all those of a process that `flags` names.
pub fn setns(fd: BorrowedFd<'_>, flags: i32) -> Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_setns, fd.as_raw_fd(), flags) })?;
    Ok(())
}

/// Leaves the shared namespaces that `flags` names for new ones.
pub fn unshare(flags: i32) -> Result<()> {
    // SAFETY: takes integers only; descriptors and memory stay as they are.
    check(unsafe { libc::syscall(libc::SYS_unshare, flags) })?;
    Ok(())
}

pub fn set_hostname(name: &CStr) -> Result<()> {
    // SAFETY: pointer and length describe the string.
    check(unsafe { libc::syscall(libc::SYS_sethostname, name.as_ptr(), name.count_bytes()) })?;
    Ok(())
}

pub fn set_domainname(name: &CStr) -> Result<()> {
    // SAFETY: pointer and length describe the string.
    check(unsafe { libc::syscall(libc::SYS_setdomainname, name.as_ptr(), name.count_bytes()) })?;
    Ok(())
}

/// Starts a new session without a controlling terminal.
pub fn setsid() -> Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::syscall(libc::SYS_setsid) })?;
    Ok(())
}

/// Joins a new, empty session keyring with this name.
pub fn join_session_keyring(name: &CStr) -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: the name is a C string that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    Ok(())
}

//! What a pidfd says about a process that somebody else has reaped: `PIDFD_GET_INFO` (Linux 6.13; exits since 6.15).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Errno;
use crate::process::Exit;

/// `struct pidfd_info` in its first version (`<linux/pidfd.h>`), 64 bytes.
#[repr(C)]
#[derive(Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

/// `PIDFD_INFO_EXIT`.
const INFO_EXIT: u64 = 1 << 3;

/// How the process ended, once it was reaped; `None` before that. Needs neither parenthood nor luck.
///
/// # Errors
/// `ENOTTY` or `EINVAL` where the kernel is older, `ESRCH` where it does not remember.
pub fn exit_info(pidfd: BorrowedFd<'_>) -> crate::Result<Option<Exit>> {
    let request = nix::request_code_readwrite!(0xff, 11, size_of::<Info>());
    let mut info = Info { mask: INFO_EXIT, ..Info::default() };
    // SAFETY: the request is PIDFD_GET_INFO with the size of `Info` in it, so the kernel writes at most that many bytes.
    if unsafe { libc::ioctl(pidfd.as_raw_fd(), request, &raw mut info) } < 0 {
        return Err(Errno::last());
    }
    if info.mask & INFO_EXIT == 0 {
        return Ok(None);
    }
    let status = info.exit_code;
    Ok(Some(if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Code(libc::WEXITSTATUS(status))
    }))
}

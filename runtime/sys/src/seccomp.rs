//! Installing a seccomp filter.

use crate::{Result, check, own};
use std::os::fd::OwnedFd;

pub const FLAG_TSYNC: u64 = 1;
pub const FLAG_LOG: u64 = 2;
pub const FLAG_SPEC_ALLOW: u64 = 4;
pub const FLAG_NEW_LISTENER: u64 = 8;
pub const FLAG_TSYNC_ESRCH: u64 = 16;
pub const FLAG_WAIT_KILLABLE_RECV: u64 = 32;

const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
const SECCOMP_GET_ACTION_AVAIL: libc::c_ulong = 2;

/// One instruction of classic BPF, as the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub value: u32,
}

#[repr(C)]
struct Program {
    length: u16,
    filter: *const Instruction,
}

/// Installs a filter on this thread; with `FLAG_NEW_LISTENER` the descriptor on which notifications arrive.
pub fn install(filter: &[Instruction], flags: u64) -> Result<Option<OwnedFd>> {
    let length = u16::try_from(filter.len()).map_err(|_| crate::Errno::EINVAL)?;
    let program = Program { length, filter: filter.as_ptr() };
    // SAFETY: program and the instructions outlive the call; the kernel checks them before use.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if flags & FLAG_NEW_LISTENER != 0 { own(answer).map(Some) } else { check(answer).map(|_| None) }
}

/// Whether the kernel knows a filter's return action.
pub fn action_available(action: u32) -> bool {
    // SAFETY: reads one u32.
    unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) == 0 }
}

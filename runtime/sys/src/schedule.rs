//! Where and when a process runs: scheduling policy, I/O priority, processors, memory nodes, personality.

use crate::{Result, check};

/// `struct sched_attr` of sched_setattr(2), first published size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime_ns: u64,
    pub deadline_ns: u64,
    pub period_ns: u64,
}

pub fn set_scheduler(attributes: &SchedulerAttributes) -> Result<()> {
    let sized = SchedulerAttributes { size: size_of::<SchedulerAttributes>() as u32, ..*attributes };
    // SAFETY: the structure outlives the call and says its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const sized, 0) })?;
    Ok(())
}

/// I/O priority of this process: class 1 real time, 2 best effort, 3 idle; level 0 (first) to 7.
pub fn set_io_priority(class: u32, level: u32) -> Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, class << 13 | level) })?;
    Ok(())
}

/// Processors on which this process may run, one bit each.
pub fn set_affinity(mask: &[u64]) -> Result<()> {
    // SAFETY: pointer and length in bytes describe the slice.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(mask), mask.as_ptr()) })?;
    Ok(())
}

/// Memory policy of this process: mode with flags, nodes as one bit each.
pub fn set_memory_policy(mode: u32, nodes: &[u64]) -> Result<()> {
    let bits = nodes.len() * 64 + usize::from(!nodes.is_empty());
    let pointer = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // SAFETY: the kernel reads (bits - 1) bits, which the slice holds.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) })?;
    Ok(())
}

/// Execution domain.
pub fn set_personality(domain: u64) -> Result<()> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::syscall(libc::SYS_personality, domain) })?;
    Ok(())
}

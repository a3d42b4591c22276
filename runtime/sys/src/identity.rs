//! Who a process is: ids, groups, capabilities, privileges. Raw calls for this thread alone, unlike the C library's,
//! which signal every thread and take locks.

use crate::process::prctl;
use crate::{Errno, Result, check};

const PR_CAPBSET_READ: i32 = 23;
const PR_CAPBSET_DROP: i32 = 24;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Capabilities as bit sets (bit n = capability n).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

pub fn set_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: pointer and length describe the slice.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// Real, effective and saved user id.
pub fn set_uid(uid: u32) -> Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// Real, effective and saved group id.
pub fn set_gid(gid: u32) -> Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    Ok(())
}

/// Drops from the bounding set all that `keep` lacks.
pub fn limit_bounding(keep: u64) -> Result<()> {
    for capability in 0..64 {
        if keep & (1 << capability) == 0 {
            match prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) {
                // The first number that the kernel does not know: all the rest are unknown, too.
                Err(Errno::EINVAL) if prctl(PR_CAPBSET_READ, capability, 0, 0, 0).is_err() => return Ok(()),
                other => other?,
            };
        }
    }
    Ok(())
}

/// All capabilities that this process may still give: its bounding set.
pub fn bounding() -> u64 {
    // The kernel knows no capability above one that it does not know.
    (0..64)
        .map_while(|capability| Some((capability, prctl(PR_CAPBSET_READ, capability, 0, 0, 0).ok()?)))
        .filter_map(|(capability, has)| (has == 1).then_some(capability))
        .fold(0, |set, capability| set | 1 << capability)
}

/// This thread's permitted set.
pub fn permitted() -> Result<u64> {
    let header = Header { version: CAPABILITY_VERSION, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 writes exactly two data structures.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Sets effective, permitted and inheritable.
pub fn set_capabilities(capabilities: &Capabilities) -> Result<()> {
    let half = |shift: u32| Data {
        effective: (capabilities.effective >> shift) as u32,
        permitted: (capabilities.permitted >> shift) as u32,
        inheritable: (capabilities.inheritable >> shift) as u32,
    };
    let header = Header { version: CAPABILITY_VERSION, pid: 0 };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads exactly two data structures.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Replaces the ambient set.
pub fn set_ambient(set: u64) -> Result<()> {
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)?;
    for capability in (0..64).filter(|capability| set & (1 << capability) != 0) {
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)?;
    }
    Ok(())
}

/// Whether a change of user id keeps the permitted set.
pub fn keep_capabilities(keep: bool) -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, u64::from(keep), 0, 0, 0).map(drop)
}

/// No program started from here on gains a privilege.
pub fn no_new_privileges() -> Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).map(drop)
}

/// Whether others of the same user may trace this process and open its files in procfs.
pub fn set_dumpable(dumpable: bool) -> Result<()> {
    prctl(libc::PR_SET_DUMPABLE, u64::from(dumpable), 0, 0, 0).map(drop)
}

/// The signal that this process gets when its parent ends; 0 for none.
pub fn set_parent_death_signal(signal: i32) -> Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, signal as u64, 0, 0, 0).map(drop)
}

/// Orphans below this process become its children.
pub fn set_child_subreaper() -> Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0).map(drop)
}

/// Soft and hard limit of a resource.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: pid 0 is this process; limit outlives the call and the old one is not asked for.
    check(unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, std::ptr::null_mut::<libc::rlimit64>())
    })?;
    Ok(())
}

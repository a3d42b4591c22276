//! Loading a BPF program that decides on device access and attaching it to a cgroup.

use crate::{Result, check, own};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;
/// More programs than this on one cgroup are not looked at when one is replaced.
const MAX_ATTACHED: usize = 64;

/// One instruction of extended BPF.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replace: u32,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> libc::c_long {
    // SAFETY: attributes is one of the structures above, laid out as the command's part of union bpf_attr; all pointers
    // in it are set by the callers below to memory that outlives the call.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) }
}

/// Verifies and loads a device program.
pub fn load_device_program(instructions: &[Instruction]) -> Result<OwnedFd> {
    let license = c"Apache-2.0";
    own(bpf(
        BPF_PROG_LOAD,
        &mut Load {
            program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Load::default()
        },
    ))
}

/// Attaches a device program to a cgroup, beside those of its ancestors; `replace` is exchanged in one step.
pub fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> Result<()> {
    check(bpf(
        BPF_PROG_ATTACH,
        &mut Attach {
            target: cgroup.as_raw_fd() as u32,
            program: program.as_raw_fd() as u32,
            kind: BPF_CGROUP_DEVICE,
            flags: BPF_F_ALLOW_MULTI | if replace.is_some() { BPF_F_REPLACE } else { 0 },
            replace: replace.map_or(0, |fd| fd.as_raw_fd() as u32),
        },
    ))?;
    Ok(())
}

/// The device programs attached to a cgroup itself.
pub fn attached_device_programs(cgroup: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
    let mut ids = [0_u32; MAX_ATTACHED];
    let mut query = Query {
        target: cgroup.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        ids: ids.as_mut_ptr() as u64,
        count: MAX_ATTACHED as u32,
        ..Query::default()
    };
    check(bpf(BPF_PROG_QUERY, &mut query))?;
    ids.iter().take(query.count as usize).map(|id| own(bpf(BPF_PROG_GET_FD_BY_ID, &mut [*id, 0, 0, 0]))).collect()
}

/// Detaches a device program.
pub fn detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    check(bpf(
        BPF_PROG_DETACH,
        &mut Attach {
            target: cgroup.as_raw_fd() as u32,
            program: program.as_raw_fd() as u32,
            kind: BPF_CGROUP_DEVICE,
            ..Attach::default()
        },
    ))?;
    Ok(())
}

//! The default profile for containers: what an ordinary program needs, without the calls that reach beyond a container.

use super::numbers::NUMBERS;
use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder, LinuxSeccompOperator,
    LinuxSyscall, LinuxSyscallBuilder,
};
use std::collections::HashSet;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_VSOCK: u64 = 40;
/// `CLONE_NEW*` of every namespace type that clone(2) takes.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// `PER_LINUX`, `PER_LINUX32` with and without `UNAME26`, and the query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Calls that need one of these capabilities anyway; refused without them so that a kernel flaw in them is out of reach.
const GATED: &[(&[Capability], &[&str])] = &[
    (
        &[Capability::SysAdmin],
        &[
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "lsm_set_self_attr",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "open_tree_attr",
            "pivot_root",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "swapoff",
            "swapon",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (&[Capability::SysAdmin, Capability::Bpf], &["bpf"]),
    (&[Capability::SysAdmin, Capability::Perfmon], &["perf_event_open"]),
    (&[Capability::SysAdmin, Capability::Syslog], &["syslog"]),
    (&[Capability::SysBoot], &["reboot", "kexec_file_load", "kexec_load"]),
    (&[Capability::SysChroot], &["chroot"]),
    (&[Capability::SysModule], &["create_module", "delete_module", "finit_module", "init_module"]),
    (&[Capability::SysPacct], &["acct"]),
    (&[Capability::SysPtrace], &["kcmp", "process_madvise"]),
    (&[Capability::SysRawio], &["ioperm", "iopl"]),
    (&[Capability::SysTime], &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    (&[Capability::SysTtyConfig], &["vhangup"]),
    (&[Capability::SysNice], &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (&[Capability::DacReadSearch], &["open_by_handle_at"]),
];

/// Never needed in a container: keyrings know no namespaces, io_uring and userfaultfd widen the kernel's open side,
/// the others are relics.
const NEVER: &[&str] = &[
    "add_key",
    "afs_syscall",
    "break",
    "ftime",
    "get_kernel_syms",
    "getpmsg",
    "gtty",
    "idle",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "keyctl",
    "lock",
    "migrate_pages",
    "move_pages",
    "mpx",
    "nfsservctl",
    "prof",
    "profil",
    "putpmsg",
    "query_module",
    "request_key",
    "security",
    "stty",
    "sysfs",
    "_sysctl",
    "tuxcall",
    "ulimit",
    "uprobe",
    "userfaultfd",
    "uselib",
    "ustat",
    "vm86",
    "vm86old",
    "vserver",
];

/// Looked at by their arguments below.
const SPECIAL: &[&str] = &["clone", "clone3", "personality", "socket", "socketcall"];

/// The profile for a container with these capabilities.
///
/// Calls that no kernel header knew when this was written answer ENOSYS, so that programs fall back to older ones;
/// known but refused calls answer EPERM.
pub fn default_profile(capabilities: &HashSet<Capability>) -> LinuxSeccomp {
    let admin = capabilities.contains(&Capability::SysAdmin);
    let mut refused: Vec<&str> = NEVER.to_vec();
    for (any_of, names) in GATED {
        if !any_of.iter().any(|capability| capabilities.contains(capability)) {
            refused.extend(*names);
        }
    }
    let allowed = NUMBERS
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !refused.contains(name) && (!SPECIAL.contains(name) || *name == "socketcall"));
    let mut syscalls = vec![
        rule(allowed.map(String::from).collect(), LinuxSeccompAction::ScmpActAllow, None, None),
        rule(
            refused.iter().map(|name| String::from(*name)).collect(),
            LinuxSeccompAction::ScmpActErrno,
            Some(EPERM),
            None,
        ),
        allow_when("socket", argument(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)),
        rule(vec!["socket".into()], LinuxSeccompAction::ScmpActErrno, Some(EPERM), None),
    ];
    syscalls.extend(
        PERSONALITIES
            .map(|domain| allow_when("personality", argument(0, LinuxSeccompOperator::ScmpCmpEq, domain, None))),
    );
    syscalls.push(rule(vec!["personality".into()], LinuxSeccompAction::ScmpActErrno, Some(EPERM), None));
    if admin {
        let both = vec!["clone".into(), "clone3".into()];
        syscalls.push(rule(both, LinuxSeccompAction::ScmpActAllow, None, None));
    } else {
        let no_namespaces = argument(0, LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NAMESPACES, Some(0));
        syscalls.push(allow_when("clone", no_namespaces));
        syscalls.push(rule(vec!["clone".into()], LinuxSeccompAction::ScmpActErrno, Some(EPERM), None));
        // Its flags lie in memory where a filter cannot look; ENOSYS makes the C library use clone.
        syscalls.push(rule(vec!["clone3".into()], LinuxSeccompAction::ScmpActErrno, Some(ENOSYS), None));
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(ENOSYS)
        .architectures(if cfg!(target_arch = "x86_64") {
            vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
        } else {
            vec![Arch::ScmpArchNative]
        })
        .syscalls(syscalls)
        .build()
        .expect("every field has a default")
}

fn rule(
    names: Vec<String>,
    action: LinuxSeccompAction,
    errno: Option<u32>,
    argument: Option<LinuxSeccompArg>,
) -> LinuxSyscall {
    let mut builder = LinuxSyscallBuilder::default().names(names).action(action);
    if let Some(errno) = errno {
        builder = builder.errno_ret(errno);
    }
    if let Some(argument) = argument {
        builder = builder.args(vec![argument]);
    }
    builder.build().expect("every field has a default")
}

fn allow_when(name: &str, argument: LinuxSeccompArg) -> LinuxSyscall {
    rule(vec![name.into()], LinuxSeccompAction::ScmpActAllow, None, Some(argument))
}

fn argument(index: usize, op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> LinuxSeccompArg {
    let mut builder = oci_spec::runtime::LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    if let Some(value_two) = value_two {
        builder = builder.value_two(value_two);
    }
    builder.build().expect("every field has a default")
}

//! A program to run: arguments, identity, limits, labels, filters. The same for a container's first process and for
//! those added by `exec`.

use super::{Options, c_string, container_path};
use crate::capability;
use crate::error::{Error, Result};
use crate::seccomp;
use coracle_sys::identity::{self, Capabilities};
use coracle_sys::process::StringArray;
use coracle_sys::schedule::SchedulerAttributes;
use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, MemoryPolicyFlagType,
    MemoryPolicyModeType, PosixRlimitType, Process,
};
use std::ffi::CString;
use std::path::Path;

/// Where a program without a slash is looked for when the environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Room for `HOME=` and a folder, filled in by the new process when the environment lacks it.
pub(crate) const HOME_BYTES: usize = 512;
/// Processors and memory nodes that a list may name.
const MAX_LISTED: usize = 8192;

#[derive(Clone, Debug)]
pub(crate) struct ProcessPlan {
    pub arguments: StringArray,
    pub environment: StringArray,
    /// Place of the `HOME` entry that the new process fills in from the container's user database.
    pub home: Option<usize>,
    /// Files to try, in order.
    pub candidates: Vec<CString>,
    pub cwd: CString,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub umask: Option<u32>,
    pub capabilities: Capabilities,
    pub no_new_privileges: bool,
    /// Resource, soft, hard.
    pub rlimits: Vec<(u32, u64, u64)>,
    pub oom_score_adj: Option<CString>,
    pub scheduler: Option<SchedulerAttributes>,
    /// Class and level.
    pub io_priority: Option<(u32, u32)>,
    /// Processors during set-up and for the program.
    pub affinity: (Option<Vec<u64>>, Option<Vec<u64>>),
    pub personality: Option<u64>,
    pub memory_policy: Option<(u32, Vec<u64>)>,
    /// What to write to which attribute of `/proc/self/attr` (relative to procfs).
    pub label: Option<(CString, CString)>,
    pub seccomp: Option<seccomp::Filter>,
    /// Rows and columns; (0, 0) leaves the terminal's own.
    pub terminal: Option<(u16, u16)>,
    pub plain_line_ends: bool,
    pub keyring: Option<CString>,
    pub preserve_fds: u32,
}

impl ProcessPlan {
    /// The first descriptor that the program does not inherit.
    pub(crate) fn first_closed(&self) -> i32 {
        3 + i32::try_from(self.preserve_fds).unwrap_or(i32::MAX - 3)
    }

    pub(super) fn compile(process: &Process, linux: &Linux, options: &Options) -> Result<Self> {
        let arguments = process.args().as_deref().unwrap_or_default();
        let program = arguments.first().ok_or_else(|| Error::config("process.args", "is empty"))?;
        if program.is_empty() {
            return Err(Error::config("process.args", "the program has no name"));
        }
        let cwd = process.cwd();
        if !cwd.is_absolute() {
            return Err(Error::config("process.cwd", format!("{:?} is not absolute", cwd.display().to_string())));
        }
        let (environment, home) = environment(process)?;
        let terminal = process.terminal().unwrap_or(false).then(|| {
            let side = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
            process.console_size().map_or((0, 0), |size| (side(size.height()), side(size.width())))
        });
        let user = process.user();
        let affinity = process.exec_cpu_affinity().as_ref();
        let list = |field: &str, text: &Option<String>| match text.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => bit_list(field, text).map(Some),
        };
        Ok(Self {
            candidates: candidates(program, process.env().as_deref().unwrap_or_default())?,
            arguments: c_strings("process.args", arguments)?,
            environment,
            home,
            cwd: container_path("process.cwd", cwd)?,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask(),
            capabilities: capability::sets(process.capabilities().as_ref(), identity::bounding()),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            rlimits: rlimits(process)?,
            oom_score_adj: process.oom_score_adj().map(oom_score).transpose()?,
            scheduler: scheduler(process)?,
            io_priority: io_priority(process)?,
            affinity: (
                list("process.execCPUAffinity.initial", &affinity.and_then(|affinity| affinity.initial().clone()))?,
                list("process.execCPUAffinity.final", &affinity.and_then(|a| a.cpu_affinity_final().clone()))?,
            ),
            personality: personality(linux)?,
            memory_policy: memory_policy(linux)?,
            label: label(process)?,
            seccomp: linux.seccomp().as_ref().map(seccomp::compile).transpose()?,
            terminal,
            plain_line_ends: options.plain_line_ends,
            keyring: (!options.no_new_keyring).then(|| c_string("id", &format!("_ses.{}", options.id))).transpose()?,
            preserve_fds: options.preserve_fds,
        })
    }
}

fn c_strings(field: &str, strings: &[String]) -> Result<StringArray> {
    Ok(StringArray::new(strings.iter().map(|text| c_string(field, text)).collect::<Result<_>>()?))
}

/// The environment, the last of equal names winning; with room for `HOME` when it is missing.
fn environment(process: &Process) -> Result<(StringArray, Option<usize>)> {
    let listed = process.env().as_deref().unwrap_or_default();
    let mut strings: Vec<CString> = Vec::with_capacity(listed.len() + 1);
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_string();
    let mut last = std::collections::HashMap::new();
    for (position, entry) in listed.iter().enumerate() {
        last.insert(name(entry), position);
    }
    for (position, entry) in listed.iter().enumerate() {
        let name = name(entry);
        if !entry.contains('=') || name.is_empty() {
            return Err(Error::config("process.env", format!("{entry:?} is not of the form NAME=value")));
        }
        let empty_home = entry == "HOME=";
        if last.get(&name) == Some(&position) && !empty_home {
            strings.push(c_string("process.env", entry)?);
        }
    }
    let home = (!strings.iter().any(|entry| entry.to_bytes().starts_with(b"HOME="))).then(|| {
        let mut room = b"HOME=/".to_vec();
        room.resize(HOME_BYTES - 1, b'/');
        strings.push(CString::new(room).expect("slashes only"));
        strings.len() - 1
    });
    Ok((StringArray::new(strings), home))
}

fn candidates(program: &str, environment: &[String]) -> Result<Vec<CString>> {
    if program.contains('/') {
        return Ok(vec![c_string("process.args", program)?]);
    }
    let path = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    path.split(':')
        // An empty or relative part would look in whatever folder the image chose as the working one.
        .filter(|folder| folder.starts_with('/'))
        .map(|folder| c_string("process.env", &format!("{}/{program}", folder.trim_end_matches('/'))))
        .collect()
}

fn rlimits(process: &Process) -> Result<Vec<(u32, u64, u64)>> {
    let mut limits: Vec<(u32, u64, u64)> = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let resource = match limit.typ() {
            PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
            PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
            PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
            PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
            PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
            PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
            PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
            PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
            PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
            PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
            PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
            PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
            PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
            PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
            PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
            PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
        };
        if limits.iter().any(|(other, ..)| *other == resource) {
            return Err(Error::config("process.rlimits", format!("{} is listed twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(Error::config("process.rlimits", format!("{}: soft is above hard", limit.typ())));
        }
        limits.push((resource, limit.soft(), limit.hard()));
    }
    Ok(limits)
}

fn oom_score(score: i32) -> Result<CString> {
    if !(-1000..=1000).contains(&score) {
        return Err(Error::config("process.oomScoreAdj", format!("{score} is not between -1000 and 1000")));
    }
    c_string("process.oomScoreAdj", &score.to_string())
}

fn scheduler(process: &Process) -> Result<Option<SchedulerAttributes>> {
    let Some(wanted) = process.scheduler() else { return Ok(None) };
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let mut flags = 0;
    for flag in wanted.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        };
    }
    let priority = wanted.priority().unwrap_or(0);
    if priority != 0 && ![1, 2].contains(&policy) {
        return Err(Error::config("process.scheduler.priority", "goes with SCHED_FIFO and SCHED_RR only"));
    }
    let deadline = [wanted.runtime(), wanted.deadline(), wanted.period()];
    if policy != 6 && deadline.iter().any(|value| value.is_some_and(|value| value != 0)) {
        return Err(Error::config("process.scheduler", "runtime, deadline and period go with SCHED_DEADLINE only"));
    }
    Ok(Some(SchedulerAttributes {
        policy,
        flags,
        nice: wanted.nice().unwrap_or(0),
        priority: u32::try_from(priority).map_err(|_| Error::config("process.scheduler.priority", "is negative"))?,
        runtime_ns: wanted.runtime().unwrap_or(0),
        deadline_ns: wanted.deadline().unwrap_or(0),
        period_ns: wanted.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    }))
}

fn io_priority(process: &Process) -> Result<Option<(u32, u32)>> {
    let Some(wanted) = process.io_priority() else { return Ok(None) };
    let level = u32::try_from(wanted.priority())
        .ok()
        .filter(|level| *level <= 7)
        .ok_or_else(|| Error::config("process.ioPriority.priority", "is not between 0 and 7"))?;
    Ok(Some(match wanted.class() {
        IOPriorityClass::IoprioClassRt => (1, level),
        IOPriorityClass::IoprioClassBe => (2, level),
        IOPriorityClass::IoprioClassIdle => (3, level),
    }))
}

/// A list like `0-3,7` as bits.
pub(crate) fn bit_list(field: &str, text: &str) -> Result<Vec<u64>> {
    let mut bits: Vec<u64> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|number| *number < MAX_LISTED);
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return Err(Error::config(field, format!("{part:?} is not a number or range below {MAX_LISTED}")));
        };
        if first > last {
            return Err(Error::config(field, format!("{part:?} runs backwards")));
        }
        if bits.len() <= last / 64 {
            bits.resize(last / 64 + 1, 0);
        }
        for number in first..=last {
            bits[number / 64] |= 1 << (number % 64);
        }
    }
    Ok(bits)
}

fn personality(linux: &Linux) -> Result<Option<u64>> {
    let Some(wanted) = linux.personality() else { return Ok(None) };
    if wanted.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(Error::unsupported("linux.personality.flags", "the specification defines none"));
    }
    Ok(Some(match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

fn memory_policy(linux: &Linux) -> Result<Option<(u32, Vec<u64>)>> {
    let Some(wanted) = linux.memory_policy() else { return Ok(None) };
    let mut mode = match wanted.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    for flag in wanted.flags().iter().flatten() {
        mode |= match flag {
            MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
            MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
            MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        };
    }
    let nodes = match wanted.nodes().as_deref() {
        None | Some("") => Vec::new(),
        Some(text) => bit_list("linux.memoryPolicy.nodes", text)?,
    };
    Ok(Some((mode, nodes)))
}

pub(crate) fn selinux_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

pub(crate) fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|answer| answer.starts_with(b"Y"))
}

fn label(process: &Process) -> Result<Option<(CString, CString)>> {
    if let Some(profile) = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty()) {
        if !apparmor_enabled() {
            return Err(Error::unsupported("process.apparmorProfile", "AppArmor is not enabled on this host"));
        }
        let value = c_string("process.apparmorProfile", &format!("exec {profile}"))?;
        return Ok(Some((c"self/attr/apparmor/exec".into(), value)));
    }
    if let Some(label) = process.selinux_label().as_deref().filter(|label| !label.is_empty()) {
        if !selinux_enabled() {
            return Err(Error::unsupported("process.selinuxLabel", "SELinux is not enabled on this host"));
        }
        return Ok(Some((c"self/attr/exec".into(), c_string("process.selinuxLabel", label)?)));
    }
    Ok(None)
}

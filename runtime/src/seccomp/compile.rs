//! The compiler. For every architecture of the profile the calls form ranges of equal outcome, found by binary search;
//! a call whose rules look at arguments has a chain of comparisons at its leaf.
//!
//! Reading of a profile: the first rule that names the call and whose argument conditions all hold decides; without one
//! the default action does; but a call that is newer than any that the profile names does not exist (`ENOSYS`) rather than
//! being refused, for programs fall back to older ones only then. Several conditions on the *same* argument within a rule are alternatives (each makes a rule
//! of its own), as runc has always read them. A call of an architecture that the profile does not list kills the
//! process. Calls without argument rules are decided by number and architecture alone, which lets the kernel answer
//! them from its bitmap without running the program.

use super::{Architecture, X32_BIT};
use crate::error::{Error, Result};
use coracle_sys::seccomp::{
    FLAG_LOG, FLAG_NEW_LISTENER, FLAG_SPEC_ALLOW, FLAG_TSYNC, FLAG_TSYNC_ESRCH, FLAG_WAIT_KILLABLE_RECV, Instruction,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use std::path::PathBuf;

/// The kernel takes no longer programs (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
/// Arguments of a system call.
const ARGUMENTS: usize = 6;
const KILL_PROCESS: u32 = 0x8000_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

// Opcodes of classic BPF (linux/bpf_common.h) as used here: all on the 32-bit accumulator.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_GREATER_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// A compiled filter and how to install it.
#[derive(Clone, Debug)]
pub struct Filter {
    pub program: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u64,
    /// Socket that gets the notification descriptor, and what is told along with it.
    pub listener: Option<(PathBuf, String)>,
}

/// One rule of a call: all conditions must hold for the action.
#[derive(Clone, Debug, PartialEq)]
struct Rule {
    conditions: Vec<LinuxSeccompArg>,
    action: u32,
}

/// What one architecture does: calls with their rules, sorted by number.
type Table = Vec<(u32, Vec<Rule>)>;

/// A run of calls, from `first` up to the next run, with one outcome.
struct Run<'rules> {
    first: u32,
    rules: &'rules [Rule],
    /// What happens where no rule matches.
    default: u32,
}

/// Compiles a profile.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
        return Err(Error::config("linux.seccomp.defaultAction", "SCMP_ACT_NOTIFY would stop the runtime itself"));
    }
    let architectures = architectures(profile);
    let newer = newer(profile, default);
    let mut program = vec![load(ARCHITECTURE_AT)];
    let x32 = architectures.contains(&Architecture::X32);
    for architecture in architectures.iter().filter(|architecture| **architecture != Architecture::X32) {
        let table = table(profile, *architecture)?;
        let mut block = vec![load(NUMBER_AT)];
        if *architecture == Architecture::X86_64 {
            let other = if x32 {
                search(&runs(&self::table(profile, Architecture::X32)?, default, newer))
            } else {
                vec![finish(KILL_PROCESS)]
            };
            let native = search(&runs(&table, default, newer));
            // An x32 call is one of x86_64 by its architecture, told apart by a bit of its number.
            block.push(Instruction { code: JUMP_GREATER_EQUAL, jump_true: 0, jump_false: 1, value: X32_BIT });
            block.push(skip(native.len()));
            block.extend(native);
            block.extend(other);
        } else {
            block.extend(search(&runs(&table, default, newer)));
        }
        program.push(Instruction { code: JUMP_EQUAL, jump_true: 1, jump_false: 0, value: architecture.audit() });
        program.push(skip(block.len()));
        program.extend(block);
    }
    program.push(finish(KILL_PROCESS));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Error::config(
            "linux.seccomp",
            format!("the filter needs {} instructions, the kernel takes {MAX_INSTRUCTIONS}", program.len()),
        ));
    }
    let notifies = profile.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
    Ok(Filter { program, flags: flags(profile, notifies), listener: listener(profile, notifies)? })
}

/// What a reader of the profile would answer for one call: the obvious, slow model that the compiler is tested against.
pub fn naive(profile: &LinuxSeccomp, audit: u32, number: u32, arguments: [u64; ARGUMENTS]) -> Result<u32> {
    let architecture = architectures(profile).into_iter().find(|architecture| {
        architecture.audit() == audit
            && (audit != Architecture::X86_64.audit() || (*architecture == Architecture::X32) == (number >= X32_BIT))
    });
    let Some(architecture) = architecture else { return Ok(KILL_PROCESS) };
    for rule in profile.syscalls().iter().flatten() {
        if !rule.names().iter().any(|name| architecture.number(name) == Some(number)) {
            continue;
        }
        let conditions = rule.args().clone().unwrap_or_default();
        let holds = |condition: &LinuxSeccompArg| {
            let (value, wanted) = (arguments[condition.index()], condition.value());
            match condition.op() {
                LinuxSeccompOperator::ScmpCmpNe => value != wanted,
                LinuxSeccompOperator::ScmpCmpLt => value < wanted,
                LinuxSeccompOperator::ScmpCmpLe => value <= wanted,
                LinuxSeccompOperator::ScmpCmpEq => value == wanted,
                LinuxSeccompOperator::ScmpCmpGe => value >= wanted,
                LinuxSeccompOperator::ScmpCmpGt => value > wanted,
                LinuxSeccompOperator::ScmpCmpMaskedEq => value & wanted == condition.value_two().unwrap_or(0),
            }
        };
        let matches =
            if same_argument_twice(&conditions) { conditions.iter().any(holds) } else { conditions.iter().all(holds) };
        if matches {
            return action(rule.action(), rule.errno_ret());
        }
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let names = profile.syscalls().iter().flatten().flat_map(|rule| rule.names());
    let last = names.filter_map(|name| architecture.number(name)).max();
    Ok(if last.is_some_and(|last| number > last) { newer(profile, default) } else { default })
}

/// The answer to calls above all that a profile names on an architecture.
fn newer(profile: &LinuxSeccomp, default: u32) -> u32 {
    match profile.default_action() {
        // Allowed; or answered by a tracer, which knows best.
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace => default,
        _ => LinuxSeccompAction::ScmpActErrno.as_u32(Some(ENOSYS)),
    }
}

/// The kernel's word for an action. A missing errno is EPERM, for the default action and for rules alike.
fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32> {
    const DATA_MASK: u32 = 0xffff;
    const MAX_ERRNO: u32 = 4095;
    let takes_errno = matches!(action, LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace);
    if errno.is_some() && !takes_errno && errno != Some(0) {
        return Err(Error::config("linux.seccomp", format!("errnoRet does not go with {action:?}")));
    }
    let errno = errno.unwrap_or(EPERM);
    if takes_errno && errno > if action == LinuxSeccompAction::ScmpActErrno { MAX_ERRNO } else { DATA_MASK } {
        return Err(Error::config("linux.seccomp", format!("errnoRet {errno} is out of range")));
    }
    Ok(action.as_u32(Some(errno)))
}

/// The listed architectures that can occur on this machine; the native one when none is listed.
fn architectures(profile: &LinuxSeccomp) -> Vec<Architecture> {
    let mut found = Vec::new();
    for listed in profile.architectures().iter().flatten() {
        let architecture = match listed {
            Arch::ScmpArchNative => Architecture::NATIVE,
            Arch::ScmpArchX86_64 => Architecture::X86_64,
            Arch::ScmpArchX86 => Architecture::X86,
            Arch::ScmpArchX32 => Architecture::X32,
            Arch::ScmpArchAarch64 => Architecture::Aarch64,
            Arch::ScmpArchRiscv64 => Architecture::Riscv64,
            // Other machines' calls never reach a filter here.
            _ => continue,
        };
        if !found.contains(&architecture) {
            found.push(architecture);
        }
    }
    // The native architecture is always part of a filter, as with libseccomp.
    if !found.contains(&Architecture::NATIVE) {
        found.insert(0, Architecture::NATIVE);
    }
    // x86_64 first: it is the one that nearly every call comes from.
    found.sort_by_key(|architecture| *architecture != Architecture::NATIVE);
    if found.contains(&Architecture::X32) && !found.contains(&Architecture::X86_64) {
        found.retain(|architecture| *architecture != Architecture::X32);
    }
    found
}

fn flags(profile: &LinuxSeccomp, notifies: bool) -> u64 {
    let mut flags = if notifies { FLAG_NEW_LISTENER } else { 0 };
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            // Without a listener there is nothing to wait for, and the kernel refuses the flag.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if notifies => FLAG_WAIT_KILLABLE_RECV,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
    }
    // A listener and a thread id share the call's return value unless the latter is turned into an error.
    if flags & FLAG_NEW_LISTENER != 0 && flags & FLAG_TSYNC != 0 {
        flags |= FLAG_TSYNC_ESRCH;
    }
    flags
}

fn listener(profile: &LinuxSeccomp, notifies: bool) -> Result<Option<(PathBuf, String)>> {
    let path = profile.listener_path().as_ref().filter(|path| !path.as_os_str().is_empty());
    let metadata = profile.listener_metadata().clone().unwrap_or_default();
    match path {
        None if notifies => Err(Error::config("linux.seccomp.listenerPath", "SCMP_ACT_NOTIFY needs it")),
        None if !metadata.is_empty() => {
            Err(Error::config("linux.seccomp.listenerMetadata", "goes with listenerPath only"))
        }
        None => Ok(None),
        Some(path) => Ok(notifies.then(|| (path.clone(), metadata))),
    }
}

fn same_argument_twice(conditions: &[LinuxSeccompArg]) -> bool {
    conditions
        .iter()
        .enumerate()
        .any(|(position, one)| conditions[..position].iter().any(|other| other.index() == one.index()))
}

/// Collects the rules of each call. Names that this architecture does not know are skipped, as the specification's
/// profiles are written for all of them at once.
fn table(profile: &LinuxSeccomp, architecture: Architecture) -> Result<Table> {
    let mut calls: std::collections::BTreeMap<u32, Vec<Rule>> = std::collections::BTreeMap::new();
    for syscall in profile.syscalls().iter().flatten() {
        let action = action(syscall.action(), syscall.errno_ret())?;
        let conditions = syscall.args().clone().unwrap_or_default();
        if let Some(condition) = conditions.iter().find(|condition| condition.index() >= ARGUMENTS) {
            return Err(Error::config(
                "linux.seccomp.syscalls.args.index",
                format!("{} is not an argument of a system call (0 to {})", condition.index(), ARGUMENTS - 1),
            ));
        }
        let rules = if same_argument_twice(&conditions) {
            conditions.iter().map(|condition| Rule { conditions: vec![*condition], action }).collect()
        } else {
            vec![Rule { conditions, action }]
        };
        for name in syscall.names() {
            let Some(number) = architecture.number(name) else { continue };
            let known = calls.entry(number).or_default();
            // What stands behind an unconditional rule is never reached.
            if known.last().is_none_or(|last| !last.conditions.is_empty()) {
                known.extend(rules.iter().cloned());
            }
        }
    }
    Ok(calls.into_iter().collect())
}

/// Splits all numbers into runs of equal rules.
fn runs(table: &Table, default: u32, newer: u32) -> Vec<Run<'_>> {
    let mut runs: Vec<Run<'_>> = vec![Run { first: 0, rules: &[], default }];
    let mut push = |first: u32, rules| {
        let last = runs.last_mut().expect("it begins with one");
        if last.rules == rules {
            return;
        }
        if last.first == first {
            last.rules = rules;
        } else {
            runs.push(Run { first, rules, default });
        }
    };
    let mut next = 0;
    for (number, rules) in table {
        if *number > next {
            push(next, &[]);
        }
        push(*number, rules);
        next = number + 1;
    }
    push(next, &[]);
    if let (Some(last), false) = (runs.last_mut(), table.is_empty()) {
        last.default = newer;
    }
    runs
}

/// Binary search over the runs; the accumulator holds the call's number.
fn search(runs: &[Run<'_>]) -> Vec<Instruction> {
    if let [run] = runs {
        return leaf(run.rules, run.default);
    }
    let (low, high) = runs.split_at(runs.len() / 2);
    let pivot = high[0].first;
    let (low, high) = (search(low), search(high));
    let mut block = Vec::with_capacity(low.len() + high.len() + 2);
    if let Ok(distance) = u8::try_from(low.len()) {
        block.push(Instruction { code: JUMP_GREATER_EQUAL, jump_true: distance, jump_false: 0, value: pivot });
    } else {
        // Conditional jumps reach 255 instructions; the unconditional one reaches all.
        block.push(Instruction { code: JUMP_GREATER_EQUAL, jump_true: 0, jump_false: 1, value: pivot });
        block.push(skip(low.len()));
    }
    block.extend(low);
    block.extend(high);
    block
}

fn leaf(rules: &[Rule], default: u32) -> Vec<Instruction> {
    let mut block = Vec::new();
    for rule in rules {
        let mut body: Vec<Instruction> = rule.conditions.iter().flat_map(compare).collect();
        // A comparison leaves `FAIL` where it must leave the rule; what that means is known only now.
        let length = body.len();
        for (position, instruction) in body.iter_mut().enumerate() {
            let distance = (length - position) as u8;
            for target in [&mut instruction.jump_true, &mut instruction.jump_false] {
                if *target == FAIL {
                    *target = distance;
                }
            }
        }
        block.extend(body);
        block.push(finish(rule.action));
        if rule.conditions.is_empty() {
            return block;
        }
    }
    block.push(finish(default));
    block
}

/// Stands for "this rule does not match" until the distance is known; a rule is far shorter than this.
const FAIL: u8 = u8::MAX;

/// Compares one 64-bit argument; falls through when the condition holds.
fn compare(condition: &LinuxSeccompArg) -> Vec<Instruction> {
    let at = ARGUMENTS_AT + 8 * condition.index() as u32;
    let (low_at, high_at) = if cfg!(target_endian = "little") { (at, at + 4) } else { (at + 4, at) };
    let halves = |value: u64| (value as u32, (value >> 32) as u32);
    let (low, high) = halves(condition.value());
    let jump = |code, value, jump_true, jump_false| Instruction { code, jump_true, jump_false, value };
    match condition.op() {
        LinuxSeccompOperator::ScmpCmpEq => {
            vec![load(high_at), jump(JUMP_EQUAL, high, 0, FAIL), load(low_at), jump(JUMP_EQUAL, low, 0, FAIL)]
        }
        LinuxSeccompOperator::ScmpCmpNe => {
            vec![load(high_at), jump(JUMP_EQUAL, high, 0, 2), load(low_at), jump(JUMP_EQUAL, low, FAIL, 0)]
        }
        LinuxSeccompOperator::ScmpCmpGt | LinuxSeccompOperator::ScmpCmpGe => {
            let last =
                if condition.op() == LinuxSeccompOperator::ScmpCmpGt { JUMP_GREATER } else { JUMP_GREATER_EQUAL };
            vec![
                load(high_at),
                jump(JUMP_GREATER, high, 3, 0),
                jump(JUMP_EQUAL, high, 0, FAIL),
                load(low_at),
                jump(last, low, 0, FAIL),
            ]
        }
        LinuxSeccompOperator::ScmpCmpLt | LinuxSeccompOperator::ScmpCmpLe => {
            let last =
                if condition.op() == LinuxSeccompOperator::ScmpCmpLt { JUMP_GREATER_EQUAL } else { JUMP_GREATER };
            vec![
                load(high_at),
                jump(JUMP_GREATER, high, FAIL, 0),
                jump(JUMP_EQUAL, high, 0, 2),
                load(low_at),
                jump(last, low, FAIL, 0),
            ]
        }
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let (wanted_low, wanted_high) = halves(condition.value_two().unwrap_or(0));
            vec![
                load(high_at),
                Instruction { code: AND, jump_true: 0, jump_false: 0, value: high },
                jump(JUMP_EQUAL, wanted_high, 0, FAIL),
                load(low_at),
                Instruction { code: AND, jump_true: 0, jump_false: 0, value: low },
                jump(JUMP_EQUAL, wanted_low, 0, FAIL),
            ]
        }
    }
}

fn load(at: u32) -> Instruction {
    Instruction { code: LOAD, jump_true: 0, jump_false: 0, value: at }
}

fn finish(action: u32) -> Instruction {
    Instruction { code: RETURN, jump_true: 0, jump_false: 0, value: action }
}

fn skip(count: usize) -> Instruction {
    Instruction { code: JUMP, jump_true: 0, jump_false: 0, value: count as u32 }
}

//! The last steps before the program: identity, limits, filters, and finding and executing it.

use super::message::At;
use super::{Failure, Message, Note, report};
use crate::error::Step;
use crate::plan::ProcessPlan;
use coracle_sys::identity::{self, Capabilities};
use coracle_sys::path::{self, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_XDEV};
use coracle_sys::process::{self, StringArray};
use coracle_sys::{Errno, channel, schedule, seccomp, tty};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// As much of the container's user database is searched for a home.
const USER_DATABASE_BYTES: usize = 32 * 1024;
const DEFAULT_UMASK: u32 = 0o022;

/// What is executed: own copies, for one string of the environment may be replaced.
pub(crate) struct Program {
    pub arguments: StringArray,
    pub environment: StringArray,
}

pub(crate) struct Surroundings<'fd> {
    pub stdio: [RawFd; 3],
    pub has_terminal: bool,
    pub procfs: BorrowedFd<'fd>,
    pub sync: BorrowedFd<'fd>,
}

/// Writes a file of procfs that is reached without crossing another mount.
pub(crate) fn write_procfs(procfs: BorrowedFd<'_>, name: &CStr, value: &CStr) -> coracle_sys::Result<()> {
    let file =
        path::openat2(procfs, name, libc::O_WRONLY, 0, RESOLVE_IN_ROOT | RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS)?;
    let bytes = value.to_bytes();
    let written = path::write(file.as_fd(), bytes)?;
    if written == bytes.len() { Ok(()) } else { Err(Errno::EIO) }
}

/// Turns this process into the program. `announce` says that all is ready, waits for the word to start, and may name
/// another channel on which a failure is to be reported from then on.
pub(crate) fn finish(
    plan: &ProcessPlan,
    program: &mut Program,
    around: &Surroundings<'_>,
    announce: impl FnOnce() -> Result<Option<OwnedFd>, Failure>,
) -> Result<(), Failure> {
    place_streams(around)?;
    scheduling(plan)?;
    for (resource, soft, hard) in &plan.rlimits {
        identity::set_rlimit(*resource, *soft, *hard).at(Step::Rlimit)?;
    }
    if let Some((file, label)) = &plan.label {
        write_procfs(around.procfs, file, label).on(Step::SecurityLabel, label)?;
    }
    let mut home = [0_u8; crate::plan::HOME_BYTES];
    let home = plan.home.map(|index| (index, find_home(plan.uid, &mut home)));
    // With the runtime's rights first, which reach folders that the user cannot search.
    let early = path::chdir(&plan.cwd);
    become_user(plan)?;
    if let Err(errno) = early {
        path::chdir(&plan.cwd).map_err(|_| errno).on(Step::WorkingDirectory, &plan.cwd)?;
    }
    if !path::cwd_is_reachable().on(Step::WorkingDirectory, &plan.cwd)? {
        return Err(Failure::new(Step::WorkingDirectoryOutside, &plan.cwd, Errno::EXDEV));
    }
    path::umask(plan.umask.unwrap_or(DEFAULT_UMASK));
    if plan.uid != 0 {
        // Becoming another user has put the rights away with which the program itself will be executed.
        let permitted = identity::permitted().at(Step::Capabilities)?;
        let effective = plan.capabilities.effective & permitted;
        identity::set_capabilities(&Capabilities { effective, permitted, ..Capabilities::default() })
            .at(Step::Capabilities)?;
    }
    let executable = find_program(plan)?;
    process::reset_signals().at(Step::Signals)?;
    process::close_on_exec_from(plan.first_closed()).at(Step::CloseDescriptors)?;
    if plan.no_new_privileges {
        identity::no_new_privileges().at(Step::NoNewPrivileges)?;
    }
    identity::set_parent_death_signal(0).at(Step::Signals)?;
    let starter = announce()?;
    let sync = starter.as_ref().map_or(around.sync, AsFd::as_fd);
    let last = last_steps(plan, program, sync, executable, home);
    match (last, &starter) {
        (Err(failure), Some(starter)) => {
            report(starter.as_fd(), &failure);
            Err(failure)
        }
        (other, _) => other,
    }
}

/// Filter, capabilities, exec. A filter that must be installed with privilege comes before the capabilities go.
fn last_steps(
    plan: &ProcessPlan,
    program: &mut Program,
    sync: BorrowedFd<'_>,
    executable: &CStr,
    home: Option<(usize, &CStr)>,
) -> Result<(), Failure> {
    if let Some(affinity) = &plan.affinity.1 {
        schedule::set_affinity(affinity).at(Step::Affinity)?;
    }
    if plan.no_new_privileges {
        take_capabilities(&plan.capabilities)?;
        install_filter(plan, sync)?;
    } else {
        if plan.seccomp.is_some() {
            let all = identity::permitted().at(Step::Seccomp)?;
            let raised = Capabilities { effective: all, permitted: all, ..Capabilities::default() };
            identity::set_capabilities(&raised).at(Step::Seccomp)?;
            install_filter(plan, sync)?;
        }
        take_capabilities(&plan.capabilities)?;
    }
    let environment = &mut program.environment;
    let arguments = &program.arguments;
    let errno = match home {
        Some((index, home)) => {
            environment.with_replaced(index, home, |environment| process::execve(executable, arguments, environment))
        }
        None => process::execve(executable, arguments, environment),
    };
    Err(Failure::new(Step::Execute, executable, errno))
}

fn place_streams(around: &Surroundings<'_>) -> Result<(), Failure> {
    for (target, source) in (0..).zip(around.stdio) {
        if source != target {
            process::dup_onto(source, target).at(Step::StandardStreams)?;
        }
    }
    if around.has_terminal {
        tty::set_controlling(process::borrow_standard(0)).at(Step::Terminal)?;
    }
    Ok(())
}

fn scheduling(plan: &ProcessPlan) -> Result<(), Failure> {
    if let Some(affinity) = &plan.affinity.0 {
        schedule::set_affinity(affinity).at(Step::Affinity)?;
    }
    if let Some(attributes) = &plan.scheduler {
        schedule::set_scheduler(attributes).at(Step::Scheduler)?;
    }
    if let Some((class, level)) = plan.io_priority {
        schedule::set_io_priority(class, level).at(Step::IoPriority)?;
    }
    if let Some(domain) = plan.personality {
        schedule::set_personality(domain).at(Step::Personality)?;
    }
    if let Some((mode, nodes)) = &plan.memory_policy {
        schedule::set_memory_policy(*mode, nodes).at(Step::MemoryPolicy)?;
    }
    Ok(())
}

fn become_user(plan: &ProcessPlan) -> Result<(), Failure> {
    identity::limit_bounding(plan.capabilities.bounding).at(Step::BoundingSet)?;
    identity::keep_capabilities(true).at(Step::Identity)?;
    match identity::set_groups(&plan.groups) {
        // In a user namespace whose owner gave up to change groups for the right to map its own.
        Err(Errno::EPERM) if plan.groups.is_empty() => {}
        other => other.at(Step::Groups)?,
    }
    identity::set_gid(plan.gid).at(Step::Identity)?;
    identity::set_uid(plan.uid).at(Step::Identity)?;
    identity::keep_capabilities(false).at(Step::Identity)
}

fn take_capabilities(wanted: &Capabilities) -> Result<(), Failure> {
    identity::set_capabilities(wanted).at(Step::Capabilities)?;
    identity::set_ambient(wanted.ambient).at(Step::Capabilities)
}

fn install_filter(plan: &ProcessPlan, sync: BorrowedFd<'_>) -> Result<(), Failure> {
    let Some(filter) = &plan.seccomp else { return Ok(()) };
    let listener = seccomp::install(&filter.program, filter.flags).at(Step::Seccomp)?;
    if let Some(listener) = listener {
        let message = Message::note(Note::SeccompListener).encode();
        channel::send(sync, &message, Some(listener.as_fd())).at(Step::SeccompListener)?;
    }
    Ok(())
}

/// The first of the candidates that this user may execute.
fn find_program(plan: &ProcessPlan) -> Result<&CStr, Failure> {
    let name = plan.arguments.strings().first().map_or(c"", |name| name.as_c_str());
    let mut found = Errno::ENOENT;
    for candidate in &plan.candidates {
        match path::is_executable(candidate) {
            Ok(()) => return Ok(candidate),
            // One that is there but may not be executed explains more than those that are missing.
            Err(Errno::EACCES) => found = Errno::EACCES,
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => return Err(Failure::new(Step::FindProgram, candidate, errno)),
        }
    }
    Err(Failure::new(Step::FindProgram, name, found))
}

/// `HOME=` with the folder that the container's user database gives to a user, `/` without one.
fn find_home(uid: u32, buffer: &mut [u8; crate::plan::HOME_BYTES]) -> &CStr {
    const DEFAULT: &CStr = c"HOME=/";
    const PREFIX: &[u8] = b"HOME=";
    let mut database = [0_u8; USER_DATABASE_BYTES];
    let length = path::open(c"/", libc::O_PATH)
        .and_then(|root| {
            path::openat2(root.as_fd(), c"etc/passwd", libc::O_RDONLY | libc::O_NONBLOCK, 0, RESOLVE_IN_ROOT)
        })
        .and_then(|file| path::read(file.as_fd(), &mut database))
        .unwrap_or(0);
    for line in database[..length].split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b':');
        let (Some(id), Some(home)) = (fields.nth(2), fields.nth(2)) else { continue };
        let number = id.iter().try_fold(0_u32, |number, digit| {
            let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
            number.checked_mul(10)?.checked_add(digit.into())
        });
        if number == Some(uid) && !id.is_empty() && !home.is_empty() && PREFIX.len() + home.len() < buffer.len() {
            buffer[..PREFIX.len()].copy_from_slice(PREFIX);
            buffer[PREFIX.len()..PREFIX.len() + home.len()].copy_from_slice(home);
            return CStr::from_bytes_until_nul(buffer).unwrap_or(DEFAULT);
        }
    }
    DEFAULT
}

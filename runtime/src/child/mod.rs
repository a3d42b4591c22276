//! What the container's first process does between clone and exec. Nothing here allocates, locks or unwinds: all
//! strings stand in the plan, all descriptors were opened before, and a failure travels as a fixed-size message.

mod copy_up;
mod devices;
mod message;
mod process;
mod root;

use crate::error::Step;
use crate::plan::{Gate, Plan};
use coracle_sys::path;
use coracle_sys::process::CLONE_NEWTIME;
use coracle_sys::{channel, identity, namespace};
pub(crate) use devices::open_terminal;
use message::{At, listen};
pub(crate) use message::{Failure, MESSAGE_BYTES, Message, Note, Word};
pub(crate) use process::{Program, Surroundings, finish, write_procfs};
pub(crate) use root::{apply, root_tree};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Everything that the new process needs beside the plan, opened by its parent.
pub(crate) struct Prepared {
    /// The child's end of the channel.
    pub sync: OwnedFd,
    /// The parent's end, to be closed in the child so that the parent's death is seen.
    pub parent_sync: RawFd,
    /// Descriptors to become 0, 1, 2.
    pub stdio: [RawFd; 3],
    /// A procfs of the host, checked to be one.
    pub procfs: OwnedFd,
    /// Detached copy of the root file system; the folder itself when the parent may not make one.
    pub root: OwnedFd,
    /// Whether the parent may make mounts.
    pub privileged: bool,
    /// Detached copies of bind sources made by the parent, and whether each is a folder; one for each mount of the plan.
    pub sources: Vec<Option<(OwnedFd, bool)>>,
    /// File systems made by the new process, kept until they become read-only.
    pub made: Vec<Option<OwnedFd>>,
    /// Host nodes to bind instead of making devices (in a user namespace), one for each device of the plan.
    pub nodes: Vec<Option<OwnedFd>>,
    /// Namespaces to join.
    pub joins: Vec<(OwnedFd, i32)>,
    /// The mount that the runtime's program comes from.
    pub own_mount: Option<OwnedFd>,
    /// The listening socket of [`Gate::Listener`].
    pub listener: Option<OwnedFd>,
    pub program: Program,
    /// Whether the parent has hooks to run while the namespaces are new.
    pub runtime_hooks: bool,
    pub container_hooks: bool,
}

/// Runs the new process; returns only when it failed, after the failure was reported.
pub(crate) fn run(plan: &Plan, prepared: &mut Prepared) -> i32 {
    const FAILED: i32 = 1;
    coracle_sys::process::close(prepared.parent_sync);
    let Err(failure) = set_up(plan, prepared) else { return FAILED };
    report(prepared.sync.as_fd(), &failure);
    FAILED
}

/// Tells the parent; when it is gone, nobody is left to be told and the exit status says enough.
fn report(to: BorrowedFd<'_>, failure: &Failure) {
    let _ = channel::send(to, &Message::failed(failure).encode(), None);
}

fn set_up(plan: &Plan, prepared: &mut Prepared) -> Result<(), Failure> {
    identity::set_parent_death_signal(libc::SIGKILL).at(Step::Synchronize)?;
    // By the process itself, lest its program runs before; within a user namespace it has not the right to lower it.
    if let Some(score) = plan.process.oom_score_adj.as_ref().filter(|_| !plan.namespaces.has_user()) {
        process::write_procfs(prepared.procfs.as_fd(), c"self/oom_score_adj", score).on(Step::OomScore, score)?;
    }
    let sync = prepared.sync.as_fd();
    if matches!(plan.namespaces.user, crate::plan::UserNamespace::New { .. }) {
        tell(sync, Note::NeedsIdMaps)?;
        listen(sync, Word::Go)?;
    }
    if plan.namespaces.new & CLONE_NEWTIME != 0 {
        // While the files in procfs are still this process's own: becoming another user takes them away.
        enter_new_time(plan, prepared.procfs.as_fd())?;
    }
    if plan.namespaces.has_user() {
        match identity::set_groups(&[]) {
            // An unprivileged user's group map goes with giving up to change groups.
            Err(coracle_sys::Errno::EPERM) if !prepared.privileged => {}
            other => other.at(Step::BecomeRoot)?,
        }
        identity::set_gid(0).at(Step::BecomeRoot)?;
        identity::set_uid(0).at(Step::BecomeRoot)?;
        identity::set_parent_death_signal(libc::SIGKILL).at(Step::BecomeRoot)?;
    }
    // Others in a shared PID namespace shall not look into this process while it is still the runtime.
    if prepared.privileged {
        identity::set_dumpable(false).at(Step::Identity)?;
    }
    namespace::setsid().at(Step::NewSession)?;
    for (file, flag) in &prepared.joins {
        namespace::setns(file.as_fd(), *flag).at(Step::JoinNamespace)?;
    }
    if plan.namespaces.new & libc::CLONE_NEWCGROUP as u64 != 0 {
        // Only now: a cgroup namespace begins at the cgroup of the process that makes it.
        namespace::unshare(libc::CLONE_NEWCGROUP).at(Step::Unshare)?;
    }
    if let Some(name) = &plan.process.keyring {
        match namespace::join_session_keyring(name) {
            // No keyrings in this kernel, or none left for this user: the old one stays, as runc has it.
            Ok(()) | Err(coracle_sys::Errno::ENOSYS | coracle_sys::Errno::EDQUOT) => {}
            Err(errno) => return Err(Failure::new(Step::Keyring, name, errno)),
        }
    }
    if plan.namespaces.new & libc::CLONE_NEWNET as u64 != 0 {
        coracle_sys::net::bring_up(c"lo").on(Step::Loopback, c"lo")?;
    }
    if prepared.runtime_hooks {
        tell(sync, Note::NamespacesMade)?;
        listen(sync, Word::Go)?;
    }
    path::umask(0);
    root::build(plan, prepared)?;
    let terminal = devices::console(plan, prepared)?;
    root::seal(plan, prepared)?;
    if prepared.container_hooks {
        tell(prepared.sync.as_fd(), Note::MountsMade)?;
        listen(prepared.sync.as_fd(), Word::Go)?;
    }
    root::enter(plan, prepared)?;
    settings(plan, prepared)?;
    let stdio = terminal.as_ref().map_or(prepared.stdio, |terminal| {
        let fd = terminal.as_raw_fd();
        [fd, fd, fd]
    });
    let announce = || match plan.options.gate {
        Gate::Open => Ok(None),
        Gate::Parent => {
            tell(prepared.sync.as_fd(), Note::Created)?;
            listen(prepared.sync.as_fd(), Word::Start)?;
            Ok(None)
        }
        Gate::Listener => {
            identity::set_parent_death_signal(0).at(Step::AnnounceCreated)?;
            let listener = prepared
                .listener
                .as_ref()
                .ok_or_else(|| Failure::new(Step::AnnounceCreated, c"listener", coracle_sys::Errno::EBADF))?;
            // It may wait for long, and whoever made it may have handed down descriptors without knowing.
            let kept =
                [prepared.sync.as_raw_fd(), listener.as_raw_fd(), terminal.as_ref().map_or(-1, AsRawFd::as_raw_fd)];
            coracle_sys::process::close_from(plan.process.first_closed(), kept).at(Step::CloseDescriptors)?;
            tell(prepared.sync.as_fd(), Note::Created)?;
            loop {
                let starter = channel::accept(listener.as_fd()).at(Step::AnnounceCreated)?;
                // Whoever goes away without the word has changed its mind; the next one may say it.
                if listen(starter.as_fd(), Word::Start).is_ok() {
                    return Ok(Some(starter));
                }
            }
        }
    };
    finish(
        &plan.process,
        &mut prepared.program,
        &process::Surroundings {
            stdio,
            has_terminal: terminal.is_some(),
            procfs: prepared.procfs.as_fd(),
            sync: prepared.sync.as_fd(),
        },
        announce,
    )
}

/// A process gets into a new time namespace by joining the one that it has made for its children.
fn enter_new_time(plan: &Plan, procfs: BorrowedFd<'_>) -> Result<(), Failure> {
    namespace::unshare(CLONE_NEWTIME as i32).on(Step::Unshare, c"time")?;
    if let Some(offsets) = &plan.namespaces.time_offsets {
        process::write_procfs(procfs, c"self/timens_offsets", offsets).at(Step::TimeOffsets)?;
    }
    let new = path::openat(procfs, c"self/ns/time_for_children", libc::O_RDONLY, 0).on(Step::OpenNamespace, c"time")?;
    namespace::setns(new.as_fd(), CLONE_NEWTIME as i32).on(Step::JoinNamespace, c"time")
}

fn tell(sync: BorrowedFd<'_>, note: Note) -> Result<(), Failure> {
    channel::send(sync, &Message::note(note).encode(), None).at(Step::Synchronize)
}

/// Names and kernel settings of the new namespaces.
fn settings(plan: &Plan, prepared: &Prepared) -> Result<(), Failure> {
    if let Some(name) = &plan.hostname {
        namespace::set_hostname(name).on(Step::Hostname, name)?;
    }
    if let Some(name) = &plan.domainname {
        namespace::set_domainname(name).on(Step::Domainname, name)?;
    }
    for sysctl in &plan.sysctls {
        process::write_procfs(prepared.procfs.as_fd(), &sysctl.path, &sysctl.value).on(Step::Sysctl, &sysctl.path)?;
    }
    Ok(())
}

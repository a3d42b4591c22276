//! Adding a process to a running container.

use crate::cgroup::Cgroup;
use crate::child::{self, Failure, Message, Program, Surroundings};
use crate::error::{Error, Result, Step, StepResult};
use crate::hooks::{self, StateTemplate};
use crate::plan::{Options, Plan, ProcessPlan};
use crate::spawn::{Init, Stdio, Story, Streams, procfs};
use crate::usher::{OwnPids, usher};
use coracle_sys::process::{self, CloneRequest};
use coracle_sys::{Errno, channel, identity, namespace, path};
use oci_spec::runtime::{Process, Spec};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The container that a process joins.
#[derive(Clone, Copy, Debug)]
pub struct Target<'container> {
    /// Its first process.
    pub pid: i32,
    pub pidfd: BorrowedFd<'container>,
    /// Its specification: which namespaces it has, its seccomp profile, its annotations.
    pub spec: &'container Spec,
    pub bundle: &'container std::path::Path,
}

/// Clones a process into a container and its `cgroup`; the program starts by itself. Follow it with
/// [`Init::wait_running`] or [`Init::advance`]. Where the container's first process has moved below that cgroup, which hands
/// controllers down and so takes no processes, the new one goes where that is.
pub fn spawn(
    target: &Target<'_>,
    process: &Process,
    cgroup: Option<&Cgroup>,
    stdio: Stdio<'_>,
    options: &Options,
) -> Result<Init> {
    match spawn_in(target, process, cgroup, stdio, options) {
        Err(Error::Step { step: Step::Clone, errno: Errno::EBUSY, .. }) if cgroup.is_some() => {
            spawn_in(target, process, Some(&Cgroup::of_process(target.pid)?), stdio, options)
        }
        other => other,
    }
}

/// The same into this cgroup and no other.
pub fn spawn_in(
    target: &Target<'_>,
    process: &Process,
    cgroup: Option<&Cgroup>,
    stdio: Stdio<'_>,
    options: &Options,
) -> Result<Init> {
    let (plan, namespaces) = Plan::compile_process(process, target.spec, options)?;
    let state = StateTemplate {
        version: target.spec.version().clone(),
        id: options.id.clone(),
        bundle: target.bundle.to_path_buf(),
        annotations: target.spec.annotations().clone().unwrap_or_default(),
    };
    let place = Place { pid: target.pid, pidfd: target.pidfd, namespaces: namespaces.own_flags() };
    join(place, &plan, cgroup.map(Cgroup::as_fd), stdio, state)
}

/// The container's process whose namespaces are joined, and which it has apart from the caller.
#[derive(Clone, Copy)]
pub(crate) struct Place<'container> {
    pub pid: i32,
    pub pidfd: BorrowedFd<'container>,
    pub namespaces: u64,
}

/// Clones a process into a container, to run what a plan says.
pub(crate) fn join(
    target: Place<'_>,
    plan: &ProcessPlan,
    cgroup: Option<BorrowedFd<'_>>,
    stdio: Stdio<'_>,
    state: StateTemplate,
) -> Result<Init> {
    let streams = Streams::new(stdio)?;
    let (sync, theirs) = channel::pair().step(Step::Channel, "")?;
    let procfs = procfs()?;
    let all = target.namespaces;
    // Without mounts of its own, a container is in its root by that of its processes alone.
    let root = if all & libc::CLONE_NEWNS as u64 == 0 { Some(hooks::root_of(target.pid)?) } else { None };
    let has_user = all as i32 & libc::CLONE_NEWUSER != 0;
    // A user without privileges may join the other namespaces only from within the user namespace that owns them.
    let through_user = has_user && !nix::unistd::geteuid().is_root();
    let own = if all & libc::CLONE_NEWPID as u64 != 0 && !through_user {
        OwnPids::enter_those_of(target.pidfd)?
    } else {
        OwnPids::stay()
    };
    let early = if through_user { libc::CLONE_NEWUSER | libc::CLONE_NEWPID } else { libc::CLONE_NEWPID };
    let joined = all as i32 & !early;
    let mut program = Program { arguments: plan.arguments.clone(), environment: plan.environment.clone() };
    let parent_end = sync.as_raw_fd();
    let body = || {
        const FAILED: i32 = 1;
        process::close(parent_end);
        let mut work = || -> std::result::Result<(), Failure> {
            let at = |step| move |errno| Failure::new(step, c"", errno);
            if let Some(score) = &plan.oom_score_adj {
                child::write_procfs(procfs.as_fd(), c"self/oom_score_adj", score)
                    .map_err(|errno| Failure::new(Step::OomScore, score, errno))?;
            }
            // The container's own processes can see this one from now on; they shall not look into it.
            identity::set_dumpable(false).map_err(at(Step::JoinNamespace))?;
            identity::set_parent_death_signal(libc::SIGKILL).map_err(at(Step::JoinNamespace))?;
            namespace::setsid().map_err(at(Step::NewSession))?;
            if joined != 0 {
                namespace::setns(target.pidfd, joined).map_err(at(Step::JoinNamespace))?;
            }
            if let Some(root) = &root {
                path::fchdir(root.as_fd()).and_then(|()| path::chroot(c".")).map_err(at(Step::OpenRoot))?;
            }
            if has_user {
                identity::set_gid(0).map_err(at(Step::BecomeRoot))?;
                identity::set_uid(0).map_err(at(Step::BecomeRoot))?;
            }
            if let Some(name) = &plan.keyring {
                match namespace::join_session_keyring(name) {
                    Ok(()) | Err(coracle_sys::Errno::ENOSYS | coracle_sys::Errno::EDQUOT) => {}
                    Err(errno) => return Err(Failure::new(Step::Keyring, name, errno)),
                }
            }
            let terminal = match plan.terminal {
                None => None,
                Some(_) => {
                    let root = path::open(c"/", libc::O_PATH | libc::O_DIRECTORY).map_err(at(Step::OpenRoot))?;
                    Some(child::open_terminal(root.as_fd(), plan, theirs.as_fd())?)
                }
            };
            let stdio = terminal.as_ref().map_or(streams.numbers, |terminal| [terminal.as_raw_fd(); 3]);
            let around =
                Surroundings { stdio, has_terminal: terminal.is_some(), procfs: procfs.as_fd(), sync: theirs.as_fd() };
            child::finish(plan, &mut program, &around, || Ok(None))
        };
        if let Err(failure) = work() {
            // When the parent is gone, nobody is left to be told.
            let _ = channel::send(theirs.as_fd(), &Message::failed(&failure).encode(), None);
        }
        FAILED
    };
    let request = CloneRequest { flags: 0, cgroup };
    let cloned = if through_user {
        let enter = || {
            namespace::setns(target.pidfd, early & all as i32)
                .map_err(|errno| Failure::new(Step::JoinUserNamespace, c"", errno))
        };
        usher(enter, request, body)
    } else {
        process::clone3(request, body).step(Step::Clone, "")
    };
    own.restore()?;
    let child = cloned?;
    drop(theirs);
    let story = Story {
        state,
        listener: plan.seccomp.as_ref().and_then(|filter| filter.listener.clone()),
        starts_itself: true,
        ..Story::default()
    };
    Ok(Init::new(child, sync, story))
}

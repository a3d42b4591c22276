//! Entering namespaces ahead of a clone. Some can be had only by a process whose maker is in them (pid), some only with
//! rights that are gone within a user namespace; and the runtime itself must stay where it is. So a short-lived process,
//! the usher, goes ahead, and clones the wanted one as its own sibling, which makes that one the runtime's child.

use crate::child::{Failure, Message, Note};
use crate::error::{Error, Result, Step, StepResult};
use crate::plan::{Plan, UserNamespace};
use crate::spawn::{failed, receive};
use coracle_sys::process::{self, CLONE_NEWTIME, Child, CloneRequest};
use coracle_sys::{channel, namespace, path};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A namespace file that is open, its `CLONE_NEW*` flag and its name.
type Open = (OwnedFd, i32, CString);

/// Which namespaces are entered when.
pub(crate) struct Entry {
    /// By an usher, in this order.
    pub before: Vec<Open>,
    /// By the new process itself.
    pub later: Vec<(OwnedFd, i32)>,
}

/// Opens the namespaces that a plan joins.
pub(crate) fn entry(plan: &Plan) -> Result<Entry> {
    let open = |path: &CString, flag: i32| Ok((open_namespace(path)?, flag, path.clone()));
    let (mut before, mut later) = (Vec::new(), Vec::new());
    if let Some(path) = &plan.namespaces.joined_time {
        later.push((open_namespace(path)?, CLONE_NEWTIME as i32));
    }
    let privileged = nix::unistd::geteuid().is_root();
    // Within the user namespace only what belongs to it can be entered, by its root; from outside a superuser enters all.
    // Mounts wait until the process needs nothing of the host any more, the cgroup namespace until it is in its cgroup.
    let apart = libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP;
    let ahead =
        |flag: i32| flag == libc::CLONE_NEWPID || (privileged && plan.namespaces.has_user() && flag & apart == 0);
    for join in &plan.namespaces.joined {
        if ahead(join.flag) {
            before.push(open(&join.path, join.flag)?);
        } else {
            later.push((open_namespace(&join.path)?, join.flag));
        }
    }
    if let UserNamespace::Joined(file) = &plan.namespaces.user {
        let user = open(file, libc::CLONE_NEWUSER)?;
        before.insert(if privileged { before.len() } else { 0 }, user);
    }
    Ok(Entry { before, later })
}

/// Clones a process that begins in the given namespaces.
pub(crate) fn clone(before: &[Open], request: CloneRequest<'_>, child: impl FnOnce() -> i32) -> Result<Child> {
    if before.is_empty() {
        return process::clone3(request, child).step(Step::Clone, "");
    }
    let enter = || {
        before.iter().try_for_each(|(file, flag, name)| {
            let step = if *flag == libc::CLONE_NEWUSER { Step::JoinUserNamespace } else { Step::JoinNamespace };
            namespace::setns(file.as_fd(), *flag).map_err(|errno| Failure::new(step, name, errno))
        })
    };
    usher(enter, request, child)
}

/// A process that enters where the caller must not or may not go, and clones another one as its own sibling.
pub(crate) fn usher(
    enter: impl FnOnce() -> std::result::Result<(), Failure>,
    request: CloneRequest<'_>,
    child: impl FnOnce() -> i32,
) -> Result<Child> {
    let (ours, theirs) = channel::pair().step(Step::Channel, "")?;
    let usher = process::clone3(CloneRequest::default(), || {
        let made = enter().and_then(|()| {
            process::clone3_sibling(request, child).map_err(|errno| Failure::new(Step::Clone, c"", errno))
        });
        let message = match made {
            Ok(pid) => Message::pid(pid),
            Err(failure) => Message::failed(&failure),
        };
        i32::from(channel::send(theirs.as_fd(), &message.encode(), None).is_err())
    })
    .step(Step::Clone, "")?;
    let exit = process::wait(usher.pidfd.as_fd(), true).step(Step::Clone, "")?;
    let message = receive(&ours)?.ok_or_else(|| Error::Died(format!("{exit:?}")))?;
    match message.note {
        Note::Pid => {
            let pidfd = process::pidfd_open(message.number).step(Step::Clone, "")?;
            Ok(Child { pid: message.number, pidfd })
        }
        _ => Err(failed(&message)),
    }
}

pub(crate) fn open_namespace(path: &CStr) -> Result<OwnedFd> {
    path::open(path, libc::O_RDONLY).step(Step::OpenNamespace, path.to_string_lossy())
}

/// The caller's own PID namespace for children, kept while another one takes its place.
pub(crate) struct OwnPids(Option<OwnedFd>);

impl OwnPids {
    /// For children in the PID namespace of the process behind a pidfd. No usher: this is how commands are added to a
    /// running container, and there the time of another clone counts.
    pub(crate) fn enter_those_of(pidfd: BorrowedFd<'_>) -> Result<Self> {
        let own = open_namespace(c"/proc/self/ns/pid")?;
        namespace::setns(pidfd, libc::CLONE_NEWPID).step(Step::JoinNamespace, "pid")?;
        Ok(Self(Some(own)))
    }

    pub(crate) fn stay() -> Self {
        Self(None)
    }

    /// Also after a failure: the caller's next process must not land in a container's namespace.
    pub(crate) fn restore(self) -> Result<()> {
        self.0.map_or(Ok(()), |own| {
            namespace::setns(own.as_fd(), libc::CLONE_NEWPID).step(Step::JoinNamespace, "of the runtime itself")
        })
    }
}

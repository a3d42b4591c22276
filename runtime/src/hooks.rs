//! Hooks of the specification, and the state that they and a seccomp agent are told.

use crate::error::{Error, Result, Step, StepResult};
use crate::plan::{Plan, c_path, c_string};
use crate::spawn::Story;
use coracle_sys::process::{self, CloneRequest, StringArray};
use coracle_sys::{channel, namespace, path};
use oci_spec::runtime::{Hook, Hooks};
use std::collections::HashMap;
use std::ffi::CString;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

/// As much of what a failed hook printed is shown.
const SHOWN_BYTES: u64 = 4096;

/// The specification's state of a container, but for what changes.
#[derive(Clone, Debug, Default)]
pub struct StateTemplate {
    pub version: String,
    pub id: String,
    pub bundle: PathBuf,
    pub annotations: HashMap<String, String>,
}

impl StateTemplate {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            version: plan.spec_version.clone(),
            id: plan.options.id.clone(),
            bundle: plan.bundle.clone(),
            annotations: plan.annotations.clone(),
        }
    }

    /// The state as the specification writes it.
    pub fn json(&self, status: &str, pid: i32) -> serde_json::Value {
        let mut state = serde_json::json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
        });
        if pid > 0 {
            state["pid"] = pid.into();
        }
        if !self.annotations.is_empty() {
            state["annotations"] = serde_json::json!(self.annotations);
        }
        state
    }
}

fn prestart(hooks: &Hooks) -> &[Hook] {
    hooks.prestart().as_deref().unwrap_or_default()
}

fn list(hooks: &Option<Vec<Hook>>) -> &[Hook] {
    hooks.as_deref().unwrap_or_default()
}

pub(crate) fn has_runtime_hooks(hooks: &Hooks) -> bool {
    !prestart(hooks).is_empty() || !list(hooks.create_runtime()).is_empty()
}

/// `prestart` and `createRuntime`: after the namespaces are made, in the namespaces of the runtime.
pub(crate) fn run_runtime(story: &Story, pid: i32) -> Result<()> {
    let state = story.state.json("creating", pid);
    run("prestart", prestart(&story.hooks), &state, None)?;
    run("createRuntime", list(story.hooks.create_runtime()), &state, None)
}

/// `createContainer`: when the root is built but not entered, in the container's namespaces.
pub(crate) fn run_create_container(story: &Story, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    let state = story.state.json("creating", pid);
    let place = Some((pidfd, container_namespaces(story.namespaces), pid));
    run("createContainer", list(story.hooks.create_container()), &state, place)
}

/// `startContainer`: before the program, inside the container.
pub(crate) fn run_start_container(story: &Story, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    start_container(&story.hooks, &story.state, pid, pidfd, story.namespaces, &story.environment)
}

/// The same for a container that another process created. A hook that names no environment has the program's, since it
/// is one of the container's own programs.
pub fn start_container(
    hooks: &Hooks,
    state: &StateTemplate,
    pid: i32,
    pidfd: BorrowedFd<'_>,
    namespaces: u64,
    environment: &[CString],
) -> Result<()> {
    let place = Some((pidfd, container_namespaces(namespaces), pid));
    let state = state.json("created", pid);
    let hooks = list(hooks.start_container());
    hooks.iter().try_for_each(|hook| run_one("startContainer", hook, &state, place, Some(environment)))
}

/// `poststart`: after the program was executed.
pub fn poststart(hooks: &Hooks, state: &StateTemplate, pid: i32) -> Result<()> {
    run("poststart", list(hooks.poststart()), &state.json("running", pid), None)
}

/// `poststop`: after the container is deleted. All run; the failures are handed back to be logged.
pub fn poststop(hooks: &Hooks, state: &StateTemplate) -> Vec<Error> {
    let state = state.json("stopped", 0);
    list(hooks.poststop())
        .iter()
        .filter_map(|hook| run("poststop", std::slice::from_ref(hook), &state, None).err())
        .collect()
}

/// Of the container's namespaces, those that a hook enters; its process belongs to the runtime.
fn container_namespaces(all: u64) -> i32 {
    let entered =
        libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    all as i32 & entered
}

fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &serde_json::Value,
    place: Option<(BorrowedFd<'_>, i32, i32)>,
) -> Result<()> {
    hooks.iter().try_for_each(|hook| run_one(kind, hook, state, place, None))
}

fn run_one(
    kind: &'static str,
    hook: &Hook,
    state: &serde_json::Value,
    place: Option<(BorrowedFd<'_>, i32, i32)>,
    environment: Option<&[CString]>,
) -> Result<()> {
    let fail = |reason: String| Error::Hook { kind, path: hook.path().clone(), reason };
    let io = |source: std::io::Error| fail(format!("cannot be run: {source}"));
    let file = c_path("hooks.path", hook.path())?;
    let arguments = match hook.args().as_deref() {
        None | Some([]) => vec![file.clone()],
        Some(arguments) => arguments.iter().map(|text| c_string("hooks.args", text)).collect::<Result<_>>()?,
    };
    let environment = match (hook.env(), environment) {
        (Some(entries), _) => entries.iter().map(|text| c_string("hooks.env", text)).collect::<Result<Vec<_>>>()?,
        (None, Some(own)) => own.to_vec(),
        (None, None) => std::env::vars_os()
            .filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
            .collect(),
    };
    let (arguments, environment) = (StringArray::new(arguments), StringArray::new(environment));
    // A file in memory holds a state of any length without anybody having to write while the hook reads.
    let mut input = memory_file(c"hook-state").map_err(io)?;
    input.write_all(state.to_string().as_bytes()).and_then(|()| input.rewind()).map_err(io)?;
    let mut output = memory_file(c"hook-output").map_err(io)?;
    // Joining a mount namespace leads to its topmost root; the hook belongs to the one that the container sees now.
    let root = match place {
        None => None,
        Some((_, _, pid)) => {
            let name = c_string("pid", &format!("/proc/{pid}/root"))?;
            Some(path::open(&name, libc::O_PATH | libc::O_DIRECTORY).step(Step::OpenRoot, "of the container")?)
        }
    };
    let child = process::clone3(CloneRequest::default(), || {
        const CANNOT_RUN: i32 = 126;
        let entered = place.map_or(Ok(()), |(pidfd, flags, _)| namespace::setns(pidfd, flags)).and_then(|()| {
            root.as_ref().map_or(Ok(()), |root| path::fchdir(root.as_fd()).and_then(|()| path::chroot(c".")))
        });
        let placed = entered
            .and_then(|()| process::dup_onto(input.as_raw_fd(), 0))
            .and_then(|()| process::dup_onto(output.as_raw_fd(), 1))
            .and_then(|()| process::dup_onto(output.as_raw_fd(), 2))
            .and_then(|()| process::reset_signals())
            .and_then(|()| process::close_on_exec_from(3));
        if placed.is_ok() {
            process::execve(&file, &arguments, &environment);
        }
        CANNOT_RUN
    })
    .step(Step::Clone, format!("for hook {}", hook.path().display()))?;
    if let Some(seconds) = hook.timeout() {
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        if !crate::wait_readable(child.pidfd.as_fd(), Some(limit)).map_err(io)? {
            process::pidfd_send_signal(child.pidfd.as_fd(), libc::SIGKILL).step(Step::Clone, "")?;
            process::wait(child.pidfd.as_fd(), true).step(Step::Clone, "")?;
            return Err(fail(format!("did not end within {seconds} s")));
        }
    }
    let exit = process::wait(child.pidfd.as_fd(), true).step(Step::Clone, "")?;
    if exit == Some(process::Exit::Code(0)) {
        return Ok(());
    }
    let mut shown = String::new();
    output.rewind().map_err(io)?;
    let mut bytes = Vec::new();
    output.take(SHOWN_BYTES).read_to_end(&mut bytes).map_err(io)?;
    shown.push_str(String::from_utf8_lossy(&bytes).trim());
    Err(fail(match exit {
        Some(process::Exit::Signal(signal)) => format!("ended by signal {signal}: {shown}"),
        other => format!("ended with status {}: {shown}", other.map_or(-1, process::Exit::code)),
    }))
}

fn memory_file(name: &std::ffi::CStr) -> std::io::Result<std::fs::File> {
    let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    Ok(fd.into())
}

/// Tells a seccomp agent of a new container and gives it the descriptor of notifications, as the specification's
/// "container process state".
pub(crate) fn hand_over_listener(
    state: &StateTemplate,
    status: &str,
    pid: i32,
    (agent, metadata): &(PathBuf, String),
    listener: BorrowedFd<'_>,
) -> Result<()> {
    let message = serde_json::json!({
        "ociVersion": state.version,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": metadata,
        "state": state.json(status, pid),
    });
    let io = |source| Error::Write { path: agent.clone(), source };
    let socket = std::os::unix::net::UnixStream::connect(agent).map_err(io)?;
    channel::send(socket.as_fd(), message.to_string().as_bytes(), Some(listener))
        .step(Step::SeccompListener, agent.display())
}

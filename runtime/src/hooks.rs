//! Hooks of the specification, and the state that they and a seccomp agent are told.

use crate::cgroup::Cgroup;
use crate::error::{Error, Result, Step, StepResult};
use crate::exec;
use crate::plan::{Plan, ProcessPlan, c_path, c_string};
use crate::spawn::{Stdio, Story};
use coracle_sys::process::{self, Child, CloneRequest, StringArray};
use coracle_sys::{channel, namespace, path};
use oci_spec::runtime::{Hook, Hooks};
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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
    run("prestart", prestart(&story.hooks), &state, Place::Runtime)?;
    run("createRuntime", list(story.hooks.create_runtime()), &state, Place::Runtime)
}

/// `createContainer`: when the root is built but not entered, in the container's namespaces.
pub(crate) fn run_create_container(story: &Story, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    let state = story.state.json("creating", pid);
    let place = Place::Namespaces(pid, pidfd, container_namespaces(story.namespaces));
    run("createContainer", list(story.hooks.create_container()), &state, place)
}

/// What makes a hook one of the container's own processes.
#[derive(Debug)]
pub struct Inside {
    process: ProcessPlan,
    namespaces: u64,
    cgroup: Option<OwnedFd>,
}

impl Inside {
    pub fn new(plan: &Plan, cgroup: Option<&Cgroup>) -> Result<Self> {
        let cgroup = cgroup.map(|cgroup| cgroup.as_fd().try_clone_to_owned()).transpose();
        Ok(Self {
            process: plan.process.clone(),
            namespaces: plan.namespace_flags(),
            cgroup: cgroup.map_err(|source| Error::Read { path: "the container's cgroup".into(), source })?,
        })
    }
}

/// `startContainer`: before the program, inside the container and under all that confines the program: its image may have
/// put anything in the hook's place. A hook that names no environment has the program's.
pub fn start_container(
    hooks: &Hooks,
    state: &StateTemplate,
    pid: i32,
    pidfd: BorrowedFd<'_>,
    inside: &Inside,
) -> Result<()> {
    let json = state.json("created", pid);
    run("startContainer", list(hooks.start_container()), &json, Place::Inside(pid, pidfd, inside, state))
}

/// `poststart`: after the program was executed.
pub fn poststart(hooks: &Hooks, state: &StateTemplate, pid: i32) -> Result<()> {
    run("poststart", list(hooks.poststart()), &state.json("running", pid), Place::Runtime)
}

/// `poststop`: after the container is deleted. All run; the failures are handed back to be logged.
pub fn poststop(hooks: &Hooks, state: &StateTemplate) -> Vec<Error> {
    let state = state.json("stopped", 0);
    list(hooks.poststop())
        .iter()
        .enumerate()
        .filter_map(|(index, hook)| run_one(("poststop", index), hook, &state, Place::Runtime).err())
        .collect()
}

/// Of the container's namespaces, those that a hook enters; its process belongs to the runtime.
fn container_namespaces(all: u64) -> i32 {
    let entered =
        libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    all as i32 & entered
}

/// Where a hook runs.
#[derive(Clone, Copy)]
enum Place<'a> {
    Runtime,
    /// With the runtime's rights in these namespaces of a process.
    Namespaces(i32, BorrowedFd<'a>, i32),
    /// As a process of the container.
    Inside(i32, BorrowedFd<'a>, &'a Inside, &'a StateTemplate),
}

fn run(kind: &'static str, hooks: &[Hook], state: &serde_json::Value, place: Place<'_>) -> Result<()> {
    hooks.iter().enumerate().try_for_each(|(index, hook)| run_one((kind, index), hook, state, place))
}

/// The root of a process, as it sees it now.
pub(crate) fn root_of(pid: i32) -> Result<OwnedFd> {
    let name = c_string("pid", &format!("/proc/{pid}/root"))?;
    path::open(&name, libc::O_PATH | libc::O_DIRECTORY).step(Step::OpenRoot, "of the container")
}

fn run_one(
    (kind, index): (&'static str, usize),
    hook: &Hook,
    state: &serde_json::Value,
    place: Place<'_>,
) -> Result<()> {
    let fail = |reason: String| Error::Hook { kind, index, path: hook.path().clone(), reason };
    let io = |source: std::io::Error| fail(format!("cannot be run: {source}"));
    let file = c_path("hooks.path", hook.path())?;
    let strings = |field: &str, listed: &[String]| -> Result<StringArray> {
        Ok(StringArray::new(listed.iter().map(|text| c_string(field, text)).collect::<Result<_>>()?))
    };
    let arguments = match hook.args().as_deref() {
        None | Some([]) => StringArray::new(vec![file.clone()]),
        Some(arguments) => strings("hooks.args", arguments)?,
    };
    let environment = hook.env().as_deref().map(|listed| strings("hooks.env", listed)).transpose()?;
    // A file in memory holds a state of any length without anybody having to write while the hook reads.
    let mut input = memory_file(c"hook-state").map_err(io)?;
    input.write_all(state.to_string().as_bytes()).and_then(|()| input.rewind()).map_err(io)?;
    let mut output = memory_file(c"hook-output").map_err(io)?;
    let streams = Stdio { stdin: input.as_fd(), stdout: output.as_fd(), stderr: output.as_fd() };
    let (joined, made);
    let pidfd = match place {
        Place::Inside(pid, pidfd, inside, state) => {
            let mut process = ProcessPlan {
                arguments,
                candidates: vec![file],
                cwd: c"/".into(),
                terminal: None,
                keyring: None,
                preserve_fds: 0,
                ..inside.process.clone()
            };
            if let Some(environment) = environment {
                (process.environment, process.home) = (environment, None);
            }
            let place = exec::Place { pid, pidfd, namespaces: inside.namespaces };
            let cgroup = inside.cgroup.as_ref().map(AsFd::as_fd);
            joined = exec::join(place, &process, cgroup, streams, state.clone())
                .and_then(|mut init| init.wait_running().map(|()| init))
                .map_err(|error| fail(format!("cannot be run: {error}")))?;
            joined.pidfd()
        }
        Place::Runtime => {
            made = outside(&file, &arguments, environment, streams, None).step(Step::Clone, hook.path().display())?;
            made.pidfd.as_fd()
        }
        Place::Namespaces(pid, pidfd, flags) => {
            // Joining a mount namespace leads to its topmost root; the hook belongs to the one that the container sees now.
            let root = root_of(pid)?;
            let entered = Some((pidfd, flags, root.as_fd()));
            made =
                outside(&file, &arguments, environment, streams, entered).step(Step::Clone, hook.path().display())?;
            made.pidfd.as_fd()
        }
    };
    if let Some(seconds) = hook.timeout() {
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        if !crate::wait_readable(pidfd, Some(limit)).map_err(io)? {
            process::pidfd_send_signal(pidfd, libc::SIGKILL).step(Step::Clone, "")?;
            process::wait(pidfd, true).step(Step::Clone, "")?;
            return Err(fail(format!("did not end within {seconds} s")));
        }
    }
    let exit = process::wait(pidfd, true).step(Step::Clone, "")?;
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

/// A process of the runtime's that becomes the hook, in the namespaces and the root of another one if that is said.
fn outside(
    file: &CStr,
    arguments: &StringArray,
    environment: Option<StringArray>,
    streams: Stdio<'_>,
    entered: Option<(BorrowedFd<'_>, i32, BorrowedFd<'_>)>,
) -> coracle_sys::Result<Child> {
    let environment = environment.unwrap_or_else(|| {
        let own = std::env::vars_os();
        StringArray::new(
            own.filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
                .collect(),
        )
    });
    process::clone3(CloneRequest::default(), || {
        const CANNOT_RUN: i32 = 126;
        let place = |(pidfd, flags, root): (BorrowedFd<'_>, i32, BorrowedFd<'_>)| {
            namespace::setns(pidfd, flags).and_then(|()| path::fchdir(root)).and_then(|()| path::chroot(c"."))
        };
        let placed = entered
            .map_or(Ok(()), place)
            .and_then(|()| process::dup_onto(streams.stdin.as_raw_fd(), 0))
            .and_then(|()| process::dup_onto(streams.stdout.as_raw_fd(), 1))
            .and_then(|()| process::dup_onto(streams.stderr.as_raw_fd(), 2))
            .and_then(|()| process::reset_signals())
            .and_then(|()| process::close_on_exec_from(3));
        if placed.is_ok() {
            process::execve(file, arguments, &environment);
        }
        CANNOT_RUN
    })
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

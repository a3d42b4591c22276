//! `start`, `kill`, `delete`, `pause`, `resume`.

use crate::Context;
use anyhow::{Context as _, Result, anyhow, bail};
use coracle_runtime::state::{Folder, State, Status};
use coracle_runtime::{Cgroup, Error, Options, Plan, hooks, start_waiting};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::{AsFd, AsRawFd};

/// How long a killed container may take to end.
const END_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

fn need(state: &State, folder: &Folder, wanted: Status, what: &'static str) -> Result<()> {
    let status = state.status(folder);
    if status == wanted {
        return Ok(());
    }
    Err(Error::Status { id: state.id.clone(), status: status.to_string(), need: what }.into())
}

pub(crate) fn start(context: &Context) -> Result<i32> {
    let (folder, state) = context.container()?;
    need(&state, &folder, Status::Created, "only a created container can be started")?;
    let pidfd = state.pidfd().ok_or_else(|| anyhow!("the container has just ended"))?;
    let specification = folder.load_spec()?;
    let options = Options { id: state.id.clone(), ..Options::default() };
    let plan = Plan::compile(&specification, &state.bundle, &options)?;
    if plan.hooks().start_container().is_some() {
        let inside = hooks::Inside::new(&plan, state.cgroup().as_ref())?;
        hooks::start_container(plan.hooks(), &state.template(), state.pid, pidfd.as_fd(), &inside)?;
    }
    let place = std::fs::File::open(&folder.path)?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}/start.sock", place.as_raw_fd()).as_str())?;
    let stream = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &address).context("the container does not wait to be started")?;
    let started = start_waiting(stream.as_fd(), &plan, &state.template(), state.pid);
    std::fs::remove_file(folder.start_socket()).context("cannot remove the start socket")?;
    started?;
    if let Err(error) = hooks::poststart(plan.hooks(), &state.template(), state.pid) {
        // The container ends with its hook, as the specification's life cycle goes on with its end.
        coracle_sys::process::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL).context("cannot end the container")?;
        return Err(error.into());
    }
    Ok(0)
}

/// A signal by number or name, with or without `SIG`.
fn signal_number(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let signal: nix::sys::signal::Signal = name.parse().map_err(|_| anyhow!("unknown signal {text:?}"))?;
    Ok(signal as i32)
}

/// In the words by which engines know that a container has ended by itself, which is no failure of theirs.
fn not_running(id: &str) -> anyhow::Error {
    anyhow!("container not running: {id:?} has ended")
}

pub(crate) fn kill(context: &Context) -> Result<i32> {
    // `--all` is accepted wherever it stands.
    let is_flag = |word: &String| ["--all", "-a", "--"].contains(&word.as_str());
    let all = context.flags.has("all") || context.words.iter().any(is_flag);
    let words: Vec<String> = context.words.iter().filter(|word| !is_flag(word)).cloned().collect();
    let id = words.first().ok_or_else(|| anyhow!("the id of a container is missing"))?;
    let folder = Folder::of(&context.root, id)?;
    let state = folder.load()?;
    let signal = signal_number(words.get(1).map_or("TERM", String::as_str))?;
    let status = state.status(&folder);
    let own_pids = folder.load_spec()?.linux().as_ref().is_some_and(|linux| {
        linux.namespaces().iter().flatten().any(|namespace| {
            namespace.typ() == oci_spec::runtime::LinuxNamespaceType::Pid && namespace.path().is_none()
        })
    });
    // Where the first process does not take the others with it, they are a container still when it is gone.
    let outlived = |cgroup: &Cgroup| Ok::<_, Error>(!own_pids && !cgroup.processes()?.is_empty());
    let cgroup = state.cgroup();
    if status == Status::Stopped && !all && !cgroup.as_ref().map_or(Ok(false), outlived)? {
        return Err(not_running(&state.id));
    }
    if all || (!own_pids && signal == libc::SIGKILL) {
        let Some(cgroup) = cgroup else { return Ok(0) };
        if signal == libc::SIGKILL {
            cgroup.kill()?;
        } else {
            for pid in cgroup.processes()? {
                // One that has ended meanwhile needs no signal.
                if let Ok(pidfd) = coracle_sys::process::pidfd_open(pid) {
                    let _ = coracle_sys::process::pidfd_send_signal(pidfd.as_fd(), signal);
                }
            }
        }
        return Ok(0);
    }
    let pidfd = state.pidfd().ok_or_else(|| not_running(&state.id))?;
    coracle_sys::process::pidfd_send_signal(pidfd.as_fd(), signal)
        .with_context(|| format!("cannot send signal {signal} to container {:?}", state.id))?;
    if signal == libc::SIGKILL && status == Status::Paused {
        // Frozen processes die only once they run.
        state.need_cgroup()?.kill()?;
    }
    Ok(0)
}

pub(crate) fn delete(context: &Context) -> Result<i32> {
    let force = context.flags.has("force");
    let (folder, state) = match context.container() {
        Ok(found) => found,
        Err(error) => {
            let folder = context.folder()?;
            if !force {
                return Err(error);
            }
            // What a broken creation left.
            folder.remove()?;
            return Ok(0);
        }
    };
    let status = state.status(&folder);
    if !force && !matches!(status, Status::Stopped | Status::Created) {
        bail!("container {:?} is {status}: stop it first, or use --force", state.id);
    }
    let cgroup = state.cgroup();
    if let Some(pidfd) = state.pidfd() {
        let _ = coracle_sys::process::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
        if let Some(cgroup) = &cgroup {
            cgroup.kill()?;
        }
        if !coracle_runtime::wait_readable(pidfd.as_fd(), Some(END_LIMIT))? {
            bail!("container {:?} does not end", state.id);
        }
    }
    if let Some(cgroup) = &cgroup {
        cgroup.take_down(state.unit.as_deref())?;
    }
    state.clear()?;
    let hooks = folder.load_spec().ok().and_then(|spec| spec.hooks().clone());
    folder.remove()?;
    for error in hooks.iter().flat_map(|hooks| hooks::poststop(hooks, &state.template())) {
        eprintln!("corun: {error}");
    }
    Ok(0)
}

pub(crate) fn freeze(context: &Context, frozen: bool) -> Result<i32> {
    let (folder, state) = context.container()?;
    let status = state.status(&folder);
    let fits = match status {
        Status::Running | Status::Created => frozen,
        Status::Paused => !frozen,
        _ => false,
    };
    if !fits {
        bail!("container {:?} is {status}: it cannot be {}", state.id, if frozen { "paused" } else { "resumed" });
    }
    state.need_cgroup()?.freeze(frozen)?;
    Ok(0)
}

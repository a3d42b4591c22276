//! `exec`.

use crate::{Context, console};
use anyhow::{Context as _, Result, anyhow, bail};
use coracle_runtime::state::Status;
use coracle_runtime::{Cgroup, Options, Stdio, exec, sealed, spec};
use oci_spec::runtime::Process;
use std::os::fd::AsFd;
use std::path::Path;

fn process(context: &Context, specification: &oci_spec::runtime::Spec) -> Result<Process> {
    if let Some(path) = context.flags.value("process") {
        let path = Path::new(path);
        let (process, unknown) = spec::parse_leniently(path, &spec::read_bounded(path)?)?;
        for name in unknown {
            context.warn(&format!("capability {name} is not known and was left out"));
        }
        return Ok(process);
    }
    let base = specification.process().as_ref().ok_or_else(|| anyhow!("the container has no process"))?;
    let arguments = context.words.get(1..).filter(|words| !words.is_empty());
    let arguments = arguments.ok_or_else(|| anyhow!("the command to run is missing"))?;
    let arguments = if arguments[0] == "--" { &arguments[1..] } else { arguments };
    // The specification's types have no way to change one field; its JSON has.
    let mut json = serde_json::to_value(base)?;
    json["args"] = serde_json::json!(arguments);
    json["terminal"] = context.flags.has("tty").into();
    if let Some(cwd) = context.flags.value("cwd") {
        json["cwd"] = cwd.into();
    }
    let mut environment = base.env().clone().unwrap_or_default();
    environment.extend(context.flags.values("env").iter().cloned());
    json["env"] = serde_json::json!(environment);
    if let Some(user) = context.flags.value("user") {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        json["user"]["uid"] = uid.parse::<u32>().with_context(|| format!("--user: {uid:?} is not a user id"))?.into();
        if !gid.is_empty() {
            json["user"]["gid"] =
                gid.parse::<u32>().with_context(|| format!("--user: {gid:?} is not a group id"))?.into();
        }
    }
    let groups = context.flags.values("additional-gids");
    if !groups.is_empty() {
        let groups: Vec<u32> = groups
            .iter()
            .map(|group| group.parse().with_context(|| format!("--additional-gids: {group:?} is not a group id")))
            .collect::<Result<_>>()?;
        json["user"]["additionalGids"] = serde_json::json!(groups);
    }
    for (flag, field) in [("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")] {
        if let Some(value) = context.flags.value(flag) {
            json[field] = value.into();
        }
    }
    if context.flags.has("no-new-privs") {
        json["noNewPrivileges"] = true.into();
    }
    for capability in context.flags.values("cap") {
        // Never inheritable, nor ambient unless the container's own processes may hand it on already: a program without
        // privileges would do so (CVE-2022-29162).
        let number = coracle_runtime::capability::number(capability);
        let inheritable = json["capabilities"]["inheritable"].as_array().is_some_and(|listed| {
            listed
                .iter()
                .filter_map(serde_json::Value::as_str)
                .any(|name| coracle_runtime::capability::number(name) == number)
        });
        let ambient: &[&str] = if inheritable { &["ambient"] } else { &[] };
        for set in ["bounding", "effective", "permitted"].iter().chain(ambient) {
            match json["capabilities"][set].as_array_mut() {
                Some(list) if list.iter().any(|known| known == capability) => {}
                Some(list) => list.push(capability.clone().into()),
                None => json["capabilities"][set] = serde_json::json!([capability]),
            }
        }
    }
    Ok(serde_json::from_value(json)?)
}

pub(crate) fn exec(context: &Context) -> Result<i32> {
    let _own = sealed::ensure()?;
    let (folder, state) = context.container()?;
    match state.status(&folder) {
        Status::Running | Status::Created => {}
        Status::Paused if context.flags.has("ignore-paused") => {}
        Status::Paused => {
            bail!("cannot exec in a paused container: resume {:?} first, or use --ignore-paused", state.id)
        }
        other => bail!("container {:?} is {other}: nothing can be run in it", state.id),
    }
    let pidfd = state.pidfd().ok_or_else(|| anyhow!("container {:?} has just ended", state.id))?;
    let specification = folder.load_spec()?;
    let process = process(context, &specification)?;
    let cgroup = match context.flags.value("cgroup") {
        None => state.cgroup(),
        Some(below) => {
            if Path::new(below).components().any(|part| part == std::path::Component::ParentDir) {
                bail!("bad sub cgroup path {below:?}: it leads out of the container's cgroup");
            }
            state.need_cgroup()?;
            Some(Cgroup::open(&state.cgroup.join(below.trim_start_matches('/')))?)
        }
    };
    let options = Options {
        id: state.id.clone(),
        preserve_fds: context.flags.number("preserve-fds")?.unwrap_or(0),
        plain_line_ends: context.flags.value("console-socket").is_none(),
        ..Options::default()
    };
    let detach = context.flags.has("detach");
    let signals = if detach { None } else { Some(console::take_signals()?) };
    if let Some(group) = &state.resctrl {
        // This command itself, of which the process will be a child: so there is no moment at which it is outside.
        group.take(std::process::id() as i32)?;
    }
    let target = exec::Target { pid: state.pid, pidfd: pidfd.as_fd(), spec: &specification, bundle: &state.bundle };
    let standard = coracle_sys::process::borrow_standard;
    let stdio = Stdio { stdin: standard(0), stdout: standard(1), stderr: standard(2) };
    let spawn = if context.flags.value("cgroup").is_some() { exec::spawn_in } else { exec::spawn };
    let mut init = spawn(&target, &process, cgroup.as_ref(), stdio, &options)?;
    init.wait_running()?;
    context.debug(&format!("process {} was added to container {:?}", init.pid(), state.id));
    if let Some(socket) = context.flags.value("pidfd-socket") {
        console::hand_over_pidfd(Path::new(socket), &init)?;
    }
    let master = match (init.take_console(), context.flags.value("console-socket")) {
        (Some(master), Some(socket)) => {
            console::hand_over(Path::new(socket), &master)?;
            None
        }
        (Some(_), None) if detach => bail!("a detached process with a terminal needs --console-socket"),
        (master, _) => master,
    };
    if let Some(path) = context.flags.value("pid-file") {
        std::fs::write(path, init.pid().to_string()).with_context(|| format!("cannot write {path}"))?;
    }
    let Some(signals) = signals else {
        init.release();
        return Ok(0);
    };
    Ok(console::attend(&mut init, &signals, master)?.code())
}

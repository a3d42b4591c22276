//! `create`, `run`, `spec`.

use crate::{Context, console};
use anyhow::{Context as _, Result, bail};
use coracle_runtime::state::{self, Folder, State};
use coracle_runtime::systemd::{Holder, Scope};
use coracle_runtime::{
    Cgroup, Gate, Given, Init, Options, Plan, Stdio, capability, hooks, resctrl, sealed, spawn_gated, spec,
};
use oci_spec::runtime::Spec;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What a failed start takes down again. Disarmed when the container is there to stay.
struct Undo<'folder> {
    folder: &'folder Folder,
    cgroup: Option<Cgroup>,
    /// The unit of systemd's that has the cgroup.
    unit: Option<String>,
    resctrl: Option<resctrl::Group>,
    /// Where and over which mount a container without a mount namespace mounts on the host.
    mounted: Option<(PathBuf, u64)>,
    armed: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.take_down(self.unit.as_deref())
        {
            eprintln!("corun: {error}");
        }
        let unmounted = self.mounted.as_ref().map_or(Ok(()), |(root, below)| state::unmount_above(root, *below));
        let ungrouped = self.resctrl.as_ref().map_or(Ok(()), resctrl::Group::remove);
        for error in [unmounted, ungrouped, self.folder.remove()].into_iter().filter_map(Result::err) {
            eprintln!("corun: {error}");
        }
    }
}

struct Made<'folder> {
    init: Init,
    undo: Undo<'folder>,
    state: State,
    plan: Plan,
}

fn make<'folder>(
    context: &Context,
    folder: &'folder Folder,
    gate: Gate,
    own_mount: Option<OwnedFd>,
) -> Result<Made<'folder>> {
    let bundle = match context.flags.value("bundle") {
        Some(path) => Path::new(path).canonicalize().with_context(|| format!("no bundle {path:?}"))?,
        None => std::env::current_dir().context("the working directory is gone")?,
    };
    let config = bundle.join("config.json");
    let bytes = spec::read_bounded(&config)?;
    let (mut specification, unknown): (Spec, _) = spec::parse_leniently(&config, &bytes)?;
    for name in unknown {
        context.warn(&format!("capability {name} is not known and was left out"));
    }
    for name in
        capability::left_out(specification.process().as_ref().and_then(|process| process.capabilities().as_ref()))
    {
        context.warn(&format!("can't raise ambient capability {name}: it is not permitted and inheritable, too"));
    }
    let inherited = pass_activation(&mut specification)?;
    let process = specification.process().as_ref();
    let hooked = specification.hooks().as_ref().is_some_and(|hooks| hooks.start_container().is_some());
    let attended = process.is_some_and(|process| process.terminal() == Some(true))
        || context.flags.value("pidfd-socket").is_some();
    let gate = match gate {
        // Nothing is left to do between "set up" and "started": two changes of the process on the processor less.
        Gate::Parent if !hooked && !attended => Gate::Open,
        other => other,
    };
    let options = Options {
        id: folder.id.clone(),
        no_pivot: context.flags.has("no-pivot"),
        no_new_keyring: context.flags.has("no-new-keyring"),
        preserve_fds: context.flags.number("preserve-fds")?.unwrap_or(0) + inherited,
        plain_line_ends: context.flags.value("console-socket").is_none(),
        gate,
    };
    let plan = Plan::compile(&specification, &bundle, &options)?;
    let rootfs = bundle.join(specification.root().as_ref().map_or(Path::new(""), |root| root.path()));
    folder.create(&bytes)?;
    let mut undo = Undo { folder, cgroup: None, unit: None, resctrl: None, mounted: None, armed: true };
    let holder = if context.systemd { Some(scope(&plan, &specification, &mut undo)?) } else { None };
    if holder.is_none() {
        undo.cgroup = cgroup(context, &plan, &folder.id)?;
    }
    if !plan.mounts_apart() {
        undo.mounted = Some((rootfs.clone(), state::mount_id(&rootfs)?));
    }
    undo.resctrl = plan.create_resctrl_group()?;
    let listener = match gate {
        Gate::Open | Gate::Parent => None,
        Gate::Listener => Some(listen(folder)?),
    };
    let standard = coracle_sys::process::borrow_standard;
    let stdio = Stdio { stdin: standard(0), stdout: standard(1), stderr: standard(2) };
    let mut init =
        spawn_gated(&plan, undo.cgroup.as_ref(), stdio, Given { listener, own_mount, resctrl: undo.resctrl.clone() })?;
    drop(holder);
    // Written while the new process sets itself up.
    let state = State {
        oci_version: specification.version().clone(),
        id: folder.id.clone(),
        pid: init.pid(),
        pid_start: state::process_start(init.pid()).map_or(0, |(start, _)| start),
        rootfs,
        bundle,
        created: state::now(),
        owner: owner(),
        cgroup: undo.cgroup.as_ref().map(|cgroup| cgroup.name().to_path_buf()).unwrap_or_default(),
        unit: undo.unit.clone(),
        resctrl: undo.resctrl.clone(),
        mounted_over: undo.mounted.as_ref().map(|(_, below)| *below),
        annotations: specification.annotations().clone().unwrap_or_default(),
    };
    folder.save(&state)?;
    context.debug(&format!("process {} sets itself up in cgroup {}", state.pid, state.cgroup.display()));
    init.wait_created()?;
    context.debug("the container is set up");
    Ok(Made { init, undo, state, plan })
}

/// The name of who calls.
fn owner() -> String {
    let uid = nix::unistd::geteuid();
    // The superuser's needs no database.
    if uid.is_root() {
        return "root".into();
    }
    let entry = |text: String| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_string();
            (fields.nth(1)?.parse() == Ok(uid.as_raw())).then_some(name)
        })
    };
    std::fs::read_to_string("/etc/passwd").ok().and_then(entry).unwrap_or_else(|| format!("#{uid}"))
}

/// Has systemd make the cgroup and sets the limits that it has no words for.
fn scope(plan: &Plan, specification: &Spec, undo: &mut Undo<'_>) -> Result<Holder> {
    let id = &undo.folder.id;
    let scope = Scope::of(plan.cgroups_path(), id)?;
    let (holder, name) = scope.start(id, plan.resources(), specification.annotations().as_ref())?;
    undo.unit = Some(scope.unit().to_owned());
    let cgroup = undo.cgroup.insert(Cgroup::create(&name)?);
    cgroup.apply(plan.resources())?;
    plan.delegate(cgroup)?;
    Ok(holder)
}

/// Makes the cgroup with its limits. An unprivileged user who may not make one does without, unless limits are asked for.
fn cgroup(context: &Context, plan: &Plan, id: &str) -> Result<Option<Cgroup>> {
    let name = cgroup_name(plan, id)?;
    let limits = plan.resources().is_some_and(|resources| !coracle_runtime::cgroup::only_devices(resources));
    let tolerant = match context.rootless {
        Some(wanted) => wanted,
        None => !nix::unistd::geteuid().is_root(),
    };
    let cgroup = match Cgroup::create(&name) {
        Err(coracle_runtime::Error::Cgroup { source, .. })
            if tolerant
                && !limits
                && matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    cgroup.check_free()?;
    let applied = cgroup.apply(plan.resources()).or_else(|error| match error {
        // In a user namespace nothing can be done to devices anyway.
        coracle_runtime::Error::Cgroup { source, .. }
            if tolerant && source.raw_os_error() == Some(libc::EPERM) && !limits =>
        {
            Ok(())
        }
        other => Err(other),
    });
    let applied = applied.and_then(|()| plan.delegate(&cgroup));
    if let Err(error) = applied {
        cgroup.remove()?;
        return Err(error.into());
    }
    Ok(Some(cgroup))
}

/// Sockets of activation (`LISTEN_FDS`) go to the program.
fn pass_activation(specification: &mut Spec) -> Result<u32> {
    let Some(count) = std::env::var("LISTEN_FDS").ok() else { return Ok(0) };
    let count: u32 = count.parse().context("LISTEN_FDS is not a number")?;
    if let Some(process) = specification.process_mut() {
        let mut environment = process.env().clone().unwrap_or_default();
        environment.push(format!("LISTEN_FDS={count}"));
        environment.push("LISTEN_PID=1".into());
        process.set_env(Some(environment));
    }
    Ok(count)
}

fn cgroup_name(plan: &Plan, id: &str) -> Result<PathBuf> {
    match plan.cgroups_path().filter(|path| !path.as_os_str().is_empty()) {
        None => Ok(Path::new("/").join(id)),
        Some(path) if !path.has_root() && path.to_string_lossy().matches(':').count() == 2 => {
            bail!("linux.cgroupsPath {} is meant for systemd: give --systemd-cgroup", path.display())
        }
        Some(path) => Ok(Path::new("/").join(path)),
    }
}

fn listen(folder: &Folder) -> Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    // An address of a socket has little room; the folder's descriptor makes any path short.
    let place = std::fs::File::open(&folder.path).with_context(|| format!("cannot open {}", folder.path.display()))?;
    let name = folder.start_socket();
    let short = format!("/proc/self/fd/{}/start.sock", place.as_raw_fd());
    let listener = socket(&short).with_context(|| format!("cannot listen on {}", name.display()))?;
    Ok(listener)
}

fn socket(path: &str) -> Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(1)?)?;
    Ok(fd)
}

fn write_pid_file(context: &Context, pid: i32) -> Result<()> {
    let Some(path) = context.flags.value("pid-file") else { return Ok(()) };
    let path = Path::new(path);
    let new = path.with_file_name(format!(".{}", path.file_name().unwrap_or_default().to_string_lossy()));
    std::fs::write(&new, pid.to_string())
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Gives the terminal away; what remains is for this process to attend to.
fn terminal(context: &Context, made: &mut Made<'_>, may_attend: bool) -> Result<Option<OwnedFd>> {
    let socket = context.flags.value("console-socket");
    if let Some(socket) = context.flags.value("pidfd-socket") {
        console::hand_over_pidfd(Path::new(socket), &made.init)?;
    }
    match (made.init.take_console(), socket) {
        (Some(master), Some(socket)) => console::hand_over(Path::new(socket), &master).map(|()| None),
        (Some(master), None) if may_attend => Ok(Some(master)),
        (Some(_), None) => bail!("a detached container with a terminal needs --console-socket"),
        (None, Some(_)) => bail!("--console-socket goes with process.terminal only"),
        (None, None) => Ok(None),
    }
}

pub(crate) fn create(context: &Context) -> Result<i32> {
    let own = sealed::ensure()?;
    let folder = context.folder()?;
    let mut made = make(context, &folder, Gate::Listener, own)?;
    terminal(context, &mut made, false)?;
    write_pid_file(context, made.state.pid)?;
    made.undo.armed = false;
    made.init.release();
    Ok(0)
}

pub(crate) fn run(context: &Context) -> Result<i32> {
    let own = sealed::ensure()?;
    let folder = context.folder()?;
    let detach = context.flags.has("detach");
    let signals = if detach { None } else { Some(console::take_signals()?) };
    if !context.flags.has("no-subreaper") && !detach {
        coracle_sys::identity::set_child_subreaper().context("cannot become a subreaper")?;
    }
    let mut made = make(context, &folder, Gate::Parent, own)?;
    let master = terminal(context, &mut made, !detach)?;
    write_pid_file(context, made.state.pid)?;
    if made.plan.starts_by_itself() {
        made.init.wait_running()?;
    } else {
        made.init.start()?;
    }
    hooks::poststart(made.plan.hooks(), &made.state.template(), made.state.pid)?;
    let Some(signals) = signals else {
        made.undo.armed = false;
        made.init.release();
        return Ok(0);
    };
    let exit = console::attend(&mut made.init, &signals, master)?;
    if context.flags.has("keep") {
        made.undo.armed = false;
        return Ok(exit.code());
    }
    made.undo.armed = false;
    if let Some(cgroup) = &made.undo.cgroup {
        // Processes outlive the first one where the container has no PID namespace of its own.
        cgroup.take_down(made.undo.unit.as_deref())?;
    }
    made.state.clear()?;
    folder.remove()?;
    for error in hooks::poststop(made.plan.hooks(), &made.state.template()) {
        eprintln!("corun: {error}");
    }
    Ok(exit.code())
}

/// A specification to begin with: a shell on a terminal, everything else as strict as it gets.
pub(crate) fn spec(context: &Context) -> Result<i32> {
    const CAPABILITIES: [&str; 3] = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let folder = Path::new(context.flags.value("bundle").unwrap_or("."));
    let path = folder.join("config.json");
    if path.exists() {
        bail!("{} exists: remove it first", path.display());
    }
    let mut document = serde_json::to_value(spec::default_container())?;
    document["process"] = serde_json::json!({
        "terminal": true,
        "user": {"uid": 0, "gid": 0},
        "args": ["sh"],
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true,
    });
    document["root"]["readonly"] = true.into();
    document["hostname"] = "corun".into();
    if context.flags.has("rootless") {
        rootless(&mut document);
    }
    std::fs::write(&path, format!("{document:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(0)
}

/// For a user without privileges: a user namespace with the user as its root, the host's network and sysfs.
fn rootless(document: &mut serde_json::Value) {
    let map = |id: u32| serde_json::json!([{"containerID": 0, "hostID": id, "size": 1}]);
    let linux = &mut document["linux"];
    linux["uidMappings"] = map(nix::unistd::geteuid().as_raw());
    linux["gidMappings"] = map(nix::unistd::getegid().as_raw());
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(serde_json::json!({"type": "user"}));
    }
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("resources");
    }
    if let Some(mounts) = document["mounts"].as_array_mut() {
        for mount in mounts {
            if mount["destination"] == "/sys" {
                *mount = serde_json::json!({"destination": "/sys", "type": "none", "source": "/sys",
                    "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
            } else if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "gid=5");
            }
        }
    }
}

//! Cloning a container's first process and following it to the running program.

use crate::cgroup::Cgroup;
use crate::child::{self, Failure, MESSAGE_BYTES, Message, Note, Prepared, Program, Word};
use crate::error::{Error, Result, Step, StepResult};
use crate::hooks;
use crate::idmap::Maps;
use crate::net_device::{self, NetDevice};
use crate::plan::{Gate, IdMap, MountStep, Plan, Source, UserNamespace};
use crate::resctrl;
use crate::resolve;
use crate::usher::{self, open_namespace};
use coracle_sys::mount::{self, Attributes, MOUNT_ATTR_IDMAP};
use coracle_sys::process::{self, CLONE_NEWTIME, Child, CloneRequest, Exit};
use coracle_sys::{Errno, channel, namespace, path};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// The standard streams of a program.
#[derive(Clone, Copy, Debug)]
pub struct Stdio<'fd> {
    pub stdin: BorrowedFd<'fd>,
    pub stdout: BorrowedFd<'fd>,
    pub stderr: BorrowedFd<'fd>,
}

/// How far a new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    SettingUp,
    /// All is set up; it waits for [`Init::send_start`].
    Created,
    /// The program was executed.
    Running,
}

/// A process made by this library, a child of the caller. Dropped before it runs, it is killed and reaped.
#[derive(Debug)]
pub struct Init {
    child: Child,
    sync: OwnedFd,
    stage: Stage,
    started: bool,
    finished: bool,
    /// How it ended, once it was reaped: whoever asks later is told the same.
    ended: Option<Exit>,
    story: Story,
    console: Option<OwnedFd>,
}

/// What the parent needs of the plan while the child sets itself up.
#[derive(Debug, Default)]
pub(crate) struct Story {
    pub id_maps: Option<(String, String)>,
    pub hooks: oci_spec::runtime::Hooks,
    pub state: hooks::StateTemplate,
    pub listener: Option<(std::path::PathBuf, String)>,
    pub net_devices: Vec<NetDevice>,
    pub resctrl: Option<resctrl::Group>,
    pub namespaces: u64,
    /// Id-mapped mounts whose sources come with an earlier one, by their places in the plan, and those sources.
    pub brought: Vec<(usize, MountStep, CString)>,
    /// For `startContainer` hooks.
    pub inside: Option<Box<hooks::Inside>>,
    /// An exec'd process starts without waiting for a word.
    pub starts_itself: bool,
}

/// Clones the container's first process with [`Gate::Parent`].
pub fn spawn(plan: &Plan, cgroup: Option<&Cgroup>, stdio: Stdio<'_>) -> Result<Init> {
    spawn_gated(plan, cgroup, stdio, Given::default())
}

/// Descriptors that some containers need.
#[derive(Debug, Default)]
pub struct Given {
    /// The listening socket of [`Gate::Listener`].
    pub listener: Option<OwnedFd>,
    /// What [`crate::sealed::ensure`] gave.
    pub own_mount: Option<OwnedFd>,
    /// What [`Plan::create_resctrl_group`] gave.
    pub resctrl: Option<resctrl::Group>,
}

/// The same with what a caller of another kind has to give.
pub fn spawn_gated(plan: &Plan, cgroup: Option<&Cgroup>, stdio: Stdio<'_>, given: Given) -> Result<Init> {
    let Given { listener, own_mount, resctrl } = given;
    if plan.resctrl.is_some() != resctrl.is_some() {
        return Err(Error::unsupported("linux.intelRdt", "the caller has made no group for the container"));
    }
    if (plan.options.gate == Gate::Listener) != listener.is_some() {
        return Err(Error::config("gate", "a listener goes with the gate that needs it"));
    }
    let streams = Streams::new(stdio)?;
    let (sync, theirs) = channel::pair().step(Step::Channel, "")?;
    let procfs = procfs()?;
    let entry = usher::entry(plan)?;
    let (root, privileged) = root(plan)?;
    let mut prepared = Prepared {
        sync: theirs,
        parent_sync: sync.as_raw_fd(),
        stdio: streams.numbers,
        root,
        privileged,
        sources: sources(plan, cgroup, privileged)?,
        made: plan.mounts.iter().map(|_| None).collect(),
        nodes: nodes(plan, privileged)?,
        joins: entry.later,
        listener,
        program: Program { arguments: plan.process.arguments.clone(), environment: plan.process.environment.clone() },
        runtime_hooks: hooks::has_runtime_hooks(&plan.hooks)
            || !plan.net_devices.is_empty()
            || resctrl.is_some()
            || (plan.namespaces.has_user() && plan.process.oom_score_adj.is_some()),
        own_mount,
        container_hooks: plan.hooks.create_container().as_ref().is_some_and(|hooks| !hooks.is_empty()),
        procfs,
    };
    let hooked = plan.hooks.start_container().as_ref().is_some_and(|hooks| !hooks.is_empty());
    let inside = if hooked { Some(Box::new(hooks::Inside::new(plan, cgroup)?)) } else { None };
    let flags = plan.namespaces.new & !(libc::CLONE_NEWCGROUP as u64) & !CLONE_NEWTIME;
    let request = CloneRequest { flags, cgroup: cgroup.map(Cgroup::as_fd) };
    let cloned = usher::clone(&entry.before, request, || child::run(plan, &mut prepared))?;
    let id_maps = match &plan.namespaces.user {
        UserNamespace::New { uid_map, gid_map } => Some((uid_map.clone(), gid_map.clone())),
        _ => None,
    };
    let init = Init {
        child: cloned,
        sync,
        stage: Stage::SettingUp,
        started: plan.options.gate == Gate::Open,
        finished: false,
        ended: None,
        console: None,
        story: Story {
            id_maps,
            hooks: plan.hooks.clone(),
            state: hooks::StateTemplate::new(plan),
            listener: plan.process.seccomp.as_ref().and_then(|filter| filter.listener.clone()),
            net_devices: plan.net_devices.clone(),
            resctrl,
            namespaces: plan.namespaces.own_flags(),
            inside,
            brought: plan
                .mounts
                .iter()
                .enumerate()
                .filter(|(_, step)| step.id_map.is_some())
                .filter_map(|(index, step)| {
                    Some((index, step.clone(), step.brought_by(&plan.mounts[..index])?.to_owned()))
                })
                .collect(),
            starts_itself: false,
        },
    };
    if let Some(score) = plan.process.oom_score_adj.as_ref().filter(|_| plan.namespaces.has_user()) {
        set_oom_score(prepared.procfs.as_fd(), init.pid(), score)?;
    }
    Ok(init)
}

/// Says the word to a container that waits behind [`Gate::Listener`], over a connection to its socket, and follows it until
/// its program is executed.
pub fn start_waiting(connection: BorrowedFd<'_>, plan: &Plan, state: &hooks::StateTemplate, pid: i32) -> Result<()> {
    channel::send(connection, &[Word::Start as u8], None).step(Step::Synchronize, "")?;
    loop {
        let mut bytes = [0; MESSAGE_BYTES];
        let (length, fd) = match channel::receive(connection, &mut bytes, true) {
            // The end of the channel is the beginning of the program.
            Ok((0, _)) | Err(Errno::ECONNRESET) => return Ok(()),
            other => other.step(Step::Synchronize, "")?,
        };
        let message =
            Message::decode(&bytes[..length]).ok_or_else(|| Error::Died("it sent an unknown message".into()))?;
        match (message.note, fd, plan.process.seccomp.as_ref().and_then(|filter| filter.listener.as_ref())) {
            (Note::SeccompListener, Some(fd), Some(agent)) => {
                hooks::hand_over_listener(state, "created", pid, agent, fd.as_fd())?;
            }
            _ => return Err(failed(&message)),
        }
    }
}

/// The host's procfs, checked to be one, so that nothing mounted over it can swallow or fake what is written.
pub(crate) fn procfs() -> Result<OwnedFd> {
    const ROOT_INODE: u64 = 1;
    let procfs = path::open(c"/proc", libc::O_PATH | libc::O_DIRECTORY).step(Step::OpenProc, "/proc")?;
    let magic = path::filesystem_magic(procfs.as_fd()).step(Step::OpenProc, "/proc")?;
    let inode = path::stat(procfs.as_fd()).step(Step::OpenProc, "/proc")?.st_ino;
    if magic != path::PROC_SUPER_MAGIC || inode != ROOT_INODE {
        return Err(Error::Step {
            step: Step::OpenProc,
            subject: "/proc (it is not procfs)".into(),
            errno: Errno::ENODEV,
        });
    }
    Ok(procfs)
}

fn set_oom_score(procfs: BorrowedFd<'_>, pid: i32, score: &CStr) -> Result<()> {
    let name = std::ffi::CString::new(format!("{pid}/oom_score_adj")).expect("digits only");
    path::openat2(procfs, &name, libc::O_WRONLY, 0, path::RESOLVE_BENEATH | path::RESOLVE_NO_XDEV)
        .and_then(|file| path::write(file.as_fd(), score.to_bytes()))
        .step(Step::OomScore, score.to_string_lossy())?;
    Ok(())
}

/// The container's root as a detached mount; or, for a caller who may not make one, the folder itself, of which the new
/// process makes one in its own user namespace (then the second answer is false).
fn root(plan: &Plan) -> Result<(OwnedFd, bool)> {
    let name = plan.root.to_string_lossy();
    let folder = path::open(&plan.root, libc::O_PATH | libc::O_DIRECTORY).step(Step::OpenRoot, &name)?;
    match child::root_tree(plan) {
        Err(Errno::EPERM) if matches!(plan.namespaces.user, UserNamespace::New { .. }) => Ok((folder, false)),
        other => Ok((other.step(Step::OpenRoot, &name)?, true)),
    }
}

/// Copies of the bind sources with all attributes set, where the new process could not make them: it may lack the right
/// to reach or change them, and where it looks nothing is shared with the host any more. The others it makes itself, in the
/// order of the mounts.
fn sources(plan: &Plan, cgroup: Option<&Cgroup>, privileged: bool) -> Result<Vec<Option<(OwnedFd, bool)>>> {
    let early = privileged && plan.opens_before_clone();
    let mut trees = Vec::with_capacity(plan.mounts.len());
    for (index, step) in plan.mounts.iter().enumerate() {
        let (tree, name) = match &step.source {
            // Not there before the container has its mounts.
            Source::Bind { .. } if privileged && step.brought_by(&plan.mounts[..index]).is_some() => {
                trees.push(None);
                continue;
            }
            Source::Bind { path, recursive, within_root }
                if early || step.id_map.is_some() || (privileged && within_root.is_none() && step.is_shared()) =>
            {
                let name = path.to_string_lossy().into_owned();
                (mount::clone_tree(None, path, *recursive).step(Step::OpenSource, &name)?, name)
            }
            // Without a cgroup namespace the file system would show the host's whole tree; the container sees its own.
            Source::New { filesystem, .. }
                if privileged
                    && filesystem.as_c_str() == c"cgroup2"
                    && !plan.namespaces.has_own(libc::CLONE_NEWCGROUP) =>
            {
                let Some(cgroup) = cgroup else {
                    trees.push(None);
                    continue;
                };
                let name = cgroup.folder().display().to_string();
                (mount::clone_tree(Some(cgroup.as_fd()), c"", false).step(Step::OpenSource, &name)?, name)
            }
            _ => {
                trees.push(None);
                continue;
            }
        };
        child::apply(step, tree.as_fd()).step(Step::MountAttributes, &name)?;
        if let Some(map) = &step.id_map {
            map_ids(tree.as_fd(), map, &name)?;
        }
        let kind = path::stat(tree.as_fd()).step(Step::OpenSource, &name)?.st_mode & libc::S_IFMT;
        trees.push(Some((tree, kind == libc::S_IFDIR)));
    }
    Ok(trees)
}

/// Gives a detached mount the id map of a user namespace.
fn map_ids(tree: BorrowedFd<'_>, map: &IdMap, name: &str) -> Result<()> {
    give_map(tree, id_map_namespace(map, name)?.as_fd(), map.recursive).step(Step::IdMapMount, name)
}

fn give_map(tree: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> coracle_sys::Result<()> {
    let attributes =
        Attributes { set: MOUNT_ATTR_IDMAP, userns_fd: userns.as_raw_fd() as u64, ..Attributes::default() };
    mount::set_attributes(tree, &attributes, recursive)
}

/// The user namespace whose maps a mount gets: one that exists, or one made for that alone.
fn id_map_namespace(map: &IdMap, name: &str) -> Result<OwnedFd> {
    let (uid_map, gid_map) = match &map.maps {
        Maps::OfNamespace(file) => return open_namespace(file),
        Maps::Listed { uid_map, gid_map } => (uid_map, gid_map),
    };
    let (ours, theirs) = channel::pair().step(Step::Channel, "")?;
    let request = CloneRequest { flags: libc::CLONE_NEWUSER as u64, cgroup: None };
    let holder = process::clone3(request, || {
        process::close(ours.as_raw_fd());
        // Lives until the parent lets go of the channel.
        let _ = channel::receive(theirs.as_fd(), &mut [0], true);
        0
    })
    .step(Step::IdMapMount, name)?;
    drop(theirs);
    let mapped = write_id_maps(holder.pid, uid_map, gid_map).and_then(|()| {
        let file = format!("/proc/{}/ns/user", holder.pid);
        std::fs::File::open(&file).map_err(|source| Error::Read { path: file.into(), source })
    });
    drop(ours);
    process::wait(holder.pidfd.as_fd(), true).step(Step::IdMapMount, name)?;
    Ok(mapped?.into())
}

/// A copy of what an earlier mount has brought into the container's root, its ids mapped: with the runtime's rights, by
/// a process that enters the container's mounts for that alone.
fn brought_source(step: &MountStep, below: &CStr, container: BorrowedFd<'_>) -> Result<OwnedFd> {
    let name = below.to_string_lossy();
    let map = step.id_map.as_ref().map(|map| Ok((id_map_namespace(map, &name)?, map.recursive))).transpose()?;
    let recursive = matches!(step.source, Source::Bind { recursive: true, .. });
    let (ours, theirs) = channel::pair().step(Step::Channel, "")?;
    let helper = process::clone3(CloneRequest::default(), || {
        // One enters at the topmost root, which is the container's by now.
        let tree = namespace::setns(container, libc::CLONE_NEWNS)
            .and_then(|()| path::open(c"/", libc::O_PATH | libc::O_DIRECTORY))
            .and_then(|root| resolve::find(root.as_fd(), below))
            .and_then(|found| mount::clone_tree(Some(found.as_fd()), c"", recursive))
            .and_then(|tree| child::apply(step, tree.as_fd()).map(|()| tree))
            .and_then(|tree| match &map {
                Some((userns, recursive)) => give_map(tree.as_fd(), userns.as_fd(), *recursive).map(|()| tree),
                None => Ok(tree),
            });
        let (message, tree) = match tree {
            Ok(tree) => (Message::note(Note::NeedsSource), Some(tree)),
            Err(errno) => (Message::failed(&Failure::new(Step::OpenSource, below, errno)), None),
        };
        i32::from(channel::send(theirs.as_fd(), &message.encode(), tree.as_ref().map(AsFd::as_fd)).is_err())
    })
    .step(Step::Clone, "")?;
    let exit = process::wait(helper.pidfd.as_fd(), true).step(Step::Clone, "")?;
    let mut bytes = [0; MESSAGE_BYTES];
    let (length, tree) = channel::receive(ours.as_fd(), &mut bytes, false).step(Step::Synchronize, "")?;
    match (tree, Message::decode(&bytes[..length])) {
        (Some(tree), _) => Ok(tree),
        (None, Some(message)) => Err(failed(&message)),
        (None, None) => Err(Error::Died(format!("{exit:?}"))),
    }
}

fn write_id_maps(pid: i32, uid_map: &str, gid_map: &str) -> Result<()> {
    let write = |file: &str, text: &str| {
        let path = std::path::PathBuf::from(format!("/proc/{pid}/{file}"));
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|source| Error::Write { path, source })
    };
    for (file, map, helper) in [("gid_map", gid_map, "newgidmap"), ("uid_map", uid_map, "newuidmap")] {
        match write(file, map) {
            Err(Error::Write { source, .. }) if source.raw_os_error() == Some(libc::EPERM) && !is_root() => {
                // One's own id may be mapped without privilege once groups cannot be dropped any more; what
                // /etc/subuid and /etc/subgid allow beyond that is up to programs made for it.
                if file == "gid_map"
                    && map.lines().count() == 1
                    && write("setgroups", "deny").is_ok()
                    && write(file, map).is_ok()
                {
                    continue;
                }
                help_with_map(helper, pid, map)?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Lets newuidmap(1) or newgidmap(1) write a map.
fn help_with_map(helper: &'static str, pid: i32, map: &str) -> Result<()> {
    let fail = |reason: String| Error::Helper { helper, reason };
    let output = std::process::Command::new(helper)
        .arg(pid.to_string())
        .args(map.split_whitespace())
        .output()
        .map_err(|source| fail(format!("cannot be run ({source}): install the package uidmap")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(fail(String::from_utf8_lossy(&output.stderr).trim().to_string()))
}

/// In a user namespace devices cannot be made, but the host's can be bound.
fn nodes(plan: &Plan, privileged: bool) -> Result<Vec<Option<OwnedFd>>> {
    plan.devices
        .iter()
        .map(|step| {
            if !plan.namespaces.has_user() || !privileged {
                return Ok(None);
            }
            let name = step.path.to_string_lossy();
            mount::clone_tree(None, &step.path, false).step(Step::OpenSource, name).map(Some)
        })
        .collect()
}

pub(crate) fn receive(channel: &OwnedFd) -> Result<Option<Message>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let (length, _) = channel::receive(channel.as_fd(), &mut bytes, false).step(Step::Synchronize, "")?;
    Ok(Message::decode(&bytes[..length]))
}

pub(crate) fn failed(message: &Message) -> Error {
    match Step::from_number(message.step) {
        Some(step) => Error::Setup { step, subject: message.text(), errno: Errno::from_raw(message.number) },
        None => Error::Died(format!("unknown step {}", message.step)),
    }
}

/// Descriptors for the standard streams that do not overwrite each other when they are placed one after the other.
pub(crate) struct Streams {
    pub numbers: [RawFd; 3],
    _copies: Vec<OwnedFd>,
}

impl Streams {
    pub(crate) fn new(stdio: Stdio<'_>) -> Result<Self> {
        let mut copies = Vec::new();
        let mut numbers = [0; 3];
        for (target, fd) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
            numbers[target] = fd.as_raw_fd();
            if numbers[target] <= 2 && numbers[target] != target as RawFd {
                let copy = fd
                    .try_clone_to_owned()
                    .map_err(|source| Error::Read { path: "a standard stream".into(), source })?;
                numbers[target] = copy.as_raw_fd();
                copies.push(copy);
            }
        }
        Ok(Self { numbers, _copies: copies })
    }
}

impl Init {
    pub(crate) fn new(child: Child, sync: OwnedFd, story: Story) -> Self {
        Self {
            child,
            sync,
            stage: Stage::SettingUp,
            started: story.starts_itself,
            finished: false,
            ended: None,
            story,
            console: None,
        }
    }

    /// Its id in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.child.pid
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// Readable when [`Init::advance`] has something to do. A seqpacket socket, fit for poll, epoll and io_uring.
    pub fn sync_fd(&self) -> BorrowedFd<'_> {
        self.sync.as_fd()
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The master side of the program's terminal, once it is set up.
    pub fn take_console(&mut self) -> Option<OwnedFd> {
        self.console.take()
    }

    /// Takes what the process has told, without waiting, and answers it. Blocks only for the hooks of the specification.
    pub fn advance(&mut self) -> Result<Stage> {
        while self.stage != Stage::Running && self.step(false)? {
            if self.stage == Stage::Created && !self.started {
                break;
            }
        }
        Ok(self.stage)
    }

    /// Waits until all is set up. The terminal, if there is one, is there then.
    pub fn wait_created(&mut self) -> Result<()> {
        while self.stage == Stage::SettingUp {
            self.step(true)?;
        }
        Ok(())
    }

    /// Gives the word to start, without waiting for the outcome.
    pub fn send_start(&mut self) -> Result<()> {
        if let Some(inside) = &self.story.inside {
            let Story { hooks, state, .. } = &self.story;
            hooks::start_container(hooks, state, self.child.pid, self.child.pidfd.as_fd(), inside)?;
        }
        self.started = true;
        channel::send(self.sync.as_fd(), &[Word::Start as u8], None).step(Step::Synchronize, "")
    }

    /// Starts the program and waits until it is executed.
    pub fn start(&mut self) -> Result<()> {
        self.send_start()?;
        self.wait_running()
    }

    /// Waits until the program is executed.
    pub fn wait_running(&mut self) -> Result<()> {
        while self.stage != Stage::Running {
            self.step(true)?;
        }
        Ok(())
    }

    /// Waits for its end and reaps it.
    pub fn wait(&mut self) -> Result<Exit> {
        if let Some(exit) = self.ended {
            return Ok(exit);
        }
        let exit = process::wait(self.pidfd(), true).step(Step::Synchronize, "")?;
        (self.finished, self.ended) = (true, exit);
        exit.ok_or_else(|| Error::Died("without a status".into()))
    }

    /// Reaps it if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<Exit>> {
        if self.ended.is_none() {
            self.ended = process::wait(self.pidfd(), false).step(Step::Synchronize, "")?;
            self.finished |= self.ended.is_some();
        }
        Ok(self.ended)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) -> coracle_sys::Result<()> {
        process::pidfd_send_signal(self.pidfd(), signal)
    }

    /// Lets it live on without this handle.
    pub fn release(mut self) {
        self.finished = true;
    }

    /// Handles one message; false when none was there.
    fn step(&mut self, block: bool) -> Result<bool> {
        let mut bytes = [0; MESSAGE_BYTES];
        let (length, fd) = match channel::receive(self.sync.as_fd(), &mut bytes, block) {
            Err(Errno::EAGAIN) if !block => return Ok(false),
            // The other end is closed with messages of ours unread: the same as its end.
            Err(Errno::ECONNRESET) => (0, None),
            other => other.step(Step::Synchronize, "")?,
        };
        if length == 0 {
            return self.closed();
        }
        let message =
            Message::decode(&bytes[..length]).ok_or_else(|| Error::Died("it sent an unknown message".into()))?;
        match message.note {
            Note::NeedsIdMaps => {
                let (uid_map, gid_map) = self.story.id_maps.clone().unwrap_or_default();
                write_id_maps(self.child.pid, &uid_map, &gid_map)?;
                self.go()?;
            }
            Note::NamespacesMade => {
                if !self.story.net_devices.is_empty() {
                    let name = std::ffi::CString::new(format!("/proc/{}/ns/net", self.child.pid))
                        .map_err(|_| Error::config("pid", "is not a number"))?;
                    net_device::move_all(&self.story.net_devices, open_namespace(&name)?.as_fd())?;
                }
                if let Some(group) = &self.story.resctrl {
                    group.take(self.child.pid)?;
                }
                hooks::run_runtime(&self.story, self.child.pid)?;
                self.go()?;
            }
            Note::MountsMade => {
                hooks::run_create_container(&self.story, self.child.pid, self.child.pidfd.as_fd())?;
                self.go()?;
            }
            Note::Created => self.stage = Stage::Created,
            Note::Terminal => self.console = fd,
            Note::SeccompListener => {
                // Not kept: when the agent ends, nobody else may hold calls back that it will never answer.
                if let (Some(fd), Some(agent)) = (fd, &self.story.listener) {
                    let status = if self.story.starts_itself { "running" } else { "creating" };
                    hooks::hand_over_listener(&self.story.state, status, self.child.pid, agent, fd.as_fd())?;
                }
            }
            Note::Failed => {
                let error = failed(&message);
                self.wait()?;
                return Err(error);
            }
            Note::NeedsSource => {
                let asked = usize::try_from(message.number).unwrap_or(usize::MAX);
                let found = self.story.brought.iter().find(|(place, ..)| *place == asked);
                let (_, step, below) = found.ok_or_else(|| Error::Died("it asked for an unknown mount".into()))?;
                let tree = brought_source(step, below, self.child.pidfd.as_fd())?;
                channel::send(self.sync.as_fd(), &[Word::Go as u8], Some(tree.as_fd())).step(Step::Synchronize, "")?;
            }
            // Only an usher says this, and its words were taken before.
            Note::Pid => return Err(Error::Died("it spoke like an usher".into())),
        }
        Ok(true)
    }

    fn go(&self) -> Result<()> {
        channel::send(self.sync.as_fd(), &[Word::Go as u8], None).step(Step::Synchronize, "")
    }

    /// The channel's end: the program was executed, or the process is no more.
    fn closed(&mut self) -> Result<bool> {
        let exit = if self.started { None } else { Some(self.wait()?) };
        match exit {
            None => {
                self.stage = Stage::Running;
                Ok(true)
            }
            Some(exit) => Err(Error::Died(match exit {
                Exit::Code(code) => format!("exit status {code}"),
                Exit::Signal(signal) => format!("signal {signal}"),
            })),
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        if !self.finished && self.stage != Stage::Running {
            // Nothing else can be done about a failure here, and a process that is gone already is no failure.
            let _ = process::pidfd_send_signal(self.pidfd(), libc::SIGKILL);
            let _ = process::wait(self.pidfd(), true);
        }
    }
}

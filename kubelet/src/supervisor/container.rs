//! One container as its parent sees it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_runtime::{Cgroup, Init, Options, Plan, Stdio, spawn};
use coracle_sys::process::{self, Exit};
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use oci_spec::runtime::{LinuxIdMapping, Spec};

use super::frame::Stream;
use super::journal::Journal;
use super::link::Fds;
use super::logfile::LogFile;
use super::protocol::{Create, FdKind, Report};
use super::stream::{Attached, Pump, Sink, Source, Turn};
use crate::cri::{ContainerState, ExitStatus};

/// The first process, as one's own child or as one taken over.
pub enum Process {
    /// Our child.
    Own(Box<Init>),
    /// The child of a supervisor that died.
    Adopted(OwnedFd),
}

/// A container.
pub struct Container {
    /// What is known of it.
    pub report: Report,
    /// Its first process; dropped when it has ended.
    pub process: Option<Process>,
    /// Its cgroup.
    pub cgroup: Option<Cgroup>,
    /// Standard output (or the terminal) and standard error.
    pub sources: [Option<Source>; 2],
    /// Our copy of the write end of its standard input: kept so that a daemon's death is not an end of input.
    pub stdin: Option<OwnedFd>,
    /// Clients that get a copy of the output.
    pub attached: Vec<Attached>,
    /// The request that awaits creation or start.
    pub pending: Option<u64>,
    log: LogFile,
    journal: Journal,
    log_failed: bool,
}

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// In one of our own steps.
    #[error("{step} {}: {source}", path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// In the runtime.
    #[error(transparent)]
    Runtime(#[from] coracle_runtime::Error),
    /// `config.json` is not a specification.
    #[error("{}: {message}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

fn step<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { step, path: path.to_owned(), source }
}

/// Reads the OCI specification of a bundle.
///
/// # Errors
/// When there is none.
pub fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let bytes = fs::read(&path).map_err(step("read", &path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Spec { path, message: e.to_string() })
}

/// The options that every container and exec of this node is made with.
pub fn options(create: &Create) -> Options {
    Options { id: create.id.to_string(), ..Options::default() }
}

impl Container {
    /// Clones the container's first process, which sets itself up and then waits.
    ///
    /// # Errors
    /// The step that failed; nothing is left of the container then.
    pub fn create(create: Create) -> Result<Self, Error> {
        let spec = read_spec(&create.bundle)?;
        let plan = Plan::compile(&spec, &create.bundle, &options(&create))?;
        let log = LogFile::open(&create.log_path, create.log_limits).map_err(step("open log", &create.log_path))?;
        let journal_path = create.bundle.join("journal");
        let journal = Journal::open(&journal_path).map_err(step("open journal", &journal_path))?;
        let cgroup = Cgroup::create(&create.cgroup)?;
        let spawned = (|| {
            cgroup.apply(spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()))?;
            spawn_with_pipes(&plan, &cgroup, &create, owner(&spec, spec.process().as_ref()))
        })();
        let Spawned { init, sources, stdin } = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                // The first error is the one to tell.
                if let Err(second) = cgroup.remove() {
                    tracing::warn!(container = %create.id, error = %second, "cgroup of a failed container stays");
                }
                return Err(error);
            }
        };
        let pid = init.pid();
        let report = Report {
            start_ticks: start_ticks(pid).unwrap_or(0),
            create,
            pid,
            state: ContainerState::Created,
            created_at: now(),
            started_at: 0,
            exit: None,
        };
        Ok(Self {
            report,
            process: Some(Process::Own(Box::new(init))),
            cgroup: Some(cgroup),
            sources,
            stdin,
            attached: Vec::new(),
            pending: None,
            log,
            journal,
            log_failed: false,
        })
    }

    /// Takes over a container whose supervisor died, and what that one had on its way to the log.
    ///
    /// # Errors
    /// When log or journal cannot be opened.
    pub fn take_over(report: Report, mut fds: Fds, pump: &mut Pump) -> Result<Self, Error> {
        let create = &report.create;
        let mut log = LogFile::open(&create.log_path, create.log_limits).map_err(step("open log", &create.log_path))?;
        let journal_path = create.bundle.join("journal");
        let journal = Journal::open(&journal_path).map_err(step("open journal", &journal_path))?;
        let mut sources = match fds.take(FdKind::Terminal) {
            Some(terminal) => [Some(Source::terminal(terminal)), None],
            None => [
                fds.take(FdKind::Stdout).map(|fd| Source::pipe(fd, Stream::Stdout)),
                fds.take(FdKind::Stderr).map(|fd| Source::pipe(fd, Stream::Stderr)),
            ],
        };
        for source in sources.iter_mut().flatten() {
            pump.recover(source, &mut log, &journal).map_err(step("recover log", &create.log_path))?;
        }
        Ok(Self {
            process: fds.take(FdKind::Pidfd).map(Process::Adopted),
            cgroup: Cgroup::open(&create.cgroup).ok(),
            sources,
            stdin: fds.take(FdKind::Stdin),
            attached: Vec::new(),
            pending: None,
            log,
            journal,
            log_failed: false,
            report,
        })
    }

    /// The descriptor that tells the end of the first process.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match self.process.as_ref()? {
            Process::Own(init) => Some(init.pidfd()),
            Process::Adopted(pidfd) => Some(pidfd.as_fd()),
        }
    }

    /// All descriptors that outlive a supervisor.
    pub fn descriptors(&self) -> (Vec<FdKind>, Vec<BorrowedFd<'_>>) {
        let mut list: Vec<(FdKind, BorrowedFd<'_>)> = Vec::new();
        list.extend(self.pidfd().map(|fd| (FdKind::Pidfd, fd)));
        for (source, kind) in self.sources.iter().zip([FdKind::Stdout, FdKind::Stderr]) {
            if let Some(source) = source {
                list.push((if source.is_terminal() { FdKind::Terminal } else { kind }, source.as_fd()));
            }
        }
        list.extend(self.stdin.as_ref().map(|fd| (FdKind::Stdin, fd.as_fd())));
        list.into_iter().unzip()
    }

    /// Moves the output that is there; `Err` text when lines were lost for the first time since the log last worked.
    ///
    /// # Errors
    /// When the pipe fails; the source is then closed.
    pub fn pump(&mut self, index: usize, pump: &mut Pump) -> (Turn, Option<String>) {
        let Some(source) = self.sources[index].as_mut() else { return (Turn::Ended, None) };
        let mut lost = None;
        let mut sink =
            Sink { log: &mut self.log, journal: &self.journal, attached: &mut self.attached, lost: &mut lost };
        let turn = match pump.turn(source, &mut sink) {
            Ok(turn) => turn,
            Err(error) => {
                lost = Some(error);
                Turn::Ended
            }
        };
        if turn == Turn::Ended {
            self.sources[index] = None;
            if self.sources.iter().all(Option::is_none) {
                self.attached.clear();
            }
        }
        let first = lost.is_some() && !self.log_failed;
        self.log_failed = lost.is_some();
        (turn, lost.filter(|_| first).map(|e| e.to_string()))
    }

    /// Looks for the end of the first process; `None`: it still runs, or its parent has to say how it ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        let exit = match self.process.as_mut()? {
            Process::Own(init) => init.try_wait().ok().flatten()?,
            Process::Adopted(pidfd) => match process::wait(pidfd.as_fd(), false) {
                Ok(exit) => exit?,
                Err(_) => coracle_sys::pidfd::exit_info(pidfd.as_fd()).ok().flatten()?,
            },
        };
        Some(self.exit_status(exit))
    }

    /// The status of this exit, with what the cgroup says about it.
    pub fn exit_status(&self, exit: Exit) -> ExitStatus {
        let signal = match exit {
            Exit::Signal(signal) => Some(signal),
            Exit::Code(_) => None,
        };
        ExitStatus {
            code: exit.code(),
            signal,
            oom_killed: oom_kills(&self.report.create.cgroup) > 0,
            finished_at: now(),
        }
    }

    /// Writes `state.json`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> io::Result<()> {
        let folder = &self.report.create.bundle;
        let (new, path) = (folder.join("state.json.new"), folder.join("state.json"));
        fs::write(&new, serde_json::to_vec(&self.report)?)?;
        fs::rename(new, path)
    }

    /// Opens the log anew.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn reopen_log(&mut self) -> io::Result<()> {
        self.log.reopen()
    }
}

struct Spawned {
    init: Init,
    sources: [Option<Source>; 2],
    stdin: Option<OwnedFd>,
}

/// Who owns a program's standard streams, in ids of the host: whoever it runs as, for it may open `/dev/stdout` anew.
pub fn owner(spec: &Spec, process: Option<&oci_spec::runtime::Process>) -> (Uid, Gid) {
    let linux = spec.linux().as_ref();
    let outside = |id: u32, maps: Option<&Vec<LinuxIdMapping>>| {
        let inside = |map: &&LinuxIdMapping| (map.container_id()..map.container_id() + map.size()).contains(&id);
        maps.and_then(|maps| maps.iter().find(inside)).map_or(id, |map| map.host_id() + (id - map.container_id()))
    };
    let (uid, gid) = process.map_or((0, 0), |process| (process.user().uid(), process.user().gid()));
    let uid = outside(uid, linux.and_then(|linux| linux.uid_mappings().as_ref()));
    (Uid::from_raw(uid), Gid::from_raw(outside(gid, linux.and_then(|linux| linux.gid_mappings().as_ref()))))
}

fn spawn_with_pipes(plan: &Plan, cgroup: &Cgroup, create: &Create, (uid, gid): (Uid, Gid)) -> Result<Spawned, Error> {
    let null_path = Path::new("/dev/null");
    let null = File::options().read(true).write(true).open(null_path).map_err(step("open", null_path))?;
    if create.stdio.tty {
        // The terminal is the container's own; its master comes when the container is created.
        let stdio = Stdio { stdin: null.as_fd(), stdout: null.as_fd(), stderr: null.as_fd() };
        let init = spawn(plan, Some(cgroup), stdio)?;
        return Ok(Spawned { init, sources: [None, None], stdin: None });
    }
    let pipe = || {
        // Both ends are one file.
        let made = pipe2(OFlag::O_CLOEXEC).and_then(|ends| fchown(&ends.0, Some(uid), Some(gid)).map(|()| ends));
        made.map_err(|e| step("make a pipe for", &create.bundle)(e.into()))
    };
    let (stdout, stderr) = (pipe()?, pipe()?);
    let stdin = if create.stdio.stdin { Some(pipe()?) } else { None };
    let stdio = Stdio {
        stdin: stdin.as_ref().map_or(null.as_fd(), |(read, _)| read.as_fd()),
        stdout: stdout.1.as_fd(),
        stderr: stderr.1.as_fd(),
    };
    let init = spawn(plan, Some(cgroup), stdio)?;
    Ok(Spawned {
        init,
        sources: [Some(Source::pipe(stdout.0, Stream::Stdout)), Some(Source::pipe(stderr.0, Stream::Stderr))],
        stdin: stdin.map(|(_, write)| write),
    })
}

/// Unix nanoseconds now.
pub fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (`proc(5)`).
pub fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is in brackets and may hold blanks.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// `oom_kill` of a cgroup's `memory.events`; 0 where the host has no memory controller.
fn oom_kills(cgroup: &Path) -> u64 {
    let events = fs::read_to_string(crate::cgroups::mount_point().join(relative(cgroup)).join("memory.events"));
    let events = events.unwrap_or_default();
    events.lines().find_map(|l| l.strip_prefix("oom_kill ")).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

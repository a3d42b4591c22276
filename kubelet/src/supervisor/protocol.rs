//! What daemon and supervisor say to each other: one JSON value a seqpacket message, with descriptors beside it.
//!
//! The daemon asks, the supervisor answers each request once and tells events in between. Whoever of the two is new asks for
//! (or hands over) everything that the other holds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::logfile::Limits;
use crate::cri::{ContainerState, ExitStatus, StdioMode};
use crate::names::ContainerId;

/// Most bytes of one message; well below the kernel's default socket buffer. Long things (a process to execute) go through a
/// memory file.
pub const MESSAGE_LIMIT_BYTES: usize = 32 << 10;

/// What a descriptor beside a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FdKind {
    /// The process.
    Pidfd,
    /// Read end of standard output (container) or write end (exec, attach).
    Stdout,
    /// The same of standard error.
    Stderr,
    /// Write end of standard input (container) or read end (exec).
    Stdin,
    /// Master of the terminal.
    Terminal,
    /// A memory file with an OCI `process` as JSON.
    Process,
}

/// One request.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the daemon, repeated in the answer.
    pub id: u64,
    /// What is wanted.
    pub verb: Verb,
    /// What the descriptors beside it are, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<FdKind>,
}

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum Verb {
    /// Tell everything: one [`Message::Container`] each, then the answer.
    Hello,
    /// Create a container from the bundle in its folder.
    Create(Box<Create>),
    /// Let its program start.
    Start(ContainerId),
    /// Send a signal to its first process, or to every process of its cgroup.
    Kill {
        /// Which container.
        container: ContainerId,
        /// Signal number.
        signal: i32,
        /// Every process.
        all: bool,
    },
    /// Run a program in it; descriptors: `Process`, then the wanted ones of `Stdin`, `Stdout`, `Stderr`.
    Exec {
        /// Which container.
        container: ContainerId,
        /// Name of this exec in [`Event::ExecExited`].
        exec: u64,
        /// Whether it gets a terminal (its master comes with the answer).
        tty: bool,
    },
    /// Copy the output to these descriptors from now on.
    Attach(ContainerId),
    /// Close the standard input.
    CloseStdin(ContainerId),
    /// Open the log anew.
    ReopenLog(ContainerId),
    /// Forget an ended container; its exit has been noted.
    Forget(ContainerId),
    /// Take a container over from a supervisor that died; descriptors: all of its.
    TakeOver(Box<Report>),
    /// A container that this supervisor is not the parent of has ended in this way.
    Reaped {
        /// Which container.
        container: ContainerId,
        /// How; `None` if nobody knows.
        exit: Option<ExitStatus>,
    },
    /// End this supervisor when it holds no container.
    Quit,
}

/// A container to create.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Create {
    /// Its id.
    pub id: ContainerId,
    /// Folder with `config.json`; the supervisor keeps its own state there too.
    pub bundle: PathBuf,
    /// Log file.
    pub log_path: PathBuf,
    /// Rotation of the log.
    pub log_limits: Limits,
    /// Streams.
    pub stdio: StdioMode,
    /// The container's cgroup as an absolute path, for OOM counts and for killing it whole.
    pub cgroup: PathBuf,
}

/// What is known of a container; also what `state.json` in its folder holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What it was created with.
    pub create: Create,
    /// Process id on the host.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: tells this process from a later one of the same id.
    pub start_ticks: u64,
    /// State.
    pub state: ContainerState,
    /// Unix nanoseconds.
    pub created_at: i64,
    /// Unix nanoseconds; 0: not yet.
    pub started_at: i64,
    /// How it ended.
    pub exit: Option<ExitStatus>,
}

/// What the supervisor sends.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The answer to a request.
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Answer, Failure>,
        /// What the descriptors beside it are.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        fds: Vec<FdKind>,
    },
    /// A container that the supervisor holds, with all of its descriptors.
    Container {
        /// What it is.
        report: Box<Report>,
        /// What the descriptors are.
        fds: Vec<FdKind>,
    },
    /// Something happened.
    Event(Event),
}

/// A request that was carried out.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// The container is created.
    Created(Box<Report>),
    /// Its program was started at this time (Unix nanoseconds).
    Started(i64),
    /// The exec runs under this process id.
    Executing(i32),
}

/// A request that was not.
#[derive(Debug, Serialize, Deserialize)]
pub enum Failure {
    /// No such container.
    NotFound,
    /// The container is in this state.
    WrongState(ContainerState),
    /// Setting it up failed.
    Create(String),
    /// The program could not be started.
    Start(String),
    /// Something else.
    Other(String),
}

/// What is told unasked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// A container ended; its log is complete.
    Exited(ContainerId, ExitStatus),
    /// An exec ended.
    ExecExited(u64, ExitStatus),
    /// The OOM killer struck in a container.
    Oom(ContainerId),
    /// Lines of a container could not be written to its log; they are lost.
    LogLost(ContainerId, String),
}

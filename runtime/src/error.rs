//! What can go wrong, one variant per failed step.

use coracle_sys::Errno;
use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

/// Why a container could not be planned, made, or managed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts the specification or itself.
    #[error("invalid configuration: {field}: {reason}")]
    Config { field: String, reason: String },
    /// The configuration asks for something that this host or runtime does not have.
    #[error("{field} is not supported: {reason}")]
    Unsupported { field: String, reason: String },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid JSON: {source}")]
    Json { path: PathBuf, source: serde_json::Error },
    /// A step of making a container failed, in the runtime itself.
    #[error("cannot {step}{}: {}{}", subject_text(subject), errno.desc(), step.advice(*errno))]
    Step { step: Step, subject: String, errno: Errno },
    /// A step of making a container failed in the new process, before the program started.
    #[error("container set-up: cannot {step}{}: {}{}", subject_text(subject), errno.desc(), step.advice(*errno))]
    Setup { step: Step, subject: String, errno: Errno },
    /// The new process ended before it said that it was ready.
    #[error("the container's first process ended during set-up ({0})")]
    Died(String),
    #[error("cgroup controller {controller} is not available for {file}: {advice}")]
    Controller { controller: String, file: PathBuf, advice: String },
    #[error("cannot {action} cgroup {path}: {source}")]
    Cgroup { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot {action} unit {unit} of systemd: {reason}")]
    Systemd { action: &'static str, unit: String, reason: String },
    /// A program that maps ids for unprivileged users failed.
    #[error("{helper}: {reason}")]
    Helper { helper: &'static str, reason: String },
    /// Hooks of a kind are counted from nought.
    #[error("error running {kind} hook #{index}: {path} {reason}")]
    Hook { kind: &'static str, index: usize, path: PathBuf, reason: String },
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    #[error("container {0:?} already exists: choose another id or delete it")]
    Exists(String),
    #[error("container {id:?} is {status}: {need}")]
    Status { id: String, status: String, need: &'static str },
}

impl Error {
    pub(crate) fn config(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Config { field: field.into(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.to_string() }
    }
}

fn subject_text(subject: &str) -> String {
    if subject.is_empty() { String::new() } else { format!(" {subject}") }
}

/// Attaches a step and what it worked on to a bare errno.
pub(crate) trait StepResult<T> {
    fn step(self, step: Step, subject: impl std::fmt::Display) -> Result<T>;
}

/// Whether a test wants this step to fail after it was done: `CORUN_FAIL_STEP` holds its number. Debug builds only.
pub(crate) fn injected(step: Step) -> bool {
    static WANTED: std::sync::OnceLock<Option<u16>> = std::sync::OnceLock::new();
    // Read by the parent at its first step; the new process finds it there.
    cfg!(debug_assertions)
        && *WANTED.get_or_init(|| std::env::var("CORUN_FAIL_STEP").ok()?.parse().ok()) == Some(step as u16)
}

impl<T> StepResult<T> for coracle_sys::Result<T> {
    fn step(self, step: Step, subject: impl std::fmt::Display) -> Result<T> {
        if injected(step) {
            return Err(Error::Step { step, subject: subject.to_string(), errno: Errno::EIO });
        }
        self.map_err(|errno| Error::Step { step, subject: subject.to_string(), errno })
    }
}

macro_rules! steps {
    ($($name:ident = $text:literal),+ $(,)?) => {
        /// One thing that is done on the way to a running program. The number travels from the new process.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Step { $(#[doc = $text] $name),+ }

        impl Step {
            /// Every step, in the order of their numbers; failure injection walks through it.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            fn text(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }
        }
    };
}

steps! {
    Channel = "make the channel to the new process",
    OpenProc = "open procfs at",
    OpenNamespace = "open namespace",
    OpenSource = "open mount source",
    IdMapMount = "map the ids of mount source",
    TimeOffsets = "set the offsets of the time namespace",
    Clone = "clone the container's first process",
    JoinUserNamespace = "join user namespace",
    WriteIdMap = "write the id map",
    Synchronize = "hear from the runtime",
    BecomeRoot = "become root of the user namespace",
    NewSession = "start a session",
    JoinNamespace = "join namespace",
    Unshare = "unshare namespaces",
    Keyring = "join session keyring",
    RootPropagation = "set the propagation of the root mount",
    AttachRoot = "attach the root file system",
    OpenRoot = "open the root file system",
    Resolve = "resolve in the root file system",
    RefuseTarget = "mount over",
    MakeFilesystem = "make file system",
    MountOption = "set mount option",
    MountAttributes = "set mount attributes of",
    AttachMount = "attach mount at",
    CopyUp = "copy up into tmpfs at",
    MakeDevice = "make device",
    MakeLink = "make link",
    Terminal = "make a terminal",
    MaskPath = "mask",
    ReadonlyPath = "make read-only",
    Pivot = "pivot into the root file system",
    DetachOld = "detach the old root",
    Hostname = "set the host name",
    Domainname = "set the domain name",
    Sysctl = "set sysctl",
    Loopback = "bring up interface",
    NetDevice = "move network interface",
    OomScore = "set oom_score_adj to",
    Rlimit = "set rlimit",
    Scheduler = "set the scheduler",
    IoPriority = "set the I/O priority",
    Affinity = "set the processor affinity",
    MemoryPolicy = "set the memory policy",
    Personality = "set the personality",
    StandardStreams = "place the standard streams",
    Umask = "set the umask",
    SecurityLabel = "set security label",
    WorkingDirectory = "change to working directory",
    WorkingDirectoryOutside = "use a working directory outside the container's root:",
    BoundingSet = "limit the capability bounding set",
    Groups = "set the groups",
    Identity = "become user",
    Capabilities = "set the capabilities",
    NoNewPrivileges = "set no_new_privs",
    Signals = "reset signals",
    CloseDescriptors = "close inherited descriptors",
    Seccomp = "install the seccomp filter",
    SeccompListener = "hand over the seccomp listener",
    FindProgram = "find executable",
    Execute = "execute",
    SelfExecution = "execute the runtime itself as",
    AnnounceCreated = "announce the created container",
}

impl std::fmt::Display for Step {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.text())
    }
}

impl Step {
    pub(crate) fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// What to do about it, where that is known.
    fn advice(self, errno: Errno) -> &'static str {
        match (self, errno) {
            (Self::Clone, Errno::EPERM) => " (root or a user namespace is needed)",
            (Self::Clone, Errno::ENOSPC) => " (raise user.max_*_namespaces)",
            (Self::Clone, Errno::EAGAIN) => " (a limit on processes is reached)",
            (Self::Clone, Errno::EINVAL) => " (Linux 6.1 or newer with all namespaces is needed)",
            (Self::IdMapMount, Errno::EINVAL) => {
                " (its file system cannot be id-mapped on this kernel: ext4, xfs and btrfs can, tmpfs from Linux 6.3 on, overlayfs and NFS cannot)"
            }
            (Self::OomScore, Errno::EACCES) => " (lowering it needs CAP_SYS_RESOURCE)",
            (Self::Rlimit, Errno::EPERM) => " (raising a hard limit needs CAP_SYS_RESOURCE)",
            (Self::FindProgram, Errno::ENOENT) => " (not in the container's PATH)",
            (Self::Resolve, Errno::ELOOP) => " (proc and sysfs must be mounted on ordinary directory)",
            (Self::RefuseTarget, _) => " (only a proc file system belongs there)",
            _ => "",
        }
    }
}

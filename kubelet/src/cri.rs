//! The verbs by which pods become processes, in the shape of the CRI v1 `RuntimeService`.
//!
//! Source: `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`. Field names are that file's; fields that nothing here uses are left
//! out. Identifiers are [`ContainerId`]s. Times are Unix nanoseconds, sizes bytes. The trait has two implementations:
//! `native` on the kernel, and a simulated one in the pod workers' tests.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::names::{ContainerId, PodKey};

/// Why a verb was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No such container or sandbox.
    #[error("{kind} {id} not found")]
    NotFound {
        /// `container` or `sandbox`.
        kind: &'static str,
        /// The id asked for.
        id: ContainerId,
    },
    /// The container is not in the state that the verb needs.
    #[error("container {id} is {state:?}, not {wanted}")]
    WrongState {
        /// The container.
        id: ContainerId,
        /// Its state.
        state: ContainerState,
        /// What would be needed.
        wanted: &'static str,
    },
    /// The request asks for something that does not make sense or that this host cannot do.
    #[error("{0}")]
    Invalid(String),
    /// A command did not end in time; it was killed.
    #[error("command {command:?} timed out after {timeout:?}")]
    DeadlineExceeded {
        /// The command.
        command: Vec<String>,
        /// Its limit.
        timeout: Duration,
    },
    /// Creating the container's process failed; the text is what a person needs.
    #[error("failed to create containerd task: {0}")]
    Create(String),
    /// The program could not be started in the container (exit code 126 or 127 of a shell).
    #[error("{0}")]
    Start(String),
    /// The pod's network could not be set up or taken down.
    #[error("network of pod {pod}: {message}")]
    Network {
        /// Whose.
        pod: PodKey,
        /// Why.
        message: String,
    },
    /// The supervisor process did not answer.
    #[error("supervisor: {0}")]
    Supervisor(String),
    /// A system call failed on the way.
    #[error("{step}{}: {source}", .path.as_ref().map(|p| format!(" {}", p.display())).unwrap_or_default())]
    Io {
        /// What was being done.
        step: &'static str,
        /// With which file.
        path: Option<PathBuf>,
        /// The errno.
        source: std::io::Error,
    },
}

impl RuntimeError {
    /// An `Io` error of one step on one path.
    pub fn io(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { step, path: Some(path), source }
    }
}

/// Result of a verb.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// `NamespaceMode` of CRI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceMode {
    /// Shared by the containers of a pod.
    #[default]
    Pod,
    /// A namespace of each container.
    Container,
    /// The node's own.
    Node,
}

/// A range of a user namespace's map: ids `container..container + size` are `host..` outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside.
    pub container_id: u32,
    /// First id outside.
    pub host_id: u32,
    /// How many.
    pub length: u32,
}

/// `PodSandboxConfig`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// UID, namespace and name.
    pub pod: Option<PodKey>,
    /// How many sandboxes this pod had before.
    pub attempt: u32,
    /// Host name inside; empty with host network.
    pub hostname: String,
    /// Folder of the pod's logs.
    pub log_directory: PathBuf,
    /// Text of resolv.conf.
    pub resolv_conf: String,
    /// Ports to open on the node.
    pub port_mappings: Vec<PortMapping>,
    /// Labels for `list`.
    pub labels: BTreeMap<String, String>,
    /// Annotations, among them bandwidth limits.
    pub annotations: BTreeMap<String, String>,
    /// The pod's cgroup, relative to the cgroup2 mount.
    pub cgroup_parent: PathBuf,
    /// Sysctls set in the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Network namespace: `Pod` or `Node`.
    pub network: NamespaceMode,
    /// PID namespace: `Container`, `Pod` (shareProcessNamespace) or `Node`.
    pub pid: NamespaceMode,
    /// IPC namespace: `Pod` or `Node`.
    pub ipc: NamespaceMode,
    /// UID and GID maps; empty with the host's user namespace.
    pub id_mappings: Vec<IdMapping>,
    /// `runtimeClass` handler; empty for the default one.
    pub runtime_handler: String,
    /// Limits of the pod as a whole.
    #[serde(default)]
    pub resources: Resources,
}

/// A host port that leads to a container port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Inside.
    pub container_port: u16,
    /// On the node.
    pub host_port: u16,
    /// Address on the node; all when absent.
    pub host_ip: Option<IpAddr>,
}

/// `PodSandboxStatus`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// Its id.
    pub id: ContainerId,
    /// What it was asked for with.
    pub config: SandboxConfig,
    /// Whether its namespaces exist.
    pub ready: bool,
    /// When it was made, Unix nanoseconds.
    pub created_at: i64,
    /// The pod's addresses, the first one preferred; none with host network.
    pub ips: Vec<IpAddr>,
    /// Path of the pinned network namespace; none with host network. Port-forwards and probes connect from within it.
    pub network_namespace: Option<PathBuf>,
}

/// `MountPropagation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// `None`: private.
    #[default]
    Private,
    /// Mounts of the host show inside (`rslave`).
    HostToContainer,
    /// And the other way (`rshared`).
    Bidirectional,
}

/// One mount into a container. What volumes hand to the runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path inside.
    pub container_path: PathBuf,
    /// Absolute path outside; already resolved, sub-paths included.
    pub host_path: PathBuf,
    /// Read-only.
    pub readonly: bool,
    /// Read-only for every mount below as well.
    pub recursive_read_only: bool,
    /// Propagation between host and container.
    pub propagation: Propagation,
    /// Whether it is mapped to the pod's user namespace (idmapped mount).
    pub id_mapped: bool,
    /// The files of this image, read-only, instead of those at `host_path`.
    pub image: Option<ImageMount>,
}

/// An image as the source of a mount (KEP-4639).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMount {
    /// The image as the pod names it.
    pub image: String,
    /// The image as resolved by the image store: its id.
    pub image_id: String,
    /// The folder or file of the image that is mounted; empty: all of it.
    pub sub_path: PathBuf,
}

/// A device file made in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Path inside.
    pub container_path: PathBuf,
    /// Path outside.
    pub host_path: PathBuf,
    /// Some of `rwm`.
    pub permissions: String,
}

/// `SecurityProfile` of seccomp or AppArmor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecurityProfile {
    /// The runtime's own default.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A file (seccomp) or a loaded profile's name (AppArmor).
    Localhost(String),
}

/// `LinuxContainerSecurityContext`, resolved: no field is optional any more.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SecurityContext {
    /// UID of the process; resolved against the image's passwd when it is a name.
    pub run_as_user: Option<u32>,
    /// User name, when no UID is known (the image's `User`).
    pub run_as_username: String,
    /// GID of the process.
    pub run_as_group: Option<u32>,
    /// Groups besides.
    pub supplemental_groups: Vec<u32>,
    /// Whether the image's group file adds groups (`Merge`) or not (`Strict`).
    pub supplemental_groups_strict: bool,
    /// All capabilities, all devices, no masks.
    pub privileged: bool,
    /// Capabilities added to the default ones, without `CAP_`; `ALL` means every one.
    pub add_capabilities: Vec<String>,
    /// Capabilities taken away.
    pub drop_capabilities: Vec<String>,
    /// Root file system read-only.
    pub readonly_rootfs: bool,
    /// Set-uid programs gain nothing.
    pub no_new_privs: bool,
    /// System call filter.
    pub seccomp: SecurityProfile,
    /// AppArmor profile.
    pub apparmor: SecurityProfile,
    /// `procMount: Unmasked`.
    pub unmasked_proc: bool,
    /// Paths that nothing can be read from, instead of the usual ones.
    pub masked_paths: Option<Vec<String>>,
    /// Paths that nothing can be written to, instead of the usual ones.
    pub readonly_paths: Option<Vec<String>>,
}

/// `LinuxContainerResources`; zero means not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Requests of CPU as cgroup v1 shares (2..=262144); the runtime converts to a weight.
    pub cpu_shares: u64,
    /// Microseconds of CPU a period; -1 = unlimited.
    pub cpu_quota: i64,
    /// The period in microseconds.
    pub cpu_period: u64,
    /// `memory.max` in bytes; -1 = unlimited.
    pub memory_limit_in_bytes: i64,
    /// `oom_score_adj` of the process.
    pub oom_score_adj: i32,
    /// Further files of cgroup v2, e.g. `memory.high`.
    pub unified: BTreeMap<String, String>,
    /// Page size (`2Mi`) to bytes.
    pub hugepage_limits: BTreeMap<String, u64>,
    /// Memory and swap together in bytes, as cgroup v1 counts; 0 = not set, -1 = unlimited.
    pub memory_swap_limit_in_bytes: i64,
    /// CPUs that may be used, as a list such as `0-3,7`; empty: all.
    pub cpuset_cpus: String,
    /// Memory nodes that may be used; empty: all.
    pub cpuset_mems: String,
}

/// How a container's standard streams are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioMode {
    /// Standard input is a pipe (or the terminal) kept open; otherwise `/dev/null`.
    pub stdin: bool,
    /// Standard input closes when the first attached client leaves.
    pub stdin_once: bool,
    /// All three are one terminal.
    pub tty: bool,
}

/// `ContainerConfig`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Name in the pod.
    pub name: String,
    /// How many incarnations came before.
    pub attempt: u32,
    /// The image as resolved by the image store: its id.
    pub image_id: String,
    /// The image as the pod names it.
    pub image: String,
    /// Entry point; empty: the image's.
    pub command: Vec<String>,
    /// Arguments; empty: the image's, unless `command` is set.
    pub args: Vec<String>,
    /// Working directory; empty: the image's.
    pub working_dir: String,
    /// Environment in order, besides the image's.
    pub envs: Vec<(String, String)>,
    /// Mounts in order.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Devices by their CDI names, `vendor/class=device`.
    #[serde(default)]
    pub cdi_devices: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Absolute path of the log file.
    pub log_path: PathBuf,
    /// Streams.
    pub stdio: StdioMode,
    /// Security.
    pub security: SecurityContext,
    /// Limits.
    pub resources: Resources,
    /// Signal that asks the process to end, e.g. `SIGTERM`; empty: the image's.
    pub stop_signal: String,
    /// Shares the PID namespace of this container (`targetContainerName` of an ephemeral container).
    pub pid_target: Option<ContainerId>,
    /// Has a PID namespace of its own although the sandbox shares one.
    pub pid_own: bool,
}

/// `ContainerState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Set up, the program not yet started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Exited,
    /// Its process is gone and nobody saw how it ended.
    Unknown,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// The signal, if one ended it.
    pub signal: Option<i32>,
    /// Whether the kernel's OOM killer struck in the container's cgroup.
    pub oom_killed: bool,
    /// Unix nanoseconds.
    pub finished_at: i64,
}

/// `ContainerStatus`.
#[derive(Clone, Debug)]
pub struct ContainerStatus {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox: ContainerId,
    /// The pod.
    pub pod: PodKey,
    /// What it was created with.
    pub config: ContainerConfig,
    /// State.
    pub state: ContainerState,
    /// Process id on the host, while there is one.
    pub pid: Option<i32>,
    /// Unix nanoseconds.
    pub created_at: i64,
    /// Unix nanoseconds; 0 when never started.
    pub started_at: i64,
    /// How it ended.
    pub exit: Option<ExitStatus>,
    /// Why starting failed, when it did.
    pub message: String,
    /// Who its first process runs as.
    pub user: ContainerUser,
}

/// `LinuxContainerUser`: ids of a first process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Groups besides.
    pub supplemental_groups: Vec<u32>,
}

/// Something happened to a container (`ContainerEventResponse`).
#[derive(Clone, Debug)]
pub enum ContainerEvent {
    /// It ended.
    Stopped {
        /// Which.
        id: ContainerId,
        /// Of which pod.
        pod: PodKey,
        /// How.
        exit: ExitStatus,
    },
    /// The OOM killer struck in it.
    Oom {
        /// Which.
        id: ContainerId,
        /// Of which pod.
        pod: PodKey,
    },
}

/// A program to run in a container, with its streams.
#[derive(Clone, Debug, Default)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// With a terminal: stdin, stdout are it, stderr is not used.
    pub tty: bool,
    /// Which streams are wanted.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// The caller's ends of a running exec or attach. Closing `stdin` is the end of input.
#[derive(Debug, Default)]
pub struct Streams {
    /// Write end of standard input.
    pub stdin: Option<OwnedFd>,
    /// Read end of standard output.
    pub stdout: Option<OwnedFd>,
    /// Read end of standard error.
    pub stderr: Option<OwnedFd>,
    /// The terminal's master instead of the three; [`coracle_sys`] has the ioctl that sets its size.
    pub terminal: Option<OwnedFd>,
}

/// A program running in a container.
#[derive(Debug)]
pub struct ExecSession {
    /// Its streams.
    pub streams: Streams,
    /// Becomes its exit status; an error when the supervisor was lost before it ended.
    pub exit: tokio::sync::oneshot::Receiver<ExitStatus>,
    /// Its process id on the host; killing it ends the session.
    pub pid: i32,
}

/// What [`ContainerRuntime::exec_sync`] collected.
#[derive(Clone, Debug)]
pub struct ExecOutput {
    /// Standard output, cut at [`EXEC_SYNC_OUTPUT_LIMIT_BYTES`].
    pub stdout: Vec<u8>,
    /// Standard error, likewise.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub exit_code: i32,
}

/// Output of one `exec_sync` that is kept; CRI names 16 MiB.
pub const EXEC_SYNC_OUTPUT_LIMIT_BYTES: usize = 16 << 20;

/// `ContainerStats`, read from the cgroup.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// When they were read, Unix nanoseconds.
    pub timestamp: i64,
    /// CPU time in nanoseconds since the start.
    pub cpu_usage_ns: u64,
    /// Bytes charged; `None` where the host has no memory controller.
    pub memory_usage_bytes: Option<u64>,
    /// Usage minus inactive file pages.
    pub memory_working_set_bytes: Option<u64>,
    /// Anonymous memory.
    pub memory_rss_bytes: Option<u64>,
    /// Page faults.
    pub page_faults: Option<u64>,
    /// Major page faults.
    pub major_page_faults: Option<u64>,
    /// Processes.
    pub pids: Option<u64>,
    /// Bytes of the writable layer; `None` for a pod.
    pub writable_layer_bytes: Option<u64>,
    /// Inodes of the writable layer.
    pub writable_layer_inodes: Option<u64>,
}

/// The `RuntimeService`.
#[async_trait]
pub trait ContainerRuntime: Send + Sync + 'static {
    /// Makes a pod's namespaces, network and cgroup. Doing it twice gives the same sandbox.
    async fn run_pod_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus>;
    /// Stops every container of a sandbox at once and takes its network down. Idempotent.
    async fn stop_pod_sandbox(&self, id: &ContainerId) -> Result<()>;
    /// Removes a sandbox with its containers. Idempotent.
    async fn remove_pod_sandbox(&self, id: &ContainerId) -> Result<()>;
    /// All sandboxes.
    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>>;
    /// Those of one pod.
    async fn sandboxes_of(&self, uid: &str) -> Result<Vec<SandboxStatus>> {
        let mut all = self.list_pod_sandboxes().await?;
        all.retain(|sandbox| sandbox.config.pod.as_ref().is_some_and(|pod| pod.uid == uid));
        Ok(all)
    }
    /// One sandbox.
    async fn pod_sandbox_status(&self, id: &ContainerId) -> Result<SandboxStatus>;

    /// Sets a container up to the point where its program could start.
    async fn create_container(&self, sandbox: &ContainerId, config: ContainerConfig) -> Result<ContainerId>;
    /// Starts the program.
    async fn start_container(&self, id: &ContainerId) -> Result<()>;
    /// Sends the stop signal, waits `timeout`, then kills; returns when the container has ended. Idempotent.
    async fn stop_container(&self, id: &ContainerId, timeout: Duration) -> Result<()>;
    /// Removes an ended container with its root file system and its exit record; kills a running one. Idempotent.
    async fn remove_container(&self, id: &ContainerId) -> Result<()>;
    /// All containers.
    async fn list_containers(&self) -> Result<Vec<ContainerStatus>>;
    /// Those of one pod.
    async fn containers_of(&self, uid: &str) -> Result<Vec<ContainerStatus>> {
        let mut all = self.list_containers().await?;
        all.retain(|container| container.pod.uid == uid);
        Ok(all)
    }
    /// One container.
    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus>;
    /// Changes limits in place.
    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()>;
    /// Changes the pod cgroup's limits in place.
    async fn update_pod_sandbox_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()>;
    /// Opens the log file anew (after something else moved it).
    async fn reopen_container_log(&self, id: &ContainerId) -> Result<()>;

    /// Runs a program and collects its output.
    async fn exec_sync(&self, id: &ContainerId, command: &[String], timeout: Option<Duration>) -> Result<ExecOutput>;
    /// Runs a program with streams.
    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecSession>;
    /// Joins a container's own streams; output from now on.
    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Streams>;
    /// Ends a container's standard input (`stdinOnce`, after its first client has left).
    async fn close_stdin(&self, id: &ContainerId) -> Result<()>;

    /// Usage of a container.
    async fn container_stats(&self, id: &ContainerId) -> Result<Stats>;
    /// Usage of a pod.
    async fn pod_sandbox_stats(&self, id: &ContainerId) -> Result<Stats>;
    /// What happens from now on. A receiver that lags must list.
    fn events(&self) -> broadcast::Receiver<ContainerEvent>;
}

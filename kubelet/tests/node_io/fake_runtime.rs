//! A runtime whose containers are ordinary processes of the host: enough for streams and logs.

use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use coracle_kubelet::cri::*;
use coracle_kubelet::server::NodeState;
use coracle_kubelet::{ContainerId, PodKey};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::broadcast;

pub(crate) struct FakeRuntime {
    pub(crate) containers: Mutex<Vec<ContainerStatus>>,
    pub(crate) events: broadcast::Sender<ContainerEvent>,
    pub(crate) sandbox: Mutex<Option<SandboxStatus>>,
}

pub(crate) struct FakeNode(pub(crate) Arc<FakeRuntime>);

impl NodeState for FakeNode {
    fn pods(&self) -> Vec<Arc<Pod>> {
        let pod = serde_json::json!({
            "metadata": { "name": "web", "namespace": "ns", "uid": "u" }, "spec": { "containers": [{ "name": "waiting" }] },
        });
        vec![Arc::new(serde_json::from_value(pod).expect("pod"))]
    }
    fn runtime(&self) -> Arc<dyn ContainerRuntime> {
        self.0.clone()
    }
    fn configz(&self) -> serde_json::Value {
        serde_json::json!({ "kubeletconfig": {} })
    }
}

pub(crate) fn key() -> PodKey {
    PodKey { uid: "u".into(), namespace: "ns".into(), name: "web".into() }
}

impl FakeRuntime {
    /// With one running container `c`, and before it one that has ended.
    pub(crate) fn new(log: &std::path::Path) -> Arc<Self> {
        let container = |attempt: u32, state| ContainerStatus {
            id: ContainerId::derive("u", "c", attempt),
            sandbox: ContainerId::derive("u", "", 0),
            pod: key(),
            config: ContainerConfig {
                name: "c".into(),
                attempt,
                log_path: log.join(format!("{attempt}.log")),
                ..ContainerConfig::default()
            },
            state,
            pid: None,
            created_at: i64::from(attempt),
            started_at: 1,
            exit: None,
            message: String::new(),
            user: Default::default(),
        };
        let sandbox = SandboxStatus {
            id: ContainerId::derive("u", "", 0),
            config: SandboxConfig { pod: Some(key()), network: NamespaceMode::Node, ..SandboxConfig::default() },
            ready: true,
            created_at: 1,
            ips: Vec::new(),
            network_namespace: None,
        };
        Arc::new(Self {
            containers: Mutex::new(vec![container(0, ContainerState::Exited), container(1, ContainerState::Running)]),
            events: broadcast::channel(16).0,
            sandbox: Mutex::new(Some(sandbox)),
        })
    }

    /// Ends the running container.
    pub(crate) fn stop(&self) {
        let mut containers = self.containers.lock().expect("lock");
        containers[1].state = ContainerState::Exited;
        let exit = ExitStatus { code: 0, signal: None, oom_killed: false, finished_at: 1 };
        // Nobody may be listening.
        let _heard = self.events.send(ContainerEvent::Stopped { id: containers[1].id.clone(), pod: key(), exit });
    }
}

fn unused<T>() -> Result<T> {
    Err(RuntimeError::Invalid("not in this test".into()))
}

#[async_trait]
impl ContainerRuntime for FakeRuntime {
    async fn run_pod_sandbox(&self, _: SandboxConfig) -> Result<SandboxStatus> {
        unused()
    }
    async fn stop_pod_sandbox(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn remove_pod_sandbox(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>> {
        Ok(self.sandbox.lock().expect("lock").clone().into_iter().collect())
    }
    async fn pod_sandbox_status(&self, _: &ContainerId) -> Result<SandboxStatus> {
        unused()
    }
    async fn create_container(&self, _: &ContainerId, _: ContainerConfig) -> Result<ContainerId> {
        unused()
    }
    async fn start_container(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn stop_container(&self, _: &ContainerId, _: Duration) -> Result<()> {
        unused()
    }
    async fn remove_container(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn list_containers(&self) -> Result<Vec<ContainerStatus>> {
        Ok(self.containers.lock().expect("lock").clone())
    }
    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        let found = self.containers.lock().expect("lock").iter().find(|container| container.id == *id).cloned();
        found.ok_or_else(|| RuntimeError::NotFound { kind: "container", id: id.clone() })
    }
    async fn update_container_resources(&self, _: &ContainerId, _: &Resources) -> Result<()> {
        unused()
    }
    async fn update_pod_sandbox_resources(&self, _: &ContainerId, _: &Resources) -> Result<()> {
        unused()
    }
    async fn reopen_container_log(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn exec_sync(&self, _: &ContainerId, _: &[String], _: Option<Duration>) -> Result<ExecOutput> {
        unused()
    }

    async fn exec(&self, _: &ContainerId, request: ExecRequest) -> Result<ExecSession> {
        let mut command = Command::new(&request.command[0]);
        command.args(&request.command[1..]);
        let mut streams = Streams::default();
        if request.tty {
            let pty = nix::pty::openpty(None, None).expect("pty");
            let side = || Stdio::from(pty.slave.try_clone().expect("dup"));
            command.stdin(side()).stdout(side()).stderr(side());
            streams.terminal = Some(pty.master);
        } else {
            command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(if request.stdout { Stdio::piped() } else { Stdio::null() });
            command.stderr(if request.stderr { Stdio::piped() } else { Stdio::null() });
        }
        command.process_group(0);
        let mut child = command.spawn().map_err(|error| RuntimeError::Start(error.to_string()))?;
        streams.stdin = child.stdin.take().map(OwnedFd::from);
        streams.stdout = child.stdout.take().map(OwnedFd::from);
        streams.stderr = child.stderr.take().map(OwnedFd::from);
        let pid = i32::try_from(child.id()).expect("pid");
        let (sender, exit) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let status = child.wait().expect("wait");
            drop(command);
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            // The session may be gone.
            let _told = sender.send(ExitStatus { code, signal: status.signal(), oom_killed: false, finished_at: 1 });
        });
        Ok(ExecSession { streams, exit, pid })
    }

    async fn attach(&self, _: &ContainerId, _: bool) -> Result<Streams> {
        unused()
    }
    async fn close_stdin(&self, _: &ContainerId) -> Result<()> {
        unused()
    }
    async fn container_stats(&self, _: &ContainerId) -> Result<Stats> {
        Ok(Stats {
            timestamp: 1,
            cpu_usage_ns: 2_000_000_000,
            memory_working_set_bytes: Some(4096),
            ..Stats::default()
        })
    }
    async fn pod_sandbox_stats(&self, _: &ContainerId) -> Result<Stats> {
        Ok(Stats { timestamp: 1, cpu_usage_ns: 3_000_000_000, ..Stats::default() })
    }
    fn events(&self) -> broadcast::Receiver<ContainerEvent> {
        self.events.subscribe()
    }
}

//! The container verbs on the kernel itself.
//!
//! State lies in the run folder, one folder per sandbox and container, written before the kernel is asked, so that a daemon
//! started anew finds everything. Blocking steps (mounts, files) run on tokio's blocking threads.

pub mod cdi;
mod container;
mod exec;
pub(crate) mod idmap;
mod init;
pub mod namespaces;
pub mod network;
mod sandbox;
pub use sandbox::HANDLERS;
pub mod spec;
pub mod user;

pub(crate) use container::signal_number;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::cgroups::Hierarchy;
use crate::cri::{
    ContainerConfig, ContainerEvent, ContainerRuntime, ContainerStatus, ExecOutput, ExecRequest, ExecSession,
    Resources, Result, RuntimeError, SandboxConfig, SandboxStatus, Stats, Streams,
};
use crate::images::ImageStore;
use crate::metrics::Metrics;
use crate::names::{ContainerId, Layout};
use crate::supervisor::client::{Client, ClientError};
use crate::supervisor::logfile::Limits;
use crate::supervisor::protocol::{Event, Failure};
use network::PodNetworks;

/// Events that a slow reader may lag behind before it has to list.
const EVENT_QUEUE: usize = 4096;

/// The runtime of this node.
#[derive(Clone)]
pub struct Native {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    log_limits: Limits,
    supervisor: Client,
    images: Arc<ImageStore>,
    network: Arc<dyn PodNetworks>,
    cgroups: Hierarchy,
    metrics: Arc<Metrics>,
    sandboxes: Mutex<HashMap<ContainerId, Arc<SandboxStatus>>>,
    containers: Mutex<HashMap<ContainerId, Arc<container::Record>>>,
    events: broadcast::Sender<ContainerEvent>,
}

impl Native {
    /// A runtime over a running supervisor; finds the sandboxes and containers that exist.
    ///
    /// # Errors
    /// When the state on disk cannot be read.
    pub fn new(
        layout: Layout,
        log_limits: Limits,
        supervisor: Client,
        images: Arc<ImageStore>,
        network: Arc<dyn PodNetworks>,
        cgroups: Hierarchy,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let sandboxes = sandbox::read_all(&layout)?;
        let containers = container::read_all(&layout)?;
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let inner = Inner {
            layout,
            log_limits,
            supervisor,
            images,
            network,
            cgroups,
            metrics,
            sandboxes: Mutex::new(sandboxes),
            containers: Mutex::new(containers),
            events,
        };
        let this = Self { inner: Arc::new(inner) };
        tokio::spawn(this.clone().forward_events(this.inner.supervisor.events()));
        Ok(this)
    }

    /// The supervisor beneath.
    pub fn supervisor(&self) -> &Client {
        &self.inner.supervisor
    }

    async fn forward_events(self, mut events: broadcast::Receiver<Event>) {
        loop {
            match events.recv().await {
                Ok(event) => self.forward(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "container events were missed; workers list");
                    for report in self.inner.supervisor.reports() {
                        if let Some(exit) = report.exit {
                            self.forward(Event::Exited(report.create.id, exit));
                        }
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    fn forward(&self, event: Event) {
        let pod = |id: &ContainerId| self.inner.containers.lock().get(id).map(|record| record.pod.clone());
        let event = match event {
            Event::Exited(id, exit) => pod(&id).map(|pod| ContainerEvent::Stopped { id, pod, exit }),
            Event::Oom(id) => pod(&id).map(|pod| ContainerEvent::Oom { id, pod }),
            Event::ExecExited(..) | Event::LogLost(..) => None,
        };
        if let Some(event) = event {
            // Nobody listening is no error.
            drop(self.inner.events.send(event));
        }
    }
}

/// Runs blocking work and gives its result back.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| RuntimeError::Invalid(format!("blocking work failed: {e}")))?
}

fn refused(id: &ContainerId, wanted: &'static str) -> impl FnOnce(ClientError) -> RuntimeError {
    let id = id.clone();
    move |error| match error {
        ClientError::Refused(Failure::NotFound) => RuntimeError::NotFound { kind: "container", id },
        ClientError::Refused(Failure::WrongState(state)) => RuntimeError::WrongState { id, state, wanted },
        ClientError::Refused(Failure::Create(text)) => RuntimeError::Create(text),
        ClientError::Refused(Failure::Start(text)) => RuntimeError::Start(text),
        ClientError::Refused(Failure::Other(text)) => RuntimeError::Supervisor(text),
        other => RuntimeError::Supervisor(other.to_string()),
    }
}

#[async_trait]
impl ContainerRuntime for Native {
    async fn run_pod_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        self.inner.metrics.operation("run_podsandbox", self.run_sandbox(config)).await
    }

    async fn stop_pod_sandbox(&self, id: &ContainerId) -> Result<()> {
        self.inner.metrics.operation("stop_podsandbox", self.stop_sandbox(id)).await
    }

    async fn remove_pod_sandbox(&self, id: &ContainerId) -> Result<()> {
        self.inner.metrics.operation("remove_podsandbox", self.remove_sandbox(id)).await
    }

    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>> {
        let all: Vec<_> = self.inner.sandboxes.lock().values().cloned().collect();
        Ok(all.iter().map(|sandbox| self.as_seen(sandbox)).collect())
    }

    async fn sandboxes_of(&self, uid: &str) -> Result<Vec<SandboxStatus>> {
        let all: Vec<_> = {
            let sandboxes = self.inner.sandboxes.lock();
            let ours = |status: &&Arc<SandboxStatus>| status.config.pod.as_ref().is_some_and(|pod| pod.uid == uid);
            sandboxes.values().filter(ours).cloned().collect()
        };
        Ok(all.iter().map(|sandbox| self.as_seen(sandbox)).collect())
    }

    async fn pod_sandbox_status(&self, id: &ContainerId) -> Result<SandboxStatus> {
        Ok(self.as_seen(&*self.sandbox(id)?))
    }

    async fn create_container(&self, sandbox: &ContainerId, config: ContainerConfig) -> Result<ContainerId> {
        self.inner.metrics.operation("create_container", self.create(sandbox, config)).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let started = async { self.inner.supervisor.start_container(id).await.map_err(refused(id, "created")) };
        self.inner.metrics.operation("start_container", started).await
    }

    async fn stop_container(&self, id: &ContainerId, timeout: Duration) -> Result<()> {
        self.inner.metrics.operation("stop_container", self.stop(id, timeout)).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.inner.metrics.operation("remove_container", self.remove(id)).await
    }

    async fn list_containers(&self) -> Result<Vec<ContainerStatus>> {
        Ok(self.statuses(None))
    }

    async fn containers_of(&self, uid: &str) -> Result<Vec<ContainerStatus>> {
        Ok(self.statuses(Some(uid)))
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.status(id).ok_or_else(|| RuntimeError::NotFound { kind: "container", id: id.clone() })
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        let record = self.record(id)?;
        let path = record.cgroup.clone();
        self.inner.cgroups.limit(&path, resources).map_err(RuntimeError::io("limit", path))?;
        self.note_resources(&record, resources)
    }

    async fn update_pod_sandbox_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        let sandbox = self.sandbox(id)?;
        let path = sandbox.config.cgroup_parent.clone();
        self.inner.cgroups.limit(&path, resources).map_err(RuntimeError::io("limit", path))?;
        let mut changed = (*sandbox).clone();
        changed.config.resources = resources.clone();
        self.note_sandbox(&changed)
    }

    async fn reopen_container_log(&self, id: &ContainerId) -> Result<()> {
        self.inner.supervisor.reopen_log(id).await.map_err(refused(id, "running"))
    }

    async fn exec_sync(&self, id: &ContainerId, command: &[String], timeout: Option<Duration>) -> Result<ExecOutput> {
        self.inner.metrics.operation("exec_sync", self.exec_and_collect(id, command, timeout)).await
    }

    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecSession> {
        self.inner.metrics.operation("exec", self.exec_with_streams(id, request)).await
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Streams> {
        self.inner.metrics.operation("attach", self.attach_streams(id, stdin)).await
    }

    async fn close_stdin(&self, id: &ContainerId) -> Result<()> {
        self.inner.supervisor.close_stdin(id).await.map_err(refused(id, "running"))
    }

    async fn container_stats(&self, id: &ContainerId) -> Result<Stats> {
        Ok(crate::cgroups::usage::read(&self.record(id)?.cgroup))
    }

    async fn pod_sandbox_stats(&self, id: &ContainerId) -> Result<Stats> {
        Ok(crate::cgroups::usage::read(&self.sandbox(id)?.config.cgroup_parent))
    }

    fn events(&self) -> broadcast::Receiver<ContainerEvent> {
        self.inner.events.subscribe()
    }
}

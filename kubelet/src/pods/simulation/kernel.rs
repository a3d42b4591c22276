//! A kernel that is not there: sandboxes and containers in memory, verbs that fail before or after they have had their effect,
//! and an eye on what must never be.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use super::Random;
use crate::cri::*;
use crate::names::ContainerId;

/// What a simulated container was told to do, as its command: `run`, or `exit CODE SECONDS`.
fn end_of(config: &ContainerConfig) -> Option<(i32, Duration)> {
    let [word, code, seconds] = &config.command[..] else { return None };
    let (code, seconds) = (code.parse().ok()?, seconds.parse().ok()?);
    (word == "exit").then(|| (code, Duration::from_secs(seconds)))
}

struct State {
    random: Random,
    faulty: bool,
    sandboxes: Vec<SandboxStatus>,
    containers: Vec<ContainerStatus>,
    /// Verbs that failed although nothing was wrong.
    faults: usize,
    /// What must never be, in words.
    violations: Vec<String>,
}

/// The kernel; it outlives every daemon.
#[derive(Clone)]
pub(super) struct Kernel(Arc<(Mutex<State>, broadcast::Sender<ContainerEvent>)>);

fn now() -> i64 {
    k8s_openapi::jiff::Timestamp::now().as_nanosecond().try_into().unwrap_or(i64::MAX)
}

fn fault() -> RuntimeError {
    RuntimeError::Supervisor("simulated fault".into())
}

impl State {
    fn container(&mut self, id: &ContainerId) -> Result<&mut ContainerStatus> {
        let found = self.containers.iter_mut().find(|held| held.id == *id);
        found.ok_or_else(|| RuntimeError::NotFound { kind: "container", id: id.clone() })
    }

    fn end(&mut self, id: &ContainerId, code: i32) -> Option<ContainerEvent> {
        let held = self.container(id).ok().filter(|held| held.state == ContainerState::Running)?;
        let exit = ExitStatus { code, signal: None, oom_killed: false, finished_at: now() };
        (held.state, held.exit, held.pid) = (ContainerState::Exited, Some(exit), None);
        Some(ContainerEvent::Stopped { id: held.id.clone(), pod: held.pod.clone(), exit })
    }

    /// Looks at a container that is about to run.
    fn watch(&mut self, new: &ContainerStatus) {
        let siblings: Vec<_> = self.containers.iter().filter(|held| held.pod.uid == new.pod.uid).collect();
        let mut wrong = Vec::new();
        if siblings.iter().any(|held| held.config.name == new.config.name && held.state == ContainerState::Running) {
            wrong.push("runs twice");
        }
        let done = |init: &str| {
            let mut all = siblings.iter().filter(|held| held.config.name == init);
            all.any(|held| held.exit.is_some_and(|exit| exit.code == 0))
        };
        let before: &[&str] = match new.config.name.as_str() {
            "main" => &["init-0", "init-1"],
            "init-1" => &["init-0"],
            _ => &[],
        };
        if !before.iter().all(|init| done(init)) {
            wrong.push("runs before its init containers are done");
        }
        if !self.sandboxes.iter().any(|sandbox| sandbox.id == new.sandbox && sandbox.ready) {
            wrong.push("runs without a sandbox");
        }
        self.violations.extend(wrong.iter().map(|what| format!("{}/{} {what}", new.pod.name, new.config.name)));
    }
}

impl Kernel {
    pub(super) fn new(seed: u64) -> Self {
        let random = Random(seed);
        let (sandboxes, containers, violations) = Default::default();
        let state = State { random, faulty: true, sandboxes, containers, faults: 0, violations };
        Self(Arc::new((Mutex::new(state), broadcast::channel(16).0)))
    }

    /// From now on nothing fails any more.
    pub(super) fn heal(&self) {
        self.0.0.lock().faulty = false;
    }

    pub(super) fn faults(&self) -> usize {
        self.0.0.lock().faults
    }

    pub(super) fn violations(&self) -> Vec<String> {
        self.0.0.lock().violations.clone()
    }

    /// Whether anything of a pod is left.
    pub(super) fn knows(&self, uid: &str) -> bool {
        let state = self.0.0.lock();
        let of_sandbox = |sandbox: &SandboxStatus| sandbox.config.pod.as_ref().is_some_and(|pod| pod.uid == uid);
        state.containers.iter().any(|held| held.pod.uid == uid) || state.sandboxes.iter().any(of_sandbox)
    }

    /// Whether a container of a pod runs.
    pub(super) fn runs(&self, uid: &str, name: &str) -> bool {
        let state = self.0.0.lock();
        let is = |held: &ContainerStatus| held.pod.uid == uid && held.config.name == name;
        state.containers.iter().any(|held| is(held) && held.state == ContainerState::Running)
    }

    /// A verb that takes its time, and fails now and then before or after its effect.
    async fn verb<T>(&self, effect: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let (pause, fate) = {
            let mut state = self.0.0.lock();
            let fate = if state.faulty { state.random.below(12) } else { u64::MAX };
            state.faults += usize::from(fate <= 1);
            (state.random.below(50), fate)
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if fate == 0 {
            return Err(fault());
        }
        let outcome = effect(&mut self.0.0.lock());
        if fate == 1 { Err(fault()) } else { outcome }
    }

    fn tell(&self, event: Option<ContainerEvent>) {
        if let Some(event) = event {
            // Nobody listens while the daemon is dead.
            let _heard = self.0.1.send(event);
        }
    }
}

fn unused<T>() -> Result<T> {
    Err(RuntimeError::Invalid("not simulated".into()))
}

#[async_trait]
impl ContainerRuntime for Kernel {
    async fn run_pod_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        let pod = config.pod.clone().ok_or_else(|| RuntimeError::Invalid("no pod".into()))?;
        self.verb(|state| {
            let id = ContainerId::derive(&pod.uid, "", config.attempt);
            if let Some(held) = state.sandboxes.iter_mut().find(|held| held.id == id) {
                held.ready = true;
                return Ok(held.clone());
            }
            let ips = vec![[10, 0, 0, 1].into()];
            let made = SandboxStatus { id, config, ready: true, created_at: now(), ips, network_namespace: None };
            state.sandboxes.push(made.clone());
            Ok(made)
        })
        .await
    }

    async fn stop_pod_sandbox(&self, id: &ContainerId) -> Result<()> {
        let events = self
            .verb(|state| {
                for held in state.sandboxes.iter_mut().filter(|held| held.id == *id) {
                    held.ready = false;
                }
                let inside = state.containers.iter().filter(|held| held.sandbox == *id);
                let inside: Vec<_> = inside.map(|held| held.id.clone()).collect();
                Ok(inside.iter().filter_map(|id| state.end(id, 137)).collect::<Vec<_>>())
            })
            .await?;
        events.into_iter().for_each(|event| self.tell(Some(event)));
        Ok(())
    }

    async fn remove_pod_sandbox(&self, id: &ContainerId) -> Result<()> {
        self.verb(|state| {
            state.containers.retain(|held| held.sandbox != *id);
            state.sandboxes.retain(|held| held.id != *id);
            Ok(())
        })
        .await
    }

    async fn list_pod_sandboxes(&self) -> Result<Vec<SandboxStatus>> {
        Ok(self.0.0.lock().sandboxes.clone())
    }

    async fn pod_sandbox_status(&self, _: &ContainerId) -> Result<SandboxStatus> {
        unused()
    }

    async fn create_container(&self, sandbox: &ContainerId, config: ContainerConfig) -> Result<ContainerId> {
        self.verb(|state| {
            let held = state.sandboxes.iter().find(|held| held.id == *sandbox);
            let pod = held.and_then(|held| held.config.pod.clone());
            let pod = pod.ok_or_else(|| RuntimeError::NotFound { kind: "sandbox", id: sandbox.clone() })?;
            let id = ContainerId::derive(&pod.uid, &config.name, config.attempt);
            if state.container(&id).is_err() {
                state.containers.push(ContainerStatus {
                    id: id.clone(),
                    sandbox: sandbox.clone(),
                    pod,
                    config,
                    state: ContainerState::Created,
                    pid: None,
                    created_at: now(),
                    started_at: 0,
                    exit: None,
                    message: String::new(),
                    user: ContainerUser::default(),
                });
            }
            Ok(id)
        })
        .await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let kernel = self.clone();
        self.verb(|state| {
            let held = state.container(id)?.clone();
            if held.state != ContainerState::Created {
                return Err(RuntimeError::Invalid(format!("{id} was started before")));
            }
            state.watch(&held);
            let held = state.container(id)?;
            (held.state, held.started_at, held.pid) = (ContainerState::Running, now(), Some(1));
            if let Some((code, after)) = end_of(&held.config) {
                let id = id.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let event = kernel.0.0.lock().end(&id, code);
                    kernel.tell(event);
                });
            }
            Ok(())
        })
        .await
    }

    async fn stop_container(&self, id: &ContainerId, _: Duration) -> Result<()> {
        let event = self.verb(|state| Ok(state.end(id, 143))).await?;
        self.tell(event);
        Ok(())
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.verb(|state| {
            state.containers.retain(|held| held.id != *id);
            Ok(())
        })
        .await
    }

    async fn list_containers(&self) -> Result<Vec<ContainerStatus>> {
        Ok(self.0.0.lock().containers.clone())
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.0.0.lock().container(id).map(|held| held.clone())
    }

    async fn update_container_resources(&self, _: &ContainerId, _: &Resources) -> Result<()> {
        Ok(())
    }

    async fn update_pod_sandbox_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.verb(|state| {
            let held = state.sandboxes.iter_mut().filter(|held| held.id == *id);
            held.for_each(|held| held.config.resources = resources.clone());
            Ok(())
        })
        .await
    }

    async fn reopen_container_log(&self, _: &ContainerId) -> Result<()> {
        unused()
    }

    async fn exec_sync(&self, _: &ContainerId, _: &[String], _: Option<Duration>) -> Result<ExecOutput> {
        unused()
    }

    async fn exec(&self, _: &ContainerId, _: ExecRequest) -> Result<ExecSession> {
        unused()
    }

    async fn attach(&self, _: &ContainerId, _: bool) -> Result<Streams> {
        unused()
    }

    async fn close_stdin(&self, _: &ContainerId) -> Result<()> {
        unused()
    }

    async fn container_stats(&self, _: &ContainerId) -> Result<Stats> {
        unused()
    }

    async fn pod_sandbox_stats(&self, _: &ContainerId) -> Result<Stats> {
        unused()
    }

    fn events(&self) -> broadcast::Receiver<ContainerEvent> {
        self.0.1.subscribe()
    }
}

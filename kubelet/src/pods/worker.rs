//! One pod's worker: it looks at what is and takes the next steps towards what is wanted, until nothing is left to do; then
//! it waits for a change of the pod, of a container, of a probe, or for the time that a back-off ends.
//!
//! It keeps no state that it could not find again: containers are found by their derived ids, files by the pod's UID.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::events::EventType;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::context::Context;
use super::monitor::Monitors;
use super::resolved::{self, is_sidecar};
use super::status::{self, Incarnation, Observed, PodObserved};
use super::table::PodEntry;
use super::{hooks, start};
use crate::cri::{ContainerState, ContainerStatus, SandboxStatus};
use crate::names::PodKey;
use crate::volumes::PodVolumes;

/// First pause before a container that ended is started again, and the longest (CrashLoopBackOff).
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_MOST: Duration = Duration::from_secs(300);
/// A container that ran for so long starts anew with the first pause.
const BACKOFF_RESET: Duration = Duration::from_secs(600);
/// Pause after a step that failed for a reason outside of the pod.
const RETRY: Duration = Duration::from_secs(2);

/// What a worker is told to bring about.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// The pod as the API has it.
    Pod(Arc<Pod>),
    /// The object is gone: end everything without delay.
    Gone(Arc<Pod>),
}

/// What comes next.
enum Next {
    /// Nothing until something changes.
    Wait,
    /// Another look at this time at the latest.
    At(Instant),
    /// Nothing any more: the worker ends.
    Finished,
}

#[derive(Clone, Copy, Debug)]
struct Backoff {
    pause: Duration,
    until: Instant,
}

pub(super) struct Worker {
    pub(super) context: Arc<Context>,
    pub(super) key: PodKey,
    wanted: watch::Receiver<Wanted>,
    wake: Arc<Notify>,
    monitors: Monitors,
    backoffs: HashMap<String, Backoff>,
    /// Containers that cannot be started at the moment: reason, message.
    waiting: HashMap<String, (String, String)>,
    failure: Option<(String, String)>,
    volumes: Option<PodVolumes>,
    /// The pod with the status as written last.
    written: Option<Arc<Pod>>,
}

impl Worker {
    pub(super) fn new(context: Arc<Context>, key: PodKey, wanted: watch::Receiver<Wanted>, wake: Arc<Notify>) -> Self {
        let monitors = Monitors::new(wake.clone());
        Self {
            context,
            key,
            wanted,
            wake,
            monitors,
            backoffs: HashMap::new(),
            waiting: HashMap::new(),
            failure: None,
            volumes: None,
            written: None,
        }
    }

    /// Runs until the pod is gone.
    pub(super) async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let next = match wanted {
                Wanted::Gone(pod) => self.remove(&pod, true).await,
                Wanted::Pod(pod) if pod.metadata.deletion_timestamp.is_some() => self.remove(&pod, false).await,
                Wanted::Pod(pod) => self.sync(&pod).await,
            };
            let wait = match next {
                Next::Finished => {
                    self.context.table.remove(&self.key.uid);
                    return;
                }
                Next::Wait => None,
                Next::At(time) => Some(time),
            };
            let late = async {
                match wait {
                    Some(time) => tokio::time::sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                () = self.wake.notified() => {}
                () = late => {}
            }
        }
    }

    /// The incarnations of the pod's containers, newest first.
    async fn incarnations(&self) -> HashMap<String, Vec<ContainerStatus>> {
        let mut found: HashMap<String, Vec<ContainerStatus>> = HashMap::new();
        match self.context.runtime.list_containers().await {
            Ok(all) => {
                for container in all.into_iter().filter(|container| container.pod.uid == self.key.uid) {
                    found.entry(container.config.name.clone()).or_default().push(container);
                }
            }
            Err(error) => tracing::warn!(pod = %self.key, %error, "containers are not listed"),
        }
        for incarnations in found.values_mut() {
            incarnations.sort_by_key(|container| std::cmp::Reverse(container.config.attempt));
        }
        found
    }

    async fn sandbox(&self) -> Option<SandboxStatus> {
        let all = self.context.runtime.list_pod_sandboxes().await.unwrap_or_default();
        let ours =
            all.into_iter().filter(|sandbox| sandbox.config.pod.as_ref().is_some_and(|pod| pod.uid == self.key.uid));
        ours.max_by_key(|sandbox| sandbox.config.attempt)
    }

    async fn observe(&mut self, pod: &Pod) -> PodObserved {
        let sandbox = self.sandbox().await;
        let incarnations = self.incarnations().await;
        let mut containers = HashMap::new();
        for (container, _) in all_containers(pod) {
            let newest = incarnations.get(&container.name).map(Vec::as_slice).unwrap_or_default();
            let image_id =
                newest.first().map(|status| self.context.image_id(&status.config.image_id)).unwrap_or_default();
            let mut observed = Observed {
                current: newest.first().map(|status| self.incarnation(status, &container)),
                last: newest.get(1).map(|status| self.incarnation(status, &container)),
                waiting: self.waiting.get(&container.name).cloned(),
                image_id,
                ..Observed::default()
            };
            if let Some(current) = observed.current.as_ref().filter(|current| current.state == ContainerState::Running)
            {
                let standing = self.monitors.standing(&current.id, &container);
                observed.started = standing.started;
                observed.ready = standing.ready;
            }
            containers.insert(container.name.clone(), observed);
        }
        let ips = sandbox.as_ref().map(|sandbox| sandbox.ips.clone()).unwrap_or_default();
        let sandbox_ready = sandbox.is_some_and(|sandbox| sandbox.ready);
        PodObserved { containers, sandbox_ready, ips, failure: self.failure.clone() }
    }

    fn incarnation(&self, status: &ContainerStatus, container: &Container) -> Incarnation {
        let ended = matches!(status.state, ContainerState::Exited | ContainerState::Unknown);
        let message = if !status.message.is_empty() {
            status.message.clone()
        } else if ended {
            self.context.termination_message(&self.key, container, status)
        } else {
            String::new()
        };
        Incarnation {
            id: status.id.clone(),
            attempt: status.config.attempt,
            state: status.state,
            started_at: status.started_at,
            exit: status.exit,
            message,
        }
    }

    /// Takes the next steps of a pod that is to run.
    async fn sync(&mut self, pod: &Arc<Pod>) -> Next {
        let pod = &self.latest(pod);
        let observed = self.observe(pod).await;
        let phase = status::phase(pod, &observed);
        if matches!(phase, "Succeeded" | "Failed") {
            self.monitors.stop_all();
            if observed.containers.values().any(Observed::running) {
                self.stop_containers(pod, grace(pod)).await;
            }
            if observed.sandbox_ready
                && let Some(sandbox) = self.sandbox().await
                && let Err(error) = self.context.runtime.stop_pod_sandbox(&sandbox.id).await
            {
                tracing::warn!(pod = %self.key, %error, "the sandbox of a finished pod is not stopped");
            }
            return self.report(pod).await;
        }
        if let Some(next) = self.check_deadline(pod).await {
            return next;
        }
        let step = self.step(pod, observed).await;
        let reported = self.report(pod).await;
        match (step, reported) {
            (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
            (Next::At(time), _) | (_, Next::At(time)) => Next::At(time),
            _ => Next::Wait,
        }
    }

    /// The pod with the status that this worker knows better than the API's copy.
    fn latest(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        match &self.written {
            Some(written) => Arc::new(Pod { status: written.status.clone(), ..(**pod).clone() }),
            None => pod.clone(),
        }
    }

    /// Ends a pod that has run for longer than `activeDeadlineSeconds`.
    async fn check_deadline(&mut self, pod: &Arc<Pod>) -> Option<Next> {
        let limit = pod.spec.as_ref()?.active_deadline_seconds?;
        let started = pod.status.as_ref()?.start_time.as_ref()?.0;
        let ran = k8s_openapi::jiff::Timestamp::now().duration_since(started).as_secs();
        if ran < limit {
            let wake = self.wake.clone();
            let left = Duration::from_secs(u64::try_from(limit - ran).unwrap_or_default());
            tokio::spawn(async move {
                tokio::time::sleep(left).await;
                wake.notify_one();
            });
            return None;
        }
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        self.context.event(pod, EventType::Normal, "DeadlineExceeded", "Killing", message.clone()).await;
        self.failure = Some(("DeadlineExceeded".into(), message));
        self.monitors.stop_all();
        self.stop_containers(pod, grace(pod)).await;
        Some(self.report(pod).await)
    }

    /// Sandbox, volumes, init containers in order, then all others.
    async fn step(&mut self, pod: &Arc<Pod>, observed: PodObserved) -> Next {
        let sandbox = match self.ensure_sandbox(pod).await {
            Ok(sandbox) => sandbox,
            Err(message) => {
                self.context.event(pod, EventType::Warning, "FailedCreatePodSandBox", "Sandbox", message).await;
                return Next::At(Instant::now() + RETRY);
            }
        };
        if self.volumes.is_none() {
            match self.context.volumes.setup(pod).await {
                Ok(volumes) => self.volumes = Some(volumes),
                Err(error) => {
                    self.context.event(pod, EventType::Warning, "FailedMount", "Mount", error.to_string()).await;
                    return Next::At(Instant::now() + RETRY);
                }
            }
        }
        let mut next = Next::Wait;
        let mut at = |time: Instant| match next {
            Next::At(known) if known <= time => {}
            _ => next = Next::At(time),
        };
        let empty = Observed::default();
        let spec = pod.spec.clone().unwrap_or_default();
        // In order: each waits for those before it.
        for container in spec.init_containers.iter().flatten() {
            let seen = observed.containers.get(&container.name).unwrap_or(&empty);
            if !is_sidecar(container) && status::init_done(container, seen) {
                continue;
            }
            // What is past needs no sidecar; what is to come waits for this one.
            if let Some(time) = self.advance(pod, &sandbox, container, seen, true).await {
                at(time);
            }
            if !status::init_done(container, seen) {
                return next;
            }
        }
        let ephemeral: Vec<_> = spec.ephemeral_containers.iter().flatten().map(resolved::ephemeral).collect();
        for container in spec.containers.iter().chain(&ephemeral) {
            let seen = observed.containers.get(&container.name).unwrap_or(&empty);
            if let Some(time) = self.advance(pod, &sandbox, container, seen, false).await {
                at(time);
            }
        }
        next
    }

    /// Starts a container if it is to run and does not; returns when to look again.
    async fn advance(
        &mut self,
        pod: &Arc<Pod>,
        sandbox: &SandboxStatus,
        container: &Container,
        seen: &Observed,
        is_init: bool,
    ) -> Option<Instant> {
        if seen.running() {
            let current = seen.current.as_ref()?;
            self.waiting.remove(&container.name);
            self.monitors.watch(&self.context, &self.key, pod, container, current, &sandbox.ips);
            if self.monitors.must_restart(&current.id) {
                self.restart_unhealthy(pod, container, current).await;
                return Some(Instant::now());
            }
            return None;
        }
        let ephemeral = all_ephemeral(pod).any(|name| name == container.name);
        if let Some(code) = seen.exited() {
            if ephemeral || !status::restarts(pod, container, is_init, code) {
                return None;
            }
            let until = self.back_off(container, seen);
            if until > Instant::now() {
                let pause = self.backoffs.get(&container.name).map(|backoff| backoff.pause).unwrap_or_default();
                let message = format!(
                    "back-off {}s restarting failed container={} pod={}_{}({})",
                    pause.as_secs(),
                    container.name,
                    self.key.name,
                    self.key.namespace,
                    self.key.uid
                );
                if self.waiting.insert(container.name.clone(), ("CrashLoopBackOff".into(), message.clone())).is_none() {
                    self.context
                        .event(
                            pod,
                            EventType::Warning,
                            "BackOff",
                            "Restart",
                            format!(
                                "Back-off restarting failed container {} in pod {}_{}({})",
                                container.name, self.key.name, self.key.namespace, self.key.uid
                            ),
                        )
                        .await;
                }
                return Some(until);
            }
        } else if let Some(backoff) =
            self.backoffs.get(&image_key(&container.name)).filter(|backoff| backoff.until > Instant::now())
        {
            return Some(backoff.until);
        }
        let attempt = seen.current.as_ref().map_or(0, |current| current.attempt + u32::from(seen.exited().is_some()));
        let volumes = self.volumes.clone().unwrap_or_default();
        match start::start(&self.context, &self.key, pod, sandbox, &volumes, container, attempt).await {
            Ok(()) => {
                self.waiting.remove(&container.name);
                self.backoffs.remove(&image_key(&container.name));
                self.context.forget_old(&self.key, &container.name, attempt).await;
                Some(Instant::now())
            }
            Err(failure) => {
                self.context
                    .event(pod, EventType::Warning, failure.event, "Start", failure.event_text(container))
                    .await;
                let pause = match self.backoffs.get(&image_key(&container.name)) {
                    Some(before) => before.pause.saturating_mul(2).min(BACKOFF_MOST),
                    None => failure.first_pause(),
                };
                let until = Instant::now() + pause;
                self.backoffs.insert(image_key(&container.name), Backoff { pause, until });
                let repeated = self.waiting.contains_key(&container.name);
                self.waiting.insert(container.name.clone(), failure.waiting(container, repeated));
                Some(until)
            }
        }
    }

    /// When a container that ended may be started again.
    fn back_off(&mut self, container: &Container, seen: &Observed) -> Instant {
        let current = seen.current.as_ref();
        let ran = current
            .map_or(0, |current| current.exit.map_or(0, |exit| exit.finished_at.saturating_sub(current.started_at)));
        let long = Duration::from_nanos(u64::try_from(ran).unwrap_or_default()) >= BACKOFF_RESET;
        let attempt = current.map_or(0, |current| current.attempt);
        let now = Instant::now();
        let key = format!("{}#{attempt}", container.name);
        if let Some(known) = self.backoffs.get(&key) {
            return known.until;
        }
        // The first restart is at once; the pause before the n-th later one follows from n, so a new daemon knows it too.
        let pause = if long || attempt == 0 {
            Duration::ZERO
        } else {
            BACKOFF_FIRST.saturating_mul(1 << (attempt - 1).min(10)).min(BACKOFF_MOST)
        };
        let prefix = format!("{}#", container.name);
        self.backoffs.retain(|key, _| !key.starts_with(&prefix));
        self.backoffs.insert(key, Backoff { pause, until: now + pause });
        self.backoffs.insert(container.name.clone(), Backoff { pause, until: now + pause });
        now + pause
    }

    async fn restart_unhealthy(&mut self, pod: &Arc<Pod>, container: &Container, current: &Incarnation) {
        let note = format!("Container {} failed liveness probe, will be restarted", container.name);
        self.context.event(pod, EventType::Normal, "Killing", "Killing", note).await;
        let own = self.monitors.grace(container);
        let limit = own.unwrap_or_else(|| grace(pod));
        self.monitors.stop(&current.id);
        hooks::stop(&self.context, pod, container, current, limit, &[]).await;
    }

    async fn ensure_sandbox(&mut self, pod: &Pod) -> Result<SandboxStatus, String> {
        // Running it as the host's own users would be less than was asked for.
        if pod.spec.as_ref().and_then(|spec| spec.host_users) == Some(false) {
            return Err("this node does not support user namespaces (hostUsers: false) yet; remove the field".into());
        }
        let known = self.sandbox().await;
        if let Some(ready) = known.as_ref().filter(|sandbox| sandbox.ready) {
            return Ok(ready.clone());
        }
        let attempt = known
            .map_or(0, |old| old.config.attempt + u32::from(!old.ready && old.created_at > 0 && !old.ips.is_empty()));
        let config = self.context.sandbox_config(pod, attempt);
        let sandbox = self
            .context
            .runtime
            .run_pod_sandbox(config)
            .await
            .map_err(|error| format!("Failed to create pod sandbox: {error}"))?;
        self.context
            .write_hosts(pod, &self.key, &sandbox.ips)
            .map_err(|error| format!("Failed to create pod sandbox: {error}"))?;
        Ok(sandbox)
    }

    /// Stops what runs: app containers at once, then sidecars in reverse order.
    async fn stop_containers(&mut self, pod: &Arc<Pod>, limit: Duration) {
        let observed = self.observe(pod).await;
        let deadline = Instant::now() + limit;
        let running = |container: &Container| {
            let seen = observed.containers.get(&container.name)?;
            seen.current
                .clone()
                .filter(|current| !matches!(current.state, ContainerState::Exited | ContainerState::Unknown))
        };
        let spec = pod.spec.clone().unwrap_or_default();
        let mut first: Vec<Container> = spec.containers.clone();
        first.extend(spec.ephemeral_containers.iter().flatten().map(resolved::ephemeral));
        first.extend(spec.init_containers.iter().flatten().filter(|container| !is_sidecar(container)).cloned());
        let stops =
            first.iter().filter_map(|container| Some((container, running(container)?))).map(|(container, current)| {
                let context = self.context.clone();
                async move {
                    hooks::stop(
                        &context,
                        pod,
                        container,
                        &current,
                        deadline.saturating_duration_since(Instant::now()),
                        &[],
                    )
                    .await
                }
            });
        futures::future::join_all(stops).await;
        for sidecar in spec.init_containers.iter().flatten().rev().filter(|container| is_sidecar(container)) {
            if let Some(current) = running(sidecar) {
                hooks::stop(
                    &self.context,
                    pod,
                    sidecar,
                    &current,
                    deadline.saturating_duration_since(Instant::now()),
                    &[],
                )
                .await;
            }
        }
    }

    /// Ends a pod: containers, sandbox, volumes, files, object.
    async fn remove(&mut self, pod: &Arc<Pod>, gone: bool) -> Next {
        let pod = &self.latest(pod);
        self.monitors.stop_all();
        let limit = if gone { Duration::ZERO } else { grace(pod) };
        // A shorter grace period that comes meanwhile takes effect at once.
        let mut wanted = self.wanted.clone();
        wanted.borrow_and_update();
        let hurried = tokio::select! {
            () = self.stop_containers(pod, limit) => false,
            changed = wanted.changed() => changed.is_ok(),
        };
        if hurried {
            return Next::At(Instant::now());
        }
        if !gone && let Next::At(time) = self.report(pod).await {
            return Next::At(time);
        }
        if let Err(message) = self.tear_down().await {
            tracing::warn!(pod = %self.key, message, "the pod is not taken down yet");
            return Next::At(Instant::now() + RETRY);
        }
        if gone {
            return Next::Finished;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.key.namespace);
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(self.key.uid.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        match api.delete(&self.key.name, &parameters).await {
            Ok(_) => Next::Finished,
            Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Next::Finished,
            Err(error) => {
                tracing::warn!(pod = %self.key, %error, "the pod's object is not removed yet");
                Next::At(Instant::now() + RETRY)
            }
        }
    }

    async fn tear_down(&mut self) -> Result<(), String> {
        let ours = |sandbox: &SandboxStatus| sandbox.config.pod.as_ref().is_some_and(|pod| pod.uid == self.key.uid);
        let all = self.context.runtime.list_pod_sandboxes().await.map_err(|error| error.to_string())?;
        for sandbox in all.into_iter().filter(ours) {
            self.context.runtime.stop_pod_sandbox(&sandbox.id).await.map_err(|error| error.to_string())?;
            self.context.runtime.remove_pod_sandbox(&sandbox.id).await.map_err(|error| error.to_string())?;
        }
        self.context.volumes.teardown(&self.key.uid).await.map_err(|error| error.to_string())?;
        self.context.remove_files(&self.key).map_err(|error| error.to_string())
    }

    /// Writes the status if it says something new, and tells the table.
    async fn report(&mut self, pod: &Arc<Pod>) -> Next {
        let observed = self.observe(pod).await;
        let wanted = status::of(pod, &observed, &self.context.config.node_ips);
        let current = Arc::new(Pod { status: Some(wanted.clone()), ..(**pod).clone() });
        let sandbox = self.sandbox().await.map(|sandbox| sandbox.id);
        let incarnations = self.incarnations().await.into_values().flatten();
        let containers = incarnations.map(|status| super::table::Incarnation {
            name: status.config.name.clone(),
            id: status.id.clone(),
            attempt: status.config.attempt,
            running: status.state == ContainerState::Running,
        });
        self.context.table.put(PodEntry {
            key: self.key.clone(),
            pod: current.clone(),
            sandbox,
            containers: containers.collect(),
        });
        if self.written.as_ref().is_some_and(|written| written.status == current.status) {
            return Next::Wait;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.key.namespace);
        let patch = serde_json::json!({"metadata": {"uid": self.key.uid}, "status": wanted});
        let parameters = PatchParams { field_manager: Some("kubelet".into()), ..PatchParams::default() };
        match api.patch_status(&self.key.name, &parameters, &Patch::Strategic(patch)).await {
            Ok(_) => {
                self.written = Some(current);
                Next::Wait
            }
            // Gone, or another pod of this name: the watch will say so.
            Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Next::Wait,
            Err(error) => {
                tracing::debug!(pod = %self.key, %error, "status not written");
                Next::At(Instant::now() + RETRY)
            }
        }
    }
}

fn image_key(container: &str) -> String {
    format!("{container}/start")
}

/// Time that the pod has to end.
fn grace(pod: &Pod) -> Duration {
    let spec = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let seconds = pod.metadata.deletion_grace_period_seconds.or(spec).unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

fn all_ephemeral(pod: &Pod) -> impl Iterator<Item = String> + '_ {
    pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten()).map(|container| container.name.clone())
}

/// All containers of a pod, with whether they are init containers.
pub(super) fn all_containers(pod: &Pod) -> Vec<(Container, bool)> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let inits = spec.init_containers.iter().flatten().map(|container| (container.clone(), true));
    let apps = spec.containers.iter().map(|container| (container.clone(), false));
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|container| (resolved::ephemeral(container), false));
    inits.chain(apps).chain(ephemeral).collect()
}

//! One pod's worker: it looks at what is and takes the next steps towards what is wanted, until nothing is left to do; then
//! it waits for a change of the pod, of a container, of a probe, or for the time that a back-off ends.
//!
//! It keeps no state that it could not find again: containers are found by their derived ids, files by the pod's UID.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::runtime::events::EventType;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::admit::admit;
use super::backoff::Backoffs;
use super::context::Context;
use super::monitor::Monitors;
use super::report::Reporter;
use super::resize::{self, Allocation, Progress};
use super::resolved::{self, is_sidecar};
use super::status::{self, Incarnation, Observed, PodObserved};
use super::stop::{self, Stop};
use super::table::PodEntry;
use super::{mirror, start};
use crate::cri::{ContainerState, ContainerStatus, RuntimeError, SandboxStatus};
use crate::metrics::{Counted, Timed};
use crate::names::PodKey;
use crate::volumes::PodVolumes;

/// Pause after a step that failed for a reason outside of the pod.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// What a worker is told to bring about.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// The pod as the API has it.
    Pod(Arc<Pod>),
    /// The object is gone: end everything without delay.
    Gone(Arc<Pod>),
}

impl Wanted {
    /// Whether the pod is to end.
    pub(super) fn is_ending(&self) -> bool {
        match self {
            Self::Pod(pod) => pod.metadata.deletion_timestamp.is_some(),
            Self::Gone(_) => true,
        }
    }
}

/// What comes next.
pub(super) enum Next {
    /// Nothing until something changes.
    Wait,
    /// Another look at this time at the latest.
    At(Instant),
    /// Nothing any more: the worker ends.
    Finished,
}

impl Next {
    fn no_later_than(&mut self, time: Instant) {
        match self {
            Self::At(known) if *known <= time => {}
            Self::Finished => {}
            _ => *self = Self::At(time),
        }
    }
}

pub(super) struct Worker {
    pub(super) context: Arc<Context>,
    pub(super) key: PodKey,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) monitors: Monitors,
    pub(super) reporter: Reporter,
    /// When the containers of a pod that ends are killed.
    pub(super) deadline: Option<Instant>,
    pub(super) wake: Arc<Notify>,
    backoffs: Backoffs,
    /// Containers that cannot be started at the moment: reason, message.
    waiting: HashMap<String, (String, String)>,
    /// Containers that start again at once, whatever their restart policy says.
    forced: HashSet<String>,
    failure: Option<(String, String)>,
    pub(super) volumes: Option<(PodVolumes, usize)>,
    admitted: bool,
    allocation: Option<Allocation>,
    progress: Option<Progress>,
    /// The pod with the status as told last.
    told: Option<Arc<Pod>>,
    /// The last trouble that was published, so that the same is not published again and again.
    trouble: Option<String>,
    /// When a pod came that had not run before; gone once it was seen to run.
    came: Option<Instant>,
}

impl Worker {
    pub(super) fn new(context: Arc<Context>, key: PodKey, wanted: watch::Receiver<Wanted>, wake: Arc<Notify>) -> Self {
        let new = matches!(&*wanted.borrow(), Wanted::Pod(pod) if is_pending(pod));
        let came = new.then(Instant::now);
        Self {
            reporter: Reporter::new(context.clone(), key.clone()),
            monitors: Monitors::new(wake.clone()),
            context,
            key,
            wanted,
            wake,
            deadline: None,
            backoffs: Backoffs::default(),
            waiting: HashMap::new(),
            forced: HashSet::new(),
            failure: None,
            volumes: None,
            admitted: false,
            allocation: None,
            progress: None,
            told: None,
            trouble: None,
            came,
        }
    }

    /// Runs until the pod is gone.
    pub(super) async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let started = Instant::now();
            let (operation, next) = match wanted {
                Wanted::Gone(pod) => ("terminated", self.remove(&pod, true).await),
                Wanted::Pod(pod) if pod.metadata.deletion_timestamp.is_some() => {
                    ("terminating", self.remove(&pod, false).await)
                }
                Wanted::Pod(pod) => ("sync", self.sync(&pod).await),
            };
            self.context.metrics.observe(Timed::PodWorker, operation, started.elapsed());
            let wait = match next {
                Next::Finished => {
                    self.context.table.remove(&self.key.uid);
                    self.context.probes.forget(&self.key.uid);
                    self.context.id_ranges.release(&self.key.uid);
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
    pub(super) async fn incarnations(&self) -> HashMap<String, Vec<ContainerStatus>> {
        let mut found: HashMap<String, Vec<ContainerStatus>> = HashMap::new();
        match self.context.runtime.containers_of(&self.key.uid).await {
            Ok(all) => {
                for container in all {
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

    pub(super) async fn sandbox(&self) -> Option<SandboxStatus> {
        let all = self.context.runtime.sandboxes_of(&self.key.uid).await.unwrap_or_default();
        all.into_iter().max_by_key(|sandbox| sandbox.config.attempt)
    }

    pub(super) async fn observe(&mut self, pod: &Pod) -> PodObserved {
        let sandbox = self.sandbox().await;
        let incarnations = self.incarnations().await;
        let mut containers = HashMap::new();
        for (container, is_init) in all_containers(pod) {
            let newest = incarnations.get(&container.name).map(Vec::as_slice).unwrap_or_default();
            let image_id =
                newest.first().map(|status| self.context.image_id(&status.config.image_id)).unwrap_or_default();
            let current = newest.first().map(|status| self.incarnation(status, &container));
            // After a reboot nothing is left of what ran but the API's memory.
            let current = current.or_else(|| status::remembered(pod, &container.name));
            let of_sandbox = |current: &Incarnation| {
                sandbox.as_ref().is_some_and(|sandbox| current.sandbox.as_ref() == Some(&sandbox.id))
            };
            let mut observed = Observed {
                // A new sandbox is initialized anew.
                stale: is_init && !is_sidecar(&container) && current.as_ref().is_some_and(|now| !of_sandbox(now)),
                user: newest.first().map(|status| status.user.clone()),
                image: newest.first().map(|status| status.config.image.clone()),
                current,
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
        PodObserved { containers, sandbox_ready, ips, failure: self.failure.clone(), resize: self.progress.clone() }
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
            sandbox: Some(status.sandbox.clone()),
            attempt: status.config.attempt,
            state: status.state,
            started_at: status.started_at,
            exit: status.exit,
            message,
        }
    }

    /// Takes the next steps of a pod that is to run.
    async fn sync(&mut self, asked: &Arc<Pod>) -> Next {
        let pod = &self.latest(asked);
        if let Some(verdict) = self.context.table.verdict(&self.key.uid)
            && self.failure.is_none()
        {
            let (reason, message) = (verdict.reason.clone(), verdict.message.clone());
            self.context.event(pod, EventType::Warning, &reason, "Killing", message.clone());
            self.failure = Some((reason, message));
            self.end(pod, verdict.grace.unwrap_or_else(|| stop::grace(pod))).await;
            self.report(pod).await;
            let next = self.wind_up(pod).await;
            self.told_or_gone().await;
            self.context.table.carried_out(&self.key.uid);
            return next;
        }
        if status::is_final(asked) {
            // Decided by another, or by this node before it started anew: it never runs again.
            return self.wind_up(pod).await;
        }
        let observed = self.observe(pod).await;
        if matches!(status::phase(pod, &observed), "Succeeded" | "Failed") {
            let next = self.wind_up(pod).await;
            self.report(pod).await;
            return next;
        }
        if self.deadline_of(pod).is_some_and(|deadline| deadline <= Instant::now()) {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.context.event(pod, EventType::Normal, "DeadlineExceeded", "Killing", message.clone());
            self.failure = Some(("DeadlineExceeded".into(), message));
            self.end(pod, stop::grace(pod)).await;
            return self.report(pod).await;
        }
        if !self.admitted {
            if !observed.sandbox_ready && observed.containers.values().all(|seen| seen.current.is_none()) {
                let others = self.others();
                let shutdown = self.context.shutdown.refusal();
                let mut verdict =
                    shutdown.and_then(|()| admit(&self.context.config, &self.context.allocatable(), &others, pod));
                if verdict.is_ok() {
                    let given = self.context.devices.admit(pod).await;
                    verdict = given.map_err(|message| ("UnexpectedAdmissionError".to_owned(), message));
                }
                if let Err((reason, message)) = verdict {
                    self.context.event(pod, EventType::Warning, &reason, "Admit", message.clone());
                    self.failure = Some((reason, message));
                    return self.report(pod).await;
                }
            }
            self.admitted = true;
        }
        let pod = &match self.allocate(pod).await {
            Ok(pod) => pod,
            Err(error) => {
                self.trouble(pod, "FailedToAllocate", error.to_string());
                return Next::At(Instant::now() + RETRY);
            }
        };
        if self.told.is_none() {
            self.report(pod).await;
        }
        let mut next = self.step(pod, observed).await;
        self.report(pod).await;
        // The first report says since when the pod runs, so the deadline is known only after it.
        if let Some(deadline) = self.deadline_of(&self.latest(pod)) {
            next.no_later_than(deadline);
        }
        if self.progress.is_some() {
            next.no_later_than(Instant::now() + RETRY);
        }
        next
    }

    /// The other pods of this node that have not ended.
    fn others(&self) -> Vec<Arc<PodEntry>> {
        let mut all = self.context.table.list();
        all.retain(|entry| entry.key.uid != self.key.uid && !status::is_final(&entry.pod));
        all
    }

    /// The pod with the status that this worker knows better than the API's copy.
    pub(super) fn latest(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        match &self.told {
            Some(told) => Arc::new(status::with_status_of(pod, told)),
            None => pod.clone(),
        }
    }

    /// When a pod has run for as long as `activeDeadlineSeconds` allows.
    fn deadline_of(&self, pod: &Pod) -> Option<Instant> {
        let limit = pod.spec.as_ref()?.active_deadline_seconds?;
        let started = pod.status.as_ref()?.start_time.as_ref()?.0;
        let ran = k8s_openapi::jiff::Timestamp::now().duration_since(started);
        let left = i128::from(limit) * 1_000_000_000 - ran.as_nanos();
        Some(Instant::now() + Duration::from_nanos(u64::try_from(left).unwrap_or_default()))
    }

    /// Publishes what keeps the pod from going on, once.
    fn trouble(&mut self, pod: &Pod, reason: &str, message: String) {
        if self.trouble.as_ref() != Some(&message) {
            self.context.event(pod, EventType::Warning, reason, reason, message.clone());
            self.trouble = Some(message);
        }
    }

    /// The pod as the node has taken it on: with the resources that it was given, which a resize may raise.
    async fn allocate(&mut self, pod: &Arc<Pod>) -> std::io::Result<Arc<Pod>> {
        let wanted = Allocation::wanted(pod);
        let given = match self.allocation.take().or_else(|| Allocation::load(&self.context, &self.key)) {
            Some(given) => given,
            None => {
                wanted.save(&self.context, &self.key)?;
                wanted.clone()
            }
        };
        if resize::same(&given, &wanted) {
            self.progress = self.progress.take().filter(|progress| progress.type_ == "PodResizeInProgress");
            self.allocation = Some(wanted);
            return Ok(pod.clone());
        }
        let before = given.applied_to(pod);
        if let Some(progress) = resize::judge(&self.context.allocatable(), &self.others(), pod) {
            if self.progress.as_ref() != Some(&progress) {
                let reason = format!("Resize{}", progress.reason.unwrap_or_default());
                self.context.event(pod, EventType::Warning, &reason, "Resize", progress.message.clone());
            }
            self.progress = Some(progress);
            self.allocation = Some(given);
            return Ok(Arc::new(before));
        }
        wanted.save(&self.context, &self.key)?;
        self.progress = None;
        for (container, _) in all_containers(pod) {
            if resize::requests_want_restart(&before, pod, &container.name) {
                self.forced.insert(container.name);
            }
        }
        self.allocation = Some(wanted);
        Ok(pod.clone())
    }

    /// Brings the limits of what runs to what the pod was given.
    async fn resize(&mut self, pod: &Arc<Pod>, sandbox: &SandboxStatus) {
        let incarnations = self.incarnations().await;
        let memory = self.context.facts.memory_bytes;
        let changes: Vec<_> = all_containers(pod)
            .into_iter()
            .filter_map(|(container, _)| {
                let status = incarnations.get(&container.name)?.first()?;
                let change = resize::change(pod, &container, status, memory);
                (change != resize::Change::Nothing).then(|| (container.name.clone(), status.id.clone(), change))
            })
            .collect();
        let wanted = resolved::pod_resources(pod);
        if changes.is_empty() && sandbox.config.resources == wanted {
            return;
        }
        let runtime = &self.context.runtime;
        // The pod's own limits give way first and close in last, so that they never cut a container short.
        let wide = resolved::wider(&sandbox.config.resources, &wanted);
        let mut outcome = runtime.update_pod_sandbox_resources(&sandbox.id, &wide).await;
        for (name, id, change) in changes {
            match change {
                resize::Change::Restart => drop(self.forced.insert(name)),
                resize::Change::Update(resources) if outcome.is_ok() => {
                    let limit = u64::try_from(resources.memory_limit_in_bytes).ok();
                    let used = runtime.container_stats(&id).await.ok().and_then(|stats| stats.memory_usage_bytes);
                    outcome = match (limit, used) {
                        // The kernel would end the container instead.
                        (Some(limit), Some(used)) if used > limit => Err(RuntimeError::Invalid(format!(
                            "attempting to set container {name:?} memory limit ({limit}) below current usage ({used})"
                        ))),
                        _ => runtime.update_container_resources(&id, &resources).await,
                    };
                }
                _ => {}
            }
        }
        if outcome.is_ok() {
            outcome = runtime.update_pod_sandbox_resources(&sandbox.id, &wanted).await;
        }
        self.progress = match outcome {
            Ok(()) => {
                let note =
                    format!("Pod resize completed of generation {}", pod.metadata.generation.unwrap_or_default());
                self.context.event(pod, EventType::Normal, "ResizeCompleted", "Resize", note);
                self.progress.take().filter(|progress| progress.type_ == "PodResizePending")
            }
            Err(error) => Some(Progress::failing(error.to_string())),
        };
    }

    /// Sandbox, volumes, init containers in order, then all others.
    async fn step(&mut self, pod: &Arc<Pod>, mut observed: PodObserved) -> Next {
        if self.volumes.is_none()
            && let Err(error) = self.context.dra.prepare(pod).await
        {
            self.trouble(pod, "FailedPrepareDynamicResources", error.to_string());
            return Next::At(Instant::now() + RETRY);
        }
        let spec = pod.spec.clone().unwrap_or_default();
        let count = spec.ephemeral_containers.as_ref().map_or(0, Vec::len);
        let known = self.volumes.as_ref().is_some_and(|(_, known)| *known == count);
        let volumes = async |user: Option<&Path>| {
            if known { Ok(None) } else { self.context.volumes.setup(pod, user).await.map(Some) }
        };
        let (sandbox, volumes) = if spec.host_users == Some(false) {
            let sandbox = self.ensure_sandbox(pod).await;
            let user = sandbox.as_ref().ok().and_then(|sandbox| self.context.user_namespace(sandbox));
            let volumes = if sandbox.is_ok() { volumes(user.as_deref()).await } else { Ok(None) };
            (sandbox, volumes)
        } else {
            // Neither needs the other.
            tokio::join!(self.ensure_sandbox(pod), volumes(None))
        };
        let sandbox = match sandbox {
            Ok(sandbox) => sandbox,
            Err(message) => {
                self.trouble(pod, "FailedCreatePodSandBox", message);
                return Next::At(Instant::now() + RETRY);
            }
        };
        match volumes {
            Ok(None) => {}
            Ok(Some(volumes)) => self.volumes = Some((volumes, count)),
            Err(error) => {
                self.trouble(pod, "FailedMount", error.to_string());
                return Next::At(Instant::now() + RETRY);
            }
        }
        self.trouble = None;
        self.resize(pod, &sandbox).await;
        let mut next = Next::Wait;
        let empty = Observed::default();
        let initialized = status::is_initialized(pod, &observed);
        // In order: each waits for those before it.
        for container in spec.init_containers.iter().flatten() {
            let seen = observed.containers.remove(&container.name).unwrap_or_default();
            let past = initialized || status::init_done(container, &seen);
            if !is_sidecar(container) && past {
                continue;
            }
            // What is past needs no sidecar; what is to come waits for this one.
            if let Some(time) = self.advance(pod, &sandbox, container, &seen, true).await {
                next.no_later_than(time);
            }
            if !past {
                return next;
            }
        }
        let ephemeral: Vec<_> = spec.ephemeral_containers.iter().flatten().map(resolved::ephemeral).collect();
        for container in spec.containers.iter().chain(&ephemeral) {
            let seen = observed.containers.get(&container.name).unwrap_or(&empty);
            if let Some(time) = self.advance(pod, &sandbox, container, seen, false).await {
                next.no_later_than(time);
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
        let name = &container.name;
        if let Some(current) = seen.current.as_ref().filter(|_| seen.running()) {
            self.waiting.remove(name);
            self.monitors.watch(&self.context, &self.key, pod, container, current, &sandbox.ips);
            let changed = seen.image.as_ref().is_some_and(|image| Some(image) != container.image.as_ref());
            let why = if self.monitors.must_restart(&current.id) {
                format!("Container {name} failed liveness probe, will be restarted")
            } else if changed {
                self.forced.insert(name.clone());
                format!("Container {name} definition changed, will be restarted")
            } else if self.forced.contains(name) {
                format!("Container {name} resize requires restart")
            } else {
                return None;
            };
            let own = self.monitors.grace(container).filter(|_| self.monitors.must_restart(&current.id));
            let limit = own.unwrap_or_else(|| stop::grace(pod));
            self.monitors.stop(&current.id);
            let context = self.context.clone();
            let stop = Stop { pod, container, current, ips: &sandbox.ips, why: Some(why), with_hook: true };
            stop.run(&context, Instant::now() + limit).await;
            return Some(Instant::now());
        }
        let forced = self.forced.contains(name);
        if let Some(code) = seen.exited().filter(|_| !forced && !seen.stale) {
            if all_ephemeral(pod).any(|other| other == *name) || !status::restarts(pod, container, is_init, code) {
                return None;
            }
            let (until, pause) = self.backoffs.restart(container, seen);
            if until > Instant::now() {
                let whose = format!("{}_{}({})", self.key.name, self.key.namespace, self.key.uid);
                let message = format!("back-off {}s restarting failed container={name} pod={whose}", pause.as_secs());
                if self.waiting.insert(name.clone(), ("CrashLoopBackOff".into(), message)).is_none() {
                    let note = format!("Back-off restarting failed container {name} in pod {whose}");
                    self.context.event_of(pod, name, EventType::Warning, "BackOff", note);
                }
                return Some(until);
            }
        } else if let Some(until) = self.backoffs.waits_to_start(name) {
            return Some(until);
        }
        let attempt = seen.current.as_ref().map_or(0, |current| current.attempt + u32::from(seen.exited().is_some()));
        let (volumes, _) = self.volumes.clone().unwrap_or_default();
        let start = start::Start { context: &self.context, key: &self.key, pod, sandbox, volumes: &volumes, container };
        match start.run(attempt, self.wanted.clone()).await {
            Ok(()) => {
                self.waiting.remove(name);
                self.forced.remove(name);
                self.backoffs.started(name);
                self.context.forget_old(&self.key, name, attempt).await;
                if let Some(status) = self.incarnations().await.remove(name).and_then(|all| all.into_iter().next()) {
                    let current = self.incarnation(&status, container);
                    if current.state == ContainerState::Running {
                        self.monitors.watch(&self.context, &self.key, pod, container, &current, &sandbox.ips);
                        self.report(pod).await;
                        // What comes after an init container looks at it again.
                        return is_init.then(Instant::now);
                    }
                }
                Some(Instant::now())
            }
            Err(start::Failure::Cancelled) => Some(Instant::now()),
            Err(start::Failure::Known(failure)) => {
                self.context.event_of(pod, name, EventType::Warning, failure.event, failure.event_text(container));
                let until = self.backoffs.failed(name, failure.first_pause());
                let repeated = self.waiting.contains_key(name);
                self.waiting.insert(name.clone(), failure.waiting(container, repeated));
                Some(until)
            }
        }
    }

    async fn ensure_sandbox(&self, pod: &Arc<Pod>) -> Result<SandboxStatus, String> {
        let known = self.sandbox().await;
        if let Some(ready) = known.as_ref().filter(|sandbox| sandbox.ready) {
            return Ok(ready.clone());
        }
        let failed = |error: &dyn std::fmt::Display| format!("Failed to create pod sandbox: {error}");
        if let Some(old) = &known {
            // Whatever still runs in it has lost its network or its first process.
            self.context.runtime.stop_pod_sandbox(&old.id).await.map_err(|error| failed(&error))?;
        }
        let attempt = known
            .map_or(0, |old| old.config.attempt + u32::from(!old.ready && old.created_at > 0 && !old.ips.is_empty()));
        let handler = self.context.runtime_handler(pod).await.map_err(|error| failed(&error))?;
        let config = self.context.sandbox_config(pod, attempt, handler).map_err(|error| failed(&error))?;
        let sandbox = self.context.runtime.run_pod_sandbox(config).await.map_err(|error| failed(&error))?;
        self.context.write_hosts(pod, &self.key, &sandbox.ips).map_err(|error| failed(&error))?;
        Ok(sandbox)
    }

    /// Notes how long the pod took to run, the first time that it is seen to.
    fn time_start(&mut self, pod: &Pod) {
        if is_pending(pod) {
            return;
        }
        let Some(came) = self.came.take() else { return };
        let metrics = &self.context.metrics;
        metrics.count(Counted::StartedPods, "");
        metrics.observe(Timed::PodStart, "", came.elapsed());
        if let Some(created) = &pod.metadata.creation_timestamp {
            let took = k8s_openapi::jiff::Timestamp::now().duration_since(created.0);
            metrics.observe(Timed::PodStartTotal, "", took.unsigned_abs());
        }
    }

    /// Tells the status to the table and, if it says something new, to the API.
    pub(super) async fn report(&mut self, pod: &Arc<Pod>) -> Next {
        let observed = self.observe(pod).await;
        let pod = &self.latest(pod);
        let wanted = status::of(pod, &observed, &self.context.config.node_ips);
        let current = Arc::new(Pod { status: Some(wanted), ..(**pod).clone() });
        self.time_start(&current);
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
        // A mirror that was removed comes again.
        let again = |told: &Pod| {
            mirror::source(pod).is_some() && told.metadata.resource_version != current.metadata.resource_version
        };
        if self.told.as_ref().is_none_or(|told| told.status != current.status || again(told)) {
            self.told = Some(current.clone());
            self.reporter.write(current);
        }
        Next::Wait
    }
}

/// Whether a pod has not run yet.
fn is_pending(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), None | Some("Pending"))
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

//! The probes of a pod's running containers: one task each, and what they have found out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use kube::runtime::events::EventType;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::context::Context;
use super::hooks;
use super::status::Incarnation;
use crate::names::{ContainerId, PodKey};
use crate::probes::{self, Answer, ProbeKind, Standing};
use crate::supervisor::container::now;

/// What the probes of one incarnation say.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    pub(super) started: bool,
    pub(super) ready: bool,
    must_restart: bool,
}

struct Watched {
    state: Arc<Mutex<State>>,
    tasks: Vec<(ProbeKind, AbortHandle)>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|(_, task)| task.abort());
    }
}

/// The probes of a pod.
pub(super) struct Monitors {
    wake: Arc<Notify>,
    watched: HashMap<ContainerId, Watched>,
}

fn probe(container: &Container, kind: ProbeKind) -> Option<&Probe> {
    match kind {
        ProbeKind::Startup => container.startup_probe.as_ref(),
        ProbeKind::Liveness => container.liveness_probe.as_ref(),
        ProbeKind::Readiness => container.readiness_probe.as_ref(),
    }
}

impl Monitors {
    /// No probes; each change of a standing rings `wake`.
    pub(super) fn new(wake: Arc<Notify>) -> Self {
        Self { wake, watched: HashMap::new() }
    }

    /// What is known of a running incarnation. One that is not watched yet has started unless a startup probe must say so.
    pub(super) fn standing(&self, id: &ContainerId, container: &Container) -> State {
        match self.watched.get(id) {
            Some(watched) => *watched.state.lock(),
            None => {
                let started = container.startup_probe.is_none();
                State { started, ready: started && container.readiness_probe.is_none(), must_restart: false }
            }
        }
    }

    /// Whether a probe asks for a restart.
    pub(super) fn must_restart(&self, id: &ContainerId) -> bool {
        self.watched.get(id).is_some_and(|watched| watched.state.lock().must_restart)
    }

    /// The grace period of a restart, if a probe has one of its own.
    pub(super) fn grace(&self, container: &Container) -> Option<Duration> {
        let of = |probe: &Option<Probe>| probe.as_ref().and_then(|probe| probe.termination_grace_period_seconds);
        let seconds = of(&container.liveness_probe).or(of(&container.startup_probe))?;
        u64::try_from(seconds).ok().map(Duration::from_secs)
    }

    /// Starts the probes of a running incarnation that do not run yet.
    pub(super) fn watch(
        &mut self,
        context: &Arc<Context>,
        key: &PodKey,
        pod: &Arc<Pod>,
        container: &Container,
        current: &Incarnation,
        ips: &[IpAddr],
    ) {
        let initial = self.standing(&current.id, container);
        let watched = self
            .watched
            .entry(current.id.clone())
            .or_insert_with(|| Watched { state: Arc::new(Mutex::new(initial)), tasks: Vec::new() });
        let started = watched.state.lock().started;
        for kind in [ProbeKind::Startup, ProbeKind::Liveness, ProbeKind::Readiness] {
            let due = (kind == ProbeKind::Startup) != started;
            if due
                && let Some(probe) = probe(container, kind)
                && !watched.tasks.iter().any(|(known, _)| *known == kind)
            {
                let task = Task {
                    context: context.clone(),
                    key: key.clone(),
                    pod: pod.clone(),
                    container: container.clone(),
                    state: watched.state.clone(),
                    wake: self.wake.clone(),
                    kind,
                };
                let target = hooks::target(context, container, &current.id, ips);
                let probe = probe.clone();
                let started_for =
                    Duration::from_nanos(u64::try_from(now().saturating_sub(current.started_at)).unwrap_or_default());
                let handle = tokio::spawn(async move {
                    let telling = |answer: &Answer, change| {
                        task.tell(answer, change);
                        if let Answer::Failure(message) = answer {
                            let note = format!("{} probe failed: {message}", kind.word());
                            task.context.event_of(
                                &task.pod,
                                &task.container.name,
                                EventType::Warning,
                                "Unhealthy",
                                note,
                            );
                        }
                    };
                    probes::run(kind, &probe, &target, started_for, telling).await;
                });
                watched.tasks.push((kind, handle.abort_handle()));
            }
        }
    }

    /// Ends the probes of one incarnation.
    pub(super) fn stop(&mut self, id: &ContainerId) {
        self.watched.remove(id);
    }

    /// Ends all probes.
    pub(super) fn stop_all(&mut self) {
        self.watched.clear();
    }
}

struct Task {
    context: Arc<Context>,
    key: PodKey,
    pod: Arc<Pod>,
    container: Container,
    state: Arc<Mutex<State>>,
    wake: Arc<Notify>,
    kind: ProbeKind,
}

impl Task {
    fn tell(&self, answer: &Answer, change: Option<Standing>) {
        self.context.probes.add(&self.key, &self.container.name, self.kind, answer);
        if let Answer::Unknown(message) = answer {
            tracing::debug!(pod = %self.key, container = %self.container.name, probe = self.kind.word(), message, "not asked");
        }
        let Some(change) = change else { return };
        let passed = change == Standing::Passed;
        {
            let mut state = self.state.lock();
            match self.kind {
                ProbeKind::Startup if passed => {
                    state.started = true;
                    state.ready = self.container.readiness_probe.is_none();
                }
                ProbeKind::Readiness => state.ready = passed,
                ProbeKind::Startup | ProbeKind::Liveness => state.must_restart |= !passed,
            }
        }
        self.wake.notify_one();
    }
}

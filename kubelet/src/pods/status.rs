//! A pod's status as a value computed from its specification and what is observed of its containers.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::core::v1::{Container, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::resolved::is_sidecar;
use crate::cri::{ContainerState, ExitStatus};
use crate::names::ContainerId;

/// What is known of one container: its newest incarnation, the one before, and why there is none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// Newest incarnation.
    pub current: Option<Incarnation>,
    /// How the incarnation before ended.
    pub last: Option<Incarnation>,
    /// Why the container does not run: reason and message.
    pub waiting: Option<(String, String)>,
    /// Whether its startup probe has passed, or it has none and runs.
    pub started: bool,
    /// Whether its readiness probe has passed, or it has none and has started.
    pub ready: bool,
    /// Digest reference or ID of its image.
    pub image_id: String,
}

/// One incarnation.
#[derive(Clone, Debug)]
pub(crate) struct Incarnation {
    pub id: ContainerId,
    pub attempt: u32,
    pub state: ContainerState,
    /// Unix nanoseconds; 0 when never started.
    pub started_at: i64,
    pub exit: Option<ExitStatus>,
    /// Termination message, or why starting failed.
    pub message: String,
}

impl Observed {
    /// Whether the newest incarnation runs.
    pub(crate) fn running(&self) -> bool {
        self.current.as_ref().is_some_and(|current| current.state == ContainerState::Running)
    }

    /// How the newest incarnation ended, if it has.
    pub(crate) fn exited(&self) -> Option<i32> {
        let current = self.current.as_ref()?;
        match current.state {
            ContainerState::Exited | ContainerState::Unknown => Some(current.exit.map_or(137, |exit| exit.code)),
            _ => None,
        }
    }
}

/// What is known of a pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodObserved {
    pub containers: HashMap<String, Observed>,
    pub sandbox_ready: bool,
    pub ips: Vec<IpAddr>,
    /// Why the pod failed as a whole: reason and message (`Evicted`, `DeadlineExceeded`, …).
    pub failure: Option<(String, String)>,
}

fn time(nanoseconds: i64) -> Option<Time> {
    (nanoseconds > 0).then(|| Timestamp::from_second(nanoseconds / 1_000_000_000).ok().map(Time)).flatten()
}

fn now() -> Time {
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

fn terminated(incarnation: &Incarnation) -> core::ContainerStateTerminated {
    let unknown = ExitStatus { code: 137, signal: None, oom_killed: false, finished_at: 0 };
    let exit = incarnation.exit.unwrap_or(unknown);
    let reason = match (&incarnation.exit, exit.oom_killed, exit.code) {
        (None, ..) => "ContainerStatusUnknown",
        (_, true, _) => "OOMKilled",
        (_, _, 0) => "Completed",
        (_, _, 128) if incarnation.started_at == 0 => "StartError",
        _ => "Error",
    };
    core::ContainerStateTerminated {
        container_id: Some(incarnation.id.url()),
        exit_code: exit.code,
        reason: Some(reason.into()),
        message: Some(incarnation.message.clone()).filter(|message| !message.is_empty()),
        started_at: time(incarnation.started_at),
        finished_at: time(exit.finished_at),
        signal: None,
    }
}

fn container_state(observed: &Observed, default_reason: &str) -> core::ContainerState {
    let waiting = |reason: &str, message: Option<String>| core::ContainerState {
        waiting: Some(core::ContainerStateWaiting { reason: Some(reason.into()), message }),
        ..core::ContainerState::default()
    };
    if let Some((reason, message)) = &observed.waiting {
        return waiting(reason, Some(message.clone()).filter(|message| !message.is_empty()));
    }
    match &observed.current {
        Some(current) if current.state == ContainerState::Running => core::ContainerState {
            running: Some(core::ContainerStateRunning { started_at: time(current.started_at) }),
            ..core::ContainerState::default()
        },
        Some(current) if current.state != ContainerState::Created => {
            core::ContainerState { terminated: Some(terminated(current)), ..core::ContainerState::default() }
        }
        _ => waiting(default_reason, None),
    }
}

fn container_status(container: &Container, observed: &Observed, default_reason: &str) -> core::ContainerStatus {
    let state = container_state(observed, default_reason);
    // While it waits for its restart, the newest incarnation is the last one.
    let last = if state.waiting.is_some() && observed.exited().is_some() {
        observed.current.as_ref()
    } else {
        observed.last.as_ref()
    };
    let shown = observed.current.as_ref();
    core::ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: observed.image_id.clone(),
        container_id: shown.map(|current| current.id.url()),
        ready: observed.ready,
        started: Some(observed.started),
        restart_count: i32::try_from(shown.map_or(0, |current| current.attempt)).unwrap_or(i32::MAX),
        last_state: Some(core::ContainerState { terminated: last.map(terminated), ..core::ContainerState::default() }),
        state: Some(state),
        resources: container.resources.clone(),
        ..core::ContainerStatus::default()
    }
}

/// Whether an init container has done its part: ended well, or, of a sidecar, started.
pub(crate) fn init_done(container: &Container, observed: &Observed) -> bool {
    if is_sidecar(container) { observed.started } else { observed.waiting.is_none() && observed.exited() == Some(0) }
}

/// Whether a container that ended is started again.
pub(crate) fn restarts(pod: &Pod, container: &Container, is_init: bool, code: i32) -> bool {
    for rule in container.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.iter().flatten().any(|value| *value == code);
        if listed == (codes.operator == "In") {
            return rule.action == "Restart";
        }
    }
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always");
    match container.restart_policy.as_deref().unwrap_or(of_pod) {
        "Never" => false,
        "OnFailure" => code != 0,
        // An init container is done when it ended well.
        _ => !is_init || is_sidecar(container) || code != 0,
    }
}

/// The phase that containers amount to.
pub(crate) fn phase(pod: &Pod, observed: &PodObserved) -> &'static str {
    if observed.failure.is_some() {
        return "Failed";
    }
    let Some(spec) = &pod.spec else { return "Pending" };
    let empty = Observed::default();
    let of = |container: &Container| observed.containers.get(&container.name).unwrap_or(&empty).clone();
    for container in spec.init_containers.iter().flatten() {
        let seen = of(container);
        if init_done(container, &seen) {
            continue;
        }
        return match seen.exited() {
            Some(code) if seen.waiting.is_none() && !restarts(pod, container, true, code) => "Failed",
            _ => "Pending",
        };
    }
    let (mut running, mut waiting, mut failed, mut ended) = (0, 0, 0, 0);
    for container in &spec.containers {
        let seen = of(container);
        match (seen.running(), seen.exited()) {
            (true, _) => running += 1,
            (_, Some(code)) if restarts(pod, container, false, code) => running += 1,
            (_, Some(code)) => {
                ended += 1;
                failed += usize::from(code != 0);
            }
            _ => waiting += 1,
        }
    }
    match (waiting, running, ended) {
        (1.., ..) => "Pending",
        (_, 1.., _) => "Running",
        (.., 1..) if failed > 0 => "Failed",
        (.., 1..) => "Succeeded",
        _ => "Pending",
    }
}

/// The whole status. `old` keeps the times of what has not changed.
pub(crate) fn of(pod: &Pod, observed: &PodObserved, host_ips: &[IpAddr]) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    let Some(spec) = &pod.spec else { return old };
    let empty = Observed::default();
    let seen = |name: &str| observed.containers.get(name).unwrap_or(&empty);
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    let initialized = inits.iter().all(|container| init_done(container, seen(&container.name)));
    let waiting_reason = if initialized { "ContainerCreating" } else { "PodInitializing" };
    let statuses = |containers: &[Container], reason: &str| -> Vec<core::ContainerStatus> {
        containers.iter().map(|container| container_status(container, seen(&container.name), reason)).collect()
    };
    let mut init_statuses = statuses(inits, "PodInitializing");
    for (status, container) in init_statuses.iter_mut().zip(inits) {
        // An init container counts as ready once it has ended well.
        if !is_sidecar(container) {
            status.ready = seen(&container.name).exited() == Some(0);
        }
    }
    let ephemeral: Vec<_> = spec.ephemeral_containers.iter().flatten().map(super::resolved::ephemeral).collect();
    let phase = phase(pod, observed);
    let done = matches!(phase, "Succeeded" | "Failed");
    let sidecars = inits.iter().filter(|container| is_sidecar(container));
    let unready: Vec<&str> = spec
        .containers
        .iter()
        .chain(sidecars)
        .filter(|container| !seen(&container.name).ready)
        .map(|container| container.name.as_str())
        .collect();
    let uninitialized: Vec<&str> = inits
        .iter()
        .filter(|container| !init_done(container, seen(&container.name)))
        .map(|container| container.name.as_str())
        .collect();
    let listed = |names: &[&str]| format!("[{}]", names.join(" "));
    let mut ready = if done {
        if phase == "Succeeded" { Some(("PodCompleted", String::new())) } else { Some(("PodFailed", String::new())) }
    } else if unready.is_empty() {
        None
    } else {
        Some(("ContainersNotReady", format!("containers with unready status: {}", listed(&unready))))
    };
    let containers_ready = ready.clone();
    if ready.is_none() {
        let held = |type_: &str| {
            old.conditions.iter().flatten().any(|condition| condition.type_ == type_ && condition.status == "True")
        };
        let gates = spec.readiness_gates.iter().flatten().map(|gate| gate.condition_type.as_str());
        let closed: Vec<_> = gates
            .filter(|gate| !held(gate))
            .map(|gate| {
                format!("corresponding condition of pod readiness gate \"{gate}\" does not exist or is not \"True\".")
            })
            .collect();
        if !closed.is_empty() {
            ready = Some(("ReadinessGatesNotReady", closed.join(", ")));
        }
    }
    let initialized = match (done && phase == "Succeeded", initialized) {
        (true, _) => Some(Some("PodCompleted".to_owned())),
        (_, true) => Some(None),
        _ => None,
    };
    let mut conditions = old.conditions.clone().unwrap_or_default();
    let mut set = |type_: &str, holds: bool, reason: Option<&str>, message: Option<String>| {
        let status = if holds { "True" } else { "False" };
        let before = conditions.iter().position(|condition| condition.type_ == type_);
        let since = before
            .map(|index| &conditions[index])
            .filter(|held| held.status == status)
            .and_then(|held| held.last_transition_time.clone());
        let condition = PodCondition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.map(str::to_owned),
            message,
            observed_generation: pod.metadata.generation,
            last_probe_time: None,
            last_transition_time: Some(since.unwrap_or_else(now)),
        };
        match before {
            Some(index) => conditions[index] = condition,
            None => conditions.push(condition),
        }
    };
    set("PodReadyToStartContainers", observed.sandbox_ready, None, None);
    match initialized {
        Some(reason) => set("Initialized", true, reason.as_deref(), None),
        None => set(
            "Initialized",
            false,
            Some("ContainersNotInitialized"),
            Some(format!("containers with incomplete status: {}", listed(&uninitialized))),
        ),
    }
    let reason = |ready: &Option<(&'static str, String)>| ready.as_ref().map(|(reason, _)| *reason);
    let message = |ready: &Option<(&'static str, String)>| {
        ready.as_ref().map(|(_, message)| message.clone()).filter(|message| !message.is_empty())
    };
    set("Ready", ready.is_none(), reason(&ready), message(&ready));
    set("ContainersReady", containers_ready.is_none(), reason(&containers_ready), message(&containers_ready));
    set("PodScheduled", true, None, None);
    let ips = if spec.host_network == Some(true) { host_ips } else { &observed.ips };
    let pod_ips: Vec<_> = ips.iter().map(|ip| core::PodIP { ip: ip.to_string() }).collect();
    PodStatus {
        phase: Some(phase.into()),
        reason: observed.failure.as_ref().map(|(reason, _)| reason.clone()),
        message: observed.failure.as_ref().map(|(_, message)| message.clone()),
        conditions: Some(conditions),
        host_ip: host_ips.first().map(ToString::to_string),
        host_ips: Some(host_ips.iter().map(|ip| core::HostIP { ip: ip.to_string() }).collect()),
        pod_ip: pod_ips.first().map(|ip| ip.ip.clone()).or(old.pod_ip),
        pod_ips: if pod_ips.is_empty() { old.pod_ips } else { Some(pod_ips) },
        start_time: old.start_time.or_else(|| Some(now())),
        init_container_statuses: (!inits.is_empty()).then_some(init_statuses),
        container_statuses: Some(statuses(&spec.containers, waiting_reason)),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then(|| statuses(&ephemeral, "ContainerCreating")),
        observed_generation: pod.metadata.generation,
        ..old
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(policy: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "a"}, {"name": "b"}]},
        }))
        .expect("a pod")
    }

    fn seen(state: ContainerState, code: i32) -> Observed {
        let exit = (state == ContainerState::Exited).then_some(ExitStatus {
            code,
            signal: None,
            oom_killed: false,
            finished_at: 1,
        });
        let running = state == ContainerState::Running;
        let current = Incarnation {
            id: ContainerId::derive("u", "a", 0),
            attempt: 0,
            state,
            started_at: 1,
            exit,
            message: String::new(),
        };
        Observed { current: Some(current), started: running, ready: running, ..Observed::default() }
    }

    fn observed(init: Observed, a: Observed, b: Observed) -> PodObserved {
        let containers = [("i", init), ("a", a), ("b", b)].map(|(name, seen)| (name.to_owned(), seen)).into();
        PodObserved { containers, sandbox_ready: true, ..PodObserved::default() }
    }

    #[test]
    fn phases_follow_the_documentation() {
        use ContainerState::{Exited, Running};
        let done = || seen(Exited, 0);
        for (policy, init, a, b, wanted) in [
            ("Always", seen(Running, 0), Observed::default(), Observed::default(), "Pending"),
            ("Always", seen(Exited, 1), Observed::default(), Observed::default(), "Pending"),
            ("Never", seen(Exited, 1), Observed::default(), Observed::default(), "Failed"),
            ("Always", done(), seen(Running, 0), Observed::default(), "Pending"),
            ("Always", done(), seen(Running, 0), seen(Exited, 0), "Running"),
            ("Never", done(), seen(Running, 0), seen(Exited, 1), "Running"),
            ("Never", done(), done(), seen(Exited, 1), "Failed"),
            ("Never", done(), done(), done(), "Succeeded"),
            ("OnFailure", done(), done(), seen(Exited, 1), "Running"),
            ("OnFailure", done(), done(), done(), "Succeeded"),
        ] {
            assert_eq!(phase(&pod(policy), &observed(init, a, b)), wanted, "{policy}");
        }
    }

    #[test]
    fn a_pod_is_ready_when_all_its_containers_are() {
        let done = seen(ContainerState::Exited, 0);
        let running = seen(ContainerState::Running, 0);
        let condition = |status: &PodStatus, type_: &str| {
            status
                .conditions
                .iter()
                .flatten()
                .find(|condition| condition.type_ == type_)
                .map(|condition| condition.status.clone())
        };
        let status = of(&pod("Always"), &observed(done.clone(), running.clone(), running.clone()), &[]);
        assert_eq!(condition(&status, "Ready").as_deref(), Some("True"));
        let unready = Observed { ready: false, ..running.clone() };
        let status = of(&pod("Always"), &observed(done, running, unready), &[]);
        assert_eq!(condition(&status, "Ready").as_deref(), Some("False"));
        assert_eq!(condition(&status, "Initialized").as_deref(), Some("True"));
    }
}

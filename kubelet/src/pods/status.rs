//! A pod's status as a value computed from its specification and what is observed of its containers.

use std::collections::HashMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::core::v1::{Container, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::resize::Progress;
use super::resolved::is_sidecar;
use crate::cri::{ContainerState, ContainerUser, ExitStatus};
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
    /// The image that the newest incarnation was made of, as its pod named it.
    pub image: Option<String>,
    /// An init container's run in an earlier sandbox, which counts no more.
    pub stale: bool,
    /// Who its first process runs as.
    pub user: Option<ContainerUser>,
}

/// One incarnation.
#[derive(Clone, Debug)]
pub(crate) struct Incarnation {
    pub id: ContainerId,
    /// The sandbox that it ran in, while anybody knows.
    pub sandbox: Option<ContainerId>,
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
    /// What holds a resize up.
    pub resize: Option<Progress>,
}

/// Reasons of failures that are the node's doing and none of the pod's.
const BY_KUBELET: [&str; 3] = ["Evicted", "Terminated", "Preempting"];

/// Conditions that come and go.
pub(crate) const PASSING_CONDITIONS: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];

/// Whether a condition is the kubelet's to write.
pub(crate) fn is_own_condition(type_: &str) -> bool {
    const LASTING: [&str; 6] =
        ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled", "DisruptionTarget"];
    LASTING.contains(&type_) || PASSING_CONDITIONS.contains(&type_)
}

/// Whether the pod has ended for good, as far as the API knows.
pub(crate) fn is_final(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"))
}

/// `pod` with the status of `told`, but for what others decide: conditions of theirs, and the end.
pub(crate) fn with_status_of(pod: &Pod, told: &Pod) -> Pod {
    let theirs = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let theirs: Vec<_> = theirs.filter(|condition| !is_own_condition(&condition.type_)).cloned().collect();
    let mut status = told.status.clone().unwrap_or_default();
    let conditions = status.conditions.get_or_insert_default();
    conditions.retain(|condition| is_own_condition(&condition.type_));
    conditions.extend(theirs);
    if is_final(pod)
        && let Some(decided) = &pod.status
    {
        status.phase = decided.phase.clone();
        status.reason = decided.reason.clone();
        status.message = decided.message.clone();
    }
    Pod { status: Some(status), ..pod.clone() }
}

/// A container of which only the API knows that it ran: what was known of it is gone, as after a reboot.
pub(crate) fn remembered(pod: &Pod, container: &str) -> Option<Incarnation> {
    let status = pod.status.as_ref()?;
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let held = lists.into_iter().flat_map(|list| list.iter().flatten()).find(|held| held.name == container)?;
    let id = ContainerId::parse(held.container_id.as_deref()?.rsplit('/').next()?)?;
    let nanoseconds =
        |time: &Option<Time>| time.as_ref().map_or(0, |time| i64::try_from(time.0.as_nanosecond()).unwrap_or_default());
    let state = held.state.as_ref()?;
    let (started_at, exit) = match (&state.terminated, &state.running) {
        (Some(ended), _) => {
            let finished_at = nanoseconds(&ended.finished_at);
            let oom_killed = ended.reason.as_deref() == Some("OOMKilled");
            (
                nanoseconds(&ended.started_at),
                Some(ExitStatus { code: ended.exit_code, signal: None, oom_killed, finished_at }),
            )
        }
        (None, Some(running)) => (nanoseconds(&running.started_at), None),
        (None, None) => return None,
    };
    let message = state.terminated.as_ref().and_then(|ended| ended.message.clone());
    Some(Incarnation {
        id,
        sandbox: None,
        attempt: u32::try_from(held.restart_count).unwrap_or_default(),
        state: if exit.is_some() { ContainerState::Exited } else { ContainerState::Unknown },
        started_at,
        exit,
        message: message.unwrap_or_else(|| "The container could not be located when the pod was started".into()),
    })
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
        allocated_resources: container.resources.as_ref().and_then(|resources| resources.requests.clone()),
        resources: Some(container.resources.clone().unwrap_or_default()),
        user: observed.user.as_ref().map(|user| core::ContainerUser {
            linux: Some(core::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: Some(user.supplemental_groups.iter().map(|group| (*group).into()).collect()),
            }),
        }),
        volume_mounts: container.volume_mounts.as_ref().map(|mounts| mounts.iter().map(volume_mount).collect()),
        ..core::ContainerStatus::default()
    }
}

fn volume_mount(mount: &core::VolumeMount) -> core::VolumeMountStatus {
    let read_only = mount.read_only == Some(true);
    core::VolumeMountStatus {
        name: mount.name.clone(),
        mount_path: mount.mount_path.clone(),
        read_only: read_only.then_some(true),
        recursive_read_only: read_only.then(|| match mount.recursive_read_only.as_deref() {
            // Every kernel that the product supports can do it.
            Some("IfPossible" | "Enabled") => "Enabled".to_owned(),
            _ => "Disabled".to_owned(),
        }),
        ..core::VolumeMountStatus::default()
    }
}

/// Whether an init container has done its part: ended well, or, of a sidecar, started.
pub(crate) fn init_done(container: &Container, observed: &Observed) -> bool {
    if is_sidecar(container) {
        return observed.started;
    }
    !observed.stale && observed.waiting.is_none() && observed.exited() == Some(0)
}

/// Whether the init containers are past: all have done their part, or, though a sidecar has ended since, an app container
/// was made after them.
pub(crate) fn is_initialized(pod: &Pod, observed: &PodObserved) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let empty = Observed::default();
    let seen = |container: &Container| observed.containers.get(&container.name).unwrap_or(&empty);
    let inits = || spec.init_containers.iter().flatten();
    let fresh = inits().all(|container| is_sidecar(container) || init_done(container, seen(container)));
    let begun = spec
        .containers
        .iter()
        .any(|container| seen(container).current.as_ref().is_some_and(|current| current.sandbox.is_some()));
    inits().all(|container| init_done(container, seen(container))) || (fresh && begun)
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
    let initialized = is_initialized(pod, observed);
    for container in spec.init_containers.iter().flatten() {
        let seen = of(container);
        if initialized || init_done(container, &seen) {
            continue;
        }
        return match seen.exited() {
            Some(code) if seen.waiting.is_none() && !seen.stale && !restarts(pod, container, true, code) => "Failed",
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
    let initialized = is_initialized(pod, observed);
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
    if let Some((reason, message)) = &observed.failure
        && BY_KUBELET.contains(&reason.as_str())
    {
        set("DisruptionTarget", true, Some("TerminationByKubelet"), Some(message.clone()));
    }
    if let Some(progress) = &observed.resize {
        set(progress.type_, true, progress.reason, Some(progress.message.clone()));
    }
    let passed = |type_: &str| observed.resize.as_ref().is_none_or(|progress| progress.type_ != type_);
    conditions.retain(|held| !(PASSING_CONDITIONS.contains(&held.type_.as_str()) && passed(&held.type_)));
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
            sandbox: Some(ContainerId::derive("u", "", 0)),
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

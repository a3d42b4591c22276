//! What a Deployment's status says: counts, availability, progress.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentSpec, DeploymentStatus, ReplicaSetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::super::replica_set::truncated;
use super::{Sets, bounds, status_of, wanted};

const DEFAULT_PROGRESS_DEADLINE_S: i32 = 600;
/// The deadline that means none.
const NO_DEADLINE: i32 = i32::MAX;
const PROGRESSING: &str = "Progressing";
const CREATE_ERROR: &str = "ReplicaSetCreateError";

/// Conditions, and the time at which they are set.
struct Conditions {
    all: Vec<DeploymentCondition>,
    now: Timestamp,
}

impl Conditions {
    fn reason(&self, type_: &str) -> Option<&str> {
        self.all.iter().find(|condition| condition.type_ == type_)?.reason.as_deref()
    }

    /// Sets a condition unless it says so already.
    fn set(&mut self, type_: &str, status: &str, reason: &str, message: impl Into<String>) {
        let held = self.all.iter().any(|one| one.type_ == type_ && one.status == status);
        if !held || self.reason(type_) != Some(reason) {
            self.renew(type_, status, reason, message);
        }
    }

    /// Sets a condition; the transition time moves with the status, the update time always.
    fn renew(&mut self, type_: &str, status: &str, reason: &str, message: impl Into<String>) {
        let now = Time(truncated(self.now));
        let before = self.all.iter().find(|one| one.type_ == type_ && one.status == status);
        let since = before.and_then(|before| before.last_transition_time.clone());
        self.remove(type_);
        self.all.push(DeploymentCondition {
            type_: type_.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_transition_time: since.or_else(|| Some(now.clone())),
            last_update_time: Some(now),
        });
    }

    fn remove(&mut self, type_: &str) {
        self.all.retain(|condition| condition.type_ != type_);
    }
}

/// The pods of a Deployment, counted.
#[derive(Clone, Copy)]
struct Counts {
    all: i32,
    updated: i32,
    ready: i32,
    available: i32,
}

impl Counts {
    fn are_complete(self, wanted: i32) -> bool {
        [self.all, self.updated, self.available] == [wanted; 3]
    }

    fn written(status: Option<&DeploymentStatus>) -> Self {
        let of = |count: fn(&DeploymentStatus) -> Option<i32>| status.and_then(count).unwrap_or_default();
        Self {
            all: of(|status| status.replicas),
            updated: of(|status| status.updated_replicas),
            ready: of(|status| status.ready_replicas),
            available: of(|status| status.available_replicas),
        }
    }

    /// Whether a rollout has come further since then.
    fn are_beyond(self, before: Self) -> bool {
        self.updated > before.updated
            || self.all - self.updated < before.all - before.updated
            || self.ready > before.ready
            || self.available > before.available
    }
}

/// Whether the last status tells of a finished rollout of this specification.
pub(super) fn is_complete(deployment: &Deployment, spec: &DeploymentSpec) -> bool {
    let status = deployment.status.as_ref();
    Counts::written(status).are_complete(spec.replicas.unwrap_or(1))
        && status.is_some_and(|status| status.observed_generation >= deployment.metadata.generation)
}

/// Notes that the new set cannot be made; says whether that is news. Without a deadline nobody asks how it goes.
pub(super) fn failed_to_create(deployment: &mut Deployment, note: &str, now: Timestamp) -> bool {
    if deployment.spec.as_ref().and_then(|spec| spec.progress_deadline_seconds) == Some(NO_DEADLINE) {
        return false;
    }
    let written = deployment.status.get_or_insert_default().conditions.get_or_insert_default();
    let mut conditions = Conditions { all: written.clone(), now };
    conditions.set(PROGRESSING, "False", CREATE_ERROR, note);
    let news = conditions.all != *written;
    *written = conditions.all;
    news
}

/// The status that the sets amount to, and when the progress deadline asks for another look.
pub(super) fn of(
    deployment: &Deployment,
    spec: &DeploymentSpec,
    sets: &Sets,
    now: Timestamp,
) -> (DeploymentStatus, Option<Duration>) {
    let sum = |count: fn(&ReplicaSetStatus) -> Option<i32>| sets.all().map(|set| status_of(set, count)).sum::<i32>();
    let counts = Counts {
        all: sum(|status| Some(status.replicas)),
        updated: sets.new.as_ref().map_or(0, |new| status_of(new, |status| Some(status.replicas))),
        ready: sum(|status| status.ready_replicas),
        available: sum(|status| status.available_replicas),
    };
    let before = deployment.status.as_ref();
    let mut conditions =
        Conditions { all: before.and_then(|status| status.conditions.clone()).unwrap_or_default(), now };
    if counts.available >= spec.replicas.unwrap_or(1) - bounds(spec).max_unavailable {
        conditions.set("Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.");
    } else {
        let message = "Deployment does not have minimum availability.";
        conditions.set("Available", "False", "MinimumReplicasUnavailable", message);
    }
    let told = sets.all().flat_map(|set| set.status.iter().flat_map(|status| status.conditions.iter().flatten()));
    match told.into_iter().find(|condition| condition.type_ == "ReplicaFailure") {
        Some(failure) => {
            let reason = failure.reason.as_deref().unwrap_or_default();
            conditions.set("ReplicaFailure", "True", reason, failure.message.clone().unwrap_or_default());
        }
        None => conditions.remove("ReplicaFailure"),
    }
    let next = progress(&mut conditions, deployment, spec, sets, counts);
    let non_zero = |count: i32| (count != 0).then_some(count);
    let status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: non_zero(counts.all),
        updated_replicas: non_zero(counts.updated),
        ready_replicas: non_zero(counts.ready),
        available_replicas: non_zero(counts.available),
        unavailable_replicas: non_zero((sets.all().map(wanted).sum::<i32>() - counts.available).max(0)),
        collision_count: before.and_then(|status| status.collision_count),
        terminating_replicas: Some(sum(|status| status.terminating_replicas)),
        conditions: Some(conditions.all),
    };
    (status, next)
}

/// Keeps the condition Progressing; returns when the deadline comes.
fn progress(
    conditions: &mut Conditions,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    sets: &Sets,
    counts: Counts,
) -> Option<Duration> {
    let deadline = spec.progress_deadline_seconds.unwrap_or(DEFAULT_PROGRESS_DEADLINE_S);
    if deadline == NO_DEADLINE {
        conditions.remove(PROGRESSING);
        return None;
    }
    if spec.paused == Some(true) {
        // What has failed already is not made good by a pause.
        if conditions.reason(PROGRESSING) != Some("ProgressDeadlineExceeded") {
            conditions.set(PROGRESSING, "Unknown", "DeploymentPaused", "Deployment is paused");
        }
        return None;
    }
    if conditions.reason(PROGRESSING) == Some("DeploymentPaused") {
        conditions.renew(PROGRESSING, "Unknown", "DeploymentResumed", "Deployment is resumed");
    }
    let name = sets.new.as_ref().map_or_else(
        || format!("Deployment \"{}\"", deployment.name_any()),
        |new| format!("ReplicaSet \"{}\"", new.name_any()),
    );
    if counts.are_complete(spec.replicas.unwrap_or(1)) && sets.new.is_some() {
        let message = format!("{name} has successfully progressed.");
        conditions.set(PROGRESSING, "True", "NewReplicaSetAvailable", message);
        return None;
    }
    let reason = conditions.reason(PROGRESSING);
    let finished = reason == Some("NewReplicaSetAvailable");
    if finished && counts.all == counts.updated && sets.new.is_some() {
        // A finished rollout that lost a pod, or is to have more, is not a rollout.
        return None;
    }
    let nothing_said = reason.is_none() || reason == Some(CREATE_ERROR);
    match &sets.new {
        Some(new) if nothing_said && counts.updated == 0 => {
            let message = format!("Created new replica set \"{}\"", new.name_any());
            conditions.renew(PROGRESSING, "True", "NewReplicaSetCreated", message);
        }
        _ if nothing_said || finished || counts.are_beyond(Counts::written(deployment.status.as_ref())) => {
            conditions.renew(PROGRESSING, "True", "ReplicaSetUpdated", format!("{name} is progressing."));
        }
        _ => {}
    }
    let held = conditions.all.iter().find(|condition| condition.type_ == PROGRESSING);
    let since = held.and_then(|condition| condition.last_update_time.as_ref()).map_or(conditions.now, |time| time.0);
    let left = i64::from(deadline) - conditions.now.duration_since(since).as_secs();
    if left <= 0 {
        let message = format!("{name} has timed out progressing.");
        conditions.set(PROGRESSING, "False", "ProgressDeadlineExceeded", message);
        return None;
    }
    u64::try_from(left).ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The condition Progressing after a look `seconds` after the last: its reason, and whether another look is due.
    fn look(deployment: &mut Deployment, new: Value, old: Value, second: i64) -> (String, bool) {
        let set = |status: Value| {
            serde_json::from_value(
                json!({"metadata": {"name": "s"}, "spec": {"replicas": 1, "selector": {}}, "status": status}),
            )
            .expect("a set")
        };
        let sets = Sets { new: Some(set(new)), old: vec![set(old)] };
        let now = Timestamp::from_second(1_800_000_000 + second).expect("a time");
        let spec = deployment.spec.clone().expect("a specification");
        let (status, next) = of(deployment, &spec, &sets, now);
        let found = status.conditions.iter().flatten().find(|one| one.type_ == PROGRESSING);
        let reason = found.and_then(|one| one.reason.clone()).unwrap_or_default();
        deployment.status = Some(status);
        (reason, next.is_some())
    }

    #[test]
    fn progress_is_told_until_the_deadline() {
        let spec = json!({"replicas": 1, "selector": {}, "template": {}, "progressDeadlineSeconds": 10});
        let mut deployment: Deployment =
            serde_json::from_value(json!({"metadata": {"name": "d", "generation": 1}, "spec": spec})).expect("one");
        let (none, up) = (json!({"replicas": 0}), json!({"replicas": 1, "readyReplicas": 1, "availableReplicas": 1}));
        let made = json!({"replicas": 1});
        assert_eq!(look(&mut deployment, none.clone(), up.clone(), 0), ("NewReplicaSetCreated".into(), true));
        assert_eq!(look(&mut deployment, made.clone(), up.clone(), 5), ("ReplicaSetUpdated".into(), true));
        assert_eq!(look(&mut deployment, made.clone(), up.clone(), 14), ("ReplicaSetUpdated".into(), true));
        assert_eq!(look(&mut deployment, made.clone(), up.clone(), 15), ("ProgressDeadlineExceeded".into(), false));
        // A pause does not hide it, and what comes after all is progress.
        deployment.spec.as_mut().expect("one").paused = Some(true);
        assert_eq!(look(&mut deployment, made.clone(), up.clone(), 16), ("ProgressDeadlineExceeded".into(), false));
        deployment.spec.as_mut().expect("one").paused = None;
        assert_eq!(look(&mut deployment, up.clone(), none.clone(), 17), ("NewReplicaSetAvailable".into(), false));
        // A pod that is lost later is no rollout.
        assert_eq!(look(&mut deployment, made, none, 18), ("NewReplicaSetAvailable".into(), false));
    }
}

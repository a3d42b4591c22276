//! Whether a Job is over, and why. Values to values.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::policy;
use super::tally::{Tally, indexed};
use crate::common::pods;
use crate::workloads::replica_set::truncated;

/// Will fail once its pods are gone.
pub(super) const FAILURE_TARGET: &str = "FailureTarget";
/// Will be complete once its pods are gone.
pub(super) const SUCCESS_MET: &str = "SuccessCriteriaMet";
pub(super) const COMPLETE: &str = "Complete";
pub(super) const FAILED: &str = "Failed";
pub(super) const SUSPENDED: &str = "Suspended";

/// A condition that holds, or does not, from now on.
pub(super) fn condition(type_: &str, holds: bool, reason: &str, message: &str, now: Timestamp) -> JobCondition {
    let now = Some(Time(truncated(now)));
    JobCondition {
        type_: type_.into(),
        status: if holds { "True" } else { "False" }.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: now.clone(),
        last_transition_time: now,
    }
}

/// The condition of this type, if it holds.
pub(super) fn holding<'a>(conditions: &'a [JobCondition], type_: &str) -> Option<&'a JobCondition> {
    conditions.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// Whether the Job has ended for good.
pub(crate) fn is_finished(job: &Job) -> bool {
    finish(job).is_some()
}

/// The condition that a Job ended with.
pub(crate) fn finish(job: &Job) -> Option<&JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_deref()?;
    holding(conditions, COMPLETE).or_else(|| holding(conditions, FAILED))
}

/// When the Job's deadline comes, from its start.
pub(super) fn deadline(job: &Job, spec: &JobSpec) -> Option<Timestamp> {
    let start = job.status.as_ref()?.start_time.as_ref()?.0;
    let seconds = spec.active_deadline_seconds.filter(|_| spec.suspend != Some(true))?;
    start.checked_add(SignedDuration::from_secs(seconds)).ok()
}

/// What decides over the Job now, if anything does: a failure first.
pub(super) fn verdict(
    job: &Job,
    spec: &JobSpec,
    pods: &[Arc<Pod>],
    tally: &Tally,
    now: Timestamp,
) -> Option<JobCondition> {
    let fails = |reason: &str, message: &str| Some(condition(FAILURE_TARGET, true, reason, message, now));
    if let Some(why) = &tally.fails_job {
        return fails("PodFailurePolicy", why);
    }
    let limit = spec.backoff_limit.unwrap_or(6);
    if tally.failed > limit || restarts_exceed(spec, pods, limit) {
        return fails("BackoffLimitExceeded", "Job has reached the specified backoff limit");
    }
    if deadline(job, spec).is_some_and(|deadline| deadline <= now) {
        return fails("DeadlineExceeded", "Job was active longer than specified deadline");
    }
    if indexed(spec) && spec.backoff_limit_per_index.is_some() {
        let failed = tally.failed_indexes.len();
        if spec.max_failed_indexes.is_some_and(|most| failed > most) {
            let message = "Job has exceeded the specified maximal number of failed indexes";
            return fails("MaxFailedIndexesExceeded", message);
        }
        if failed > 0 && failed + tally.completed.len() >= spec.completions.unwrap_or_default() {
            return fails("FailedIndexes", "Job has failed indexes");
        }
    }
    if let Some(policy) = spec.success_policy.as_ref().filter(|_| indexed(spec))
        && let Some(rule) = policy::success(policy, &tally.completed, spec.completions.unwrap_or_default())
    {
        let message = format!("Matched rules at index {rule}");
        return Some(condition(SUCCESS_MET, true, "SuccessPolicy", &message, now));
    }
    let complete = match spec.completions {
        Some(wanted) => tally.succeeded >= wanted,
        // Without a number, the first success says that the work is done; the others end by themselves.
        None => tally.succeeded > 0 && !pods.iter().any(|pod| pods::is_active(pod)),
    };
    complete
        .then(|| condition(SUCCESS_MET, true, "CompletionsReached", "Reached expected number of succeeded pods", now))
}

/// Whether containers that are restarted in place have failed too often.
fn restarts_exceed(spec: &JobSpec, pods: &[Arc<Pod>], limit: i32) -> bool {
    if spec.template.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let live = pods.iter().filter(|pod| matches!(pods::phase(pod), "Running" | "Pending"));
    let restarts: i32 = live
        .flat_map(|pod| pod.status.iter())
        .flat_map(|status| {
            status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
        })
        .map(|container| container.restart_count)
        .sum();
    if limit == 0 { restarts > 0 } else { restarts >= limit }
}

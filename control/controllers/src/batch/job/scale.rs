//! Which pods a Job makes and removes next. Values to values.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::tally::{self, FINALIZER, INDEX, INDEX_FAILURES, INDEX_IGNORED, Tally, index_of, indexed, terminating};
use crate::common::replica::Replica;
use crate::common::{control, pods};
use crate::machine::controller_reference;

/// Pause after a failure; doubles with each further one.
const BACKOFF_FIRST: SignedDuration = SignedDuration::from_secs(10);
/// Longest pause.
const BACKOFF_MOST: SignedDuration = SignedDuration::from_mins(10);
const INDEX_ENV: &str = "JOB_COMPLETION_INDEX";
/// Longest host name, in bytes.
const MAX_HOSTNAME: usize = 63;

/// What is to be done.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) delete: Vec<Arc<Pod>>,
    pub(super) create: Vec<Pod>,
    /// When failed pods may be replaced.
    pub(super) wait: Option<Duration>,
}

/// The pause that so many failures in a row ask for.
fn pause(failures: i32) -> SignedDuration {
    match failures {
        ..=0 => SignedDuration::ZERO,
        n => BACKOFF_FIRST.checked_mul(1 << (n - 1).min(10)).unwrap_or(BACKOFF_MOST).min(BACKOFF_MOST),
    }
}

/// How long until a pod may be made after the failures since the last success.
fn backoff(pods: &[Arc<Pod>], now: Timestamp) -> SignedDuration {
    let ended = |phase: &'static str| {
        pods.iter().filter(move |pod| pods::phase(pod) == phase).filter_map(|pod| tally::ended_at(pod))
    };
    let success = ended("Succeeded").max();
    let since = ended("Failed").filter(|failure| success.is_none_or(|success| *failure > success));
    let (count, last) = since.fold((0, None), |(count, last), failure| (count + 1, last.max(Some(failure))));
    remaining(count, last, now)
}

fn remaining(failures: i32, last: Option<Timestamp>, now: Timestamp) -> SignedDuration {
    last.map_or(SignedDuration::ZERO, |last| (pause(failures) - now.duration_since(last)).max(SignedDuration::ZERO))
}

/// The pods to remove and to make; never both at once.
pub(super) fn change(job: &Job, spec: &JobSpec, all: &[Arc<Pod>], tally: &Tally, now: Timestamp) -> Change {
    let active: Vec<_> = all.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
    if spec.suspend == Some(true) {
        return Change { delete: active, ..Change::default() };
    }
    let parallelism = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or_default();
    let wanted = match spec.completions {
        None if tally.succeeded > 0 => active.len().min(parallelism),
        None => parallelism,
        Some(completions) => {
            let over = tally.succeeded + tally.failed_indexes.len();
            usize::try_from(completions - over).unwrap_or_default().min(parallelism)
        }
    };
    let delete = surplus(spec, &active, tally, wanted);
    if !delete.is_empty() {
        return Change { delete, ..Change::default() };
    }
    let leaving = if tally::waits_for_end(spec) { all.iter().filter(|pod| terminating(pod)).count() } else { 0 };
    let missing = wanted.saturating_sub(active.len() + leaving).min(control::BURST);
    if missing == 0 {
        return Change::default();
    }
    let mut change = Change::default();
    let mut wait = |left: SignedDuration| {
        let left = Duration::try_from(left).unwrap_or_default();
        change.wait = Some(change.wait.map_or(left, |known| known.min(left)));
    };
    let pods = if !indexed(spec) {
        let left = backoff(all, now);
        if left > SignedDuration::ZERO {
            wait(left);
            return change;
        }
        vec![pod(job, spec, None, tally); missing]
    } else {
        let left = if spec.backoff_limit_per_index.is_none() { backoff(all, now) } else { SignedDuration::ZERO };
        if left > SignedDuration::ZERO {
            wait(left);
            return change;
        }
        let busy: BTreeSet<i32> = all
            .iter()
            .filter(|pod| pods::is_active(pod) || (tally::waits_for_end(spec) && terminating(pod)))
            .filter_map(|pod| index_of(pod, spec))
            .collect();
        let open = (0..spec.completions.unwrap_or_default()).filter(|index| {
            !busy.contains(index) && !tally.completed.contains(*index) && !tally.failed_indexes.contains(*index)
        });
        let mut pods = Vec::new();
        for index in open.take(missing) {
            let failures = tally.by_index.get(&index).copied().unwrap_or_default();
            let left = remaining(failures.counted + failures.ignored, failures.last, now);
            if left > SignedDuration::ZERO {
                wait(left);
            } else {
                pods.push(pod(job, spec, Some(index), tally));
            }
        }
        pods
    };
    change.create = pods;
    change
}

/// Active pods that are too many: first those whose index has another, is over or is none, then the least useful.
fn surplus(spec: &JobSpec, active: &[Arc<Pod>], tally: &Tally, wanted: usize) -> Vec<Arc<Pod>> {
    let mut ranked = active.to_vec();
    ranked.sort_by_cached_key(|pod| Replica::of(pod).rank(0));
    if !indexed(spec) {
        ranked.truncate(active.len().saturating_sub(wanted));
        return ranked;
    }
    let mut seen = BTreeSet::new();
    let (mut keep, mut surplus) = (Vec::new(), Vec::new());
    // The most useful first: of two with one index it stays.
    for pod in ranked.into_iter().rev() {
        let open = index_of(&pod, spec)
            .filter(|index| !tally.completed.contains(*index) && !tally.failed_indexes.contains(*index));
        match open {
            Some(index) if seen.insert(index) => keep.push(pod),
            _ => surplus.push(pod),
        }
    }
    // High indexes go first.
    keep.sort_by_key(|pod| index_of(pod, spec));
    surplus.extend(keep.split_off(keep.len().min(wanted)));
    surplus
}

/// A pod of the Job; for an index, one that knows its own.
fn pod(job: &Job, spec: &JobSpec, index: Option<i32>, tally: &Tally) -> Pod {
    let name = job.name_any();
    let prefix = index.map_or_else(|| name.clone(), |index| format!("{name}-{index}"));
    let mut pod = pods::from_template(&spec.template, &prefix, controller_reference(job));
    let finalizers = pod.metadata.finalizers.get_or_insert_default();
    if !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
        finalizers.push(FINALIZER.into());
    }
    let Some(index) = index else { return pod };
    pod.labels_mut().insert(INDEX.into(), index.to_string());
    let annotations = pod.annotations_mut();
    annotations.insert(INDEX.into(), index.to_string());
    if spec.backoff_limit_per_index.is_some() {
        let failures = tally.by_index.get(&index).copied().unwrap_or_default();
        annotations.insert(INDEX_FAILURES.into(), failures.counted.to_string());
        if failures.ignored > 0 {
            annotations.insert(INDEX_IGNORED.into(), failures.ignored.to_string());
        }
    }
    let pod_spec = pod.spec.get_or_insert_default();
    if prefix.len() <= MAX_HOSTNAME {
        pod_spec.hostname = Some(prefix);
    }
    for container in pod_spec.containers.iter_mut().chain(pod_spec.init_containers.iter_mut().flatten()) {
        let env = container.env.get_or_insert_default();
        if !env.iter().any(|one| one.name == INDEX_ENV) {
            env.push(EnvVar {
                name: INDEX_ENV.into(),
                value_from: Some(EnvVarSource {
                    field_ref: Some(ObjectFieldSelector {
                        api_version: None,
                        field_path: format!("metadata.labels['{INDEX}']"),
                    }),
                    ..EnvVarSource::default()
                }),
                ..EnvVar::default()
            });
        }
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_most() {
        let seconds: Vec<_> = [0, 1, 2, 3, 6, 7, 50].into_iter().map(|n| pause(n).as_secs()).collect();
        assert_eq!(seconds, [0, 10, 20, 40, 320, 600, 600]);
    }
}

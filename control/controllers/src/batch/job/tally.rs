//! Counting a Job's pods, each once: a pod holds a finalizer until the status shows its end. First its UID goes into
//! `uncountedTerminatedPods`, then the finalizer goes, then the UID becomes a count. Values to values.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::indexes::Indexes;
use super::policy::{self, Action};
use crate::common::pods;

/// Held by a Job's pods until they are counted.
pub(super) const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
pub(super) const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// How often the index of a pod had failed before it.
pub(super) const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
/// How often the index of a pod had failed before it in a way that does not count.
pub(super) const INDEX_IGNORED: &str = "batch.kubernetes.io/job-index-ignored-failure-count";
/// Most UIDs that the status holds at once.
const MAX_UNCOUNTED: usize = 500;

/// Whether a Job's pods have indexes.
pub(super) fn indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// Whether pods on their way out are replaced only once they have ended.
pub(super) fn waits_for_end(spec: &JobSpec) -> bool {
    spec.pod_replacement_policy.as_deref() == Some("Failed")
}

fn annotation(pod: &Pod, name: &str) -> Option<i32> {
    pod.annotations().get(name)?.parse().ok()
}

/// The pod's place, if it is one of the Job's.
pub(super) fn index_of(pod: &Pod, spec: &JobSpec) -> Option<i32> {
    annotation(pod, INDEX).filter(|index| (0..spec.completions.unwrap_or_default()).contains(index))
}

pub(super) fn held(pod: &Pod) -> bool {
    pod.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

pub(super) fn terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() && !matches!(pods::phase(pod), "Succeeded" | "Failed")
}

/// When a pod ended, as well as can be told.
pub(super) fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let last =
        statuses.filter_map(|one| one.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()).map(|t| t.0).max();
    let not_ready = || pods::condition(pod, "Ready").and_then(|ready| Some(ready.last_transition_time.as_ref()?.0));
    let deleted = || pod.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    last.or_else(not_ready).or_else(deleted).or_else(|| pod.creation_timestamp().map(|time| time.0))
}

/// What is known of an index that failed and may be tried again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Failures {
    pub(super) counted: i32,
    pub(super) ignored: i32,
    pub(super) last: Option<Timestamp>,
}

/// The count after this look.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// With those whose counting is under way.
    pub(super) succeeded: i32,
    pub(super) failed: i32,
    pub(super) completed: Indexes,
    pub(super) failed_indexes: Indexes,
    /// Failures of indexes that are not over, when they are limited each.
    pub(super) by_index: BTreeMap<i32, Failures>,
    /// A pod failed in a way that fails the Job, for this reason.
    pub(super) fails_job: Option<String>,
    /// `status.succeeded` and `status.failed`.
    pub(super) counted: (i32, i32),
    pub(super) uncounted: UncountedTerminatedPods,
    /// Pods whose finalizer goes once the status is written.
    pub(super) release: Vec<Arc<Pod>>,
    /// Pods that have ended but wait for room in the status.
    pub(super) more: bool,
}

/// How the Job stands: pods that are on their way out count differently when it is about to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Ending {
    No,
    Failing,
    Succeeding,
}

impl Tally {
    pub(super) fn new(job: &Job, spec: &JobSpec, pods: &[Arc<Pod>], ending: Ending) -> Self {
        let status = job.status.clone().unwrap_or_default();
        let limit = spec.completions.unwrap_or(i32::MAX);
        let parse = |text: &Option<String>| Indexes::parse(text.as_deref().unwrap_or_default(), limit);
        let mut tally = Self {
            completed: parse(&status.completed_indexes),
            failed_indexes: parse(&status.failed_indexes),
            ..Self::default()
        };
        tally.settle(&status, pods);
        tally.add(spec, pods, ending);
        let len = |uids: &Option<Vec<String>>| i32::try_from(uids.as_ref().map_or(0, Vec::len)).unwrap_or(i32::MAX);
        if indexed(spec) {
            tally.counted.0 = tally.completed.len();
            tally.succeeded = tally.counted.0;
        } else {
            tally.succeeded = tally.counted.0 + len(&tally.uncounted.succeeded);
        }
        tally.failed = tally.counted.1 + len(&tally.uncounted.failed);
        tally
    }

    /// What was uncounted and holds no finalizer any more is counted.
    fn settle(&mut self, status: &JobStatus, pods: &[Arc<Pod>]) {
        let holding: HashSet<&str> =
            pods.iter().filter(|pod| held(pod)).filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        let split = |uids: Option<&Vec<String>>| -> (i32, Vec<String>) {
            let (keep, gone): (Vec<_>, Vec<_>) =
                uids.into_iter().flatten().cloned().partition(|uid| holding.contains(uid.as_str()));
            (i32::try_from(gone.len()).unwrap_or(i32::MAX), keep)
        };
        let uncounted = status.uncounted_terminated_pods.as_ref();
        let (succeeded, keep_succeeded) = split(uncounted.and_then(|uncounted| uncounted.succeeded.as_ref()));
        let (failed, keep_failed) = split(uncounted.and_then(|uncounted| uncounted.failed.as_ref()));
        self.counted = (status.succeeded.unwrap_or_default() + succeeded, status.failed.unwrap_or_default() + failed);
        self.uncounted = UncountedTerminatedPods {
            succeeded: (!keep_succeeded.is_empty()).then_some(keep_succeeded),
            failed: (!keep_failed.is_empty()).then_some(keep_failed),
        };
    }

    fn add(&mut self, spec: &JobSpec, pods: &[Arc<Pod>], ending: Ending) {
        let known: HashSet<String> =
            [&self.uncounted.succeeded, &self.uncounted.failed].into_iter().flatten().flatten().cloned().collect();
        let mut room = MAX_UNCOUNTED.saturating_sub(known.len());
        let mut newly = (BTreeSet::new(), BTreeSet::new());
        // An index is over once any pod of it succeeded, whatever others did.
        if indexed(spec) {
            let succeeded = pods.iter().filter(|pod| held(pod) && pods::phase(pod) == "Succeeded");
            newly.0.extend(succeeded.filter_map(|pod| index_of(pod, spec)));
        }
        let completed = self.completed.with(newly.0.iter().copied());
        // By how often their index had failed before: what a pod adds to is known when it comes.
        let per_index = spec.backoff_limit_per_index.filter(|_| indexed(spec));
        for pod in pods.iter().filter(|pod| held(pod)) {
            let uid = pod.uid().unwrap_or_default();
            if known.contains(&uid) {
                self.release.push(pod.clone());
                continue;
            }
            let index = index_of(pod, spec);
            if pods::phase(pod) == "Succeeded" {
                if !indexed(spec) {
                    if room == 0 {
                        self.more = true;
                        continue;
                    }
                    room -= 1;
                    self.uncounted.succeeded.get_or_insert_default().push(uid);
                }
                self.release.push(pod.clone());
                continue;
            }
            if !failed(pod, spec, ending) {
                continue;
            }
            let action = match pods::phase(pod) {
                "Failed" => policy::failure(spec, pod),
                _ => Action::Count,
            };
            if let (Some(limit), Some(index)) = (per_index, index) {
                let before = annotation(pod, INDEX_FAILURES).unwrap_or_default();
                let over = action == Action::FailIndex || (action != Action::Ignore && before >= limit);
                if over {
                    newly.1.insert(index);
                }
                let failures = self.by_index.entry(index).or_default();
                let ignored = action == Action::Ignore;
                failures.counted = failures.counted.max(before + i32::from(!ignored));
                let before = annotation(pod, INDEX_IGNORED).unwrap_or_default();
                failures.ignored = failures.ignored.max(before + i32::from(ignored));
                failures.last = failures.last.max(ended_at(pod));
                // The last failed pod of an index stays until another has taken over its count.
                let taken_over = pods.iter().any(|other| {
                    other.metadata.uid != pod.metadata.uid
                        && index_of(other, spec) == Some(index)
                        && (annotation(other, INDEX_FAILURES), annotation(other, INDEX_IGNORED))
                            > (annotation(pod, INDEX_FAILURES), annotation(pod, INDEX_IGNORED))
                });
                let stays = !over
                    && !taken_over
                    && ending == Ending::No
                    && !completed.contains(index)
                    && !self.failed_indexes.contains(index);
                if stays && !matches!(action, Action::FailJob(_)) {
                    continue;
                }
            }
            match action {
                Action::Ignore => {}
                _ if indexed(spec) && index.is_none() => {}
                action => {
                    if room == 0 {
                        self.more = true;
                        continue;
                    }
                    room -= 1;
                    self.uncounted.failed.get_or_insert_default().push(uid);
                    if let Action::FailJob(why) = action {
                        self.fails_job.get_or_insert(why);
                    }
                }
            }
            self.release.push(pod.clone());
        }
        self.completed = completed;
        newly.1.retain(|index| !self.completed.contains(*index));
        self.failed_indexes = self.failed_indexes.with(newly.1);
    }
}

/// Whether the pod counts as failed: it ended so, or it goes without the chance to.
fn failed(pod: &Pod, spec: &JobSpec, ending: Ending) -> bool {
    if pods::phase(pod) == "Failed" || ending == Ending::Failing {
        return true;
    }
    let never_ran = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().is_empty();
    pod.metadata.deletion_timestamp.is_some() && (never_ran || !waits_for_end(spec))
}

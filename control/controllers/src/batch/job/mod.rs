//! Job: pods that run to their end, until enough have succeeded or too many failed.

mod indexes;
mod policy;
mod scale;
mod tally;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use self::tally::{Ending, FINALIZER, Tally, held, indexed, terminating};
use self::verdict::{COMPLETE, FAILED, FAILURE_TARGET, SUCCESS_MET, SUSPENDED, condition, holding};
pub(crate) use self::verdict::{finish, is_finished};
use crate::common::owned::{self, Owned};
use crate::common::{control, pods, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_of};
use crate::workloads::replica_set::truncated;

/// Who manages a Job that names nobody.
const MANAGER: &str = "kubernetes.io/job-controller";
/// Keys of pods that hold the finalizer and belong to no Job any more; no Job's name has a slash.
const STRAY: &str = "pod/";

pub(crate) struct Jobs {
    host: Host,
    jobs: Arc<Informer<Job>>,
    pods: Arc<Informer<Pod>>,
    owned: Arc<Owned<Pod>>,
}

impl Jobs {
    pub(crate) fn new(api: &Arc<ApiServer>, owned: &Arc<Owned<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { jobs: host.informer(), pods: host.informer(), owned: owned.clone(), host }
    }

    fn pod_changed(&self, delta: &Delta<Pod>, queue: &WorkQueue<Key>) {
        owned::enqueue(delta, &self.jobs, queue, selects);
        if let Some(pod) = delta.new.as_ref().filter(|pod| held(pod)) {
            let namespace = pod.namespace().unwrap_or_default();
            if self.job_of(pod).is_none() {
                queue.add(Key::new(&namespace, &format!("{STRAY}{}", pod.name_any())));
            }
        }
    }

    /// The Job that a pod belongs to, if it is there.
    fn job_of(&self, pod: &Pod) -> Option<Arc<Job>> {
        let namespace = pod.namespace().unwrap_or_default();
        match controller_of(&pod.metadata) {
            Some(owner) => self.jobs.get(&namespace, &owner.name).filter(|job| job.uid().as_ref() == Some(&owner.uid)),
            // One that is about to adopt it.
            None => self
                .jobs
                .list_ns(&namespace)
                .find(|job| job.metadata.deletion_timestamp.is_none() && selects(job, pod.metadata.labels.as_ref())),
        }
    }

    /// Lets a pod go whose Job is gone.
    async fn release_stray(&self, namespace: &str, name: &str) -> Result<(), Error> {
        let Some(pod) = self.pods.get(namespace, name).filter(|pod| held(pod)) else { return Ok(()) };
        if self.job_of(&pod).is_some() {
            return Ok(());
        }
        self.release(&Api::namespaced(self.host.client.clone(), namespace), &pod).await
    }

    /// Takes the finalizer from a pod.
    async fn release(&self, api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
        let patch = serde_json::json!({"metadata": {
            "uid": pod.uid(), "resourceVersion": pod.resource_version(),
            "finalizers": owned::without(&pod.metadata, FINALIZER),
        }});
        match self.host.patch(api, &pod.name_any(), patch).await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result.map(|_| ()),
        }
    }

    /// Removes pods without counting them: their finalizer goes first.
    async fn remove(&self, job: &Job, api: &Api<Pod>, pods: &[Arc<Pod>]) -> Result<(), Error> {
        let calls: Vec<_> = pods.iter().take(control::BURST).map(|pod| self.drop_pod(job, api, pod)).collect();
        control::collect(calls).await
    }

    async fn drop_pod(&self, job: &Job, api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
        if held(pod) {
            self.release(api, pod).await?;
        }
        control::delete(&self.host, job, api, pod).await
    }

    async fn event(&self, job: &Job, type_: EventType, reason: &str, message: &str) {
        self.host.event(job, type_, reason, reason, message.into()).await;
    }

    async fn sync(&self, job: &Job, spec: &JobSpec, now: Timestamp) -> Result<Outcome, Error> {
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &job.namespace().unwrap_or_default());
        let pods = owned::claim(&self.host, job, self.owned.candidates(job), Some(FINALIZER), |pod: &Pod| {
            selects(job, pod.metadata.labels.as_ref())
        })
        .await?;
        let before = job.status.clone().unwrap_or_default();
        let mut conditions = before.conditions.clone().unwrap_or_default();
        let ending = if job.metadata.deletion_timestamp.is_some() || holding(&conditions, FAILURE_TARGET).is_some() {
            Ending::Failing
        } else if holding(&conditions, SUCCESS_MET).is_some() {
            Ending::Succeeding
        } else {
            Ending::No
        };
        let mut tally = Tally::new(job, spec, &pods, ending);
        let mut outcome = Outcome::Done;
        let mut changed = Ok(());
        if ending == Ending::No {
            match verdict::verdict(job, spec, &pods, &tally, now) {
                Some(verdict) => {
                    // From here on pods count in another way.
                    let ending = if verdict.type_ == FAILURE_TARGET { Ending::Failing } else { Ending::Succeeding };
                    tally = Tally::new(job, spec, &pods, ending);
                    conditions.push(verdict);
                }
                None => {
                    let change = scale::change(job, spec, &pods, &tally, now);
                    outcome = change.wait.map_or(Outcome::Done, Outcome::After);
                    changed = self.remove(job, &api, &change.delete).await;
                    if changed.is_ok() {
                        changed = control::create_all(&self.host, job, &api, change.create).await;
                    }
                }
            }
        }
        let over = holding(&conditions, FAILURE_TARGET).or_else(|| holding(&conditions, SUCCESS_MET)).cloned();
        let status = self.status(job, spec, &pods, &tally, &conditions, over.as_ref(), now);
        if job.status.as_ref() != Some(&status) {
            let jobs: Api<Job> = Api::namespaced(self.host.client.clone(), &job.namespace().unwrap_or_default());
            let mut written = job.clone();
            written.status = Some(status.clone());
            self.host.replace_status(&jobs, &written).await?;
            self.announce(job, &before, &status).await;
        }
        // Only now that the status shows them may the pods go.
        let releases: Vec<_> = tally.release.iter().map(|pod| self.release(&api, pod)).collect();
        control::collect(releases).await?;
        if over.is_some() {
            let active: Vec<_> = pods.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
            control::delete_all(&self.host, job, &api, active).await?;
        }
        changed?;
        let deadline = verdict::deadline(&Job { status: Some(status), ..job.clone() }, spec)
            .filter(|_| over.is_none())
            .and_then(|deadline| Duration::try_from(deadline.duration_since(now)).ok());
        Ok(match (outcome, deadline) {
            (Outcome::After(wait), Some(deadline)) => Outcome::After(wait.min(deadline)),
            (Outcome::Done, Some(deadline)) => Outcome::After(deadline),
            (outcome, None) => outcome,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "each is another part of what the status is made from")]
    fn status(
        &self,
        job: &Job,
        spec: &JobSpec,
        pods: &[Arc<Pod>],
        tally: &Tally,
        conditions: &[JobCondition],
        over: Option<&JobCondition>,
        now: Timestamp,
    ) -> JobStatus {
        let count = |keep: &dyn Fn(&Pod) -> bool| {
            i32::try_from(pods.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX)
        };
        let non_zero = |count: i32| (count != 0).then_some(count);
        let (active, leaving) = (count(&pods::is_active), count(&terminating));
        let before = job.status.clone().unwrap_or_default();
        let mut status = JobStatus {
            active: non_zero(active),
            ready: Some(count(&|pod| pods::is_active(pod) && pods::is_ready(pod))),
            terminating: Some(leaving),
            succeeded: non_zero(tally.counted.0),
            failed: non_zero(tally.counted.1),
            completed_indexes: (!tally.completed.is_empty()).then(|| tally.completed.to_string()),
            failed_indexes: spec.backoff_limit_per_index.map(|_| tally.failed_indexes.to_string()),
            uncounted_terminated_pods: Some(tally.uncounted.clone()),
            start_time: before.start_time,
            completion_time: before.completion_time,
            conditions: None,
        };
        let mut conditions = conditions.to_vec();
        suspend(spec, over.is_some(), &mut conditions, &mut status, now);
        let counted = tally.uncounted.succeeded.is_none() && tally.uncounted.failed.is_none() && !tally.more;
        let gone = active == 0 && leaving == 0 && !pods.iter().any(|pod| held(pod));
        if let Some(over) = over.filter(|_| counted && gone) {
            let type_ = if over.type_ == FAILURE_TARGET { FAILED } else { COMPLETE };
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            conditions.push(condition(type_, true, &text(&over.reason), &text(&over.message), now));
            if type_ == COMPLETE {
                status.completion_time = Some(Time(truncated(now)));
            }
        }
        status.conditions = (!conditions.is_empty()).then_some(conditions);
        status
    }

    /// Tells users what the new status says for the first time.
    async fn announce(&self, job: &Job, before: &JobStatus, after: &JobStatus) {
        let held_before = |type_: &str, status: &str| {
            before.conditions.iter().flatten().any(|one| one.type_ == type_ && one.status == status)
        };
        for new in after.conditions.iter().flatten().filter(|new| !held_before(&new.type_, &new.status)) {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            match (new.type_.as_str(), new.status.as_str()) {
                (COMPLETE, _) => self.event(job, EventType::Normal, "Completed", "Job completed").await,
                (FAILED, _) => self.event(job, EventType::Warning, &text(&new.reason), &text(&new.message)).await,
                (SUSPENDED, "True") => self.event(job, EventType::Normal, "Suspended", "Job suspended").await,
                (SUSPENDED, _) => self.event(job, EventType::Normal, "Resumed", "Job resumed").await,
                _ => {}
            }
        }
    }
}

/// Keeps the condition Suspended and the start time, which counts from the last resumption.
fn suspend(spec: &JobSpec, over: bool, conditions: &mut Vec<JobCondition>, status: &mut JobStatus, now: Timestamp) {
    let suspended = spec.suspend == Some(true);
    let was = holding(conditions, SUSPENDED).is_some();
    if !over && suspended != was {
        let known = conditions.iter().any(|one| one.type_ == SUSPENDED);
        if suspended || known {
            conditions.retain(|one| one.type_ != SUSPENDED);
            let (reason, message) =
                if suspended { ("JobSuspended", "Job suspended") } else { ("JobResumed", "Job resumed") };
            conditions.push(condition(SUSPENDED, suspended, reason, message, now));
        }
        if !suspended {
            status.start_time = Some(Time(truncated(now)));
        }
    }
    if !suspended && status.start_time.is_none() {
        status.start_time = Some(Time(truncated(now)));
    }
}

fn selects(job: &Job, labels: Option<&std::collections::BTreeMap<String, String>>) -> bool {
    let selector = job.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| selector::matches(selector, labels))
}

impl Controller for Jobs {
    const NAME: &'static str = "job-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.jobs, |this, delta, queue| {
            if let Some(job) = delta.new.as_ref().or(delta.old.as_ref()) {
                queue.add(Key::of(&**job));
            }
            if let (Some(gone), None) = (&delta.old, &delta.new) {
                let namespace = gone.namespace().unwrap_or_default();
                for pod in this.owned.candidates(&**gone).filter(|pod| held(pod)) {
                    queue.add(Key::new(&namespace, &format!("{STRAY}{}", pod.name_any())));
                }
            }
        });
        sources.watch(&self.pods, |this, delta, queue| this.pod_changed(delta, queue));
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        if let Some(pod) = key.name.strip_prefix(STRAY) {
            return self.release_stray(&key.namespace, pod).await.map(|()| Outcome::Done);
        }
        let Some(job) = self.jobs.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let Some(spec) = &job.spec else { return Ok(Outcome::Done) };
        if spec.managed_by.as_deref().is_some_and(|by| by != MANAGER) || is_finished(&job) {
            return Ok(Outcome::Done);
        }
        if spec.completion_mode.as_deref().is_some_and(|mode| mode != "NonIndexed") && !indexed(spec) {
            let note = format!("Unsupported completion mode {}", spec.completion_mode.as_deref().unwrap_or_default());
            self.event(&job, EventType::Warning, "UnknownCompletionMode", &note).await;
            return Ok(Outcome::Done);
        }
        self.sync(&job, spec, Timestamp::now()).await
    }
}

//! CronJob: a Job at each time of a schedule.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};

use super::job::{finish, is_finished};
use super::schedule::Schedule;
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, controller_of, controller_reference, is_controlled_by, own,
};

/// Annotation of a Job: the time for which it was made.
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// Finished Jobs that are kept when the CronJob does not say how many.
const KEEP_SUCCESSFUL: i32 = 3;
const KEEP_FAILED: i32 = 1;

pub(crate) struct CronJobs {
    host: Host,
    cron_jobs: Arc<Informer<CronJob>>,
    jobs: Arc<Informer<Job>>,
}

/// What became of the Jobs.
fn succeeded(job: &Job) -> bool {
    finish(job).is_some_and(|condition| condition.type_ == "Complete")
}

fn reference(job: &Job) -> ObjectReference {
    ObjectReference {
        api_version: Some("batch/v1".into()),
        kind: Some("Job".into()),
        namespace: job.namespace(),
        name: Some(job.name_any()),
        uid: job.uid(),
        resource_version: job.resource_version(),
        field_path: None,
    }
}

/// The finished Jobs beyond what is to be kept, the oldest first.
fn surplus(jobs: &[Arc<Job>], success: bool, keep: Option<i32>, usual: i32) -> Vec<Arc<Job>> {
    let mut done: Vec<_> = jobs.iter().filter(|job| is_finished(job) && succeeded(job) == success).cloned().collect();
    let started = |job: &Job| job.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
    done.sort_by_key(|job| (started(job), job.name_any()));
    let keep = usize::try_from(keep.unwrap_or(usual)).unwrap_or_default();
    done.truncate(done.len().saturating_sub(keep));
    done
}

impl CronJobs {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { cron_jobs: host.informer(), jobs: host.informer(), host }
    }

    async fn event(&self, cron: &CronJob, type_: EventType, reason: &str, note: String) {
        self.host.event(cron, type_, reason, reason, note).await;
    }

    async fn warn(&self, cron: &CronJob, reason: &str, note: String) {
        self.event(cron, EventType::Warning, reason, note).await;
    }

    fn jobs_api(&self, cron: &CronJob) -> Api<Job> {
        Api::namespaced(self.host.client.clone(), &cron.namespace().unwrap_or_default())
    }

    /// Brings the list of active Jobs up to what the Jobs say.
    async fn follow(&self, cron: &CronJob, jobs: &[Arc<Job>], status: &mut CronJobStatus) {
        let mut active = status.active.take().unwrap_or_default();
        for job in jobs {
            let listed = active.iter().any(|entry| entry.uid == job.uid());
            if is_finished(job) {
                if listed {
                    active.retain(|entry| entry.uid != job.uid());
                    let end = finish(job).map(|condition| condition.type_.clone()).unwrap_or_default();
                    let note = format!("Saw completed job: {}, condition: {end}", job.name_any());
                    self.event(cron, EventType::Normal, "SawCompletedJob", note).await;
                }
                let end = job.status.as_ref().and_then(|status| status.completion_time.clone());
                if succeeded(job) && end > status.last_successful_time {
                    status.last_successful_time = end;
                }
            } else if !listed {
                // Made a moment ago, by a run that did not live to write it down, or by hand.
                let note = format!("Saw a job that the controller did not create or forgot: {}", job.name_any());
                self.warn(cron, "UnexpectedJob", note).await;
                active.push(reference(job));
            }
        }
        let (there, missing): (Vec<_>, Vec<_>) =
            active.into_iter().partition(|entry| jobs.iter().any(|job| job.uid() == entry.uid));
        for entry in missing {
            let note = format!("Active job went missing: {}", entry.name.unwrap_or_default());
            self.event(cron, EventType::Normal, "MissingJob", note).await;
        }
        status.active = (!there.is_empty()).then_some(there);
    }

    /// Starts the Job that is due, if it may; says when the next one is.
    async fn start(
        &self,
        cron: &CronJob,
        spec: &CronJobSpec,
        status: &mut CronJobStatus,
        now: Timestamp,
    ) -> Result<Outcome, Error> {
        let zone = match spec.time_zone.as_deref() {
            None => TimeZone::system(),
            Some(name) => match TimeZone::get(name) {
                Ok(zone) => zone,
                Err(error) => {
                    self.warn(cron, "UnknownTimeZone", format!("invalid timeZone: {name:?}: {error}")).await;
                    return Ok(Outcome::Done);
                }
            },
        };
        let schedule = match Schedule::parse(&spec.schedule) {
            Ok(schedule) => schedule,
            Err(error) => {
                let note = format!("unparseable schedule: {:?} : {error}", spec.schedule);
                self.warn(cron, "UnparseableSchedule", note).await;
                return Ok(Outcome::Done);
            }
        };
        let next = || {
            let left = schedule.after(now, &zone).and_then(|next| Duration::try_from(next.duration_since(now)).ok());
            left.map_or(Outcome::Done, Outcome::After)
        };
        let last = status.last_schedule_time.as_ref().or(cron.metadata.creation_timestamp.as_ref());
        let mut since = last.map_or(now, |time| time.0);
        let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
        if let Some(earliest) = deadline.and_then(|deadline| now.checked_sub(deadline).ok()) {
            since = since.max(earliest);
        }
        let missed = schedule.missed(since, now, &zone);
        if missed.too_many {
            let note = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            self.warn(cron, "TooManyMissedTimes", note.into()).await;
        }
        let Some(time) = missed.latest else { return Ok(next()) };
        if spec.concurrency_policy.as_deref() == Some("Forbid") && status.active.is_some() {
            let note = "Not starting job because prior execution is running and concurrency policy is Forbid";
            self.event(cron, EventType::Normal, "JobAlreadyActive", note.into()).await;
            return Ok(next());
        }
        let api = self.jobs_api(cron);
        if spec.concurrency_policy.as_deref() == Some("Replace") {
            for entry in status.active.take().unwrap_or_default() {
                let name = entry.name.unwrap_or_default();
                if let Some(job) = self.jobs.get(&cron.namespace().unwrap_or_default(), &name) {
                    self.host.delete(&api, &*job).await?;
                    self.event(cron, EventType::Normal, "SuccessfulDelete", format!("Deleted job {name}")).await;
                }
            }
        }
        let job = job_of(cron, spec, time, &zone);
        let made = match self.host.create(&api, &job).await {
            Ok(made) => {
                let note = format!("Created job {}", made.name_any());
                self.event(cron, EventType::Normal, "SuccessfulCreate", note).await;
                made
            }
            // Made by an earlier run that did not live to write it down; its end, if it has one, is seen by the next look.
            Err(error) if error.is_already_exists() => {
                let found = api.get_opt(&job.name_any()).await.map_err(Error::at("get the job"))?;
                match found.filter(|found| cron.uid().is_some_and(|uid| is_controlled_by(&found.metadata, &uid))) {
                    Some(found) => found,
                    None => return Err(error),
                }
            }
            Err(error) => {
                self.warn(cron, "FailedCreate", format!("Error creating job: {error}")).await;
                return Err(error);
            }
        };
        status.last_schedule_time = Some(Time(time));
        let known = status.active.iter().flatten().any(|entry| entry.uid == made.uid());
        if !known && !is_finished(&made) {
            status.active.get_or_insert_default().push(reference(&made));
        }
        Ok(next())
    }
}

/// The Job of a time. Its name follows from the time, so that no time has two.
fn job_of(cron: &CronJob, spec: &CronJobSpec, time: Timestamp, zone: &TimeZone) -> Job {
    let meta = spec.job_template.metadata.clone().unwrap_or_default();
    let mut annotations = meta.annotations.unwrap_or_default();
    annotations.insert(SCHEDULED.into(), time.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string());
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", cron.name_any(), time.as_second() / 60)),
            namespace: cron.namespace(),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(cron)]),
            ..ObjectMeta::default()
        },
        spec: spec.job_template.spec.clone(),
        status: None,
    }
}

impl Controller for CronJobs {
    const NAME: &'static str = "cronjob-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.cron_jobs, own);
        sources.watch(&self.jobs, |_, delta, queue| {
            for job in [&delta.old, &delta.new].into_iter().flatten() {
                if let Some(owner) = controller_of(job.meta()).filter(|owner| owner.kind == "CronJob") {
                    queue.add(Key::new(&job.namespace().unwrap_or_default(), &owner.name));
                }
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(cron) = self.cron_jobs.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        if cron.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Done);
        }
        let spec = &cron.spec;
        let uid = cron.uid().unwrap_or_default();
        let jobs = self.jobs.list_ns(&key.namespace);
        let jobs: Vec<_> = jobs.filter(|job| is_controlled_by(&job.metadata, &uid)).collect();
        let mut status = cron.status.clone().unwrap_or_default();
        self.follow(&cron, &jobs, &mut status).await;
        let suspended = spec.suspend == Some(true);
        let started =
            if suspended { Ok(Outcome::Done) } else { self.start(&cron, spec, &mut status, Timestamp::now()).await };
        if cron.status.clone().unwrap_or_default() != status {
            let changed = CronJob { status: Some(status), ..(*cron).clone() };
            self.host.replace_status(&Api::namespaced(self.host.client.clone(), &key.namespace), &changed).await?;
        }
        let mut old = surplus(&jobs, true, spec.successful_jobs_history_limit, KEEP_SUCCESSFUL);
        old.extend(surplus(&jobs, false, spec.failed_jobs_history_limit, KEEP_FAILED));
        for job in old {
            self.host.delete(&self.jobs_api(&cron), &*job).await?;
            let note = format!("Deleted job {}", job.name_any());
            self.event(&cron, EventType::Normal, "SuccessfulDelete", note).await;
        }
        started
    }
}

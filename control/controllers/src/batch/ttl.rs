//! Removes Jobs some time after their end (`ttlSecondsAfterFinished`).

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Api;

use super::job;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

pub(crate) struct TtlAfterFinished {
    host: Host,
    jobs: Arc<Informer<Job>>,
}

impl TtlAfterFinished {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { jobs: host.informer(), host }
    }
}

/// When the Job's time is up.
fn expires(job: &Job) -> Option<Timestamp> {
    let seconds = job.spec.as_ref()?.ttl_seconds_after_finished?;
    let end = job::finish(job)?.last_transition_time.as_ref()?.0;
    end.checked_add(SignedDuration::from_secs(seconds.into())).ok()
}

impl Controller for TtlAfterFinished {
    const NAME: &'static str = "ttl-after-finished-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.jobs, |_, delta, queue| {
            if let Some(job) = delta.new.as_ref().filter(|job| expires(job).is_some()) {
                queue.add(Key::of(&**job));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let api: Api<Job> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let cached = self.jobs.get(&key.namespace, &key.name);
        let Some(due) =
            cached.as_ref().filter(|job| job.metadata.deletion_timestamp.is_none()).and_then(|job| expires(job))
        else {
            return Ok(Outcome::Done);
        };
        if let Some(left) = Duration::try_from(due.duration_since(Timestamp::now())).ok().filter(|left| !left.is_zero())
        {
            return Ok(Outcome::After(left));
        }
        // The time may have been extended a moment ago.
        if let Some(job) = api.get_opt(&key.name).await.map_err(Error::at("get the job"))?
            && expires(&job).is_some_and(|due| due <= Timestamp::now())
        {
            self.host.delete_foreground(&api, &job).await?;
        }
        Ok(Outcome::Done)
    }
}

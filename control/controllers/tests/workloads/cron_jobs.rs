//! CronJobs: what is made when, and what is kept.

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};

use crate::support::{Cluster, ended, running};

fn cron(policy: &str) -> Value {
    json!({"metadata": {"name": "c"}, "spec": {"schedule": "@every 2s", "concurrencyPolicy": policy, "successfulJobsHistoryLimit": 1,
        "jobTemplate": {"metadata": {"labels": {"of": "c"}}, "spec": {"template": {"spec": {"restartPolicy": "Never", "nodeName": "n",
            "containers": [{"name": "c", "image": "i"}]}}}}}})
}

async fn jobs(cluster: &Cluster) -> Vec<Job> {
    cluster.of::<Job>().list(&ListParams::default().labels("of=c")).await.expect("listed").items
}

/// Jobs are named for their minute, so a schedule within one minute makes one: the time that follows is another's.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_made_on_time_and_the_oldest_go() {
    let cluster = Cluster::start().await;
    cluster.node("n", json!({})).await;
    cluster.behave(|pod: &Pod| running(pod).map(|_| ended("Succeeded", 0)));
    cluster.make::<CronJob>(cron("Allow")).await;
    assert_eventually_async!(30, !jobs(&cluster).await.is_empty(), "no job was made");
    let job = jobs(&cluster).await.remove(0);
    assert!(job.annotations().contains_key("batch.kubernetes.io/cronjob-scheduled-timestamp"), "{job:?}");
    assert!(job.name_any().starts_with("c-"));
    let successful = async || {
        let status = cluster.of::<CronJob>().get("c").await.expect("there").status.unwrap_or_default();
        status.last_successful_time.is_some() && status.last_schedule_time.is_some() && status.active.is_none()
    };
    assert_eventually_async!(30, successful().await, "the end of the job was not seen");
    let reasons = cluster.reasons("c").await;
    for reason in ["SuccessfulCreate", "SawCompletedJob"] {
        assert!(reasons.iter().any(|seen| seen == reason), "{reason} is not among {reasons:?}");
    }
    // Nothing is kept from now on.
    cluster.patch::<CronJob>("c", json!({"spec": {"suspend": true, "successfulJobsHistoryLimit": 0}})).await;
    assert_eventually_async!(30, jobs(&cluster).await.is_empty(), "finished jobs stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn forbid_waits_for_the_job_before_and_a_lost_one_is_told() {
    let cluster = Cluster::start().await;
    cluster.node("n", json!({})).await;
    cluster.make::<CronJob>(cron("Forbid")).await;
    assert_eventually_async!(30, jobs(&cluster).await.len() == 1, "one job");
    assert_eventually_async!(
        30,
        cluster.reasons("c").await.iter().any(|r| r == "JobAlreadyActive"),
        "a second start was not held back"
    );
    assert_eq!(jobs(&cluster).await.len(), 1);
    cluster.patch::<CronJob>("c", json!({"spec": {"suspend": true}})).await;
    let name = jobs(&cluster).await[0].name_any();
    cluster.of::<Job>().delete(&name, &DeleteParams::background()).await.expect("deleted");
    assert_eventually_async!(
        30,
        cluster.reasons("c").await.iter().any(|r| r == "MissingJob"),
        "the lost job was not missed"
    );
    // The event comes before the status is written.
    let status = async || cluster.of::<CronJob>().get("c").await.expect("there").status.unwrap_or_default();
    assert_eventually_async!(30, status().await.active.is_none(), "{:?}", status().await);
}

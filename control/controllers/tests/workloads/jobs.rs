//! Jobs on a whole control plane.

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::support::{Cluster, ended, phase, running, template};

fn job(spec: Value) -> Value {
    let mut job = json!({"metadata": {"name": "j"}, "spec": {"template": template("j", "i")}});
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never".into();
    for (key, value) in spec.as_object().into_iter().flatten() {
        job["spec"][key] = value.clone();
    }
    job
}

fn succeeds(pod: &Pod) -> Option<Value> {
    (phase(pod) == "Pending").then(|| ended("Succeeded", 0))
}

fn fails(pod: &Pod) -> Option<Value> {
    (phase(pod) == "Pending").then(|| ended("Failed", 3))
}

/// Type and reason of each condition that holds.
async fn conditions(cluster: &Cluster) -> Vec<(String, String)> {
    let status = cluster.of::<Job>().get("j").await.expect("the job").status.unwrap_or_default();
    let holding = status.conditions.into_iter().flatten().filter(|one| one.status == "True");
    holding.map(|one| (one.type_, one.reason.unwrap_or_default())).collect()
}

fn pair(type_: &str, reason: &str) -> (String, String) {
    (type_.to_owned(), reason.to_owned())
}

#[tokio::test]
async fn each_pod_is_counted_once_and_let_go() {
    let cluster = Cluster::start().await;
    cluster.behave(succeeds);
    cluster.make::<Job>(job(json!({"completions": 4, "parallelism": 2}))).await;
    assert_eventually_async!(
        30,
        conditions(&cluster).await.contains(&pair("Complete", "CompletionsReached")),
        "the job is complete"
    );
    let status = cluster.of::<Job>().get("j").await.expect("the job").status.expect("a status");
    assert_eq!((status.succeeded, status.failed, status.active), (Some(4), None, None));
    assert!(status.completion_time.is_some());
    let pods = cluster.pods("job-name=j").await;
    assert_eq!(pods.len(), 4);
    assert!(pods.iter().all(|pod| pod.finalizers().is_empty()), "a finalizer was left");
    assert_eventually_async!(30, cluster.reasons("j").await.contains(&"Completed".to_owned()), "the event is there");
}

#[tokio::test]
async fn indexes_are_done_one_each() {
    let cluster = Cluster::start().await;
    cluster.behave(succeeds);
    cluster.make::<Job>(job(json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed"}))).await;
    assert_eventually_async!(30, conditions(&cluster).await.len() == 2, "the job is complete");
    let status = cluster.of::<Job>().get("j").await.expect("the job").status.expect("a status");
    assert_eq!(status.completed_indexes.as_deref(), Some("0-2"));
    let hosts: Vec<_> = cluster
        .pods("job-name=j")
        .await
        .iter()
        .filter_map(|pod| pod.spec.as_ref().and_then(|spec| spec.hostname.clone()))
        .collect();
    assert_eq!(hosts, ["j-0", "j-1", "j-2"]);
}

#[tokio::test]
async fn a_job_fails_at_its_limit_or_by_policy() {
    let cluster = Cluster::start().await;
    cluster.behave(fails);
    cluster.make::<Job>(job(json!({"backoffLimit": 0}))).await;
    assert_eventually_async!(
        30,
        conditions(&cluster).await.contains(&pair("Failed", "BackoffLimitExceeded")),
        "the job failed"
    );
    cluster.of::<Job>().delete("j", &DeleteParams::background()).await.expect("deleted");
    assert_eventually_async!(30, cluster.names("job-name=j").await.is_empty(), "its pods go with it");
    let rules = json!([{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3]}}]);
    cluster.make::<Job>(job(json!({"backoffLimit": 6, "podFailurePolicy": {"rules": rules}}))).await;
    assert_eventually_async!(
        30,
        conditions(&cluster).await.contains(&pair("Failed", "PodFailurePolicy")),
        "the job failed by policy"
    );
}

#[tokio::test]
async fn a_suspended_job_has_no_pods_until_it_is_resumed() {
    let cluster = Cluster::start().await;
    cluster.make::<Job>(job(json!({"suspend": true}))).await;
    assert_eventually_async!(
        30,
        conditions(&cluster).await == [pair("Suspended", "JobSuspended")],
        "the job is suspended"
    );
    assert!(cluster.names("job-name=j").await.is_empty());
    cluster.behave(running);
    cluster.patch::<Job>("j", json!({"spec": {"suspend": false}})).await;
    assert_eventually_async!(30, cluster.names("job-name=j").await.len() == 1, "it runs");
    cluster.patch::<Job>("j", json!({"spec": {"suspend": true}})).await;
    assert_eventually_async!(30, cluster.names("job-name=j").await.is_empty(), "it stops");
    let status = cluster.of::<Job>().get("j").await.expect("the job").status.expect("a status");
    assert_eq!(status.failed, None, "a pod that was stopped has not failed");
}

#[tokio::test]
async fn a_finished_job_goes_when_its_time_is_up() {
    let cluster = Cluster::start().await;
    cluster.behave(succeeds);
    cluster.make::<Job>(job(json!({"ttlSecondsAfterFinished": 0}))).await;
    assert_eventually_async!(30, cluster.of::<Job>().get_opt("j").await.expect("asked").is_none(), "it is gone");
}

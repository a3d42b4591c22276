//! StatefulSets on a whole control plane.

use crate::support::{Cluster, ended, phase, running, template};
use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::DeleteParams;
use serde_json::{Value, json};

fn set(name: &str, replicas: i32, more: Value) -> Value {
    let mut spec = json!({"serviceName": "s", "replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template(name, "one")});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({"metadata": {"name": name}, "spec": spec})
}

fn image(pod: &Pod) -> String {
    pod.spec.as_ref().and_then(|spec| spec.containers[0].image.clone()).unwrap_or_default()
}

async fn images(cluster: &Cluster, app: &str) -> Vec<String> {
    cluster.pods(&format!("app={app}")).await.iter().map(image).collect()
}

async fn status(cluster: &Cluster, name: &str) -> (i32, i32, i32, bool) {
    let set = cluster.of::<StatefulSet>().get(name).await.expect("the set");
    let status = set.status.unwrap_or_default();
    let settled =
        status.current_revision == status.update_revision && status.observed_generation == set.metadata.generation;
    (status.replicas, status.ready_replicas.unwrap_or_default(), status.updated_replicas.unwrap_or_default(), settled)
}

#[tokio::test]
async fn pods_come_in_order_and_go_in_reverse() {
    let cluster = Cluster::start().await;
    cluster.behave(|pod| if pod.name_any() == "web-1" { None } else { running(pod) });
    cluster.make::<StatefulSet>(set("web", 3, json!({"ordinals": {"start": 0}}))).await;
    assert_eventually_async!(
        30,
        cluster.names("app=web").await == ["web-0", "web-1"],
        "the second waits for the first"
    );
    let first = cluster.of::<Pod>().get("web-0").await.expect("the pod");
    assert_eq!(first.labels()["statefulset.kubernetes.io/pod-name"], "web-0");
    assert_eq!(first.labels()["apps.kubernetes.io/pod-index"], "0");
    let spec = first.spec.expect("a spec");
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("web-0"), Some("s")));
    assert_eventually_async!(30, status(&cluster, "web").await.0 == 2, "two are counted");
    cluster.behave(running);
    assert_eventually_async!(30, status(&cluster, "web").await == (3, 3, 3, true), "all are there");
    // A broken pod stops scaling down.
    cluster.behave(|_| None);
    cluster.set_status("web-0", json!({"conditions": [{"type": "Ready", "status": "False"}]})).await;
    cluster.patch::<StatefulSet>("web", json!({"spec": {"replicas": 1}})).await;
    assert_eventually_async!(30, status(&cluster, "web").await.1 == 2, "it is seen");
    assert_eq!(cluster.names("app=web").await.len(), 3, "nothing goes while the first is not ready");
    cluster.set_status("web-0", crate::support::ready()).await;
    assert_eventually_async!(30, cluster.names("app=web").await == ["web-0"], "the last go");
    let reasons = cluster.reasons("web").await;
    assert!(
        reasons.iter().any(|r| r == "SuccessfulCreate") && reasons.iter().any(|r| r == "SuccessfulDelete"),
        "{reasons:?}"
    );
}

#[tokio::test]
async fn a_pod_that_ended_is_made_again_under_its_name() {
    let cluster = Cluster::start().await;
    cluster.make::<StatefulSet>(set("web", 1, json!({}))).await;
    assert_eventually_async!(30, status(&cluster, "web").await.1 == 1, "it runs");
    let before = cluster.of::<Pod>().get("web-0").await.expect("the pod").uid();
    cluster.set_status("web-0", ended("Failed", 1)).await;
    assert_eventually_async!(
        30,
        cluster
            .of::<Pod>()
            .get_opt("web-0")
            .await
            .expect("asked")
            .is_some_and(|pod| pod.uid() != before && phase(&pod) == "Running"),
        "a new one runs"
    );
    assert!(cluster.reasons("web").await.contains(&"RecreatingFailedPod".to_owned()));
}

#[tokio::test]
async fn an_update_goes_from_the_end_and_keeps_the_partition() {
    let cluster = Cluster::start().await;
    cluster
        .make::<StatefulSet>(set(
            "web",
            3,
            json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}}),
        ))
        .await;
    assert_eventually_async!(30, status(&cluster, "web").await == (3, 3, 3, true), "all are there");
    let template = |image: &str| json!({"spec": {"template": template("web", image)}});
    cluster.patch::<StatefulSet>("web", template("two")).await;
    assert_eventually_async!(30, images(&cluster, "web").await == ["one", "one", "two"], "the canary is there");
    assert_eventually_async!(30, status(&cluster, "web").await == (3, 3, 1, false), "one is updated");
    // A pod below the partition comes back as it was.
    let before = cluster.of::<Pod>().get("web-0").await.expect("the pod").uid();
    cluster.of::<Pod>().delete("web-0", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(
        30,
        cluster.of::<Pod>().get_opt("web-0").await.expect("asked").is_some_and(|pod| pod.uid() != before),
        "it is back"
    );
    assert_eq!(images(&cluster, "web").await, ["one", "one", "two"]);
    cluster.patch::<StatefulSet>("web", json!({"spec": {"updateStrategy": {"rollingUpdate": {"partition": 0}}}})).await;
    assert_eventually_async!(30, status(&cluster, "web").await == (3, 3, 3, true), "all are updated");
    // Back to the first template: its revision is used again, as the newest.
    cluster.patch::<StatefulSet>("web", template("one")).await;
    assert_eventually_async!(30, images(&cluster, "web").await == ["one"; 3], "all are back");
    assert_eventually_async!(30, status(&cluster, "web").await == (3, 3, 3, true), "done");
    let revisions = cluster.of::<ControllerRevision>().list(&Default::default()).await.expect("listed").items;
    let mut numbers: Vec<_> = revisions.iter().map(|revision| revision.revision).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [2, 3]);
}

#[tokio::test]
async fn on_delete_waits_for_the_user() {
    let cluster = Cluster::start().await;
    let more = json!({"updateStrategy": {"type": "OnDelete"}, "podManagementPolicy": "Parallel"});
    cluster.make::<StatefulSet>(set("web", 2, more)).await;
    assert_eventually_async!(30, status(&cluster, "web").await.1 == 2, "all are there");
    cluster.patch::<StatefulSet>("web", json!({"spec": {"template": template("web", "two")}})).await;
    assert_eventually_async!(30, !status(&cluster, "web").await.3, "the new revision is known");
    cluster.of::<Pod>().delete("web-1", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(30, images(&cluster, "web").await == ["one", "two"], "only what went is new");
}

#[tokio::test]
async fn in_parallel_many_may_be_replaced_at_once_but_no_more() {
    let cluster = Cluster::start().await;
    let more = json!({"podManagementPolicy": "Parallel", "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 2}}});
    cluster.make::<StatefulSet>(set("web", 5, more)).await;
    assert_eventually_async!(30, status(&cluster, "web").await == (5, 5, 5, true), "all are there");
    // New pods do not come up: the update stops after two.
    cluster.behave(|pod| if image(pod) == "two" { None } else { running(pod) });
    cluster.patch::<StatefulSet>("web", json!({"spec": {"template": template("web", "two")}})).await;
    assert_eventually_async!(
        30,
        images(&cluster, "web").await == ["one", "one", "one", "two", "two"],
        "two are replaced"
    );
    assert_eventually_async!(30, status(&cluster, "web").await.1 == 3, "three serve");
    cluster.behave(running);
    assert_eventually_async!(30, status(&cluster, "web").await == (5, 5, 5, true), "done");
}

#[tokio::test]
async fn claims_stay_or_go_as_the_policy_says() {
    let cluster = Cluster::start().await;
    let claim = json!([{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}}]);
    let mut pods = template("web", "one");
    pods["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    let more = json!({"template": pods, "volumeClaimTemplates": claim, "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Delete"}});
    cluster.make::<StatefulSet>(set("web", 2, more)).await;
    assert_eventually_async!(30, status(&cluster, "web").await.1 == 2, "all are there");
    let claims = async || {
        let all = cluster.of::<PersistentVolumeClaim>().list(&Default::default()).await.expect("listed").items;
        all.iter()
            .filter(|claim| claim.metadata.deletion_timestamp.is_none())
            .map(ResourceExt::name_any)
            .collect::<Vec<_>>()
    };
    assert_eq!(claims().await, ["data-web-0", "data-web-1"]);
    cluster.patch::<StatefulSet>("web", json!({"spec": {"replicas": 1}})).await;
    assert_eventually_async!(30, claims().await == ["data-web-0"], "the claim goes with its pod");
    cluster.of::<StatefulSet>().delete("web", &DeleteParams::background()).await.expect("deleted");
    assert_eventually_async!(30, cluster.names("app=web").await.is_empty(), "the pods go");
    assert_eq!(claims().await, ["data-web-0"], "the other stays");
}

//! DaemonSets on a whole control plane.

use std::collections::BTreeMap;

use crate::support::{Cluster, ended, running, template};
use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

fn set(more: Value) -> Value {
    let mut spec = json!({"selector": {"matchLabels": {"app": "d"}}, "template": template("d", "one")});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({"metadata": {"name": "d"}, "spec": spec})
}

fn meant_for(pod: &Pod) -> String {
    let spec = serde_json::to_value(pod.spec.as_ref()).expect("JSON");
    let path = "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchFields/0/values/0";
    spec.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Image by node.
async fn images(cluster: &Cluster) -> BTreeMap<String, String> {
    let pods = cluster.pods("app=d").await;
    pods.iter()
        .map(|pod| {
            (meant_for(pod), pod.spec.as_ref().and_then(|spec| spec.containers[0].image.clone()).unwrap_or_default())
        })
        .collect()
}

/// Desired, current, available, updated.
async fn status(cluster: &Cluster) -> (i32, i32, i32, i32) {
    let status = cluster.of::<DaemonSet>().get("d").await.expect("the set").status.unwrap_or_default();
    (
        status.desired_number_scheduled,
        status.current_number_scheduled,
        status.number_available.unwrap_or_default(),
        status.updated_number_scheduled.unwrap_or_default(),
    )
}

#[tokio::test]
async fn every_node_that_fits_has_one_pod() {
    let cluster = Cluster::start().await;
    for name in ["a", "b"] {
        cluster.node(name, json!({})).await;
    }
    cluster.node("closed", json!({"taints": [{"key": "dedicated", "effect": "NoSchedule"}]})).await;
    cluster.make::<DaemonSet>(set(json!({}))).await;
    assert_eventually_async!(30, status(&cluster).await == (2, 2, 2, 2), "two run");
    assert_eq!(images(&cluster).await.into_keys().collect::<Vec<_>>(), ["a", "b"]);
    // One that fails is replaced; a node that comes gets its own; one that is labelled away loses it.
    let pods = cluster.pods("app=d").await;
    cluster.set_status(&pods[0].name_any(), ended("Failed", 1)).await;
    assert_eventually_async!(30, !cluster.names("app=d").await.contains(&pods[0].name_any()), "the failed one goes");
    cluster.node("c", json!({})).await;
    assert_eventually_async!(30, status(&cluster).await == (3, 3, 3, 3), "three run");
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let patch = Patch::Merge(json!({"spec": {"taints": [{"key": "gone", "effect": "NoExecute"}]}}));
    nodes.patch("c", &PatchParams::default(), &patch).await.expect("patched");
    assert_eventually_async!(30, images(&cluster).await.len() == 2, "its pod goes");
    let reasons = cluster.reasons("d").await;
    assert!(
        reasons.contains(&"FailedDaemonPod".to_owned()) && reasons.contains(&"SuccessfulCreate".to_owned()),
        "{reasons:?}"
    );
}

#[tokio::test]
async fn an_update_goes_node_by_node_and_back() {
    let cluster = Cluster::start().await;
    for name in ["a", "b", "c"] {
        cluster.node(name, json!({})).await;
    }
    cluster.make::<DaemonSet>(set(json!({}))).await;
    assert_eventually_async!(30, status(&cluster).await == (3, 3, 3, 3), "three run");
    let old = cluster.pods("app=d").await[0].labels()["controller-revision-hash"].clone();
    // The new image does not come up: one node is touched, no more.
    cluster.behave(
        |pod| if pod.spec.as_ref()?.containers[0].image.as_deref() == Some("bad") { None } else { running(pod) },
    );
    cluster.patch::<DaemonSet>("d", json!({"spec": {"template": template("d", "bad")}})).await;
    assert_eventually_async!(30, status(&cluster).await == (3, 3, 2, 1), "one is tried");
    let untouched: Vec<_> = cluster
        .pods("app=d")
        .await
        .into_iter()
        .filter(|pod| pod.labels()["controller-revision-hash"] == old)
        .map(|pod| pod.name_any())
        .collect();
    assert_eq!(untouched.len(), 2);
    // Back: what was not touched stays as it is.
    cluster.patch::<DaemonSet>("d", json!({"spec": {"template": template("d", "one")}})).await;
    assert_eventually_async!(30, status(&cluster).await == (3, 3, 3, 3), "all are back");
    let names = cluster.names("app=d").await;
    assert!(untouched.iter().all(|name| names.contains(name)), "restarted for nothing: {untouched:?} {names:?}");
    let revisions = cluster.of::<ControllerRevision>().list(&Default::default()).await.expect("listed").items;
    let mut seen: Vec<_> =
        revisions.iter().map(|one| (one.revision, one.labels()["controller-revision-hash"] == old)).collect();
    seen.sort_unstable();
    assert_eq!(seen, [(2, false), (3, true)]);
}

#[tokio::test]
async fn with_surge_the_old_pod_stays_until_the_new_one_serves() {
    let cluster = Cluster::start().await;
    for name in ["a", "b"] {
        cluster.node(name, json!({})).await;
    }
    let strategy =
        json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}});
    cluster.make::<DaemonSet>(set(strategy)).await;
    assert_eventually_async!(30, status(&cluster).await == (2, 2, 2, 2), "two run");
    cluster.behave(
        |pod| if pod.spec.as_ref()?.containers[0].image.as_deref() == Some("two") { None } else { running(pod) },
    );
    cluster.patch::<DaemonSet>("d", json!({"spec": {"template": template("d", "two")}})).await;
    assert_eventually_async!(30, cluster.names("app=d").await.len() == 3, "one more");
    assert_eq!(status(&cluster).await.2, 2, "none less");
    cluster.behave(running);
    assert_eventually_async!(
        30,
        cluster.names("app=d").await.len() == 2 && images(&cluster).await.values().all(|image| image == "two"),
        "the old ones are gone"
    );
    assert_eventually_async!(30, status(&cluster).await == (2, 2, 2, 2), "done");
}

//! PodDisruptionBudgets: what they allow, and evictions that ask them.

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::api::{EvictParams, PostParams};
use serde_json::{Value, json};

use crate::support::{Cluster, define, made};

async fn status(cluster: &Cluster) -> Value {
    let budget = cluster.of::<PodDisruptionBudget>().get("b").await.expect("there");
    let status = budget.status.unwrap_or_default();
    let reason = status.conditions.iter().flatten().next().map(|condition| condition.reason.clone());
    json!([status.expected_pods, status.current_healthy, status.desired_healthy, status.disruptions_allowed, reason])
}

#[tokio::test(flavor = "multi_thread")]
async fn budgets_count_and_evictions_keep_to_them() {
    let cluster = Cluster::start().await;
    cluster.node("n", json!({})).await;
    cluster
        .make::<PodDisruptionBudget>(json!({"metadata": {"name": "b"},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "a"}}}}))
        .await;
    assert_eventually_async!(30, status(&cluster).await == json!([0, 0, 0, 0, "InsufficientPods"]), "an empty budget");
    cluster
        .make::<ReplicaSet>(json!({"metadata": {"name": "r"}, "spec": {"replicas": 3,
            "selector": {"matchLabels": {"app": "a"}}, "template": {"metadata": {"labels": {"app": "a"}},
            "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}}}}))
        .await;
    assert_eventually_async!(
        30,
        status(&cluster).await == json!([3, 3, 2, 1, "SufficientPods"]),
        "{}",
        status(&cluster).await
    );
    // Nobody is ready any more from here on, so the one eviction is all there is.
    cluster.behave(|_| None);
    let names = cluster.names("app=a").await;
    let evict = async |name: &str| cluster.of::<Pod>().evict(name, &EvictParams::default()).await;
    evict(&names[0]).await.expect("one may go");
    assert_eventually_async!(
        30,
        status(&cluster).await == json!([3, 2, 2, 0, "InsufficientPods"]),
        "{}",
        status(&cluster).await
    );
    let refused = evict(&names[1]).await.expect_err("a second may not");
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 429 && status.message.contains("disruption budget")),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn budgets_count_from_the_scale_of_any_owner() {
    let cluster = Cluster::start().await;
    cluster.node("n", json!({})).await;
    let scale = json!({"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"});
    let farms = define(&cluster, "example.com", "v1", "farms", "Farm", Some(scale)).await;
    let farm =
        json!({"apiVersion": "example.com/v1", "kind": "Farm", "metadata": {"name": "f"}, "spec": {"replicas": 3}});
    let farm = farms.create(&PostParams::default(), &made(farm)).await.expect("a farm");
    let owner =
        json!([{"apiVersion": "example.com/v1", "kind": "Farm", "name": "f", "uid": farm.uid(), "controller": true}]);
    for name in ["a", "b", "c"] {
        cluster
            .make::<Pod>(json!({"metadata": {"name": name, "labels": {"app": "a"}, "ownerReferences": owner},
            "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}}))
            .await;
    }
    cluster
        .make::<PodDisruptionBudget>(json!({"metadata": {"name": "b"},
        "spec": {"maxUnavailable": "34%", "selector": {"matchLabels": {"app": "a"}}}}))
        .await;
    let counted = json!([3, 3, 1, 2, "SufficientPods"]);
    assert_eventually_async!(30, status(&cluster).await == counted, "{}", status(&cluster).await);
}

//! The quota controller beside admission: a real server, in process, on a store of its own.

mod support;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{ConfigMap, ResourceQuota};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;
use support::{Cluster, made};

#[tokio::test]
async fn usage_follows_what_is_made_and_goes() {
    let cluster = Cluster::start().await;
    let client = cluster.client.clone();
    let new = PostParams::default();
    cluster.namespace("q").await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "q");
    let quotas: Api<ResourceQuota> = Api::namespaced(client, "q");
    let map = |name: &str| made::<ConfigMap>(json!({"metadata": {"name": name}}));
    maps.create(&new, &map("before")).await.expect("there is no quota yet");
    // The cluster's own bundle counts, too; once it is there nothing else comes by itself.
    assert_eventually_async!(
        20,
        maps.get_opt("kube-root-ca.crt").await.expect("asked").is_some(),
        "the CA is published"
    );
    quotas
        .create(&new, &made(json!({"metadata": {"name": "q"}, "spec": {"hard": {"configmaps": "3"}}})))
        .await
        .expect("made");
    let used = async || {
        let quota = quotas.get("q").await.expect("the quota");
        quota.status.and_then(|s| s.used).and_then(|u| u.get("configmaps").map(|q| q.0.clone())).unwrap_or_default()
    };
    assert_eventually_async!(20, used().await == "2", "both are counted");
    maps.create(&new, &map("a")).await.expect("there is room for one");
    assert_eq!(used().await, "3");
    assert!(maps.create(&new, &map("b")).await.is_err(), "the quota is full");
    maps.delete("a", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, used().await == "2", "what went is given back");
    // A count that began before the deletion may still be written after it.
    assert_eventually_async!(20, maps.create(&new, &map("b")).await.is_ok(), "there is room again");
}

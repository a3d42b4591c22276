//! Nodes and devices that fail, and what becomes of their pods, on a real server.

mod support;

use std::time::Instant;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::Cluster;

async fn pod(cluster: &Cluster, name: &str, node: &str, tolerations: Value) {
    let pods: Api<Pod> = cluster.ns("n");
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": name}, "spec": {"nodeName": node, "tolerations": tolerations,
            "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "i"}]}}),
        )
        .await;
    let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    cluster.patch_status(&pods, name, status).await;
}

async fn node(cluster: &Cluster, name: &str, heartbeat: &str) {
    let nodes: Api<Node> = cluster.all();
    cluster.create(&nodes, json!({"metadata": {"name": name}})).await;
    let ready = json!({"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}]});
    cluster.patch_status(&nodes, name, ready).await;
}

/// Whether a pod is gone or on its way.
async fn leaves(cluster: &Cluster, name: &str) -> bool {
    let pod = cluster.ns::<Pod>("n").get_opt(name).await.expect("asked");
    pod.is_none_or(|pod| pod.metadata.deletion_timestamp.is_some())
}

#[tokio::test]
async fn pods_leave_tainted_nodes_when_their_tolerations_end() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    node(&cluster, "a", "2099-01-01T00:00:00Z").await;
    let until =
        |seconds: i64| json!([{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]);
    pod(&cluster, "now", "a", json!([])).await;
    pod(&cluster, "soon", "a", until(3)).await;
    pod(&cluster, "later", "a", until(3600)).await;
    let nodes: Api<Node> = cluster.all();
    let tainted = Instant::now();
    cluster.patch(&nodes, "a", json!({"spec": {"taints": [{"key": "k", "effect": "NoExecute"}]}})).await;
    assert_eventually_async!(20, leaves(&cluster, "now").await, "it tolerates nothing");
    assert!(!leaves(&cluster, "soon").await);
    assert_eventually_async!(20, leaves(&cluster, "soon").await, "it has been tolerated long enough");
    let after = tainted.elapsed().as_secs_f64();
    assert!((2.0..=6.0).contains(&after), "left after {after} s, not 3");
    assert!(!leaves(&cluster, "later").await);
    cluster.patch(&nodes, "a", json!({"spec": {"taints": null}})).await;
    pod(&cluster, "new", "a", json!([])).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!leaves(&cluster, "new").await, "there is no taint any more");
}

#[tokio::test]
async fn a_silent_node_is_tainted_and_loses_its_pods_when_they_no_longer_tolerate_it() {
    let mut cluster = Cluster::idle().await;
    cluster.namespace("n").await;
    cluster.create(&cluster.ns::<ServiceAccount>("n"), json!({"metadata": {"name": "default"}})).await;
    node(&cluster, "alive", "2099-01-01T00:00:00Z").await;
    pod(&cluster, "stays", "dead", json!([{"operator": "Exists"}])).await;
    pod(
        &cluster,
        "goes",
        "dead",
        json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}]),
    )
    .await;
    let past = Timestamp::from_second(Timestamp::now().as_second() - 60).expect("a time").to_string();
    node(&cluster, "dead", &past).await;
    // What the first look of the controllers finds is a heartbeat a minute ago.
    cluster.control().await;
    let nodes: Api<Node> = cluster.all();
    let unknown = async || {
        let node = nodes.get("dead").await.expect("the node");
        let ready = node.status.and_then(|s| s.conditions).unwrap_or_default();
        let taints = node.spec.and_then(|s| s.taints).unwrap_or_default();
        ready
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "Unknown" && c.reason.as_deref() == Some("NodeStatusUnknown"))
            && taints.iter().any(|t| t.key == "node.kubernetes.io/unreachable" && t.effect == "NoExecute")
    };
    assert_eventually_async!(90, unknown().await, "the node is unknown and tainted");
    assert_eventually_async!(20, leaves(&cluster, "goes").await, "its toleration has ended");
    let stays = cluster.ns::<Pod>("n").get("stays").await.expect("the pod");
    let ready = stays.status.and_then(|s| s.conditions).unwrap_or_default();
    assert!(ready.iter().any(|c| c.type_ == "Ready" && c.status == "False"), "it no longer serves");
    // When the last node falls silent it is this side that is cut off: nobody is driven away any more.
    let down =
        json!({"conditions": [{"type": "Ready", "status": "False", "lastHeartbeatTime": "2099-01-01T00:00:00Z"}]});
    cluster.patch_status(&nodes, "alive", down).await;
    let driven = async || {
        let taints = nodes.get("dead").await.expect("the node").spec.and_then(|s| s.taints).unwrap_or_default();
        taints.iter().any(|taint| taint.effect == "NoExecute")
    };
    assert_eventually_async!(30, !driven().await, "the taint goes");
}

#[tokio::test]
async fn pods_that_nobody_ends_are_collected() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let pods: Api<Pod> = cluster.ns("n");
    node(&cluster, "off", "2099-01-01T00:00:00Z").await;
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": "unbound", "finalizers": ["example.com/hold"]},
            "spec": {"schedulerName": "none", "containers": [{"name": "c", "image": "i"}]}}),
        )
        .await;
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": "stuck"}, "spec": {"nodeName": "off",
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "c", "image": "i"}]}}),
        )
        .await;
    pods.delete("unbound", &DeleteParams::default()).await.expect("deleted");
    pods.delete("stuck", &DeleteParams::default()).await.expect("deleted");
    let failed = async || {
        let pod = pods.get("unbound").await.expect("the pod");
        let status = pod.status.unwrap_or_default();
        status.phase.as_deref() == Some("Failed")
            && status
                .conditions
                .iter()
                .flatten()
                .any(|c| c.type_ == "DisruptionTarget" && c.reason.as_deref() == Some("DeletionByPodGC"))
    };
    assert_eventually_async!(20, failed().await, "a pod without a node ends as failed");
    cluster.patch(&pods, "unbound", json!({"metadata": {"finalizers": null}})).await;
    assert_eventually_async!(20, pods.get_opt("unbound").await.expect("asked").is_none(), "and goes");
    assert!(pods.get_opt("stuck").await.expect("asked").is_some(), "its node may still answer");
    let nodes: Api<Node> = cluster.all();
    cluster
        .patch_status(
            &nodes,
            "off",
            json!({"conditions": [{"type": "Ready", "status": "False", "lastHeartbeatTime": "2099-01-01T00:00:00Z"}]}),
        )
        .await;
    cluster.patch(&nodes, "off", json!({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]}})).await;
    assert_eventually_async!(20, pods.get_opt("stuck").await.expect("asked").is_none(), "its node is declared off");
}

#[tokio::test]
async fn pods_leave_devices_that_are_tainted_unless_their_claims_tolerate_it() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    node(&cluster, "a", "2099-01-01T00:00:00Z").await;
    let slices: Api<ResourceSlice> = cluster.all();
    let devices = |taints: Value| json!([{"name": "one", "taints": taints}, {"name": "other"}]);
    let slice = json!({"metadata": {"name": "s"}, "spec": {"driver": "gpu.io", "nodeName": "a",
        "pool": {"name": "a", "generation": 1, "resourceSliceCount": 1}, "devices": devices(json!([]))}});
    cluster.create(&slices, slice).await;
    let (pods, claims): (Api<Pod>, Api<ResourceClaim>) = (cluster.ns("n"), cluster.ns("n"));
    let tolerated = json!([{"key": "broken", "operator": "Exists", "effect": "NoExecute"}]);
    for (name, device, tolerations) in
        [("goes", "one", json!(null)), ("tolerates", "one", tolerated), ("elsewhere", "other", json!(null))]
    {
        let request = json!({"name": "r", "exactly": {"deviceClassName": "c"}});
        cluster
            .create(&claims, json!({"metadata": {"name": name}, "spec": {"devices": {"requests": [request]}}}))
            .await;
        let pod = json!({"metadata": {"name": name}, "spec": {"nodeName": "a", "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "i"}], "resourceClaims": [{"name": "d", "resourceClaimName": name}]}});
        let uid = cluster.create(&pods, pod).await.metadata.uid;
        let result =
            json!({"request": "r", "driver": "gpu.io", "pool": "a", "device": device, "tolerations": tolerations});
        let status = json!({"allocation": {"devices": {"results": [result]}}, "reservedFor": [{"resource": "pods", "name": name, "uid": uid}]});
        cluster.patch_status(&claims, name, status).await;
    }
    let taint = json!([{"key": "broken", "effect": "NoExecute"}]);
    let tainted = cluster.patch(&slices, "s", json!({"spec": {"devices": devices(taint)}})).await;
    let of = |slice: &ResourceSlice| slice.spec.devices.as_ref().and_then(|devices| devices[0].taints.clone());
    assert!(of(&tainted).is_some_and(|taints| taints[0].time_added.is_some()), "{tainted:?}");
    assert_eventually_async!(20, leaves(&cluster, "goes").await, "its device is broken");
    assert!(!leaves(&cluster, "tolerates").await);
    assert!(!leaves(&cluster, "elsewhere").await);
}

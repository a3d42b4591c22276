//! Claims and volumes, on a real server; the scheduler's and the node's parts are played by the tests.

mod support;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{Event, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass, VolumeAttachment, VolumeAttributesClass};
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};
use support::Cluster;

type Claims = Api<PersistentVolumeClaim>;
type Volumes = Api<PersistentVolume>;

fn claim(name: &str, size: &str, class: Value) -> Value {
    json!({"metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": class,
        "resources": {"requests": {"storage": size}}}})
}

fn volume(name: &str, size: &str, policy: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"],
        "storageClassName": "manual", "persistentVolumeReclaimPolicy": policy, "hostPath": {"path": "/tmp/x"}}})
}

async fn claim_phase(claims: &Claims, name: &str) -> String {
    claims.get(name).await.expect("the claim").status.and_then(|s| s.phase).unwrap_or_default()
}

async fn volume_phase(volumes: &Volumes, name: &str) -> String {
    volumes.get(name).await.expect("the volume").status.and_then(|s| s.phase).unwrap_or_default()
}

async fn volume_of(claims: &Claims, name: &str) -> String {
    claims.get(name).await.expect("the claim").spec.and_then(|s| s.volume_name).unwrap_or_default()
}

#[tokio::test]
async fn claims_are_bound_and_volumes_given_back() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let (claims, volumes): (Claims, Volumes) = (cluster.ns("n"), cluster.all());
    for (name, size, policy) in [("small", "1Gi", "Retain"), ("large", "10Gi", "Retain"), ("gone", "20Gi", "Delete")] {
        cluster.create(&volumes, volume(name, size, policy)).await;
    }
    assert_eventually_async!(20, volume_phase(&volumes, "gone").await == "Available", "volumes are available");
    cluster.create(&claims, claim("a", "5Gi", json!("manual"))).await;
    assert_eventually_async!(20, claim_phase(&claims, "a").await == "Bound", "the claim is bound");
    assert_eq!(volume_of(&claims, "a").await, "large", "the smallest that is large enough");
    assert_eventually_async!(20, volume_phase(&volumes, "large").await == "Bound", "so is the volume");
    // A claim that comes before its volume, and a volume that is reserved for a claim.
    cluster.create(&claims, claim("early", "50Gi", json!("manual"))).await;
    assert_eventually_async!(20, claim_phase(&claims, "early").await == "Pending", "there is no such volume");
    let mut reserved = volume("reserved", "60Gi", "Retain");
    reserved["spec"]["claimRef"] = json!({"namespace": "n", "name": "early"});
    cluster.create(&volumes, reserved).await;
    assert_eventually_async!(20, volume_of(&claims, "early").await == "reserved", "the reserved volume is bound");
    // A claim that names its volume.
    let mut named = claim("named", "1Gi", json!("manual"));
    named["spec"]["volumeName"] = json!("gone");
    cluster.create(&claims, named).await;
    assert_eventually_async!(20, claim_phase(&claims, "named").await == "Bound", "the named volume is bound");
    for name in ["a", "named"] {
        claims.delete(name, &DeleteParams::default()).await.expect("deleted");
    }
    assert_eventually_async!(20, volume_phase(&volumes, "large").await == "Released", "Retain keeps the volume");
    assert_eventually_async!(
        20,
        volume_phase(&volumes, "gone").await == "Failed",
        "nobody can delete a path of a host"
    );
    // A bound volume is protected; its claim is lost with it.
    volumes.delete("reserved", &DeleteParams::default()).await.expect("deleted");
    assert!(volumes.get_opt("reserved").await.expect("asked").is_some(), "in use");
    cluster.patch(&volumes, "reserved", json!({"metadata": {"finalizers": null}})).await;
    assert_eventually_async!(20, claim_phase(&claims, "early").await == "Lost", "the volume was torn away");
}

#[tokio::test]
async fn local_volumes_are_made_on_the_selected_node_and_removed_by_it() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let (claims, volumes): (Claims, Volumes) = (cluster.ns("n"), cluster.all());
    let nodes: Api<Node> = cluster.all();
    cluster
        .create(&nodes, json!({"metadata": {"name": "a", "annotations": {"coracle.io/local-volumes": "/data/v"}}}))
        .await;
    cluster.create(&claims, claim("data", "1Gi", Value::Null)).await;
    assert_eq!(
        claims.get("data").await.expect("read").spec.and_then(|s| s.storage_class_name).as_deref(),
        Some("coracle-local")
    );
    assert_eventually_async!(20, claim_phase(&claims, "data").await == "Pending", "it waits for a pod");
    assert!(volumes.list(&ListParams::default()).await.expect("listed").items.is_empty());
    let select = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "a"}}});
    cluster.patch(&claims, "data", select).await;
    assert_eventually_async!(20, claim_phase(&claims, "data").await == "Bound", "a volume is made for it");
    let name = volume_of(&claims, "data").await;
    let made = serde_json::to_value(volumes.get(&name).await.expect("the volume")).expect("JSON");
    assert_eq!(made["spec"]["local"]["path"], format!("/data/v/{name}"));
    assert_eq!(
        made["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"],
        json!(["a"])
    );
    // It grows with its claim.
    cluster.patch(&claims, "data", json!({"spec": {"resources": {"requests": {"storage": "3Gi"}}}})).await;
    let size = async || {
        serde_json::to_value(claims.get("data").await.expect("read").status).expect("JSON")["capacity"]["storage"]
            .clone()
    };
    assert_eventually_async!(20, size().await == "3Gi", "the claim has what it asked for");
    claims.delete("data", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(
        20,
        volumes.get_opt(&name).await.expect("asked").is_none(),
        "the volume goes with its claim"
    );
    let node = nodes.get("a").await.expect("the node");
    assert_eq!(node.metadata.annotations.expect("annotations")["coracle.io/local-volumes-to-remove"], name);
}

#[tokio::test]
async fn claims_in_use_stay_and_ephemeral_ones_come_with_their_pod() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let (claims, pods): (Claims, Api<Pod>) = (cluster.ns("n"), cluster.ns("n"));
    cluster.create(&claims, claim("used", "1Gi", json!(""))).await;
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": "p"}, "spec": {"nodeName": "x", "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "c", "image": "i"}], "volumes": [
            {"name": "v", "persistentVolumeClaim": {"claimName": "used"}},
            {"name": "e", "ephemeral": {"volumeClaimTemplate": {"metadata": {"labels": {"l": "x"}}, "spec": {
                "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}}}]}}),
        )
        .await;
    assert_eventually_async!(20, claims.get_opt("p-e").await.expect("asked").is_some(), "the ephemeral claim is made");
    let made = claims.get("p-e").await.expect("the claim").metadata;
    assert_eq!(made.labels.expect("labels")["l"], "x");
    assert_eq!(made.owner_references.expect("owners")[0].name, "p");
    claims.delete("used", &DeleteParams::default()).await.expect("deleted");
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(claims.get_opt("used").await.expect("asked").is_some(), "a pod uses it");
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    assert_eventually_async!(20, claims.get_opt("used").await.expect("asked").is_none(), "nobody uses it");
    assert_eventually_async!(20, claims.get_opt("p-e").await.expect("asked").is_none(), "it goes with its pod");
}

#[tokio::test]
async fn volumes_of_drivers_are_attached_where_pods_use_them() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let attachments: Api<VolumeAttachment> = cluster.all();
    cluster.create(&cluster.all::<Node>(), json!({"metadata": {"name": "a"}})).await;
    cluster
        .create(
            &cluster.all::<CSIDriver>(),
            json!({"metadata": {"name": "free.example.com"}, "spec": {"attachRequired": false}}),
        )
        .await;
    cluster
        .create(&cluster.all::<StorageClass>(), json!({"metadata": {"name": "csi"}, "provisioner": "csi.example.com"}))
        .await;
    let claims: Claims = cluster.ns("n");
    for (name, driver) in [("one", "csi.example.com"), ("two", "free.example.com")] {
        cluster
            .create(&cluster.all::<PersistentVolume>(), json!({"metadata": {"name": name}, "spec": {"capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"], "storageClassName": "csi", "claimRef": {"namespace": "n", "name": name},
                "csi": {"driver": driver, "volumeHandle": name}}}))
            .await;
        cluster.create(&claims, claim(name, "1Gi", json!("csi"))).await;
    }
    // A claim without a volume is left to the driver's provisioner.
    cluster.create(&claims, claim("three", "1Gi", json!("csi"))).await;
    let asked = async || claims.get("three").await.expect("read").metadata.annotations.unwrap_or_default();
    assert_eventually_async!(
        20,
        asked().await.get("volume.kubernetes.io/storage-provisioner").is_some_and(|p| p == "csi.example.com"),
        "the provisioner is told"
    );
    let pods: Api<Pod> = cluster.ns("n");
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": "p"}, "spec": {"nodeName": "a", "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "c", "image": "i"}], "volumes": [
            {"name": "v1", "persistentVolumeClaim": {"claimName": "one"}},
            {"name": "v2", "persistentVolumeClaim": {"claimName": "two"}}]}}),
        )
        .await;
    let held = async || {
        let list = attachments.list(&ListParams::default()).await.expect("listed").items;
        list.into_iter()
            .filter_map(|a| Some((a.spec.source.persistent_volume_name?, a.spec.node_name)))
            .collect::<Vec<_>>()
    };
    assert_eventually_async!(
        20,
        held().await == [("one".to_owned(), "a".to_owned())],
        "the volume that needs it is attached"
    );
    // Another node has to wait for a volume of one node, and its pod is told for whom.
    cluster.create(&cluster.all::<Node>(), json!({"metadata": {"name": "b"}})).await;
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": "q"}, "spec": {"nodeName": "b", "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "c", "image": "i"}], "volumes": [
            {"name": "v1", "persistentVolumeClaim": {"claimName": "one"}}]}}),
        )
        .await;
    let events: Api<Event> = cluster.ns("n");
    let told = async || {
        let list = events.list(&ListParams::default().fields("reason=FailedAttachVolume")).await.expect("listed").items;
        list.into_iter().filter_map(|event| event.message).collect::<Vec<_>>()
    };
    let words = "Multi-Attach error for volume \"one\" Volume is already used by pod(s) p";
    assert_eventually_async!(20, told().await == [words], "{:?}", told().await);
    assert_eq!(held().await, [("one".to_owned(), "a".to_owned())]);
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    assert_eventually_async!(20, held().await == [("one".to_owned(), "b".to_owned())], "it has gone over");
    pods.delete("q", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    assert_eventually_async!(20, held().await.is_empty(), "and is detached");
}

#[tokio::test]
async fn attribute_classes_are_protected_while_claims_name_them() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let classes: Api<VolumeAttributesClass> = cluster.all();
    cluster
        .create(
            &classes,
            json!({"metadata": {"name": "gold"}, "driverName": "d.example.com", "parameters": {"iops": "9"}}),
        )
        .await;
    let mut wanting = claim("c", "1Gi", json!(""));
    wanting["spec"]["volumeAttributesClassName"] = json!("gold");
    let claims: Claims = cluster.ns("n");
    cluster.create(&claims, wanting).await;
    let held = async || classes.get("gold").await.expect("read").metadata.finalizers.unwrap_or_default();
    assert_eventually_async!(20, held().await == ["kubernetes.io/vac-protection"], "it is protected");
    classes.delete("gold", &DeleteParams::default()).await.expect("deleted");
    assert!(classes.get_opt("gold").await.expect("asked").is_some());
    claims.delete("c", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, classes.get_opt("gold").await.expect("asked").is_none(), "it goes when unused");
}

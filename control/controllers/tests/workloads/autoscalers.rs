//! HorizontalPodAutoscalers: what they read, what they set, what they say.

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::{HorizontalPodAutoscaler, HorizontalPodAutoscalerStatus};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::{Cluster, NS, define, made, template};

fn autoscaler(kind: (&str, &str), metric: Value) -> Value {
    json!({"metadata": {"name": "a"}, "spec": {"scaleTargetRef": {"apiVersion": kind.0, "kind": kind.1, "name": "web"},
        "minReplicas": 1, "maxReplicas": 5, "metrics": [metric], "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}}})
}

async fn status(cluster: &Cluster) -> HorizontalPodAutoscalerStatus {
    cluster.of::<HorizontalPodAutoscaler>().get("a").await.expect("there").status.unwrap_or_default()
}

fn condition(status: &HorizontalPodAutoscalerStatus, type_: &str) -> (String, String) {
    let found = status.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    found.map(|found| (found.status.clone(), found.reason.clone().unwrap_or_default())).unwrap_or_default()
}

fn is(status: &str, reason: &str) -> (String, String) {
    (status.into(), reason.into())
}

/// A change of the specification asks for a look at once.
async fn look(cluster: &Cluster, most: i32) {
    cluster.patch::<HorizontalPodAutoscaler>("a", json!({"spec": {"maxReplicas": most}})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_follows_what_its_pods_use() {
    let cluster = Cluster::start().await;
    cluster.node("n", json!({})).await;
    let mut pods = template("web", "i");
    pods["spec"]["nodeName"] = "n".into();
    pods["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "1"}});
    cluster
        .make::<Deployment>(json!({"metadata": {"name": "web"}, "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": pods}}))
        .await;
    assert_eventually_async!(30, cluster.pods("app=web").await.len() == 2, "the pods");
    let metric = json!({"type": "Resource", "resource": {"name": "memory", "target": {"type": "AverageValue", "averageValue": "512Ki"}}});
    cluster.make::<HorizontalPodAutoscaler>(autoscaler(("apps/v1", "Deployment"), metric)).await;
    let blind = is("False", "FailedGetResourceMetric");
    assert_eventually_async!(30, condition(&status(&cluster).await, "ScalingActive") == blind, "nobody measures yet");
    assert_eq!(condition(&status(&cluster).await, "AbleToScale"), is("True", "SucceededGetScale"));
    cluster.use_cpu(&cluster.pods("app=web").await, 100);
    let size = async || cluster.of::<Deployment>().get("web").await.expect("there").spec.and_then(|spec| spec.replicas);
    // Each uses twice its target; kubelets are asked again once what they said is old.
    look(&cluster, 6).await;
    assert_eventually_async!(60, size().await == Some(4), "{:?}", status(&cluster).await);
    assert_eventually_async!(30, status(&cluster).await.desired_replicas == 4, "the status");
    let seen = status(&cluster).await;
    assert_eq!(condition(&seen, "ScalingActive"), is("True", "ValidMetricFound"));
    assert_eq!(condition(&seen, "ScalingLimited"), is("False", "DesiredWithinRange"));
    assert!(seen.last_scale_time.is_some(), "{seen:?}");
    let current = seen.current_metrics.and_then(|all| all[0].resource.clone()).expect("a metric").current;
    assert_eq!(current.average_value.map(|value| value.0).as_deref(), Some("1048576"));
    assert_eventually_async!(
        30,
        cluster.reasons("a").await.iter().any(|reason| reason == "SuccessfulRescale"),
        "users are told"
    );
    // Bounds hold whatever the metrics say.
    look(&cluster, 3).await;
    assert_eventually_async!(30, size().await == Some(3), "{:?}", status(&cluster).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_kind_that_scales_follows_metrics_of_objects_and_of_elsewhere() {
    let cluster = Cluster::start().await;
    let scale = json!({"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"});
    let farms = define(&cluster, "example.com", "v1", "farms", "Farm", Some(scale)).await;
    let queues = define(&cluster, "external.metrics.k8s.io", "v1beta1", "depth", "Queue", None).await;
    let custom = define(&cluster, "custom.metrics.k8s.io", "v1beta2", "metrics", "Metric", None).await;
    let new = PostParams::default();
    let farm =
        json!({"apiVersion": "example.com/v1", "kind": "Farm", "metadata": {"name": "web"}, "spec": {"replicas": 2}});
    farms.create(&new, &made(farm)).await.expect("a farm");
    let state = Patch::Merge(json!({"status": {"replicas": 2, "selector": "app=farm"}}));
    farms.patch_status("web", &PatchParams::default(), &state).await.expect("its state");
    for (name, value) in [("east", "5"), ("west", "4")] {
        let queue = json!({"apiVersion": "external.metrics.k8s.io/v1beta1", "kind": "Queue", "metadata": {"name": name}, "value": value});
        queues.create(&new, &made(queue)).await.expect("a queue");
    }
    let metric = json!({"type": "External", "external": {"metric": {"name": "depth"}, "target": {"type": "AverageValue", "averageValue": "2500m"}}});
    cluster.make::<HorizontalPodAutoscaler>(autoscaler(("example.com/v1", "Farm"), metric)).await;
    let size = async || farms.get("web").await.expect("there").data["spec"]["replicas"].as_i64();
    assert_eventually_async!(30, size().await == Some(4), "nine over two and a half: {:?}", status(&cluster).await);
    let state = Patch::Merge(json!({"status": {"replicas": 4}}));
    farms.patch_status("web", &PatchParams::default(), &state).await.expect("its state");
    let load = json!({"apiVersion": "custom.metrics.k8s.io/v1beta2", "kind": "Metric", "metadata": {"name": "load"},
        "items": [{"describedObject": {"kind": "Namespace", "name": NS}, "value": "6"}]});
    custom.create(&new, &made(load)).await.expect("a value");
    let metric = json!({"type": "Object", "object": {"metric": {"name": "load"}, "describedObject": {"apiVersion": "v1", "kind": "Namespace", "name": NS},
        "target": {"type": "AverageValue", "averageValue": "3"}}});
    cluster.patch::<HorizontalPodAutoscaler>("a", json!({"spec": {"metrics": [metric]}})).await;
    assert_eventually_async!(30, size().await == Some(2), "six over three: {:?}", status(&cluster).await);
    // What nobody wants to run is left alone.
    let off = Patch::Merge(json!({"spec": {"replicas": 0}}));
    farms.patch("web", &PatchParams::default(), &off).await.expect("switched off");
    look(&cluster, 6).await;
    let off = is("False", "ScalingDisabled");
    assert_eventually_async!(
        30,
        condition(&status(&cluster).await, "ScalingActive") == off,
        "{:?}",
        status(&cluster).await
    );
    cluster.patch::<HorizontalPodAutoscaler>("a", json!({"spec": {"scaleTargetRef": {"kind": "Barn"}}})).await;
    let lost = is("False", "FailedGetScale");
    assert_eventually_async!(
        30,
        condition(&status(&cluster).await, "AbleToScale") == lost,
        "{:?}",
        status(&cluster).await
    );
}

//! Pods as the workload controllers see them.

use std::cmp::Reverse;
use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};

use crate::machine::{Error, Host};

/// Annotation by which users rank pods for removal (KEP-2255); lower goes first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// A pod as a template describes it, owned by `owner`, named after `prefix` by the server.
pub(crate) fn from_template(template: &PodTemplateSpec, prefix: &str, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{prefix}-")),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Namespace and name of the claims that a pod uses.
pub(crate) fn claims_of(pod: &Pod) -> Vec<String> {
    let namespace = pod.namespace().unwrap_or_default();
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => Some(format!("{namespace}/{}", claim.claim_name)),
            (None, Some(_)) => Some(format!("{namespace}/{}-{}", pod.name_any(), volume.name)),
            _ => None,
        })
        .collect()
}

/// A pod's condition by type.
pub(crate) fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == type_)
}

/// Whether a pod serves.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// How long a pod must still stay ready to count as available: zero when it does already, `None` when it is not ready.
pub(crate) fn until_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Option<SignedDuration> {
    let ready = condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    if min_ready_seconds == 0 {
        return Some(SignedDuration::ZERO);
    }
    let Time(since) = ready.last_transition_time.as_ref()?;
    let left = SignedDuration::from_secs(min_ready_seconds.into()) - now.duration_since(*since);
    Some(left.max(SignedDuration::ZERO))
}

/// How many of the pods are available, and how long until the next one is if none changes.
pub(crate) fn available(
    pods: &[std::sync::Arc<Pod>],
    min_ready_seconds: i32,
    now: Timestamp,
) -> (usize, Option<SignedDuration>) {
    let waits: Vec<_> = pods.iter().filter_map(|pod| until_available(pod, min_ready_seconds, now)).collect();
    let next = waits.iter().filter(|wait| !wait.is_zero()).min().copied();
    (waits.iter().filter(|wait| wait.is_zero()).count(), next)
}

/// Whether the pod has been ready for long enough.
pub(crate) fn is_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> bool {
    until_available(pod, min_ready_seconds, now).is_some_and(|wait| wait.is_zero())
}

/// The phase, or an empty string before the first status.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether the pod still counts: neither finished nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !matches!(phase(pod), "Succeeded" | "Failed") && pod.metadata.deletion_timestamp.is_none()
}

/// The node that a pod is bound to, as an index takes it.
pub(crate) fn node_of(pod: &Pod) -> Vec<String> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    node.filter(|name| !name.is_empty()).into_iter().collect()
}

/// The time, as conditions hold it: in whole seconds.
pub(crate) fn now() -> Time {
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// Says in a pod's status why it is about to be deleted (condition `DisruptionTarget`, KEP-3329), and that it has failed when
/// nobody is left who could say how it ended.
pub(crate) async fn mark_disrupted(
    host: &Host,
    api: &Api<Pod>,
    pod: &Pod,
    reason: &str,
    message: &str,
    failed: bool,
) -> Result<(), Error> {
    const TYPE: &str = "DisruptionTarget";
    let mut conditions = pod.status.clone().unwrap_or_default().conditions.unwrap_or_default();
    let held = conditions.iter().any(|condition| condition.type_ == TYPE && condition.status == "True");
    if held && !failed {
        return Ok(());
    }
    if !held {
        conditions.retain(|condition| condition.type_ != TYPE);
        conditions.push(PodCondition {
            type_: TYPE.into(),
            status: "True".into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_transition_time: Some(now()),
            ..PodCondition::default()
        });
    }
    let mut status = serde_json::json!({"conditions": conditions});
    if failed {
        status["phase"] = "Failed".into();
    }
    let patch = serde_json::json!({
        "metadata": {"uid": pod.uid(), "resourceVersion": pod.resource_version()}, "status": status,
    });
    host.patch_status(api, &pod.name_any(), patch).await?;
    Ok(())
}

/// The order in which pods are given up when there are too many (kube-controller `ActivePodsWithRanks`): unbound before
/// bound, pending before running, not ready before ready, cheap before dear, more doubled up on one node before less,
/// shorter ready before longer, more restarts before fewer, younger before older.
pub(crate) fn rank_for_removal(pods: &mut [std::sync::Arc<Pod>], on_node: &HashMap<String, usize>) {
    pods.sort_by_cached_key(|pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        let phase = match phase(pod) {
            "Pending" | "" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let cost = pod.annotations().get(DELETION_COST).and_then(|cost| cost.parse::<i32>().ok()).unwrap_or_default();
        let doubled = on_node.get(&node).copied().unwrap_or_default();
        let ready_since = condition(pod, "Ready")
            .filter(|condition| condition.status == "True")
            .and_then(|condition| condition.last_transition_time.as_ref())
            .map(|time| Reverse(time.0));
        let restarts = pod
            .status
            .iter()
            .flat_map(|status| status.container_statuses.iter().flatten())
            .map(|status| status.restart_count)
            .max()
            .unwrap_or_default();
        let created = pod.creation_timestamp().map(|time| Reverse(time.0));
        (!node.is_empty(), phase, is_ready(pod), cost, Reverse(doubled), ready_since, Reverse(restarts), created)
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: &str, ready: bool, restarts: i32) -> Arc<Pod> {
        let conditions = json!([{"type": "Ready", "status": if ready { "True" } else { "False" }, "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let node = if node.is_empty() { json!(null) } else { json!(node) };
        let statuses = json!([{"name": "a", "image": "", "imageID": "", "ready": ready, "restartCount": restarts}]);
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"containers": [], "nodeName": node},
                "status": {"phase": if ready { "Running" } else { "Pending" }, "conditions": conditions, "containerStatuses": statuses},
            }))
            .expect("a pod"),
        )
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let mut pods = vec![
            pod("steady", "n", true, 0),
            pod("restarting", "n", true, 3),
            pod("unready", "n", false, 0),
            pod("unbound", "", false, 0),
        ];
        rank_for_removal(&mut pods, &HashMap::new());
        let names: Vec<_> = pods.iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["unbound", "unready", "restarting", "steady"]);
    }

    #[test]
    fn availability_counts_from_readiness() {
        let pod = pod("a", "n", true, 0);
        let now: Timestamp = "2026-01-01T00:00:04Z".parse().expect("a time");
        assert_eq!(until_available(&pod, 0, now), Some(SignedDuration::ZERO));
        assert_eq!(until_available(&pod, 10, now), Some(SignedDuration::from_secs(6)));
        assert_eq!(until_available(&pod, 3, now), Some(SignedDuration::ZERO));
    }
}

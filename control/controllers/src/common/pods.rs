//! Pods as the workload controllers see them.

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};

use crate::machine::{Error, Host};

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
    left_to_wait(ready.last_transition_time.as_ref().map(|time| time.0), min_ready_seconds, now)
}

/// How long a pod that is ready since then must stay so to count as available.
pub(super) fn left_to_wait(since: Option<Timestamp>, min_ready_seconds: i32, now: Timestamp) -> Option<SignedDuration> {
    if min_ready_seconds == 0 {
        return Some(SignedDuration::ZERO);
    }
    let left = SignedDuration::from_secs(min_ready_seconds.into()) - now.duration_since(since?);
    Some(left.max(SignedDuration::ZERO))
}

/// How many pods are available, and how long until the next one is if none changes, from how long each must still wait.
pub(crate) fn available(waits: impl Iterator<Item = Option<SignedDuration>>) -> (usize, Option<SignedDuration>) {
    let (mut available, mut next) = (0, None);
    for wait in waits.flatten() {
        if wait.is_zero() {
            available += 1;
        } else {
            next = Some(next.map_or(wait, |next: SignedDuration| next.min(wait)));
        }
    }
    (available, next)
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

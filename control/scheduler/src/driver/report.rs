//! What users see: conditions, nominations and events; and victims of preemption told to leave.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::events::v1::Event as EventObject;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::turn::Turn;
use super::{Outcome, Writer};
use crate::engine::Report;
use crate::state::PodState;

/// Tries to write a condition while others write the pod as well.
const TRIES: usize = 4;

fn parameters() -> PatchParams {
    PatchParams { field_manager: Some("kube-scheduler".into()), ..PatchParams::default() }
}

fn pods(writer: &Writer, pod: &PodState) -> Api<Pod> {
    Api::namespaced(writer.client.clone(), &pod.shape.namespace)
}

fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// What an event is about.
fn reference(pod: &PodState) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.to_string()),
        namespace: Some(pod.shape.namespace.to_string()),
        uid: Some(pod.uid.to_string()),
        ..ObjectReference::default()
    }
}

/// The turns that a report needs: one for the pod itself, then one for each that it displaces.
pub(super) fn turns(writer: &Writer, report: &Report) -> Vec<Turn> {
    let pods = std::iter::once(&report.pod).chain(&report.displaced);
    pods.map(|pod| writer.turns.take(&pod.uid)).collect()
}

/// Reports a pod without a node and tells its victims to leave.
pub(super) async fn run(writer: Writer, report: Report, turns: Vec<Turn>, permit: OwnedSemaphorePermit) {
    let Report { pod, message, nominated, victims, displaced } = report;
    let mut turns = turns.into_iter();
    if let Some(turn) = turns.next() {
        failed(&writer, &pod, &turn, "Unschedulable", message, nominated.clone()).await;
    }
    for (other, turn) in displaced.iter().zip(turns) {
        write_status(&writer, other, &turn, json!({"nominatedNodeName": null})).await;
    }
    let mut all_left = true;
    for victim in &victims {
        let node = nominated.as_deref().unwrap_or_default();
        if let Err(error) = evict(&writer, &pod, victim, node).await {
            tracing::warn!(pod = %victim.name, %error, "a pod could not be made to leave, trying again");
            all_left = false;
        }
    }
    drop(permit);
    // The loop ends only with the process.
    let _ = writer.outcomes.send(Outcome::Reported(pod.uid.clone(), all_left));
}

/// Says in the pod's condition and in an event why it has no node.
pub(super) async fn failed(
    writer: &Writer,
    pod: &Arc<PodState>,
    turn: &Turn,
    reason: &str,
    message: String,
    nominated: Option<String>,
) {
    let seen = writer.pods.get(&pod.shape.namespace, &pod.name);
    let seen = seen.filter(|seen| seen.metadata.uid.as_deref() == Some(&*pod.uid));
    let conditions = seen.iter().flat_map(|seen| &seen.status).flat_map(|status| status.conditions.iter().flatten());
    let known = conditions.filter(|condition| condition.type_ == "PodScheduled").any(|condition| {
        condition.status == "False"
            && condition.reason.as_deref() == Some(reason)
            && condition.message.as_ref() == Some(&message)
    });
    let mut status = serde_json::Map::new();
    if !known {
        let condition = json!({
            "type": "PodScheduled", "status": "False", "reason": reason, "message": message,
            "lastTransitionTime": now(), "observedGeneration": pod.generation,
        });
        status.insert("conditions".into(), json!([condition]));
    }
    if let Some(node) = nominated {
        status.insert("nominatedNodeName".into(), if node.is_empty() { Value::Null } else { node.into() });
    }
    if !status.is_empty() {
        write_status(writer, pod, turn, Value::Object(status)).await;
    }
    publish(writer, pod, EventType::Warning, ("FailedScheduling", "Scheduling"), message, None).await;
}

/// Writes a part of the status of a pod that has no node. Once it has one, or a later report is under way, what was to be
/// said is no longer true.
async fn write_status(writer: &Writer, pod: &PodState, turn: &Turn, status: Value) {
    let mut revision = pod.revision.as_deref().map(ToOwned::to_owned);
    for _ in 0..TRIES {
        if !turn.is_latest() {
            return;
        }
        let patch = json!({"metadata": {"uid": &*pod.uid, "resourceVersion": revision}, "status": status});
        match pods(writer, pod).patch_status(&pod.name, &parameters(), &Patch::Strategic(patch)).await {
            Ok(_) => return,
            Err(kube::Error::Api(refusal)) if refusal.code == 409 => {}
            Err(kube::Error::Api(refusal)) if refusal.code == 404 => return,
            Err(error) => {
                tracing::debug!(pod = %pod.name, %error, "status not written");
                return;
            }
        }
        match pods(writer, pod).get_opt(&pod.name).await {
            Ok(Some(newer)) if newer.metadata.uid.as_deref() == Some(&*pod.uid) => {
                if newer.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
                    return;
                }
                revision = newer.metadata.resource_version;
            }
            _ => return,
        }
    }
}

/// Tells a pod to leave: its condition says why, its grace period holds.
async fn evict(writer: &Writer, preemptor: &PodState, victim: &Arc<PodState>, node: &str) -> Result<(), kube::Error> {
    let api = pods(writer, victim);
    let condition = json!({
        "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler",
        "message": format!("{}: preempting to accommodate a higher priority pod", preemptor.shape.scheduler),
        "lastTransitionTime": now(), "observedGeneration": victim.generation,
    });
    let patch = json!({"metadata": {"uid": &*victim.uid}, "status": {"conditions": [condition]}});
    let gone = |error: &kube::Error| matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409));
    match api.patch_status(&victim.name, &parameters(), &Patch::Strategic(patch)).await {
        Err(error) if gone(&error) => return Ok(()),
        other => other.map(drop)?,
    }
    let only_it = Preconditions { uid: Some(victim.uid.to_string()), resource_version: None };
    match api.delete(&victim.name, &DeleteParams { preconditions: Some(only_it), ..DeleteParams::default() }).await {
        Err(error) if gone(&error) => return Ok(()),
        other => other.map(drop)?,
    }
    let note = format!("Preempted by pod {} on node {node}", preemptor.uid);
    publish(writer, victim, EventType::Normal, ("Preempted", "Preempting"), note, Some(preemptor)).await;
    Ok(())
}

/// The news that a pod has a node. There is one such event a pod, so nothing is kept for a second.
pub(super) async fn scheduled(writer: &Writer, pod: &PodState, node: &str) {
    let Ok(_permit) = writer.events.try_acquire() else { return };
    let (namespace, name) = (&*pod.shape.namespace, &*pod.name);
    let at = Timestamp::now();
    let event = EventObject {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", at.as_nanosecond())),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(at)),
        type_: Some("Normal".into()),
        reason: Some("Scheduled".into()),
        action: Some("Binding".into()),
        note: Some(format!("Successfully assigned {namespace}/{name} to {node}")),
        reporting_controller: Some(pod.shape.scheduler.clone()),
        reporting_instance: Some(format!("{}-coracle", pod.shape.scheduler)),
        regarding: Some(reference(pod)),
        ..EventObject::default()
    };
    let api: Api<EventObject> = Api::namespaced(writer.client.clone(), namespace);
    if let Err(error) = api.create(&PostParams::default(), &event).await {
        tracing::debug!(%error, "event not written");
    }
}

/// Events are news, not state: one that cannot be written is logged, one too many dropped.
async fn publish(
    writer: &Writer,
    pod: &PodState,
    type_: EventType,
    (reason, action): (&str, &str),
    note: String,
    related: Option<&PodState>,
) {
    let profile = related.unwrap_or(pod).shape.scheduler.as_str();
    let (Some(recorder), Ok(_permit)) = (writer.recorders.get(profile), writer.events.try_acquire()) else {
        return;
    };
    let secondary = related.map(reference);
    let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary };
    if let Err(error) = recorder.publish(&event, &reference(pod)).await {
        tracing::debug!(reason, %error, "event not written");
    }
}

//! Pods: rows, preparation, quality of service, graceful deletion.

pub mod containers;
pub mod defaults;
pub mod scheduling;
pub mod security;
pub mod template;
pub mod update;
pub mod volumes;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::context::Context;
use crate::kinds::FieldLabel;
use crate::kinds::edit::{child, drop, each, list, put, text};
use crate::kinds::quantity::Quantity;
use crate::kinds::row::Row;

const LABELS: &[FieldLabel] = &[
    ("spec.nodeName", "/spec/nodeName"),
    ("spec.restartPolicy", "/spec/restartPolicy"),
    ("spec.schedulerName", "/spec/schedulerName"),
    ("spec.serviceAccountName", "/spec/serviceAccountName"),
    ("spec.hostNetwork", "/spec/hostNetwork"),
    ("status.phase", "/status/phase"),
    ("status.podIP", "/status/podIP"),
    ("status.podIPs", "/status/podIPs/0/ip"),
    ("status.nominatedNodeName", "/status/nominatedNodeName"),
];

pub static ROWS: &[Row] = &[Row {
    resource: "pods",
    default: |o| {
        defaults::pod(o);
        containers::quantities_in_status(child(o, "status"));
    },
    create: |_, o| {
        let class = qos(o.get("spec").unwrap_or(&Value::Null));
        put(o, "status", json!({"phase": "Pending", "qosClass": class}));
        // Gated pods say so from the start.
        let gated = !list(o.get("spec").unwrap_or(&Value::Null), "schedulingGates").is_empty();
        if gated {
            put(
                child(o, "status"),
                "conditions",
                json!([{"type": "PodScheduled", "status": "False",
                "reason": "SchedulingGated", "message": "Scheduling is blocked due to non-empty scheduling gates",
                "lastProbeTime": null, "lastTransitionTime": null}]),
            );
        }
    },
    subresource: prepare_subresource,
    validate: |o, e| {
        template::annotations(o, e);
        template::check_spec(&o.at("spec"), template::Place::Pod, e);
    },
    change: update::change,
    whole_on_update: false,
    sub_change: |sub, new, old, e| match sub {
        "status" => update::status(new, old, e),
        "ephemeralcontainers" => update::ephemeral(new, old, e),
        "resize" => update::resize(new, old, e),
        _ => {}
    },
    status: "{}",
    generation: true,
    spec_changed: Some(spec_changed),
    labels: LABELS,
    graceful: grace,
    ..Row::BASE
}];

/// A pod's generation counts changes of what was asked for; binding it to a node is none.
fn spec_changed(new: &Value, old: &Value) -> bool {
    let spec = |pod: &Value| pod.get("spec").cloned().unwrap_or_default();
    crate::object::differs_outside(&spec(new), &spec(old), &["nodeName"])
}

/// Keeps all of the old pod but the part that a subresource writes.
fn prepare_subresource(ctx: &Context, new: &mut Value, old: &Value) -> bool {
    let take = |new: &mut Value, keep: &dyn Fn(&mut Value, &Value)| {
        let given = std::mem::replace(new, old.clone());
        for f in ["managedFields", "resourceVersion"] {
            if let Some(v) = given.pointer(&format!("/metadata/{f}")).cloned() {
                put(child(new, "metadata"), f, v);
            }
        }
        keep(new, &given);
    };
    match ctx.subresource.as_str() {
        "status" => {
            take(new, &|new, given| {
                // Labels and annotations may come with a status, which kubelets of old make use of.
                let mut status = given.get("status").cloned().unwrap_or_else(|| json!({}));
                let class = old.pointer("/status/qosClass").and_then(Value::as_str);
                let class = class.unwrap_or_else(|| qos(old.get("spec").unwrap_or(&Value::Null)));
                put(&mut status, "qosClass", class);
                put(new, "status", status);
                if let Some(v) = given.pointer("/metadata/finalizers").cloned() {
                    put(child(new, "metadata"), "finalizers", v);
                }
                for f in ["labels", "annotations"] {
                    if let Some(v) = given.pointer(&format!("/metadata/{f}")).cloned() {
                        put(child(new, "metadata"), f, v);
                    }
                }
            });
            true
        }
        "ephemeralcontainers" => {
            take(new, &|new, given| match given.pointer("/spec/ephemeralContainers").cloned() {
                Some(v) => put(child(new, "spec"), "ephemeralContainers", v),
                None => drop(child(new, "spec"), "ephemeralContainers"),
            });
            true
        }
        "resize" => {
            take(new, &|new, given| {
                let spec = child(new, "spec");
                for lists in ["containers", "initContainers"] {
                    let wanted = list(given.get("spec").unwrap_or(&Value::Null), lists).to_vec();
                    each(spec, lists, |c| {
                        let name = text(c, "name").to_owned();
                        if let Some(w) = wanted.iter().find(|w| text(w, "name") == name) {
                            for f in ["resources", "resizePolicy"] {
                                if let Some(v) = w.get(f).cloned() {
                                    put(c, f, v);
                                }
                            }
                        }
                    });
                }
                if let Some(v) = given.pointer("/spec/resources").cloned() {
                    put(spec, "resources", v);
                }
            });
            true
        }
        _ => false,
    }
}

/// The quality of service class of a pod spec: `Guaranteed`, `Burstable` or `BestEffort`.
///
/// Source: `pkg/apis/core/v1/helper/qos`.
pub fn qos(spec: &Value) -> &'static str {
    let (mut requests, mut limits) = (BTreeMap::new(), BTreeMap::new());
    let mut guaranteed = true;
    let resources: Vec<&Value> = match spec.get("resources") {
        Some(r) if r.get("requests").is_some() || r.get("limits").is_some() => vec![r],
        _ => ["containers", "initContainers"]
            .iter()
            .flat_map(|f| list(spec, f))
            .filter_map(|c| c.get("resources"))
            .collect(),
    };
    let count = resources.len().max(["containers", "initContainers"].iter().flat_map(|f| list(spec, f)).count().min(1));
    for r in &resources {
        let mut limited = 0;
        for (which, sums) in [("requests", &mut requests), ("limits", &mut limits)] {
            for name in ["cpu", "memory"] {
                let Some(q) = r.get(which).and_then(|m| m.get(name)).and_then(Quantity::from_value) else { continue };
                if q.is_zero() || q.is_negative() {
                    continue;
                }
                let sum = sums.entry(name).or_insert(Quantity::ZERO);
                *sum = sum.plus(q);
                limited += usize::from(which == "limits");
            }
        }
        guaranteed &= limited == 2;
    }
    if requests.is_empty() && limits.is_empty() {
        "BestEffort"
    } else if guaranteed
        && count > 0
        && requests.len() == limits.len()
        && requests.iter().all(|(n, q)| limits.get(n) == Some(q))
    {
        "Guaranteed"
    } else {
        "Burstable"
    }
}

/// How long a deleted pod lives on: what the request says, else what the pod says; a pod that runs nowhere goes at once.
fn grace(_: &Context, pod: &mut Value, asked: Option<i64>) -> Option<i64> {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    let mut seconds = match (asked, pod.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64)) {
        (Some(asked), _) => asked,
        (None, Some(running)) => running,
        (None, None) => spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(30),
    };
    // Without a node, or already over, there is nothing to wait for.
    let phase = pod.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
    if text(spec, "nodeName").is_empty() || matches!(phase, "Failed" | "Succeeded") {
        seconds = 0;
    }
    if seconds < 0 {
        seconds = 1;
    }
    Some(seconds)
}

/// Whether a pod has come to its end.
pub fn is_terminal(pod: &Value) -> bool {
    matches!(pod.pointer("/status/phase").and_then(Value::as_str), Some("Failed" | "Succeeded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_counts_changes_of_the_specification_but_not_its_binding() {
        let pod = |spec: Value| json!({"metadata": {}, "spec": spec});
        let new = pod(json!({"priority": 1}));
        assert!(!spec_changed(&pod(json!({"priority": 1, "nodeName": "a"})), &new));
        assert!(spec_changed(&pod(json!({"priority": 1, "activeDeadlineSeconds": 5})), &new));
    }

    #[test]
    fn quality_of_service() {
        let c = |r: Value| json!({"containers": [{"name": "a", "image": "b", "resources": r}]});
        for (spec, class) in [
            (c(json!({})), "BestEffort"),
            (
                c(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1024Mi"}})),
                "Guaranteed",
            ),
            (c(json!({"requests": {"cpu": "1"}})), "Burstable"),
            (c(json!({"limits": {"cpu": "1"}, "requests": {"cpu": "1"}})), "Burstable"),
            (c(json!({"requests": {"example.com/gpu": "1"}, "limits": {"example.com/gpu": "1"}})), "BestEffort"),
        ] {
            assert_eq!(qos(&spec), class, "{spec}");
        }
    }
}

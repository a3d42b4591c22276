//! What may change in a pod, and through which door.

use serde_json::Value;

use crate::kinds::at::{At, Errs, same};
use crate::kinds::edit::{drop, list, put, text};
use crate::kinds::pod::{containers, qos, scheduling, template, volumes};
use crate::kinds::quantity::Quantity;
use crate::kinds::resources;

const MAY_CHANGE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// An update of the pod itself.
pub fn change(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    annotations(new, old, e);
    for lists in ["containers", "initContainers"] {
        let (a, b) = (n.at(lists), o.at(lists));
        if a.len() != b.len() {
            e.forbidden(&a, "pod updates may not add or remove containers");
            return;
        }
        for c in a.items() {
            let image = c.at("image");
            if image.is_zero() {
                e.required(&image, "");
            } else if image.str().trim() != image.str() {
                e.invalid(&image, "must not have leading or trailing whitespace");
            }
        }
    }
    let (now, was) = (n.at("activeDeadlineSeconds"), o.at("activeDeadlineSeconds"));
    if now.is_set() {
        if !(0..=i64::from(i32::MAX)).contains(&now.int()) {
            return e.invalid(&now, format!("must be between 0 and {}, inclusive", i32::MAX));
        }
        if was.is_set() && was.int() < now.int() {
            return e.invalid(&now, "must be less than or equal to previous value");
        }
    } else if was.is_set() {
        return e.invalid_value(&now, Value::Null, "must not update from a positive integer to nil value");
    }
    tolerations(&n.at("tolerations"), &o.at("tolerations"), e);
    // Gates may go, never come; while any is there the pod may still be told where to run.
    let gated = !o.at("schedulingGates").is_empty();
    for g in n.at("schedulingGates").items() {
        if !o.at("schedulingGates").array().contains(g.v) {
            e.forbidden(&g, "only deletion is allowed, but found new scheduling gate");
        }
    }
    // What is left must be as it was: bring over what may differ, then compare.
    let mut munged = n.v.clone();
    for lists in ["containers", "initContainers"] {
        let before = o.at(lists).array();
        if let Some(Value::Array(a)) = munged.get_mut(lists) {
            for (c, b) in a.iter_mut().zip(before) {
                put(c, "image", b.get("image").cloned().unwrap_or_default());
            }
        }
    }
    let mut free = vec!["activeDeadlineSeconds", "tolerations", "schedulingGates"];
    if o.at("terminationGracePeriodSeconds").int() < 0 && n.at("terminationGracePeriodSeconds").int() == 1 {
        free.push("terminationGracePeriodSeconds");
    }
    if gated {
        node_placement(&n, &o, e);
        free.extend(["nodeSelector", "affinity"]);
    }
    for f in free {
        match o.v.get(f).cloned() {
            Some(v) => put(&mut munged, f, v),
            None => drop(&mut munged, f),
        }
    }
    if !same(&munged, o.v) {
        e.forbidden(&n, MAY_CHANGE);
    }
    if old.at("metadata").at("deletionTimestamp").is_set() {
        return;
    }
    // Names and labels of the new object have been looked at; a changed template of a running pod has not.
    scheduling::tolerations(&n.at("tolerations"), e);
    template::annotations(new, e);
}

fn annotations(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    const MIRROR: &str = "kubernetes.io/config.mirror";
    let get = |a: &At<'_>| a.v.pointer("/metadata/annotations").and_then(|m| m.get(MIRROR)).cloned();
    let at = new.at("metadata").at("annotations").key(MIRROR);
    match (get(old), get(new)) {
        (Some(a), b) if Some(&a) != b.as_ref() => e.forbidden(&at, "may not remove or update mirror pod annotation"),
        (None, Some(_)) => e.forbidden(&at, "may not add mirror pod annotation"),
        _ => {}
    }
}

fn tolerations(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let without = |t: &Value| {
        let mut t = t.clone();
        drop(&mut t, "tolerationSeconds");
        t
    };
    for t in old.array() {
        if !new.array().iter().any(|n| without(n) == without(t)) {
            e.forbidden(new, "existing toleration can not be modified except its tolerationSeconds");
            return;
        }
    }
}

/// A gated pod's node selector and required node affinity may become narrower only.
fn node_placement(n: &At<'_>, o: &At<'_>, e: &mut Errs) {
    let (now, was) = (n.at("nodeSelector"), o.at("nodeSelector"));
    if !was.entries().all(|(k, v)| now.v.get(k) == Some(v.v)) {
        e.invalid(&now, "only additions to spec.nodeSelector are allowed (no mutations or deletions)");
    }
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    let (a, b) = (n.at("affinity").at("nodeAffinity").at(REQUIRED), o.at("affinity").at("nodeAffinity").at(REQUIRED));
    if !b.is_set() {
        return;
    }
    let (x, y) = (a.at("nodeSelectorTerms"), b.at("nodeSelectorTerms"));
    let narrower = x.len() == y.len()
        && x.items().zip(y.items()).all(|(x, y)| {
            ["matchExpressions", "matchFields"].iter().all(|f| list(y.v, f).iter().all(|r| list(x.v, f).contains(r)))
        });
    if !narrower {
        e.invalid(&x, "no additions/deletions to non-empty NodeSelectorTerms list are allowed");
    }
}

/// An update of the status.
pub fn status(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let s = new.at("status");
    for (f, v) in [("nominatedNodeName", s.at("nominatedNodeName"))] {
        if !v.is_zero() {
            e.check(&s.at(f), crate::kinds::names::dns1123_subdomain);
        }
    }
    for ip in s.at("podIPs").items() {
        if !ip.at("ip").is_zero() {
            e.check(&ip.at("ip"), crate::kinds::names::ip_address);
        }
    }
    // A container that ended for good does not come back.
    let policy = new.at("spec").at("restartPolicy").str();
    if policy == "Always" {
        return;
    }
    for was in list(old.at("status").v, "containerStatuses") {
        let Some(end) = was.pointer("/state/terminated") else { continue };
        if policy == "OnFailure" && end.get("exitCode").and_then(Value::as_i64) != Some(0) {
            continue;
        }
        let name = text(was, "name");
        for c in s.at("containerStatuses").items() {
            if c.at("name").str() == name && !c.at("state").has("terminated") {
                e.forbidden(&c.at("state"), "may not be transitioned to non-terminated state");
            }
        }
    }
}

/// Ephemeral containers may be added and never changed or taken away.
pub fn ephemeral(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    let mut found = Errs::default();
    let vols = volumes::check(&n.at("volumes"), &mut Errs::default());
    containers::check(&n, &vols, &[], &mut found);
    e.0.extend(found.0.into_iter().filter(|x| x.path.as_str().starts_with("spec.ephemeralContainers")));
    let list_at = n.at("ephemeralContainers");
    for was in list(o.v, "ephemeralContainers") {
        match list_at.items().find(|c| c.at("name").str() == text(was, "name")) {
            None => e.forbidden(
                &list_at,
                format!("existing ephemeral containers {:?} may not be removed\n", text(was, "name")),
            ),
            Some(c) if !same(c.v, was) => {
                e.forbidden(
                    &list_at,
                    format!("existing ephemeral containers {:?} may not be changed\n", text(was, "name")),
                );
            }
            Some(_) => {}
        }
    }
}

/// A resize in place: cpu and memory alone, and the class of service stays.
pub fn resize(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    if qos(n.v) != old.v.pointer("/status/qosClass").and_then(Value::as_str).unwrap_or_else(|| qos(o.v)) {
        e.invalid_value(
            &new.at("status").at("qosClass"),
            qos(n.v),
            "Pod QOS Class may not change as a result of resizing",
        );
    }
    for lists in ["containers", "initContainers"] {
        for c in n.at(lists).items() {
            resources::requirements(&c.at("resources"), false, e);
            let Some(was) = list(o.v, lists).iter().find(|w| text(w, "name") == c.at("name").str()) else { continue };
            for which in ["limits", "requests"] {
                let now = c.at("resources").at(which);
                let before = was.pointer(&format!("/resources/{which}"));
                let mut keys: Vec<&str> = now.entries().map(|(k, _)| k).collect();
                keys.extend(before.and_then(Value::as_object).into_iter().flatten().map(|(k, _)| k.as_str()));
                for k in keys {
                    let b = before.and_then(|b| b.get(k)).and_then(Quantity::from_value);
                    let a = now.v.get(k).and_then(Quantity::from_value);
                    if a == b {
                        continue;
                    }
                    if !matches!(k, "cpu" | "memory") {
                        e.forbidden(&n, "only cpu and memory resources are mutable");
                    } else if b.is_some() && a.is_none() {
                        e.forbidden(&c.at("resources").at(which).key(k), "resource limits cannot be removed");
                    }
                }
            }
        }
    }
}

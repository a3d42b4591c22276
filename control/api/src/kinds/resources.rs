//! Resource names and amounts: requests, limits, quota.

use coracle_schema::FieldError;

use crate::kinds::at::{At, Errs, NOT_NEGATIVE};
use crate::kinds::names::{self, Reasons};
use crate::kinds::quantity::Quantity;

/// Quota names that count or measure and need no prefix.
const QUOTA: [&str; 23] = [
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.storage",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "services",
    "services.nodeports",
    "services.loadbalancers",
    "replicationcontrollers",
    "secrets",
    "persistentvolumeclaims",
    "configmaps",
    "requests.hugepages-",
    "hugepages-",
    "storage",
    "requests.nvidia-",
];
/// Names that count things, so that a fraction makes no sense.
const WHOLE: [&str; 9] = [
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];
/// Resources that containers may ask for by a bare name.
const CONTAINER: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// A type or name that may stand without a prefix.
pub fn qualified_type(s: &str) -> Reasons {
    let mut r = names::qualified_name(s);
    if r.is_empty() && !s.contains('/') && !matches!(s, "Pod" | "Container" | "PersistentVolumeClaim") {
        r.push("must be a standard limit type or fully qualified".to_owned());
    }
    r
}

/// The amount must not be below zero.
pub fn not_negative(at: &At<'_>, e: &mut Errs) {
    if let Some(q) = Quantity::from_value(at.v)
        && q.is_negative()
    {
        e.invalid(at, NOT_NEGATIVE);
    }
}

/// An amount of a resource: not negative, and whole where it counts things.
pub fn amount(name: &str, at: &At<'_>, e: &mut Errs) {
    not_negative(at, e);
    let whole = WHOLE.contains(&name) || is_extended(name);
    if whole && Quantity::from_value(at.v).is_some_and(|q| !q.is_whole()) {
        e.invalid(at, "must be an integer");
    }
}

/// A resource of a device plugin: it has a domain of its own.
pub fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

pub fn is_hugepages(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// The key of a quota.
pub fn quota_name(at: &At<'_>, name: &str, e: &mut Errs) {
    // The words name the key, the path too.
    let value = name;
    for r in names::qualified_name(name) {
        e.0.push(FieldError::invalid(at.path(), value, r));
    }
    if !name.contains('/') && !QUOTA.iter().any(|q| name == *q || (q.ends_with('-') && name.starts_with(q))) {
        e.0.push(FieldError::invalid(at.path(), value, "must be a standard resource for quota"));
    }
}

/// The `resources` of a container (or of a pod, with `pod_level`).
pub fn requirements(at: &At<'_>, pod_level: bool, e: &mut Errs) {
    let (limits, requests) = (at.at("limits"), at.at("requests"));
    let name = |k: &str, v: &At<'_>, e: &mut Errs| {
        for r in names::qualified_name(k) {
            e.invalid_value(v, k, r);
        }
        if pod_level {
            if !matches!(k, "cpu" | "memory") && !is_hugepages(k) {
                e.0.push(FieldError::not_supported(v.path(), k, &["cpu", "hugepages-", "memory"]));
            }
        } else if !k.contains('/') && !CONTAINER.contains(&k) && !is_hugepages(k) {
            e.invalid_value(v, k, "must be a standard resource for containers");
        } else if k.contains("kubernetes.io/") && k.contains('/') {
            e.invalid_value(v, k, "must be a standard resource type or fully qualified");
        }
    };
    let mut huge = false;
    let mut core = false;
    for (k, v) in limits.entries() {
        name(k, &v, e);
        amount(k, &v, e);
        huge |= is_hugepages(k);
        core |= CONTAINER[..2].contains(&k);
    }
    for (k, v) in requests.entries() {
        name(k, &v, e);
        amount(k, &v, e);
        huge |= is_hugepages(k);
        core |= CONTAINER[..2].contains(&k);
        let (Some(want), limit) = (Quantity::from_value(v.v), limits.v.get(k)) else { continue };
        let fixed = is_extended(k) || is_hugepages(k);
        match limit.and_then(Quantity::from_value) {
            Some(l) if fixed && l != want => {
                e.invalid(&v, format!("must be equal to {k} limit of {l}"));
            }
            Some(l) if want > l => {
                e.invalid(&v, format!("must be less than or equal to {k} limit of {l}"));
            }
            None if fixed => e.required(&limits, "Limit must be set for non overcommitable resources"),
            _ => {}
        }
    }
    if huge && !core {
        e.forbidden(at, "HugePages require cpu or memory");
    }
}

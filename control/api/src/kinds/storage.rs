//! Persistent volumes, claims, classes and the CSI kinds.

use serde_json::{Value, json};

use crate::kinds::at::{At, Errs, same};
use crate::kinds::edit::{child, each_field, empty, put, quantities, quantity, text, unset};
use crate::kinds::pod::{defaults, volumes};
use crate::kinds::quantity::Quantity;
use crate::kinds::row::Row;
use crate::kinds::{meta, names, resources};

const MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
const STORAGE: &str = "storage.k8s.io";
const PROTECT_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

pub static ROWS: &[Row] = &[
    Row {
        resource: "persistentvolumes",
        default: |o| {
            let spec = child(o, "spec");
            empty(spec, "persistentVolumeReclaimPolicy", "Retain");
            unset(spec, "volumeMode", "Filesystem");
            quantities(spec, "capacity");
            each_field(spec, "hostPath", |h| unset(h, "type", ""));
            defaults::plugin_volume(spec);
        },
        create: |ctx, o| put(o, "status", json!({"phase": "Pending", "lastPhaseTransitionTime": ctx.now_text()})),
        subresource: |ctx, new, old| {
            if ctx.subresource != "status" {
                return false;
            }
            crate::kinds::row::keep_all_but_status_and_metadata(new, old);
            if new.pointer("/status/phase") != old.pointer("/status/phase") {
                put(child(new, "status"), "lastPhaseTransitionTime", ctx.now_text());
            }
            true
        },
        validate: check_volume,
        change: |n, o, e| {
            let (n, o) = (n.at("spec"), o.at("spec"));
            let source = |spec: &Value| -> Value {
                let map = spec.as_object().cloned().unwrap_or_default();
                map.into_iter().filter(|(k, _)| volumes::SOURCES.contains(&k.as_str())).collect()
            };
            let (is, was) = (source(n.v), source(o.v));
            if !same(&is, &was) {
                e.forbidden(
                    &n.named("persistentvolumesource"),
                    "spec.persistentvolumesource is immutable after creation",
                );
            }
            e.immutable(&n.at("volumeMode"), &o.at("volumeMode"));
            if o.at("nodeAffinity").is_set() {
                e.immutable(&n.at("nodeAffinity"), &o.at("nodeAffinity"));
            }
        },
        status: r#"{"phase":"Pending"}"#,
        ..Row::BASE
    },
    Row {
        resource: "persistentvolumeclaims",
        default: default_claim,
        create: |_, o| put(o, "status", json!({"phase": "Pending"})),
        validate: |o, e| {
            check_claim_spec(&o.at("spec"), e);
        },
        change: change_claim,
        sub_change: |_, n, _, e| {
            for (_, q) in n.at("status").at("capacity").entries() {
                resources::not_negative(&q, e);
            }
        },
        status: r#"{"phase":"Pending"}"#,
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "storageclasses",
        default: |o| {
            unset(o, "reclaimPolicy", "Delete");
            unset(o, "volumeBindingMode", "Immediate");
        },
        validate: |o, e| {
            provisioner(&o.at("provisioner"), e);
            for (k, v) in o.at("parameters").entries() {
                if k.is_empty() {
                    e.invalid_value(&o.at("parameters"), k, "field can not be empty.");
                }
                let _ = v;
            }
            e.required_one_of(&o.at("reclaimPolicy"), &["Delete", "Retain"]);
            e.required_one_of(&o.at("volumeBindingMode"), &["Immediate", "WaitForFirstConsumer"]);
            let mut keys: Vec<&str> = Vec::new();
            for t in o.at("allowedTopologies").items() {
                for x in t.at("matchLabelExpressions").items() {
                    if x.at("values").is_empty() {
                        e.required(&x.at("values"), "");
                    }
                    e.check(&x.at("key"), names::qualified_name);
                    keys.push(x.at("key").str());
                }
            }
        },
        change: |n, o, e| {
            for (f, words) in [
                ("parameters", "updates to parameters are forbidden."),
                ("provisioner", "updates to provisioner are forbidden."),
                ("reclaimPolicy", "updates to reclaimPolicy are forbidden."),
            ] {
                if !same(n.at(f).v, o.at(f).v) {
                    e.forbidden(&n.at(f), words);
                }
            }
            e.immutable(&n.at("volumeBindingMode"), &o.at("volumeBindingMode"));
        },
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "volumeattachments",
        status_alone: true,
        default: |o| {
            child(child(o, "spec"), "source");
        },
        validate: |o, e| {
            let s = o.at("spec");
            provisioner(&s.at("attacher"), e);
            e.required_check(&s.at("nodeName"), names::dns1123_subdomain);
            let src = s.at("source");
            let (inline, pv) = (src.has("inlineVolumeSpec"), !src.at("persistentVolumeName").is_zero());
            match (inline, pv) {
                (false, false) => {
                    e.required(&src, "must specify exactly one of inlineVolumeSpec and persistentVolumeName")
                }
                (true, true) => {
                    e.forbidden(&src, "must specify exactly one of inlineVolumeSpec and persistentVolumeName")
                }
                _ => {}
            }
        },
        change: |n, o, e| e.immutable(&n.at("spec"), &o.at("spec")),
        status: r#"{"attached":false}"#,
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "csidrivers",
        default: |o| {
            let spec = child(o, "spec");
            for (f, v) in [
                ("attachRequired", true),
                ("podInfoOnMount", false),
                ("storageCapacity", false),
                ("requiresRepublish", false),
                ("seLinuxMount", false),
            ] {
                unset(spec, f, v);
            }
            unset(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
            empty(spec, "volumeLifecycleModes", json!(["Persistent"]));
        },
        validate: |o, e| {
            let name = o.at("metadata").at("name");
            if name.len() > 63 {
                e.too_long(&name, 63);
            }
            let s = o.at("spec");
            for f in ["attachRequired", "podInfoOnMount", "storageCapacity"] {
                if !s.at(f).is_set() {
                    e.required(&s.at(f), "");
                }
            }
            e.one_of(&s.at("fsGroupPolicy"), &["File", "None", "ReadWriteOnceWithFSType"]);
            for m in s.at("volumeLifecycleModes").items() {
                e.one_of(&m, &["Ephemeral", "Persistent"]);
            }
            for t in s.at("tokenRequests").items() {
                let x = t.at("expirationSeconds");
                if x.is_set() && x.int() < 600 {
                    e.invalid(&x, "may not specify a duration less than 10 minutes");
                }
                if x.int() > 1 << 32 {
                    e.invalid(&x, "may not specify a duration larger than 2^32 seconds");
                }
            }
        },
        change: |n, o, e| {
            let (n, o) = (n.at("spec"), o.at("spec"));
            for f in ["attachRequired", "fsGroupPolicy", "volumeLifecycleModes"] {
                e.immutable(&n.at(f), &o.at(f));
            }
        },
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "csinodes",
        default: |o| {
            let spec = child(o, "spec");
            if spec.get("drivers").is_none() {
                put(spec, "drivers", Value::Null);
            }
        },
        validate: |o, e| {
            let mut seen: Vec<&str> = Vec::new();
            for d in o.at("spec").at("drivers").items() {
                provisioner(&d.at("name"), e);
                if d.at("nodeID").is_zero() {
                    e.required(&d.at("nodeID"), "");
                }
                if d.at("nodeID").len() > 192 {
                    e.invalid(&d.at("nodeID"), "must be 192 characters or less");
                }
                e.not_negative(&d.at("allocatable").at("count"));
                if seen.contains(&d.at("name").str()) {
                    e.duplicate(&d.at("name"));
                }
                seen.push(d.at("name").str());
                for k in d.at("topologyKeys").items() {
                    e.check(&k, names::qualified_name);
                }
            }
        },
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "csistoragecapacities",
        default: |o| {
            quantity(o, "capacity");
            quantity(o, "maximumVolumeSize");
        },
        validate: |o, e| {
            e.required_check(&o.at("storageClassName"), names::dns1123_subdomain);
            for f in ["capacity", "maximumVolumeSize"] {
                resources::not_negative(&o.at(f), e);
            }
            meta::selector(&o.at("nodeTopology"), e);
        },
        change: |n, o, e| {
            for f in ["nodeTopology", "storageClassName"] {
                e.immutable(&n.at(f), &o.at(f));
            }
        },
        ..Row::BASE
    },
    Row {
        group: STORAGE,
        resource: "volumeattributesclasses",
        validate: |o, e| {
            provisioner(&o.at("driverName"), e);
            if o.at("parameters").is_zero() {
                e.required(&o.at("parameters"), "must contain at least one key/value pair");
            }
        },
        change: |n, o, e| {
            for (f, words) in [
                ("driverName", "updates to driverName are forbidden."),
                ("parameters", "updates to parameters are forbidden."),
            ] {
                if !same(n.at(f).v, o.at(f).v) {
                    e.forbidden(&n.at(f), words);
                }
            }
        },
        ..Row::BASE
    },
];

/// A claim, also as a template of a stateful set.
pub fn default_claim(o: &mut Value) {
    defaults::claim_spec(child(o, "spec"));
    let status = child(o, "status");
    empty(status, "phase", "Pending");
    quantities(status, "capacity");
    quantities(status, "allocatedResources");
    // A data source is also given under its newer name, and the other way round.
    let spec = child(o, "spec");
    let (old, new) = (spec.get("dataSource").cloned(), spec.get("dataSourceRef").cloned());
    match (old, new) {
        (Some(s), None) => put(spec, "dataSourceRef", s),
        (None, Some(s)) if text(&s, "namespace").is_empty() => put(spec, "dataSource", s),
        _ => {}
    }
}

fn provisioner(at: &At<'_>, e: &mut Errs) {
    if at.is_zero() {
        return e.required(at, "");
    }
    let lower = at.str().to_lowercase();
    for r in names::qualified_name(&lower) {
        e.invalid_value(at, lower.clone(), r);
    }
}

fn modes(at: &At<'_>, e: &mut Errs) {
    if at.is_empty() {
        e.required(at, "");
    }
    let (mut single, mut other) = (false, false);
    for m in at.items() {
        if !MODES.contains(&m.str()) {
            e.not_supported(&at.with(m.v), &MODES);
        }
        single |= m.str() == "ReadWriteOncePod";
        other |= m.str() != "ReadWriteOncePod";
    }
    if single && other {
        e.forbidden(at, "may not use ReadWriteOncePod with other access modes");
    }
}

fn check_volume(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    modes(&spec.at("accessModes"), e);
    let capacity = spec.at("capacity");
    if capacity.is_zero() {
        e.required(&capacity, "");
    }
    if !capacity.has("storage") || capacity.len() > 1 {
        e.not_supported(&capacity, &["storage"]);
    }
    for (_, q) in capacity.entries() {
        positive(&q, e);
    }
    volumes::check_source(&spec, true, e);
    e.required_one_of(&spec.at("persistentVolumeReclaimPolicy"), &["Delete", "Recycle", "Retain"]);
    if spec.at("hostPath").at("path").str() == "/" && spec.at("persistentVolumeReclaimPolicy").str() == "Recycle" {
        e.forbidden(&spec.at("persistentVolumeReclaimPolicy"), "may not be 'recycle' for a hostPath mount of '/'");
    }
    if !spec.at("storageClassName").is_zero() {
        e.check(&spec.at("storageClassName"), names::dns1123_subdomain);
    }
    e.one_of(&spec.at("volumeMode"), &["Block", "Filesystem"]);
    if spec.has("local") && !spec.has("nodeAffinity") {
        e.required(&spec.at("nodeAffinity"), "Local volume requires node affinity");
    }
    if spec.has("nodeAffinity") {
        let required = spec.at("nodeAffinity").at("required");
        if required.is_set() {
            crate::kinds::pod::scheduling::node_selector(&required, e);
        } else {
            e.required(&required, "must specify required node constraints");
        }
    }
}

fn positive(at: &At<'_>, e: &mut Errs) {
    if Quantity::from_value(at.v).is_some_and(|q| q <= Quantity::ZERO) {
        e.invalid(at, "must be greater than zero");
    }
}

/// A claim's spec, also inside a pod's ephemeral volume.
pub fn check_claim_spec(spec: &At<'_>, e: &mut Errs) {
    modes(&spec.at("accessModes"), e);
    if spec.at("selector").is_set() {
        meta::selector(&spec.at("selector"), e);
    }
    let asked = spec.at("resources").at("requests").key("storage");
    if !asked.is_set() {
        e.required(&asked, "");
    } else {
        positive(&asked, e);
    }
    if !spec.at("storageClassName").is_zero() {
        e.check(&spec.at("storageClassName"), names::dns1123_subdomain);
    }
    if spec.at("volumeMode").is_set() {
        e.one_of(&spec.at("volumeMode"), &["Block", "Filesystem"]);
    }
    for f in ["dataSource", "dataSourceRef"] {
        let s = spec.at(f);
        if !s.is_set() {
            continue;
        }
        for part in ["name", "kind"] {
            if s.at(part).is_zero() {
                e.required(&s.at(part), "");
            }
        }
        if s.at("apiGroup").is_zero() && s.at("kind").str() != "PersistentVolumeClaim" {
            e.invalid_value(
                &s,
                s.at("kind").str(),
                "must be 'PersistentVolumeClaim' when referencing the default apiGroup",
            );
        }
    }
}

fn change_claim(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    let (mut is, mut was) = (n.v.clone(), o.v.clone());
    let bound = old.at("status").at("phase").str() == "Bound";
    let asked = |v: &Value| v.pointer("/resources/requests/storage").and_then(Quantity::from_value);
    let (want, had) = (asked(n.v), asked(o.v));
    // An unbound claim may be bound; a bound one may grow.
    if o.at("volumeName").is_zero() {
        for v in [&mut is, &mut was] {
            crate::kinds::edit::drop(v, "volumeName");
        }
    }
    if o.at("storageClassName").v.is_null() || o.at("storageClassName").v == "" {
        for v in [&mut is, &mut was] {
            crate::kinds::edit::drop(v, "storageClassName");
        }
    }
    if bound || want == had {
        for v in [&mut is, &mut was] {
            if let Some(r) = v.pointer_mut("/resources/requests") {
                crate::kinds::edit::drop(r, "storage");
            }
        }
    }
    for v in [&mut is, &mut was] {
        crate::kinds::edit::drop(v, "volumeAttributesClassName");
    }
    if !same(&is, &was) {
        e.forbidden(
            &n,
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        );
    } else if bound
        && let (Some(want), Some(had)) = (want, had)
        && want < had
    {
        let held = old.at("status").at("capacity").v.get("storage").and_then(Quantity::from_value);
        if held.is_none_or(|h| want <= h) {
            e.forbidden(&n.at("resources").at("requests").at("storage"), "field can not be less than status.capacity");
        }
    }
    let class = |a: &At<'_>| a.at("metadata").at("annotations").v.get(PROTECT_ANNOTATION).cloned().unwrap_or_default();
    if !class(old).is_null() && class(new) != class(old) {
        e.invalid(&new.at("metadata").at("annotations").at(PROTECT_ANNOTATION), "field is immutable");
    }
}

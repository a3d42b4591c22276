//! Workloads of the group apps, replication controllers and pod templates.

use serde_json::{Value, json};

use crate::kinds::at::{At, Errs, same};
use crate::kinds::edit::{child, drop, each, empty, list, put, text, unset, zero};
use crate::kinds::pod::{self, defaults};
use crate::kinds::row::Row;
use crate::kinds::{FieldLabel, meta, names, storage};

const REPLICAS: &[FieldLabel] = &[("status.replicas", "/status/replicas")];
const ZERO_REPLICAS: &str = r#"{"replicas":0}"#;
const ROLLING: &str = "may not be specified when strategy `type` is 'Recreate'";

pub static ROWS: &[Row] = &[
    Row {
        group: "apps",
        resource: "deployments",
        default: |o| {
            let spec = child(o, "spec");
            unset(spec, "replicas", 1);
            let strategy = child(spec, "strategy");
            empty(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                let r = child(strategy, "rollingUpdate");
                unset(r, "maxUnavailable", "25%");
                unset(r, "maxSurge", "25%");
            }
            unset(spec, "revisionHistoryLimit", 10);
            unset(spec, "progressDeadlineSeconds", 600);
            defaults::template(child(spec, "template"));
        },
        validate: |o, e| {
            let spec = o.at("spec");
            replicas(&spec, e);
            template(&spec, e);
            deployment_strategy(&spec.at("strategy"), e);
            e.not_negative(&spec.at("minReadySeconds"));
            e.not_negative(&spec.at("revisionHistoryLimit"));
            let deadline = spec.at("progressDeadlineSeconds");
            e.not_negative(&deadline);
            if deadline.is_set() && deadline.int() <= spec.at("minReadySeconds").int() {
                e.invalid(&deadline, "must be greater than minReadySeconds");
            }
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("selector"), &o.at("spec").at("selector")),
        sub_change: status_counts,
        status: "{}",
        generation: true,
        spec_changed: Some(spec_or_annotations_changed),
        ..Row::BASE
    },
    Row {
        group: "apps",
        resource: "replicasets",
        default: |o| {
            let spec = child(o, "spec");
            unset(spec, "replicas", 1);
            defaults::template(child(spec, "template"));
        },
        validate: |o, e| {
            let spec = o.at("spec");
            replicas(&spec, e);
            e.not_negative(&spec.at("minReadySeconds"));
            template(&spec, e);
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("selector"), &o.at("spec").at("selector")),
        sub_change: status_counts,
        status: ZERO_REPLICAS,
        generation: true,
        labels: REPLICAS,
        ..Row::BASE
    },
    Row {
        resource: "replicationcontrollers",
        default: |o| {
            let labels = o.pointer("/spec/template/metadata/labels").filter(|l| !zero(Some(l))).cloned();
            let spec = child(o, "spec");
            unset(spec, "replicas", 1);
            if let Some(labels) = labels.clone() {
                empty(spec, "selector", labels);
            }
            if spec.get("minReadySeconds").and_then(Value::as_i64) == Some(0) {
                drop(spec, "minReadySeconds");
            }
            if spec.get("template").is_some_and(Value::is_object) {
                defaults::template(child(spec, "template"));
            }
            if let Some(labels) = labels {
                empty(child(o, "metadata"), "labels", labels);
            }
        },
        validate: |o, e| {
            let spec = o.at("spec");
            e.not_negative(&spec.at("minReadySeconds"));
            let selector = spec.at("selector");
            if selector.is_zero() {
                e.required(&selector, "");
            }
            replicas(&spec, e);
            let t = spec.at("template");
            if !t.is_set() {
                return e.required(&t, "");
            }
            let have = t.at("metadata").at("labels");
            if !selector.entries().all(|(k, v)| have.v.get(k) == Some(v.v)) {
                let shown = if have.is_set() { have.v.clone() } else { json!({}) };
                e.invalid_value(&have, shown, "`selector` does not match template `labels`");
            }
            pod::template::check(&t, e);
            always_restarts(&t, e);
        },
        sub_change: status_counts,
        status: ZERO_REPLICAS,
        generation: true,
        labels: REPLICAS,
        orphans: true,
        ..Row::BASE
    },
    Row {
        group: "apps",
        resource: "statefulsets",
        default: |o| {
            let spec = child(o, "spec");
            empty(spec, "podManagementPolicy", "OrderedReady");
            let strategy = child(spec, "updateStrategy");
            empty(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                unset(child(strategy, "rollingUpdate"), "partition", 0);
            }
            let keep = child(spec, "persistentVolumeClaimRetentionPolicy");
            empty(keep, "whenDeleted", "Retain");
            empty(keep, "whenScaled", "Retain");
            unset(spec, "replicas", 1);
            unset(spec, "revisionHistoryLimit", 10);
            unset(spec, "serviceName", "");
            defaults::template(child(spec, "template"));
            each(spec, "volumeClaimTemplates", |c| {
                put(c, "kind", "PersistentVolumeClaim");
                put(c, "apiVersion", "v1");
                storage::default_claim(c);
            });
        },
        validate: |o, e| {
            let spec = o.at("spec");
            match spec.at("podManagementPolicy").str() {
                "" => e.required(&spec.at("podManagementPolicy"), ""),
                "OrderedReady" | "Parallel" => {}
                _ => e.invalid(&spec.at("podManagementPolicy"), "must be 'OrderedReady' or 'Parallel'"),
            }
            let s = spec.at("updateStrategy");
            match s.at("type").str() {
                "" => e.required(&s, ""),
                "OnDelete" => {
                    if s.at("rollingUpdate").is_set() {
                        e.invalid(&s.at("rollingUpdate"), "only allowed for updateStrategy 'RollingUpdate'");
                    }
                }
                "RollingUpdate" => {
                    let r = s.at("rollingUpdate");
                    e.not_negative(&r.at("partition"));
                    if r.at("maxUnavailable").is_set() {
                        int_or_percent(&r.at("maxUnavailable"), e);
                        percent_at_most_100(&r.at("maxUnavailable"), e);
                        if int_or_percent_value(r.at("maxUnavailable").v) == Some(0) {
                            e.invalid(&r.at("maxUnavailable"), "cannot be 0");
                        }
                    }
                }
                _ => e.invalid(&s, "must be 'RollingUpdate' or 'OnDelete'"),
            }
            let keep = spec.at("persistentVolumeClaimRetentionPolicy");
            for f in ["whenDeleted", "whenScaled"] {
                if keep.is_set() {
                    e.one_of(&keep.at(f), &["Delete", "Retain"]);
                }
            }
            replicas(&spec, e);
            e.not_negative(&spec.at("minReadySeconds"));
            e.not_negative(&spec.at("revisionHistoryLimit"));
            e.not_negative(&spec.at("ordinals").at("start"));
            if !spec.at("serviceName").is_zero() {
                e.check(&spec.at("serviceName"), names::dns1123_subdomain);
            }
            template_with(&spec, &with_claims(spec.v), e);
        },
        change: |n, o, e| {
            const MAY: [&str; 8] = [
                "replicas",
                "ordinals",
                "template",
                "updateStrategy",
                "revisionHistoryLimit",
                "persistentVolumeClaimRetentionPolicy",
                "minReadySeconds",
                "",
            ];
            let (n, o) = (n.at("spec"), o.at("spec"));
            let mut was = o.v.clone();
            let mut is = n.v.clone();
            for f in MAY {
                crate::kinds::edit::drop(&mut was, f);
                crate::kinds::edit::drop(&mut is, f);
            }
            if !same(&was, &is) {
                e.forbidden(
                    &n,
                    "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
                );
            }
        },
        sub_change: status_counts,
        status: r#"{"replicas":0,"availableReplicas":0}"#,
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "apps",
        resource: "daemonsets",
        default: |o| {
            let spec = child(o, "spec");
            let strategy = child(spec, "updateStrategy");
            empty(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                let r = child(strategy, "rollingUpdate");
                unset(r, "maxUnavailable", 1);
                unset(r, "maxSurge", 0);
            }
            unset(spec, "revisionHistoryLimit", 10);
            defaults::template(child(spec, "template"));
        },
        create: |_, o| template_generation(o, 1),
        update: |_, new, old| {
            // The counter of template changes, which old clients read from an annotation.
            let was = old
                .pointer("/metadata/annotations")
                .and_then(|a| a.get(TEMPLATE_GENERATION))
                .and_then(Value::as_str)
                .and_then(|s| s.parse::<i64>().ok())
                .unwrap_or(1);
            let changed = new.pointer("/spec/template") != old.pointer("/spec/template");
            template_generation(new, was + i64::from(changed));
        },
        validate: |o, e| {
            let spec = o.at("spec");
            template(&spec, e);
            let t = spec.at("template");
            if t.at("spec").at("activeDeadlineSeconds").is_set() {
                e.invalid(&t.at("spec").at("activeDeadlineSeconds"), "must not be specified");
            }
            e.not_negative(&spec.at("minReadySeconds"));
            daemon_strategy(&spec.at("updateStrategy"), e);
            e.not_negative(&spec.at("revisionHistoryLimit"));
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("selector"), &o.at("spec").at("selector")),
        sub_change: status_counts,
        status: r#"{"currentNumberScheduled":0,"numberMisscheduled":0,"desiredNumberScheduled":0,"numberReady":0}"#,
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "apps",
        resource: "controllerrevisions",
        validate: |o, e| {
            e.not_negative(&o.at("revision"));
            if !o.at("data").is_set() {
                e.required(&o.at("data"), "data is mandatory");
            }
        },
        change: |n, o, e| {
            if n.at("data").v != o.at("data").v {
                e.immutable(&n.at("data"), &o.at("data"));
            }
        },
        raw: true,
        ..Row::BASE
    },
    Row {
        resource: "podtemplates",
        default: |o| defaults::template(child(o, "template")),
        validate: |o, e| pod::template::check(&o.at("template"), e),
        generation: true,
        ..Row::BASE
    },
];

const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

fn template_generation(o: &mut Value, n: i64) {
    put(child(child(o, "metadata"), "annotations"), TEMPLATE_GENERATION, n.to_string());
}

/// A deployment's generation also follows its annotations, which replica sets inherit.
fn spec_or_annotations_changed(new: &Value, old: &Value) -> bool {
    !same(new.get("spec").unwrap_or(&Value::Null), old.get("spec").unwrap_or(&Value::Null))
        || !same(
            new.pointer("/metadata/annotations").unwrap_or(&Value::Null),
            old.pointer("/metadata/annotations").unwrap_or(&Value::Null),
        )
}

fn replicas(spec: &At<'_>, e: &mut Errs) {
    e.not_negative(&spec.at("replicas"));
}

fn always_restarts(t: &At<'_>, e: &mut Errs) {
    let policy = t.at("spec").at("restartPolicy");
    if policy.str() != "Always" && ["OnFailure", "Never"].contains(&policy.str()) {
        e.not_supported(&policy, &["Always"]);
    }
}

/// The template of a StatefulSet, in which its claims are volumes of the pods.
fn with_claims(spec: &Value) -> Value {
    let mut template = spec.get("template").cloned().unwrap_or_default();
    let own: Vec<_> =
        list(spec, "volumeClaimTemplates").iter().filter_map(|claim| claim.pointer("/metadata/name")).collect();
    if let Some(pod) = template.get_mut("spec").and_then(Value::as_object_mut)
        && !own.is_empty()
        && let Some(volumes) = pod.entry("volumes").or_insert_with(|| json!([])).as_array_mut()
    {
        volumes.retain(|volume| !own.iter().any(|name| volume.get("name") == Some(name)));
        volumes.extend(own.iter().map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}})));
    }
    template
}

/// The selector of a workload and the template that it must match.
fn template(spec: &At<'_>, e: &mut Errs) {
    template_with(spec, spec.at("template").v, e);
}

fn template_with(spec: &At<'_>, template: &Value, e: &mut Errs) {
    let (selector, t) = (spec.at("selector"), spec.at("template").with(template));
    if !selector.is_set() {
        e.required(&selector, "");
    } else {
        meta::selector(&selector, e);
        if meta::selects_all(selector.v) {
            e.invalid(&selector, "empty selector is invalid for deployment");
        }
    }
    let labels = t.at("metadata").at("labels");
    if selector.is_set() && !meta::selects_all(selector.v) && !meta::selects(selector.v, labels.v) {
        let shown = if labels.is_set() { labels.v.clone() } else { json!({}) };
        e.invalid_value(&labels, shown, "`selector` does not match template `labels`");
    }
    pod::template::check(&t, e);
    always_restarts(&t, e);
}

fn deployment_strategy(s: &At<'_>, e: &mut Errs) {
    let r = s.at("rollingUpdate");
    match s.at("type").str() {
        "Recreate" => {
            if r.is_set() {
                e.forbidden(&r, ROLLING);
            }
        }
        "RollingUpdate" => {
            if !r.is_set() {
                return e.required(&r, "this should be defaulted and never be nil");
            }
            int_or_percent(&r.at("maxUnavailable"), e);
            int_or_percent(&r.at("maxSurge"), e);
            if int_or_percent_value(r.at("maxUnavailable").v) == Some(0)
                && int_or_percent_value(r.at("maxSurge").v) == Some(0)
            {
                e.invalid(&r.at("maxUnavailable"), "may not be 0 when `maxSurge` is 0");
            }
            percent_at_most_100(&r.at("maxUnavailable"), e);
        }
        _ => e.not_supported(&s.at("type"), &["Recreate", "RollingUpdate"]),
    }
}

fn daemon_strategy(s: &At<'_>, e: &mut Errs) {
    match s.at("type").str() {
        "OnDelete" => {}
        "RollingUpdate" => {
            let r = s.at("rollingUpdate");
            if !r.is_set() {
                return e.required(&r, "");
            }
            let (down, surge) = (r.at("maxUnavailable"), r.at("maxSurge"));
            int_or_percent(&down, e);
            percent_at_most_100(&down, e);
            int_or_percent(&surge, e);
            percent_at_most_100(&surge, e);
            let zero = |a: &At<'_>| int_or_percent_value(a.v).unwrap_or(0) == 0;
            if zero(&down) && zero(&surge) {
                e.required(&down, "cannot be 0 when maxSurge is 0");
            } else if !zero(&down) && !zero(&surge) {
                e.invalid(&surge, "may not be set when maxUnavailable is non-zero");
            }
        }
        _ => e.not_supported(&s.at("type"), &["OnDelete", "RollingUpdate"]),
    }
}

/// A number or a percentage, not below zero.
pub fn int_or_percent(at: &At<'_>, e: &mut Errs) {
    match at.v {
        Value::String(s) => {
            let ok = s.strip_suffix('%').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
            if !ok {
                e.invalid(
                    at,
                    names::regex_error(
                        "a valid percent string must be a numeric string followed by an ending '%'",
                        "[0-9]+%",
                        &["1%", "93%"],
                    ),
                );
            }
        }
        Value::Number(_) => e.not_negative(at),
        Value::Null => {}
        _ => e.invalid(at, "must be an integer or percentage (e.g '5%%')"),
    }
}

pub fn int_or_percent_value(v: &Value) -> Option<i64> {
    match v {
        Value::String(s) => s.strip_suffix('%')?.parse().ok(),
        Value::Number(n) => n.as_i64(),
        _ => None,
    }
}

pub fn percent_at_most_100(at: &At<'_>, e: &mut Errs) {
    if let Value::String(s) = at.v
        && s.strip_suffix('%').and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > 100)
    {
        e.invalid(at, "must not be greater than 100%");
    }
}

/// Counters of a status: none below zero, and each within `replicas`.
fn status_counts(sub: &str, new: &At<'_>, _: &At<'_>, e: &mut Errs) {
    if sub != "status" {
        return;
    }
    let s = new.at("status");
    for f in [
        "currentNumberScheduled",
        "numberMisscheduled",
        "desiredNumberScheduled",
        "numberReady",
        "observedGeneration",
        "updatedNumberScheduled",
        "numberAvailable",
        "numberUnavailable",
        "replicas",
        "fullyLabeledReplicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "currentReplicas",
        "unavailableReplicas",
        "terminatingReplicas",
        "collisionCount",
    ] {
        e.not_negative(&s.at(f));
    }
    if !s.has("replicas") && s.at("numberReady").is_set() {
        return;
    }
    let all = s.at("replicas").int();
    for f in ["fullyLabeledReplicas", "updatedReplicas", "readyReplicas", "availableReplicas", "currentReplicas"] {
        if s.at(f).int() > all {
            e.invalid(&s.at(f), "cannot be greater than status.replicas");
        }
    }
    if s.at("availableReplicas").int() > s.at("readyReplicas").int() {
        e.invalid(&s.at("availableReplicas"), "cannot be greater than readyReplicas");
    }
}

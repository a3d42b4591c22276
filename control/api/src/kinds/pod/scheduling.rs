//! Validation of what tells the scheduler where a pod may run.

use crate::kinds::at::{At, Errs};
use crate::kinds::{meta, names};

const WEIGHT: &str = "must be in the range 1-100";

pub fn affinity(a: &At<'_>, e: &mut Errs) {
    let n = a.at("nodeAffinity");
    let required = n.at("requiredDuringSchedulingIgnoredDuringExecution");
    if required.is_set() {
        node_selector(&required, e);
    }
    for t in n.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
        weight(&t.at("weight"), e);
        node_term(&t.at("preference"), e);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let p = a.at(kind);
        for t in p.at("requiredDuringSchedulingIgnoredDuringExecution").items() {
            pod_term(&t, e);
        }
        for t in p.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(&t.at("weight"), e);
            pod_term(&t.at("podAffinityTerm"), e);
        }
    }
}

fn weight(at: &At<'_>, e: &mut Errs) {
    if !(1..=100).contains(&at.int()) {
        e.invalid_value(at, at.int(), WEIGHT);
    }
}

/// A `core.NodeSelector`: terms of expressions.
pub fn node_selector(s: &At<'_>, e: &mut Errs) {
    let terms = s.at("nodeSelectorTerms");
    if terms.is_empty() {
        return e.required(&terms, "must have at least one node selector term");
    }
    for t in terms.items() {
        node_term(&t, e);
    }
}

fn node_term(t: &At<'_>, e: &mut Errs) {
    for x in t.at("matchExpressions").items() {
        requirement(&x, e);
        e.check(&x.at("key"), names::qualified_name);
    }
    for x in t.at("matchFields").items() {
        let values = x.at("values");
        match x.at("operator").str() {
            "In" | "NotIn" => {
                if values.len() != 1 {
                    e.required(
                        &values,
                        "must be only one value when `operator` is 'In' or 'NotIn' for node field selector",
                    );
                }
            }
            _ => e.invalid(&x.at("operator"), "not a valid selector operator"),
        }
        if x.at("key").str() == "metadata.name" {
            for v in values.items() {
                e.check(&v, names::dns1123_subdomain);
            }
        } else {
            e.invalid(&x.at("key"), "not a valid field selector key");
        }
    }
}

fn requirement(x: &At<'_>, e: &mut Errs) {
    let values = x.at("values");
    match x.at("operator").str() {
        "In" | "NotIn" => {
            if values.is_empty() {
                e.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
            }
        }
        "Exists" | "DoesNotExist" => {
            if !values.is_empty() {
                e.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
        }
        "Gt" | "Lt" => {
            if values.len() != 1 {
                e.required(&values, "must be specified single value when `operator` is 'Lt' or 'Gt'");
            }
        }
        _ => e.invalid(&x.at("operator"), "not a valid selector operator"),
    }
}

fn pod_term(t: &At<'_>, e: &mut Errs) {
    meta::selector(&t.at("labelSelector"), e);
    meta::selector(&t.at("namespaceSelector"), e);
    for n in t.at("namespaces").items() {
        e.reasons(&t.at("namespace").with(n.v), names::dns1123_label(n.str()));
    }
    let key = t.at("topologyKey");
    if key.is_zero() {
        e.required(&key, "can not be empty");
    } else {
        e.check(&key, names::qualified_name);
    }
    for f in ["matchLabelKeys", "mismatchLabelKeys"] {
        if !t.at(f).is_empty() && !t.at("labelSelector").is_set() {
            e.forbidden(&t.at(f), "must not be specified when labelSelector is not set");
        }
        for k in t.at(f).items() {
            e.check(&k, names::qualified_name);
        }
    }
}

pub fn tolerations(at: &At<'_>, e: &mut Errs) {
    for t in at.items() {
        let (key, op, value) = (t.at("key"), t.at("operator"), t.at("value"));
        if !key.is_zero() {
            e.check(&key, names::qualified_name);
        }
        if key.is_zero() && op.str() != "Exists" {
            e.invalid_value(
                &op,
                op.str(),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if t.at("tolerationSeconds").is_set() && t.at("effect").str() != "NoExecute" {
            e.invalid_value(
                &t.at("effect"),
                t.at("effect").str(),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
        match op.str() {
            "Equal" | "" => {
                let reasons = names::label_value(value.str());
                if !reasons.is_empty() {
                    e.invalid_value(&op, value.str(), reasons.join(";"));
                }
            }
            "Exists" => {
                if !value.is_zero() {
                    e.invalid_value(&op, t.v.clone(), "value must be empty when `operator` is 'Exists'");
                }
            }
            "Lt" | "Gt" => {
                if value.str().parse::<i64>().is_err() {
                    e.invalid_value(
                        &value,
                        value.str(),
                        "value must be a 64-bit integer when `operator` is 'Lt' or 'Gt'",
                    );
                }
            }
            _ => e.not_supported(&op, &["Equal", "Exists"]),
        }
        if !t.at("effect").is_zero() {
            e.one_of(&t.at("effect"), &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        }
    }
}

pub fn spread(at: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for c in at.items() {
        let skew = c.at("maxSkew");
        if skew.int() <= 0 {
            e.invalid_value(&skew, skew.int(), "must be greater than zero");
        }
        let key = c.at("topologyKey");
        if key.is_zero() {
            e.required(&key, "can not be empty");
        } else {
            e.check(&key, names::qualified_name);
        }
        let when = c.at("whenUnsatisfiable");
        e.one_of(&when, &["DoNotSchedule", "ScheduleAnyway"]);
        let id = (key.str(), when.str());
        if seen.contains(&id) {
            e.0.push(coracle_schema::FieldError::duplicate(c.path(), format!("{{{}, {}}}", id.0, id.1)));
        }
        seen.push(id);
        let min = c.at("minDomains");
        if min.is_set() {
            if min.int() <= 0 {
                e.invalid(&min, "must be greater than zero");
            }
            if when.str() != "DoNotSchedule" {
                e.invalid(
                    &min,
                    format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {}", when.str()),
                );
            }
        }
        for f in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            if c.at(f).is_set() {
                e.one_of(&c.at(f), &["Honor", "Ignore"]);
            }
        }
        for k in c.at("matchLabelKeys").items() {
            e.check(&k, names::qualified_name);
            if !c.at("labelSelector").is_set() {
                e.forbidden(&c.at("matchLabelKeys"), "must not be specified when labelSelector is not set");
            }
        }
        meta::selector(&c.at("labelSelector"), e);
    }
}

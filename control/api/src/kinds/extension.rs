//! What extends the API: webhook configurations, admission policies, custom resource definitions, device claims.

use serde_json::{Value, json};

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{child, each, each_field, empty, list, put, text, unset};
use crate::kinds::row::Row;
use crate::kinds::{meta, names};

const GROUP: &str = "admissionregistration.k8s.io";
const DRA: &str = "resource.k8s.io";
const OPERATIONS: [&str; 5] = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];

pub static ROWS: &[Row] = &[
    Row {
        group: GROUP,
        resource: "validatingwebhookconfigurations",
        default: |o| each(o, "webhooks", webhook),
        validate: |o, e| webhooks(o, e),
        generation: true,
        ..Row::BASE
    },
    Row {
        group: GROUP,
        resource: "mutatingwebhookconfigurations",
        default: |o| {
            each(o, "webhooks", |w| {
                webhook(w);
                unset(w, "reinvocationPolicy", "Never");
            });
        },
        validate: |o, e| {
            webhooks(o, e);
            for w in o.at("webhooks").items() {
                e.one_of(&w.at("reinvocationPolicy"), &["IfNeeded", "Never"]);
            }
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: GROUP,
        resource: "validatingadmissionpolicies",
        status_alone: true,
        default: policy,
        validate: |o, e| {
            check_policy(o, e);
            let s = o.at("spec");
            if s.at("validations").is_empty() && s.at("auditAnnotations").is_empty() {
                e.required(&s.at("validations"), "validations or auditAnnotations must contain at least one item");
            }
            for v in s.at("validations").items() {
                expression(&v.at("expression"), e);
                if !v.at("messageExpression").is_zero() {
                    expression(&v.at("messageExpression"), e);
                }
                if v.at("reason").is_set() {
                    e.one_of(&v.at("reason"), &["Forbidden", "Invalid", "RequestEntityTooLarge", "Unauthorized"]);
                }
            }
            for a in s.at("auditAnnotations").items() {
                e.required_check(&a.at("key"), names::qualified_name);
                expression(&a.at("valueExpression"), e);
            }
        },
        status: "{}",
        generation: true,
        ..Row::BASE
    },
    Row {
        group: GROUP,
        resource: "mutatingadmissionpolicies",
        default: |o| {
            policy(o);
            unset(child(o, "spec"), "reinvocationPolicy", "Never");
        },
        validate: |o, e| {
            check_policy(o, e);
            let m = o.at("spec").at("mutations");
            if m.is_empty() {
                e.required(&m, "mutations must contain at least one item");
            }
            for x in m.items() {
                e.required_one_of(&x.at("patchType"), &["ApplyConfiguration", "JSONPatch"]);
                let part = match x.at("patchType").str() {
                    "JSONPatch" => x.at("jsonPatch"),
                    _ => x.at("applyConfiguration"),
                };
                expression(&part.at("expression"), e);
            }
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: GROUP,
        resource: "validatingadmissionpolicybindings",
        default: |o| {
            let s = child(o, "spec");
            each_field(s, "paramRef", |p| unset(p, "parameterNotFoundAction", Value::Null));
            each_field(s, "paramRef", crate::kinds::edit::drop_nulls);
            each_field(s, "matchResources", match_resources);
        },
        validate: |o, e| {
            let s = o.at("spec");
            if s.at("policyName").is_zero() {
                e.required(&s.at("policyName"), "");
            } else {
                e.check(&s.at("policyName"), names::dns1123_subdomain);
            }
            param_ref(&s.at("paramRef"), e);
            let actions = s.at("validationActions");
            if actions.is_empty() {
                e.required(&actions, "");
            }
            for a in actions.items() {
                e.one_of(&a, &["Audit", "Deny", "Warn"]);
            }
            let has = |w: &str| actions.array().iter().any(|a| a == w);
            if has("Deny") && has("Warn") {
                e.invalid(&actions, "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)");
            }
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: GROUP,
        resource: "mutatingadmissionpolicybindings",
        default: |o| each_field(child(o, "spec"), "matchResources", match_resources),
        validate: |o, e| {
            let s = o.at("spec");
            if s.at("policyName").is_zero() {
                e.required(&s.at("policyName"), "");
            }
            param_ref(&s.at("paramRef"), e);
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "apiextensions.k8s.io",
        resource: "customresourcedefinitions",
        status_alone: true,
        default: crd,
        create: |_, o| {
            let stored: Vec<Value> = o
                .pointer("/spec/versions")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter(|v| crate::kinds::edit::flag(v, "storage"))
                .map(|v| v["name"].clone())
                .collect();
            put(
                o,
                "status",
                json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored}),
            );
        },
        update: |_, new, _| {
            // What may be stored from now on is remembered as stored.
            let storage = list(new.get("spec").unwrap_or(&Value::Null), "versions")
                .iter()
                .find(|v| crate::kinds::edit::flag(v, "storage"))
                .and_then(|v| v.get("name").cloned());
            let status = child(new, "status");
            let mut stored = list(status, "storedVersions").to_vec();
            if let Some(s) = storage
                && !stored.contains(&s)
            {
                stored.push(s);
                put(status, "storedVersions", stored);
            }
        },
        validate: check_crd,
        change: |n, o, e| {
            let established = list(o.at("status").v, "conditions")
                .iter()
                .any(|c| text(c, "type") == "Established" && text(c, "status") == "True");
            let (n, o) = (n.at("spec"), o.at("spec"));
            e.immutable(&n.at("group"), &o.at("group"));
            e.immutable(&n.at("names").at("plural"), &o.at("names").at("plural"));
            if established {
                e.immutable(&n.at("scope"), &o.at("scope"));
                e.immutable(&n.at("names").at("kind"), &o.at("names").at("kind"));
            }
        },
        status: r#"{"acceptedNames":{"plural":"","kind":""},"storedVersions":[]}"#,
        generation: true,
        raw: true,
        ..Row::BASE
    },
    Row {
        group: DRA,
        resource: "deviceclasses",
        validate: |o, e| {
            for s in o.at("spec").at("selectors").items() {
                device_selector(&s, e);
            }
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: DRA,
        resource: "resourceclaims",
        status_alone: true,
        default: |o| claim_spec(child(o, "spec")),
        validate: |o, e| check_claim(&o.at("spec"), e),
        change: |n, o, e| e.immutable(&n.at("spec"), &o.at("spec")),
        status: "{}",
        ..Row::BASE
    },
    Row {
        group: DRA,
        resource: "resourceclaimtemplates",
        default: |o| {
            let s = child(o, "spec");
            claim_spec(child(s, "spec"));
        },
        validate: |o, e| check_claim(&o.at("spec").at("spec"), e),
        change: |n, o, e| e.immutable(&n.at("spec"), &o.at("spec")),
        ..Row::BASE
    },
    Row {
        group: DRA,
        resource: "resourceslices",
        default: |o| {
            each(child(o, "spec"), "devices", |d| {
                if let Some(Value::Object(c)) = d.get_mut("capacity") {
                    c.values_mut().for_each(|x| crate::kinds::edit::quantity(x, "value"));
                }
            });
        },
        create: |ctx, o| date_taints(o, &Value::Null, &ctx.now_text()),
        update: |ctx, new, old| date_taints(new, old, &ctx.now_text()),
        validate: |o, e| {
            let s = o.at("spec");
            e.required_check(&s.at("driver"), names::dns1123_subdomain);
            if s.at("pool").at("name").is_zero() {
                e.required(&s.at("pool").at("name"), "");
            }
            if s.at("pool").at("resourceSliceCount").int() <= 0 {
                e.invalid_value(
                    &s.at("pool").at("resourceSliceCount"),
                    s.at("pool").at("resourceSliceCount").int(),
                    "must be greater than zero",
                );
            }
            let ways = ["nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection"]
                .iter()
                .filter(|f| !s.at(f).is_zero())
                .count();
            match ways {
                1 => {}
                0 => e.required(&s, "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required"),
                _ => e.invalid_value(&s, "{}", "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required, but multiple fields are set"),
            }
            for d in s.at("devices").items() {
                e.required_check(&d.at("name"), names::dns1123_label);
            }
        },
        change: |n, o, e| {
            let (n, o) = (n.at("spec"), o.at("spec"));
            for f in ["driver", "nodeName"] {
                e.immutable(&n.at(f), &o.at(f));
            }
            e.immutable(&n.at("pool").at("name"), &o.at("pool").at("name"));
        },
        generation: true,
        labels: &[("spec.driver", "/spec/driver"), ("spec.nodeName", "/spec/nodeName")],
        ..Row::BASE
    },
];

fn match_rules(r: &mut Value) {
    unset(r, "scope", "*");
}

fn webhook(w: &mut Value) {
    unset(w, "failurePolicy", "Fail");
    unset(w, "matchPolicy", "Equivalent");
    unset(w, "namespaceSelector", json!({}));
    unset(w, "objectSelector", json!({}));
    unset(w, "timeoutSeconds", 10);
    each(w, "rules", match_rules);
    each_field(w, "clientConfig", |c| each_field(c, "service", |s| unset(s, "port", 443)));
}

fn match_resources(m: &mut Value) {
    unset(m, "matchPolicy", "Equivalent");
    unset(m, "namespaceSelector", json!({}));
    unset(m, "objectSelector", json!({}));
    for f in ["resourceRules", "excludeResourceRules"] {
        each(m, f, match_rules);
    }
}

fn policy(o: &mut Value) {
    let s = child(o, "spec");
    unset(s, "failurePolicy", "Fail");
    each_field(s, "matchConstraints", match_resources);
}

/// A CEL expression that must be there and compile.
fn expression(at: &At<'_>, e: &mut Errs) {
    if at.str().trim().is_empty() {
        return e.required(at, "");
    }
    if let Err(why) = crate::admission::matching::program(at.str()) {
        e.invalid(at, format!("compilation failed: {why}"));
    }
}

fn rule(r: &At<'_>, e: &mut Errs) {
    for (f, what) in [("operations", ""), ("apiGroups", ""), ("apiVersions", ""), ("resources", "")] {
        if r.at(f).is_empty() {
            e.required(&r.at(f), what);
        } else if f != "apiGroups" && f != "operations" && r.at(f).array().iter().any(|v| v == "") {
            e.required(&r.at(f), "");
        } else if f != "resources" && r.at(f).len() > 1 && r.at(f).array().iter().any(|v| v == "*") {
            e.invalid(&r.at(f), "if '*' is present, must not specify other values");
        }
    }
    for op in r.at("operations").items() {
        e.one_of(&op, &OPERATIONS);
    }
    if r.at("scope").is_set() {
        e.one_of(&r.at("scope"), &["*", "Cluster", "Namespaced"]);
    }
}

fn conditions(at: &At<'_>, e: &mut Errs) {
    if at.len() > 64 {
        e.too_many(at, at.len(), 64);
    }
    let mut seen: Vec<&str> = Vec::new();
    for c in at.items() {
        e.required_check(&c.at("name"), names::qualified_name);
        if seen.contains(&c.at("name").str()) {
            e.duplicate(&c.at("name"));
        }
        seen.push(c.at("name").str());
        expression(&c.at("expression"), e);
    }
}

fn webhooks(o: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<&str> = Vec::new();
    for w in o.at("webhooks").items() {
        let name = w.at("name");
        if name.is_zero() {
            e.required(&name, "");
        } else {
            e.check(&name, names::dns1123_subdomain);
            if name.str().split('.').count() < 3 {
                e.invalid(&name, "should be a domain with at least three segments separated by dots");
            }
        }
        if seen.contains(&name.str()) {
            e.duplicate(&name);
        }
        seen.push(name.str());
        for r in w.at("rules").items() {
            rule(&r, e);
        }
        e.one_of(&w.at("failurePolicy"), &["Fail", "Ignore"]);
        e.one_of(&w.at("matchPolicy"), &["Equivalent", "Exact"]);
        let effects = w.at("sideEffects");
        if effects.is_zero() {
            e.required(&effects, "must specify one of None, NoneOnDryRun");
        } else {
            e.one_of(&effects, &["None", "NoneOnDryRun"]);
        }
        let t = w.at("timeoutSeconds");
        if t.is_set() && !(1..=30).contains(&t.int()) {
            e.invalid(&t, "the timeout value must be between 1 and 30 seconds");
        }
        for s in ["namespaceSelector", "objectSelector"] {
            meta::selector(&w.at(s), e);
        }
        client_config(&w.at("clientConfig"), e);
        conditions(&w.at("matchConditions"), e);
        let versions = w.at("admissionReviewVersions");
        if versions.is_empty() {
            e.required(&versions, "must specify one of v1, v1beta1");
        } else if !versions.array().iter().any(|v| v == "v1" || v == "v1beta1") {
            e.invalid(&versions, "must include at least one of v1, v1beta1");
        }
    }
}

fn client_config(c: &At<'_>, e: &mut Errs) {
    let (url, service) = (c.at("url"), c.at("service"));
    match (url.is_set(), service.is_set()) {
        (true, true) | (false, false) => {
            e.required(&c.at("url"), "exactly one of url or service is required");
        }
        (true, false) => {
            if !url.str().starts_with("https://") {
                e.invalid_value(
                    &url,
                    url.str().split("://").next().unwrap_or_default(),
                    "'https' is the only allowed URL scheme; desired format: https://host[/path]",
                );
            }
        }
        (false, true) => {
            for f in ["name", "namespace"] {
                if service.at(f).is_zero() {
                    e.required(&service.at(f), format!("service {f} is required"));
                }
            }
            let p = service.at("port");
            if p.is_set() && !(1..=65535).contains(&p.int()) {
                e.invalid(&p, "port is not valid: must be between 1 and 65535, inclusive");
            }
        }
    }
}

fn check_policy(o: &At<'_>, e: &mut Errs) {
    let s = o.at("spec");
    let kind = s.at("paramKind");
    if kind.is_set() {
        for f in ["apiVersion", "kind"] {
            if kind.at(f).is_zero() {
                e.required(&kind.at(f), "");
            }
        }
    }
    e.one_of(&s.at("failurePolicy"), &["Fail", "Ignore"]);
    let m = s.at("matchConstraints");
    if !m.is_set() {
        e.required(&m, "");
    } else {
        if m.at("resourceRules").is_empty() {
            e.required(&m.at("resourceRules"), "");
        }
        for f in ["resourceRules", "excludeResourceRules"] {
            for r in m.at(f).items() {
                rule(&r, e);
            }
        }
        for f in ["namespaceSelector", "objectSelector"] {
            meta::selector(&m.at(f), e);
        }
    }
    conditions(&s.at("matchConditions"), e);
    let mut seen: Vec<&str> = Vec::new();
    for v in s.at("variables").items() {
        e.required_check(&v.at("name"), names::c_identifier);
        if seen.contains(&v.at("name").str()) {
            e.duplicate(&v.at("name"));
        }
        seen.push(v.at("name").str());
        expression(&v.at("expression"), e);
    }
}

fn param_ref(p: &At<'_>, e: &mut Errs) {
    if !p.is_set() {
        return;
    }
    match (!p.at("name").is_zero(), p.has("selector")) {
        (false, false) => e.required(p, "one of name or selector must be specified"),
        (true, true) => e.forbidden(&p.at("name"), "name and selector are mutually exclusive"),
        _ => {}
    }
    let a = p.at("parameterNotFoundAction");
    if a.is_zero() {
        e.required(&a, "");
    } else {
        e.one_of(&a, &["Allow", "Deny"]);
    }
}

fn crd(o: &mut Value) {
    let spec = child(o, "spec");
    let names = child(spec, "names");
    let kind = text(names, "kind").to_owned();
    empty(names, "singular", kind.to_lowercase());
    empty(names, "listKind", format!("{kind}List"));
    each_field(spec, "conversion", |c| {
        each_field(c, "webhook", |w| {
            each_field(w, "clientConfig", |c| each_field(c, "service", |s| unset(s, "port", 443)));
        });
    });
    unset(spec, "conversion", json!({"strategy": "None"}));
    let status = child(o, "status");
    if status.get("conditions").is_none() {
        put(status, "conditions", Value::Null);
    }
}

fn check_crd(o: &At<'_>, e: &mut Errs) {
    let s = o.at("spec");
    let (group, names_at) = (s.at("group"), s.at("names"));
    let want = format!("{}.{}", names_at.at("plural").str(), group.str());
    if o.at("metadata").at("name").str() != want {
        e.invalid(&o.at("metadata").at("name"), "must be spec.names.plural+\".\"+spec.group");
    }
    if group.is_zero() {
        e.required(&group, "");
    } else {
        e.check(&group, names::dns1123_subdomain);
        if !group.str().contains('.') {
            e.invalid(&group, "should be a domain with at least one dot");
        }
    }
    e.required_one_of(&s.at("scope"), &["Cluster", "Namespaced"]);
    let versions = s.at("versions");
    let mut seen: Vec<&str> = Vec::new();
    let mut storage = 0;
    for v in versions.items() {
        e.check(&v.at("name"), names::dns1035_label);
        if seen.contains(&v.at("name").str()) {
            e.duplicate(&v.at("name"));
        }
        seen.push(v.at("name").str());
        storage += usize::from(v.at("storage").bool());
        let schema = v.at("schema").at("openAPIV3Schema");
        if !schema.is_set() {
            e.required(&v.at("schema").at("openAPIV3Schema"), "schemas are required");
        }
        let scale = v.at("subresources").at("scale");
        if scale.is_set() {
            for (f, root) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
                if scale.at(f).is_zero() {
                    e.required(&scale.at(f), "");
                } else if !scale.at(f).str().starts_with(root) {
                    e.invalid(&scale.at(f), format!("should be a json path under {}", &root[..root.len() - 1]));
                }
            }
        }
    }
    if storage != 1 {
        e.invalid(&versions, "must have exactly one version marked as storage version");
    }
    for (f, check) in [("plural", names::dns1035_label as names::Check), ("singular", names::dns1035_label)] {
        if names_at.at(f).is_zero() {
            e.required(&names_at.at(f), "");
        } else {
            e.check(&names_at.at(f), check);
        }
    }
    for f in ["kind", "listKind"] {
        let lower = Value::from(names_at.at(f).str().to_lowercase());
        if names_at.at(f).is_zero() {
            e.required(&names_at.at(f), "");
        } else if !names::dns1035_label(lower.as_str().unwrap_or_default()).is_empty() {
            e.invalid(
                &names_at.at(f),
                format!(
                    "may have mixed case, but should otherwise match: {}",
                    names::dns1035_label(lower.as_str().unwrap_or_default()).join(",")
                ),
            );
        }
    }
    if names_at.at("kind").str() == names_at.at("listKind").str() && !names_at.at("kind").is_zero() {
        e.invalid(&names_at.at("listKind"), "kind and listKind may not be the same");
    }
    let conversion = s.at("conversion");
    e.one_of(&conversion.at("strategy"), &["None", "Webhook"]);
    if conversion.at("strategy").str() == "Webhook" {
        let w = conversion.at("webhook");
        if !w.at("clientConfig").is_set() {
            e.required(&w.at("clientConfig"), "required when strategy is set to Webhook");
        } else {
            client_config(&w.at("clientConfig"), e);
        }
        if w.at("conversionReviewVersions").is_empty() {
            e.required(&w.at("conversionReviewVersions"), "");
        }
    }
    // The schemas are judged by the engine that will use them.
    for error in coracle_schema::Schema::from_crd(o.v).err().into_iter().flatten() {
        e.0.push(error);
    }
}

/// Dates the taints of devices that say not since when they hold: tolerations for a time count from there.
fn date_taints(slice: &mut Value, old: &Value, now: &str) {
    let before = list(old.get("spec").unwrap_or(&Value::Null), "devices").to_vec();
    each(child(slice, "spec"), "devices", |device| {
        let known = before.iter().find(|known| known["name"] == device["name"]).cloned().unwrap_or(Value::Null);
        each(device, "taints", |taint| {
            if taint.get("timeAdded").is_some_and(|time| !time.is_null()) {
                return;
            }
            let same = |old: &&Value| ["key", "value", "effect"].iter().all(|field| old.get(field) == taint.get(field));
            let since = list(&known, "taints").iter().find(same).and_then(|old| old.get("timeAdded")).cloned();
            put(taint, "timeAdded", since.unwrap_or_else(|| now.into()));
        });
    });
}

fn claim_spec(spec: &mut Value) {
    each_field(spec, "devices", |d| {
        each(d, "requests", |r| {
            each_field(r, "exactly", |x| {
                unset(x, "allocationMode", "ExactCount");
                if text(x, "allocationMode") == "ExactCount" {
                    empty(x, "count", 1);
                }
            });
            each(r, "firstAvailable", |x| {
                unset(x, "allocationMode", "ExactCount");
                if text(x, "allocationMode") == "ExactCount" {
                    empty(x, "count", 1);
                }
            });
        });
    });
}

fn device_selector(s: &At<'_>, e: &mut Errs) {
    let c = s.at("cel");
    if !c.is_set() {
        e.required(&c, "");
    } else if c.at("expression").is_zero() {
        e.required(&c.at("expression"), "");
    }
}

fn check_claim(spec: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<&str> = Vec::new();
    for r in spec.at("devices").at("requests").items() {
        e.required_check(&r.at("name"), names::dns1123_label);
        if seen.contains(&r.at("name").str()) {
            e.duplicate(&r.at("name"));
        }
        seen.push(r.at("name").str());
        match (r.has("exactly"), !r.at("firstAvailable").is_empty()) {
            (false, false) => e.required(&r, "exactly one of `exactly` or `firstAvailable` is required"),
            (true, true) => {
                e.invalid(&r, "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set")
            }
            _ => {}
        }
        let x = r.at("exactly");
        if x.is_set() {
            e.required_check(&x.at("deviceClassName"), names::dns1123_subdomain);
            for s in x.at("selectors").items() {
                device_selector(&s, e);
            }
        }
    }
}

//! Kinds of small groups: disruption budgets, autoscalers, priorities, leases, runtime classes, signing requests, flow
//! control, API services.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::kinds::apps::{int_or_percent, percent_at_most_100};
use crate::kinds::edit::{child, drop, each, each_field, empty, list, put, quantities, quantity, text, unset};
use crate::kinds::row::Row;
use crate::kinds::{meta, names, resources};

/// Highest priority that users may give; what is above belongs to the system.
pub const USER_PRIORITY_MAX: i64 = 1_000_000_000;
const FLOW: &str = "flowcontrol.apiserver.k8s.io";
const CERTS: &str = "certificates.k8s.io";

pub static ROWS: &[Row] = &[
    Row {
        group: "policy",
        resource: "poddisruptionbudgets",
        validate: |o, e| {
            let s = o.at("spec");
            let (min, max) = (s.at("minAvailable"), s.at("maxUnavailable"));
            if min.is_set() && max.is_set() {
                e.invalid(&s, "minAvailable and maxUnavailable cannot be both set");
            }
            for f in [min, max] {
                if f.is_set() {
                    int_or_percent(&f, e);
                    percent_at_most_100(&f, e);
                }
            }
            if s.at("selector").is_set() {
                meta::selector(&s.at("selector"), e);
            }
            if s.at("unhealthyPodEvictionPolicy").is_set() {
                e.one_of(&s.at("unhealthyPodEvictionPolicy"), &["AlwaysAllow", "IfHealthyBudget"]);
            }
        },
        sub_change: |_, n, _, e| {
            for f in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
                e.not_negative(&n.at("status").at(f));
            }
        },
        status: r#"{"disruptionsAllowed":0,"currentHealthy":0,"desiredHealthy":0,"expectedPods":0}"#,
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "autoscaling",
        resource: "horizontalpodautoscalers",
        default: |o| {
            let spec = child(o, "spec");
            unset(spec, "minReplicas", 1);
            let v1 = spec.get("targetCPUUtilizationPercentage").is_some();
            if !v1 {
                empty(
                    spec,
                    "metrics",
                    json!([{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]),
                );
            }
            each(spec, "metrics", |m| {
                for f in ["resource", "containerResource", "pods", "object", "external"] {
                    each_field(m, f, |s| {
                        each_field(s, "target", |t| {
                            quantity(t, "value");
                            quantity(t, "averageValue");
                        });
                    });
                }
            });
            each_field(spec, "behavior", |b| {
                for (way, policies) in [
                    (
                        "scaleUp",
                        json!([{"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}]),
                    ),
                    ("scaleDown", json!([{"type": "Percent", "value": 100, "periodSeconds": 15}])),
                ] {
                    let rules = child(b, way);
                    unset(rules, "selectPolicy", "Max");
                    empty(rules, "policies", policies);
                    if way == "scaleUp" {
                        unset(rules, "stabilizationWindowSeconds", 0);
                    }
                }
            });
            let status = child(o, "status");
            if status.get("currentMetrics").is_none() && !v1 {
                put(status, "currentMetrics", Value::Null);
            }
        },
        create: |_, o| put(o, "status", json!({"desiredReplicas": 0, "currentMetrics": null})),
        validate: |o, e| {
            let s = o.at("spec");
            let (min, max) = (s.at("minReplicas"), s.at("maxReplicas"));
            if min.is_set() && min.int() < 1 {
                e.invalid(&min, "must be greater than or equal to 1");
            }
            if max.int() < 1 {
                e.invalid_value(&max, max.int(), "must be greater than 0");
            }
            if min.is_set() && max.int() < min.int() {
                e.invalid_value(&max, max.int(), "must be greater than or equal to `minReplicas`");
            }
            let r = s.at("scaleTargetRef");
            for f in ["kind", "name"] {
                if r.at(f).is_zero() {
                    e.required(&r.at(f), "");
                } else {
                    e.check(&r.at(f), names::path_segment);
                }
            }
            for m in s.at("metrics").items() {
                e.required_one_of(&m.at("type"), &["ContainerResource", "External", "Object", "Pods", "Resource"]);
            }
        },
        status: r#"{"desiredReplicas":0}"#,
        ..Row::BASE
    },
    Row {
        group: "scheduling.k8s.io",
        resource: "priorityclasses",
        default: |o| unset(o, "preemptionPolicy", "PreemptLowerPriority"),
        validate: |o, e| {
            let (name, value) = (o.at("metadata").at("name"), o.at("value"));
            let system = name.str().starts_with("system-");
            if system {
                if !matches!(
                    (name.str(), value.int()),
                    ("system-node-critical", 2_000_001_000) | ("system-cluster-critical", 2_000_000_000)
                ) {
                    e.forbidden(&name, "priority class names with 'system-' prefix are reserved for system use only. error: the name is not in the list of system classes");
                }
            } else if value.int() > USER_PRIORITY_MAX {
                e.forbidden(&value, format!("maximum allowed value of a user defined priority is {USER_PRIORITY_MAX}"));
            }
            e.one_of(&o.at("preemptionPolicy"), &["Never", "PreemptLowerPriority"]);
        },
        change: |n, o, e| {
            if n.at("value").v != o.at("value").v {
                e.forbidden(&n.at("value"), "may not be changed in an update.");
            }
            e.immutable(&n.at("preemptionPolicy"), &o.at("preemptionPolicy"));
        },
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "coordination.k8s.io",
        resource: "leases",
        default: |o| {
            child(o, "spec");
        },
        validate: |o, e| {
            let s = o.at("spec");
            let t = s.at("leaseDurationSeconds");
            if t.is_set() && t.int() <= 0 {
                e.invalid(&t, "must be greater than 0");
            }
            e.not_negative(&s.at("leaseTransitions"));
            if s.at("strategy").is_set() && s.at("strategy").is_zero() {
                e.required(&s.at("strategy"), "");
            }
        },
        creates_on_update: true,
        ..Row::BASE
    },
    Row {
        group: "node.k8s.io",
        resource: "runtimeclasses",
        default: |o| each_field(o, "overhead", |x| quantities(x, "podFixed")),
        validate: |o, e| {
            e.check(&o.at("handler"), names::dns1123_label);
            for (k, q) in o.at("overhead").at("podFixed").entries() {
                resources::amount(k, &q, e);
            }
            meta::labels(&o.at("scheduling").at("nodeSelector"), e);
            crate::kinds::pod::scheduling::tolerations(&o.at("scheduling").at("tolerations"), e);
        },
        change: |n, o, e| e.immutable(&n.at("handler"), &o.at("handler")),
        ..Row::BASE
    },
    Row {
        group: CERTS,
        resource: "certificatesigningrequests",
        default: |o| empty(child(o, "spec"), "usages", json!(["digital signature", "key encipherment"])),
        create: |ctx, o| {
            // Who asks is what authentication found, whatever the client wrote.
            let spec = child(o, "spec");
            for f in ["uid", "groups", "extra"] {
                drop(spec, f);
            }
            put(spec, "username", ctx.user.name.clone());
            if !ctx.user.uid.is_empty() {
                put(spec, "uid", ctx.user.uid.clone());
            }
            if !ctx.user.groups.is_empty() {
                put(spec, "groups", json!(ctx.user.groups));
            }
            if !ctx.user.extra.is_empty() {
                put(spec, "extra", json!(ctx.user.extra));
            }
        },
        update: |_, new, old| crate::object::copy(new, old, "spec"),
        subresource: |ctx, new, old| {
            let status = new.get("status").cloned().unwrap_or_else(|| json!({}));
            let mut kept = old.clone();
            let before = old.get("status").cloned().unwrap_or_else(|| json!({}));
            let decisions = |s: &Value, mine: bool| -> Vec<Value> {
                list(s, "conditions")
                    .iter()
                    .filter(|c| matches!(text(c, "type"), "Approved" | "Denied") == mine)
                    .cloned()
                    .collect()
            };
            let approval = ctx.subresource == "approval";
            let mut now = if approval { before.clone() } else { status.clone() };
            // The approval subresource writes decisions alone, the status subresource everything else.
            let mut conditions: Vec<Value> = if approval {
                list(&status, "conditions").to_vec()
            } else {
                let mut c = decisions(&before, true);
                c.extend(decisions(&status, false));
                c
            };
            for c in &mut conditions {
                unset(c, "status", "True");
                let kind = text(c, "type").to_owned();
                let was = list(&before, "conditions").iter().find(|o| text(o, "type") == kind);
                if was.is_none_or(|w| w.get("status") != c.get("status")) {
                    empty(c, "lastTransitionTime", ctx.now_text());
                } else if let Some(t) = was.and_then(|w| w.get("lastTransitionTime")) {
                    empty(c, "lastTransitionTime", t.clone());
                }
                empty(c, "lastUpdateTime", ctx.now_text());
            }
            if !conditions.is_empty() {
                put(&mut now, "conditions", conditions);
            }
            for f in ["managedFields", "resourceVersion"] {
                if let Some(v) = new.pointer(&format!("/metadata/{f}")).cloned() {
                    put(child(&mut kept, "metadata"), f, v);
                }
            }
            for f in ["labels", "annotations"] {
                if let Some(v) = new.pointer(&format!("/metadata/{f}")).cloned() {
                    put(child(&mut kept, "metadata"), f, v);
                }
            }
            put(&mut kept, "status", now);
            *new = kept;
            true
        },
        validate: |o, e| {
            let s = o.at("spec");
            let pem = s.at("request").v.as_str().and_then(|t| BASE64.decode(t).ok()).unwrap_or_default();
            let parsed = x509_parser::pem::parse_x509_pem(&pem)
                .ok()
                .filter(|(_, p)| p.label == "CERTIFICATE REQUEST")
                .is_some_and(|(_, p)| {
                    use x509_parser::prelude::FromDer as _;
                    x509_parser::certification_request::X509CertificationRequest::from_der(&p.contents).is_ok()
                });
            if !parsed {
                e.invalid(&s.at("request"), "PEM block type must be CERTIFICATE REQUEST");
            }
            let usages = s.at("usages");
            if usages.is_empty() {
                e.required(&usages, "");
            }
            let signer = s.at("signerName");
            if signer.is_zero() {
                e.required(&signer, "");
            } else if !signer
                .str()
                .split_once('/')
                .is_some_and(|(d, p)| names::dns1123_subdomain(d).is_empty() && !p.is_empty())
            {
                e.invalid(&signer, "must be a fully qualified domain and path of the form 'example.com/signer-name'");
            }
            let t = s.at("expirationSeconds");
            if t.is_set() && t.int() < 600 {
                e.invalid(&t, "may not specify a duration less than 600 seconds (10 minutes)");
            }
        },
        sub_change: |_, n, _, e| {
            let conditions = n.at("status").at("conditions");
            let has = |k: &str| conditions.array().iter().any(|c| text(c, "type") == k);
            if has("Approved") && has("Denied") {
                e.invalid_value(&conditions, "Denied", "Approved and Denied conditions are mutually exclusive");
            }
            for c in conditions.items() {
                if c.at("type").is_zero() {
                    e.required(&c.at("type"), "");
                }
            }
        },
        status: "{}",
        labels: &[("spec.signerName", "/spec/signerName")],
        ..Row::BASE
    },
    Row {
        group: FLOW,
        resource: "flowschemas",
        status_alone: true,
        default: |o| {
            let spec = child(o, "spec");
            empty(spec, "matchingPrecedence", 1000);
            child(spec, "priorityLevelConfiguration");
        },
        validate: |o, e| {
            let s = o.at("spec");
            if s.at("priorityLevelConfiguration").at("name").is_zero() {
                e.required(&s.at("priorityLevelConfiguration").at("name"), "must reference a priority level");
            }
            let p = s.at("matchingPrecedence");
            if p.int() <= 0 {
                e.invalid(&p, "must be a positive value");
            } else if p.int() > 10_000 {
                e.invalid(&p, "must not be greater than 10000");
            }
            for r in s.at("rules").items() {
                if r.at("subjects").is_empty() {
                    e.required(&r.at("subjects"), "subjects must contain at least one value");
                }
                if r.at("resourceRules").is_empty() && r.at("nonResourceRules").is_empty() {
                    e.required(&r, "at least one of resourceRules and nonResourceRules has to be non-empty");
                }
                for x in r.at("subjects").items() {
                    e.one_of(&x.at("kind"), &["Group", "ServiceAccount", "User"]);
                }
            }
        },
        status: "{}",
        generation: true,
        ..Row::BASE
    },
    Row {
        group: FLOW,
        resource: "prioritylevelconfigurations",
        status_alone: true,
        default: |o| {
            let spec = child(o, "spec");
            each_field(spec, "limited", |l| {
                unset(l, "nominalConcurrencyShares", 30);
                unset(l, "lendablePercent", 0);
                let r = child(l, "limitResponse");
                each_field(r, "queuing", |q| {
                    empty(q, "queues", 64);
                    empty(q, "handSize", 8);
                    empty(q, "queueLengthLimit", 50);
                });
            });
            each_field(spec, "exempt", |x| {
                unset(x, "nominalConcurrencyShares", 0);
                unset(x, "lendablePercent", 0);
            });
        },
        validate: |o, e| {
            let s = o.at("spec");
            e.one_of(&s.at("type"), &["Exempt", "Limited"]);
            match (s.at("type").str(), s.has("limited"), s.has("exempt")) {
                ("Limited", false, _) => e.required(&s.at("limited"), "must not be empty when type is Limited"),
                ("Exempt", true, _) => e.forbidden(&s.at("limited"), "must be nil if the type is not Limited"),
                _ => {}
            }
            let r = s.at("limited").at("limitResponse");
            if s.has("limited") {
                match (r.at("type").str(), r.has("queuing")) {
                    ("Reject", true) => {
                        e.forbidden(&r.at("queuing"), "must be nil if limited.limitResponse.type is not Limited")
                    }
                    ("Queue", false) => {
                        e.required(&r.at("queuing"), "must not be empty if limited.limitResponse.type is Limited")
                    }
                    ("Reject" | "Queue", _) => {}
                    _ => e.not_supported(&r.at("type"), &["Queue", "Reject"]),
                }
            }
        },
        status: "{}",
        generation: true,
        ..Row::BASE
    },
    Row {
        group: "apiregistration.k8s.io",
        resource: "apiservices",
        status_alone: true,
        default: |o| {
            let spec = child(o, "spec");
            each_field(spec, "service", |s| unset(s, "port", 443));
            unset(spec, "groupPriorityMinimum", 0);
            unset(spec, "versionPriority", 0);
        },
        create: |_, o| {
            // A version that this server itself serves is there at once.
            let local = o.pointer("/spec/service").is_none_or(Value::is_null);
            if local {
                put(
                    o,
                    "status",
                    json!({"conditions": [{"type": "Available", "status": "True", "reason": "Local",
                    "message": "Local APIServices are always available"}]}),
                );
            }
        },
        validate: |o, e| {
            let (meta, s) = (o.at("metadata"), o.at("spec"));
            let want = format!("{}.{}", s.at("version").str(), s.at("group").str());
            if meta.at("name").str() != want {
                e.invalid(&meta.at("name"), format!("must be `spec.version+\".\"+spec.group`: {want:?}"));
            }
            if s.at("service").is_set() {
                for f in ["name", "namespace"] {
                    if s.at("service").at(f).is_zero() {
                        e.required(&s.at("service").at(f), "");
                    }
                }
            }
            for (f, max) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
                if !(1..=max).contains(&s.at(f).int()) {
                    e.invalid(&s.at(f), format!("must be positive and less than or equal to {max}"));
                }
            }
            if s.at("insecureSkipTLSVerify").bool() && !s.at("caBundle").is_zero() {
                e.invalid(&s.at("insecureSkipTLSVerify"), "may not be true if caBundle is present");
            }
        },
        name: names::path_segment,
        status: "{}",
        ..Row::BASE
    },
];

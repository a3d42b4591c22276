//! Small core kinds: config maps, secrets, service accounts, namespaces, nodes, events, endpoints, limits and quotas.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use crate::kinds::at::{At, Errs, IMMUTABLE, same};
use crate::kinds::edit::{child, each, empty, list, put, quantities, text, unset, zero};
use crate::kinds::quantity::Quantity;
use crate::kinds::row::Row;
use crate::kinds::{meta, names, resources};

/// Bytes that the data of a config map or secret may take together.
const DATA_MAX_BYTES: usize = 1024 * 1024;

pub static ROWS: &[Row] = &[
    Row {
        resource: "configmaps",
        default: config_map,
        validate: check_config_map,
        change: change_config_map,
        ..Row::BASE
    },
    Row {
        resource: "secrets",
        default: secret,
        validate: check_secret,
        change: change_secret,
        labels: &[("type", "/type")],
        ..Row::BASE
    },
    Row { resource: "serviceaccounts", ..Row::BASE },
    Row {
        resource: "namespaces",
        default: namespace,
        create: |_, o| {
            // The namespace lives until this finalizer's controller has emptied it.
            let spec = child(o, "spec");
            let kept = list(spec, "finalizers").iter().any(|f| f == "kubernetes");
            if !kept {
                let mut all = list(spec, "finalizers").to_vec();
                all.push("kubernetes".into());
                put(spec, "finalizers", all);
            }
            put(o, "status", json!({"phase": "Active"}));
        },
        update: |_, new, old| {
            crate::object::copy(new, old, "spec");
        },
        subresource: |ctx, new, old| {
            if ctx.subresource == "finalize" {
                crate::object::copy(new, old, "status");
                return true;
            }
            false
        },
        sub_change: |sub, new, old, e| {
            if sub == "finalize" {
                for f in new.at("spec").at("finalizers").items() {
                    meta::finalizer_name(&f, e);
                }
            } else if new.v.pointer("/metadata/deletionTimestamp").is_none() {
                let phase = new.at("status").at("phase");
                if phase.str() != "Active" {
                    e.invalid(&phase, "may only be 'Active' if `deletionTimestamp` is empty");
                }
            } else {
                let phase = new.at("status").at("phase");
                if phase.str() != "Terminating" {
                    e.invalid(&phase, "may only be 'Terminating' if `deletionTimestamp` is not empty");
                }
                let _ = old;
            }
        },
        name: names::dns1123_label,
        status: r#"{"phase":"Active"}"#,
        labels: &[("status.phase", "/status/phase"), ("name", "/metadata/name")],
        ..Row::BASE
    },
    Row {
        resource: "nodes",
        default: |o| {
            each(child(o, "spec"), "taints", |t| empty(t, "effect", ""));
            let status = child(o, "status");
            quantities(status, "capacity");
            quantities(status, "allocatable");
            if zero(status.get("allocatable"))
                && let Some(c) = status.get("capacity").cloned()
            {
                put(status, "allocatable", c);
            }
            child(child(status, "daemonEndpoints"), "kubeletEndpoint");
            if let Some(e) = status.pointer_mut("/daemonEndpoints/kubeletEndpoint") {
                unset(e, "Port", 0);
            }
            let info = child(status, "nodeInfo");
            for f in [
                "machineID",
                "systemUUID",
                "bootID",
                "kernelVersion",
                "osImage",
                "containerRuntimeVersion",
                "kubeletVersion",
                "kubeProxyVersion",
                "operatingSystem",
                "architecture",
            ] {
                unset(info, f, "");
            }
        },
        validate: check_node,
        change: change_node,
        sub_change: |_, new, _, e| {
            for (name, q) in new.at("status").at("capacity").entries() {
                let _ = name;
                resources::not_negative(&q, e);
            }
        },
        status: "{}",
        born_with_status: true,
        labels: &[("spec.unschedulable", "/spec/unschedulable")],
        ..Row::BASE
    },
    Row {
        resource: "events",
        default: |o| {
            for f in ["reportingComponent", "reportingInstance"] {
                unset(o, f, "");
            }
            child(o, "source");
            child(o, "involvedObject");
            for f in ["firstTimestamp", "lastTimestamp", "eventTime"] {
                if o.get(f).is_none() {
                    put(o, f, Value::Null);
                }
            }
        },
        validate: check_event,
        labels: EVENT_LABELS,
        creates_on_update: true,
        ..Row::BASE
    },
    Row {
        group: "events.k8s.io",
        resource: "events",
        default: |o| {
            for f in ["eventTime", "deprecatedFirstTimestamp", "deprecatedLastTimestamp"] {
                if o.get(f).is_none() {
                    put(o, f, Value::Null);
                }
            }
            child(o, "deprecatedSource");
            child(o, "regarding");
        },
        validate: check_new_event,
        labels: NEW_EVENT_LABELS,
        creates_on_update: true,
        ..Row::BASE
    },
    Row {
        resource: "endpoints",
        default: |o| each(o, "subsets", |s| each(s, "ports", |p| empty(p, "protocol", "TCP"))),
        validate: check_endpoints,
        creates_on_update: true,
        ..Row::BASE
    },
    Row {
        resource: "limitranges",
        default: |o| each(child(o, "spec"), "limits", limit_item),
        validate: check_limit_range,
        creates_on_update: true,
        ..Row::BASE
    },
    Row {
        resource: "resourcequotas",
        default: |o| {
            quantities(child(o, "spec"), "hard");
            let status = child(o, "status");
            quantities(status, "hard");
            quantities(status, "used");
        },
        validate: check_quota,
        change: |new, old, e| {
            let (n, o) = (new.at("spec").at("scopes"), old.at("spec").at("scopes"));
            let set = |a: &At<'_>| a.array().iter().map(Value::to_string).collect::<std::collections::BTreeSet<_>>();
            if set(&n) != set(&o) {
                e.invalid(&n, IMMUTABLE);
            }
        },
        status: "{}",
        ..Row::BASE
    },
    Row { resource: "bindings", ..Row::BASE },
    Row {
        resource: "componentstatuses",
        answer_list: Some(|_| Box::pin(async { Ok(component_statuses()) })),
        ..Row::BASE
    },
    Row {
        group: crate::usage::GROUP,
        resource: "nodes",
        answer_list: Some(|ctx| Box::pin(crate::usage::nodes(ctx))),
        ..Row::BASE
    },
    Row {
        group: crate::usage::GROUP,
        resource: "pods",
        answer_list: Some(|ctx| Box::pin(crate::usage::pods(ctx))),
        ..Row::BASE
    },
];

const EVENT_LABELS: &[(&str, &str)] = &[
    ("involvedObject.kind", "/involvedObject/kind"),
    ("involvedObject.namespace", "/involvedObject/namespace"),
    ("involvedObject.name", "/involvedObject/name"),
    ("involvedObject.uid", "/involvedObject/uid"),
    ("involvedObject.apiVersion", "/involvedObject/apiVersion"),
    ("involvedObject.resourceVersion", "/involvedObject/resourceVersion"),
    ("involvedObject.fieldPath", "/involvedObject/fieldPath"),
    ("reason", "/reason"),
    ("reportingComponent", "/reportingComponent"),
    ("source", "/source/component"),
    ("type", "/type"),
];
const NEW_EVENT_LABELS: &[(&str, &str)] = &[
    ("regarding.kind", "/regarding/kind"),
    ("regarding.namespace", "/regarding/namespace"),
    ("regarding.name", "/regarding/name"),
    ("regarding.uid", "/regarding/uid"),
    ("regarding.apiVersion", "/regarding/apiVersion"),
    ("regarding.resourceVersion", "/regarding/resourceVersion"),
    ("regarding.fieldPath", "/regarding/fieldPath"),
    ("reason", "/reason"),
    ("reportingController", "/reportingController"),
    ("type", "/type"),
];

/// The parts of the control plane, which all live in this process: that it answers says that they run.
fn component_statuses() -> Vec<Value> {
    ["controller-manager", "scheduler", "etcd-0"]
        .iter()
        .map(|name| {
            json!({"apiVersion": "v1", "kind": "ComponentStatus", "metadata": {"name": name},
                   "conditions": [{"type": "Healthy", "status": "True", "message": "ok"}]})
        })
        .collect()
}

fn config_map(o: &mut Value) {
    // An empty map is not written.
    for f in ["data", "binaryData"] {
        if o.get(f).is_some_and(|v| zero(Some(v))) {
            crate::kinds::edit::drop(o, f);
        }
    }
}

fn secret(o: &mut Value) {
    empty(o, "type", "Opaque");
    if let Some(Value::Object(strings)) = o.get("stringData").cloned() {
        let data = child(o, "data");
        for (k, v) in strings {
            if let Value::String(s) = v {
                put(data, &k, BASE64.encode(s));
            }
        }
        crate::kinds::edit::drop(o, "stringData");
    }
    config_map(o);
}

fn decoded_len(v: &Value) -> usize {
    let s = v.as_str().unwrap_or_default();
    let pad = s.bytes().rev().take_while(|b| *b == b'=').count();
    (s.len() / 4 * 3).saturating_sub(pad)
}

fn check_config_map(o: &At<'_>, e: &mut Errs) {
    let (data, binary) = (o.at("data"), o.at("binaryData"));
    let mut total = 0;
    for (k, v) in data.entries() {
        e.0.extend(names::config_map_key(k).into_iter().map(|m| coracle_schema::FieldError::invalid(v.path(), k, m)));
        if binary.v.get(k).is_some() {
            e.0.push(coracle_schema::FieldError::invalid(v.path(), k, "duplicate of key present in binaryData"));
        }
        total += v.len();
    }
    for (k, v) in binary.entries() {
        e.0.extend(names::config_map_key(k).into_iter().map(|m| coracle_schema::FieldError::invalid(v.path(), k, m)));
        total += decoded_len(v.v);
    }
    if total > DATA_MAX_BYTES {
        // The whole object is too long, so the path is empty.
        e.too_long(o, DATA_MAX_BYTES);
    }
}

fn frozen(new: &At<'_>, old: &At<'_>, fields: &[&'static str], e: &mut Errs) {
    if !old.at("immutable").bool() {
        return;
    }
    if !new.at("immutable").bool() {
        e.forbidden(&new.at("immutable"), "field is immutable when `immutable` is set");
    }
    for f in fields {
        if !same(new.at(f).v, old.at(f).v) {
            e.forbidden(&new.at(f), "field is immutable when `immutable` is set");
        }
    }
}

fn change_config_map(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    frozen(new, old, &["data", "binaryData"], e);
}

fn check_secret(o: &At<'_>, e: &mut Errs) {
    let data = o.at("data");
    let mut total = 0;
    for (k, v) in data.entries() {
        e.0.extend(names::config_map_key(k).into_iter().map(|m| coracle_schema::FieldError::invalid(v.path(), k, m)));
        total += decoded_len(v.v);
    }
    if total > DATA_MAX_BYTES {
        e.too_long(&data, DATA_MAX_BYTES);
    }
    let needs = |keys: &[&'static str], e: &mut Errs| {
        for k in keys {
            if data.v.get(*k).is_none() {
                e.required(&data.key(k), "");
            }
        }
    };
    match o.at("type").str() {
        "kubernetes.io/service-account-token" => {
            let name = o.at("metadata").at("annotations").key("kubernetes.io/service-account.name");
            if name.str().is_empty() {
                e.required(&name, "");
            }
        }
        "kubernetes.io/dockercfg" => docker_config(&data, ".dockercfg", e),
        "kubernetes.io/dockerconfigjson" => docker_config(&data, ".dockerconfigjson", e),
        "kubernetes.io/basic-auth" if data.v.get("username").is_none() && data.v.get("password").is_none() => {
            needs(&["username", "password"], e);
        }
        "kubernetes.io/ssh-auth" if data.at("ssh-privatekey").is_zero() => {
            e.required(&data.key("ssh-privatekey"), "");
        }
        "kubernetes.io/tls" => needs(&["tls.crt", "tls.key"], e),
        _ => {}
    }
}

fn docker_config(data: &At<'_>, key: &'static str, e: &mut Errs) {
    let at = data.key(key);
    let Some(text) = at.v.as_str() else { return e.required(&at, "") };
    let json = BASE64.decode(text).ok().and_then(|b| serde_json::from_slice::<Map<String, Value>>(&b).ok());
    if json.is_none() {
        e.invalid_value(&at, "<secret contents redacted>", "invalid character");
    }
}

fn change_secret(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    e.immutable(&new.at("type"), &old.at("type"));
    frozen(new, old, &["data"], e);
}

fn namespace(o: &mut Value) {
    let name = crate::object::name(o).to_owned();
    if !name.is_empty() {
        put(child(child(o, "metadata"), "labels"), "kubernetes.io/metadata.name", name);
    }
    child(o, "spec");
}

fn check_node(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for t in spec.at("taints").items() {
        e.required_check(&t.at("key"), names::qualified_name);
        let value = t.at("value");
        e.check(&value, names::label_value);
        e.required_one_of(&t.at("effect"), &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        let id = (t.at("key").str(), t.at("effect").str());
        if seen.contains(&id) {
            e.duplicate(&t);
            if let Some(last) = e.0.last_mut() {
                last.detail = "taints must be unique by key and effect pair".to_owned();
            }
        }
        seen.push(id);
    }
    let cidrs = spec.at("podCIDRs");
    for c in cidrs.items() {
        e.check(&c, names::cidr);
    }
    if cidrs.len() > 2 {
        e.invalid(&cidrs, "may specify no more than one CIDR for each IP family");
    }
}

fn change_node(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    if !o.at("podCIDRs").is_empty() && !same(n.at("podCIDRs").v, o.at("podCIDRs").v) {
        e.forbidden(&n.at("podCIDRs"), "node updates may not change podCIDR except from \"\" to valid");
    }
    if !o.at("providerID").is_zero() && n.at("providerID").v != o.at("providerID").v {
        e.forbidden(&n.at("providerID"), "node updates may not change providerID except from \"\" to valid");
    }
}

fn check_event(o: &At<'_>, e: &mut Errs) {
    // Old clients leave eventTime out and are held to less.
    let object = o.at("involvedObject");
    let ns = o.at("metadata").at("namespace");
    let wanted = match object.at("namespace").str() {
        "" => "default",
        n => n,
    };
    if !ns.str().is_empty() && ns.str() != wanted {
        let at = object.at("namespace");
        e.invalid(&at, "does not match event.namespace");
    }
    if o.at("eventTime").is_set() {
        if o.at("reportingComponent").is_zero() {
            e.required(&o.at("reportingController"), "");
        } else {
            e.check(&o.at("reportingComponent").with(o.at("reportingComponent").v), names::qualified_name);
        }
        if o.at("reportingInstance").is_zero() {
            e.required(&o.at("reportingInstance"), "");
        }
        event_words(o, e);
    }
}

fn check_new_event(o: &At<'_>, e: &mut Errs) {
    if !o.at("eventTime").is_set() {
        e.required(&o.at("eventTime"), "");
    }
    let ns = o.at("metadata").at("namespace");
    let wanted = match o.at("regarding").at("namespace").str() {
        "" => "default",
        n => n,
    };
    if !ns.str().is_empty() && ns.str() != wanted {
        e.invalid(&o.at("regarding").at("namespace"), "does not match event.namespace");
    }
    e.required_check(&o.at("reportingController"), names::qualified_name);
    if o.at("reportingInstance").is_zero() {
        e.required(&o.at("reportingInstance"), "");
    }
    event_words(o, e);
}

fn event_words(o: &At<'_>, e: &mut Errs) {
    if o.at("action").is_zero() {
        e.required(&o.at("action"), "");
    }
    if o.at("reason").is_zero() {
        e.required(&o.at("reason"), "");
    }
    for (f, max) in [("reportingInstance", 128), ("action", 128), ("reason", 128), ("message", 1024), ("note", 1024)] {
        let at = o.at(f);
        if at.len() > max {
            e.invalid(&at, format!("can have at most {max} characters"));
        }
    }
    let t = o.at("type");
    if t.str() != "Normal" && t.str() != "Warning" {
        e.invalid(&t, format!("has invalid value: {}", t.str()));
    }
}

fn check_endpoints(o: &At<'_>, e: &mut Errs) {
    for s in o.at("subsets").items() {
        if s.at("addresses").is_empty() && s.at("notReadyAddresses").is_empty() {
            e.required(&s, "must specify `addresses` or `notReadyAddresses`");
        }
        for list in ["addresses", "notReadyAddresses"] {
            for a in s.at(list).items() {
                endpoint_ip(&a.at("ip"), e);
                if !a.at("hostname").is_zero() {
                    e.check(&a.at("hostname"), names::dns1123_label);
                }
            }
        }
        let named = s.at("ports").len() > 1;
        for p in s.at("ports").items() {
            if named && p.at("name").is_zero() {
                e.required(&p.at("name"), "");
            } else if !p.at("name").is_zero() {
                e.check(&p.at("name"), names::dns1123_label);
            }
            e.reasons(&p.at("port"), names::port_number(p.at("port").int()));
            e.required_one_of(&p.at("protocol"), &["SCTP", "TCP", "UDP"]);
        }
    }
}

/// An address of an endpoint: valid, and not one that only the own host can mean.
pub fn endpoint_ip(at: &At<'_>, e: &mut Errs) {
    let Ok(ip) = at.str().parse::<std::net::IpAddr>() else { return e.reasons(at, names::ip_address(at.str())) };
    let link_local = match ip {
        std::net::IpAddr::V4(v4) => v4.is_link_local(),
        std::net::IpAddr::V6(v6) => (v6.segments()[0] & 0xffc0) == 0xfe80,
    };
    let link_multicast = match ip {
        std::net::IpAddr::V4(v4) => v4.octets()[..3] == [224, 0, 0],
        std::net::IpAddr::V6(v6) => (v6.segments()[0] & 0xff0f) == 0xff02,
    };
    if ip.is_unspecified() {
        e.invalid(at, format!("may not be unspecified ({ip})"));
    }
    if ip.is_loopback() {
        e.invalid(at, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        e.invalid(at, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if link_multicast {
        e.invalid(at, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

fn limit_item(item: &mut Value) {
    for f in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
        quantities(item, f);
    }
    if text(item, "type") != "Container" {
        return;
    }
    let map = |v: &Value, f: &str| v.get(f).and_then(Value::as_object).cloned().unwrap_or_default();
    let (max, min) = (map(item, "max"), map(item, "min"));
    let default = child(item, "default");
    for (k, v) in max {
        unset(default, &k, v);
    }
    let limits = default.as_object().cloned().unwrap_or_default();
    let request = child(item, "defaultRequest");
    for (k, v) in limits.into_iter().chain(min) {
        unset(request, &k, v);
    }
    for f in ["default", "defaultRequest"] {
        if zero(item.get(f)) {
            crate::kinds::edit::drop(item, f);
        }
    }
}

fn check_limit_range(o: &At<'_>, e: &mut Errs) {
    let mut types = Vec::new();
    for item in o.at("spec").at("limits").items() {
        let kind = item.at("type");
        e.check(&kind, resources::qualified_type);
        if types.contains(&kind.str()) {
            e.duplicate(&kind);
        }
        types.push(kind.str());
        let pod = kind.str() == "Pod";
        let q = |a: At<'_>| Quantity::from_value(a.v);
        let mut keys: Vec<&str> = Vec::new();
        for f in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
            for (k, v) in item.at(f).entries() {
                if !keys.contains(&k) {
                    keys.push(k);
                }
                if pod && f.starts_with("default") {
                    let _ = v;
                }
            }
        }
        if pod {
            for f in ["default", "defaultRequest"] {
                if !item.at(f).is_empty() {
                    e.forbidden(&item.at(f), "may not be specified when `type` is 'Pod'");
                }
            }
        }
        if kind.str() == "PersistentVolumeClaim" && !item.at("min").has("storage") && !item.at("max").has("storage") {
            e.required(&item, "either minimum or maximum storage value is required, but neither was provided");
        }
        keys.sort_unstable();
        for k in keys {
            let (min, max) = (item.at("min").key(k), item.at("max").key(k));
            let (def, req) = (item.at("default").key(k), item.at("defaultRequest").key(k));
            let (min_q, max_q, def_q, req_q) = (q(min.clone()), q(max.clone()), q(def.clone()), q(req.clone()));
            let more = |a: Option<Quantity>, b: Option<Quantity>| matches!((a, b), (Some(a), Some(b)) if a > b);
            let s = |q: Option<Quantity>| q.map(|q| q.to_string()).unwrap_or_default();
            if more(min_q, max_q) {
                e.invalid(&min, format!("min value {} is greater than max value {}", s(min_q), s(max_q)));
            }
            if more(min_q, req_q) {
                e.invalid(&req, format!("min value {} is greater than default request value {}", s(min_q), s(req_q)));
            }
            if more(req_q, max_q) {
                e.invalid(&req, format!("default request value {} is greater than max value {}", s(req_q), s(max_q)));
            }
            if more(req_q, def_q) {
                e.invalid(
                    &req,
                    format!("default request value {} is greater than default limit value {}", s(req_q), s(def_q)),
                );
            }
            if more(min_q, def_q) {
                e.invalid(&min, format!("min value {} is greater than default value {}", s(min_q), s(def_q)));
            }
            if more(def_q, max_q) {
                e.invalid(&max, format!("default value {} is greater than max value {}", s(def_q), s(max_q)));
            }
            let ratio = item.at("maxLimitRequestRatio").key(k);
            if let Some(r) = q(ratio.clone()) {
                if r < Quantity::from_units(1) {
                    e.invalid(&ratio, format!("ratio {r} is less than 1"));
                }
                if let (Some(max), Some(min)) = (max_q, min_q)
                    && !min.is_zero()
                    && r.millis() * min.millis() > max.millis() * 1000
                {
                    let limit = max.millis() as f64 / min.millis() as f64;
                    e.invalid(&ratio, format!("ratio {r} is greater than max/min = {limit:.6}"));
                }
            }
        }
    }
}

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

fn check_quota(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    for (name, q) in spec.at("hard").entries() {
        resources::quota_name(&q, name, e);
        resources::not_negative(&q, e);
    }
    let scopes = spec.at("scopes");
    for s in scopes.items() {
        if !SCOPES.contains(&s.str()) {
            e.invalid(&scopes, "unsupported scope");
        }
    }
    let has = |w: &str| scopes.array().iter().any(|s| s == w);
    if (has("BestEffort") && has("NotBestEffort")) || (has("Terminating") && has("NotTerminating")) {
        e.invalid(&scopes, "conflicting scopes");
    }
    for m in spec.at("scopeSelector").at("matchExpressions").items() {
        if !SCOPES.contains(&m.at("scopeName").str()) {
            e.invalid(&m.at("scopeName"), "unsupported scope");
        }
        let (op, values) = (m.at("operator"), m.at("values"));
        match op.str() {
            "In" | "NotIn" if values.is_empty() => {
                e.required(&values, "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                e.invalid(&values, "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector");
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => e.invalid(&op, "not a valid selector operator"),
        }
    }
}

//! ResourceQuota: what is made is counted before it is made, so that a quota is never overrun.
//!
//! The count stands in the quota's status. A charge is a compare-and-swap on that object, all quotas of a namespace one after
//! the other, so that several servers on one store agree as well. The quota controller corrects what failed requests left behind.

use std::collections::BTreeMap;

use coracle_store::{Draft, Precondition};
use serde_json::{Value, json};

use crate::admission::plugin::{Plugin, forbid, look_all};
use crate::context::{Context, Operation};
use crate::kinds::edit::{child, list, put, text};
use crate::kinds::pod::{self, defaults};
use crate::kinds::quantity::Quantity;
use crate::status::Status;

/// Amounts by quota name, such as `pods` or `requests.cpu`.
pub type Usage = BTreeMap<String, Quantity>;

/// Times that a charge is tried again because somebody else charged the same quota.
const ATTEMPTS: usize = 64;

pub static PLUGIN: Plugin = Plugin {
    name: "ResourceQuota",
    handles: |ctx| {
        !ctx.namespace.is_empty()
            && ctx.kind.stored()
            && !ctx.kind.is("", "events")
            && !ctx.kind.is("events.k8s.io", "events")
            && !ctx.kind.is("", "resourcequotas")
            && match ctx.operation {
                Operation::Create => ctx.subresource.is_empty(),
                Operation::Update => {
                    (ctx.subresource.is_empty()
                        && (ctx.kind.is("", "services") || ctx.kind.is("", "persistentvolumeclaims")))
                        || (ctx.kind.is("", "pods") && ctx.subresource == "resize")
                }
                _ => false,
            }
            || (ctx.operation == Operation::Create && ctx.is_object_of("", "resourcequotas"))
    },
    admit: None,
    validate: Some(|ctx, new, old| Box::pin(async move { charge(ctx, new, old).await })),
};

fn one() -> Quantity {
    Quantity::from_units(1)
}

fn add(usage: &mut Usage, name: impl Into<String>, q: Quantity) {
    let slot = usage.entry(name.into()).or_insert(Quantity::ZERO);
    *slot = slot.plus(q);
}

/// What an object counts for, by every name that a quota may use. Source: `pkg/quota/v1/evaluator`.
pub fn usage(group: &str, resource: &str, object: &Value) -> Usage {
    let mut out = Usage::new();
    let counted = if group.is_empty() { format!("count/{resource}") } else { format!("count/{resource}.{group}") };
    let spec = object.get("spec").unwrap_or(&Value::Null);
    match (group, resource) {
        ("", "pods") => {
            // Even a finished pod is an object.
            add(&mut out, counted, one());
            if pod::is_terminal(object) {
                return out;
            }
            add(&mut out, "pods", one());
            for (which, prefix) in [("requests", "requests."), ("limits", "limits.")] {
                let mut sums = defaults::aggregate(spec, which);
                for (k, v) in
                    spec.pointer(&format!("/resources/{which}")).and_then(Value::as_object).into_iter().flatten()
                {
                    if let Some(q) = Quantity::from_value(v) {
                        sums.insert(k.clone(), q);
                    }
                }
                for (k, v) in spec.get("overhead").and_then(Value::as_object).into_iter().flatten() {
                    if let Some(q) = Quantity::from_value(v).filter(|_| which == "requests" || sums.contains_key(k)) {
                        add(&mut sums, k.clone(), q);
                    }
                }
                for (k, q) in sums {
                    if which == "requests" && matches!(k.as_str(), "cpu" | "memory" | "ephemeral-storage") {
                        add(&mut out, k.clone(), q);
                    }
                    add(&mut out, format!("{prefix}{k}"), q);
                }
            }
        }
        ("", "services") => {
            add(&mut out, counted, one());
            add(&mut out, "services", one());
            let ports = i64::try_from(list(spec, "ports").len()).unwrap_or(i64::MAX);
            let allocates = spec.get("allocateLoadBalancerNodePorts").and_then(Value::as_bool).unwrap_or(true);
            match text(spec, "type") {
                "NodePort" => add(&mut out, "services.nodeports", Quantity::from_units(ports)),
                "LoadBalancer" => {
                    add(&mut out, "services.loadbalancers", one());
                    let n = if allocates {
                        ports
                    } else {
                        list(spec, "ports").iter().filter(|p| p.get("nodePort").is_some()).count() as i64
                    };
                    add(&mut out, "services.nodeports", Quantity::from_units(n));
                }
                _ => {}
            }
        }
        ("", "persistentvolumeclaims") => {
            add(&mut out, counted, one());
            add(&mut out, "persistentvolumeclaims", one());
            let class = text(spec, "storageClassName");
            let asked = spec.pointer("/resources/requests/storage").and_then(Quantity::from_value);
            if !class.is_empty() {
                add(&mut out, format!("{class}.storageclass.storage.k8s.io/persistentvolumeclaims"), one());
            }
            if let Some(q) = asked {
                add(&mut out, "requests.storage", q);
                if !class.is_empty() {
                    add(&mut out, format!("{class}.storageclass.storage.k8s.io/requests.storage"), q);
                }
            }
        }
        ("", "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas") => {
            add(&mut out, counted, one());
            add(&mut out, resource, one());
        }
        _ => add(&mut out, counted, one()),
    }
    out
}

/// Whether a quota's scopes take an object in.
pub fn in_scope(quota: &Value, group: &str, resource: &str, object: &Value) -> bool {
    let none = Value::Null;
    let spec = quota.get("spec").unwrap_or(&none);
    let plain = list(spec, "scopes").iter().filter_map(Value::as_str).map(|s| (s, "Exists", &[][..]));
    let selected = spec
        .pointer("/scopeSelector/matchExpressions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|m| (text(m, "scopeName"), text(m, "operator"), list(m, "values")));
    let mut scopes = plain.chain(selected).peekable();
    if scopes.peek().is_none() {
        return true;
    }
    let object = object.get("spec").map_or(&none, |_| object);
    scopes.all(|(scope, operator, values)| {
        let spec = object.get("spec").unwrap_or(&none);
        let among = |have: &str| match operator {
            "Exists" => !have.is_empty(),
            "DoesNotExist" => have.is_empty(),
            "In" => values.iter().any(|v| v == have),
            "NotIn" => !values.iter().any(|v| v == have),
            _ => false,
        };
        if (group, resource) == ("", "persistentvolumeclaims") {
            return scope == "VolumeAttributesClass" && among(text(spec, "volumeAttributesClassName"));
        }
        if (group, resource) != ("", "pods") {
            return false;
        }
        let deadline = spec.get("activeDeadlineSeconds").is_some_and(|v| !v.is_null());
        match scope {
            "Terminating" => deadline,
            "NotTerminating" => !deadline,
            "BestEffort" => pod::qos(spec) == "BestEffort",
            "NotBestEffort" => pod::qos(spec) != "BestEffort",
            "PriorityClass" => among(text(spec, "priorityClassName")),
            "CrossNamespacePodAffinity" => crosses_namespaces(spec),
            _ => false,
        }
    })
}

fn crosses_namespaces(spec: &Value) -> bool {
    let terms = ["podAffinity", "podAntiAffinity"].into_iter().flat_map(|kind| {
        let a = spec.pointer(&format!("/affinity/{kind}")).cloned().unwrap_or_default();
        let required = list(&a, "requiredDuringSchedulingIgnoredDuringExecution").to_vec();
        let preferred = list(&a, "preferredDuringSchedulingIgnoredDuringExecution").to_vec();
        required.into_iter().chain(preferred.into_iter().map(|p| p["podAffinityTerm"].clone()))
    });
    terms
        .into_iter()
        .any(|t| !list(&t, "namespaces").is_empty() || t.get("namespaceSelector").is_some_and(|v| !v.is_null()))
}

fn amounts(v: Option<&Value>) -> Usage {
    v.and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), Quantity::from_value(v)?)))
        .collect()
}

fn words(usage: &Usage, names: &[&String]) -> String {
    names.iter().filter_map(|n| Some(format!("{n}={}", usage.get(*n)?))).collect::<Vec<_>>().join(",")
}

async fn charge(ctx: &Context, new: &Value, old: Option<&Value>) -> Result<(), Status> {
    let Some(kind) = ctx.api.kind("", "v1", "resourcequotas") else { return Ok(()) };
    let quotas = look_all(ctx, "", "resourcequotas", &ctx.namespace).await?;
    if quotas.is_empty() {
        return Ok(());
    }
    let (group, resource) = (ctx.kind.group.as_str(), ctx.kind.resource.as_str());
    let mut delta = usage(group, resource, new);
    if let (Operation::Update, Some(old)) = (ctx.operation, old) {
        for (k, q) in usage(group, resource, old) {
            let slot = delta.entry(k).or_insert(Quantity::ZERO);
            *slot = slot.minus(q);
        }
        delta.retain(|_, q| !q.is_zero());
    }
    for quota in quotas {
        let key = kind.key(&ctx.namespace, crate::object::name(&quota));
        let mut tries = 0;
        loop {
            let Some(entry) = ctx.api.store.get(&key).await? else { break };
            let mut quota: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
            if !in_scope(&quota, group, resource, new) {
                break;
            }
            let Some(used) = judge(ctx, new, &quota, &delta)? else { break };
            if ctx.dry_run {
                break;
            }
            let status = child(child(&mut quota, "status"), "used");
            for (k, q) in used {
                put(status, &k, q.to_string());
            }
            let draft = Draft::encode(&quota).map_err(Status::internal)?;
            match ctx.api.store.put(&key, draft, Precondition::Revision(entry.revision)).await {
                Ok(_) => break,
                Err(coracle_store::Error::Conflict { .. }) if tries < ATTEMPTS => tries += 1,
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Whether the quota has room: the new usage, `None` when nothing of it is counted here, or the refusal.
fn judge(ctx: &Context, object: &Value, quota: &Value, delta: &Usage) -> Result<Option<Usage>, Status> {
    let name = crate::object::name(quota);
    let (spec_hard, hard) = (amounts(quota.pointer("/spec/hard")), amounts(quota.pointer("/status/hard")));
    let used = amounts(quota.pointer("/status/used"));
    // A pod must say what it wants of anything that the quota counts.
    if ctx.kind.is("", "pods") && ctx.operation == Operation::Create {
        let lacking = lacking(object, &spec_hard);
        if !lacking.is_empty() {
            return Err(forbid(ctx, object, format!("failed quota: {name}: must specify {lacking}")));
        }
    }
    let touched: Vec<&String> = delta.keys().filter(|k| spec_hard.contains_key(*k)).collect();
    if touched.is_empty() {
        return Ok(None);
    }
    let unknown: Vec<&String> = touched.iter().copied().filter(|k| !hard.contains_key(*k)).collect();
    if !unknown.is_empty() {
        let list: Vec<&str> = unknown.iter().map(|s| s.as_str()).collect();
        return Err(forbid(ctx, object, format!("status unknown for quota: {name}, resources: {}", list.join(","))));
    }
    let now = |k: &String| used.get(k).copied().unwrap_or(Quantity::ZERO);
    let over: Vec<&String> = touched
        .iter()
        .copied()
        .filter(|k| !delta[*k].is_negative() && !delta[*k].is_zero() && now(k).plus(delta[*k]) > hard[*k])
        .collect();
    if !over.is_empty() {
        return Err(forbid(
            ctx,
            object,
            format!(
                "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
                words(delta, &over),
                words(&over.iter().map(|k| ((*k).clone(), now(k))).collect(), &over),
                words(&hard, &over)
            ),
        ));
    }
    Ok(Some(touched.into_iter().map(|k| (k.clone(), now(k).plus(delta[k]))).collect()))
}

/// `limits.cpu for: a,b; limits.memory for: a`: containers that leave out what the quota counts.
fn lacking(pod: &Value, hard: &Usage) -> String {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    let mut out: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    const COMPUTE: [(&str, &str, &str); 6] = [
        ("cpu", "requests", "cpu"),
        ("memory", "requests", "memory"),
        ("requests.cpu", "requests", "cpu"),
        ("requests.memory", "requests", "memory"),
        ("limits.cpu", "limits", "cpu"),
        ("limits.memory", "limits", "memory"),
    ];
    for (name, which, what) in COMPUTE {
        if !hard.contains_key(name) || spec.pointer(&format!("/resources/{which}/{what}")).is_some() {
            continue;
        }
        for c in ["containers", "initContainers"].iter().flat_map(|f| list(spec, f)) {
            if c.pointer(&format!("/resources/{which}/{what}")).is_none() {
                out.entry(name).or_default().push(text(c, "name"));
            }
        }
    }
    out.iter().map(|(k, v)| format!("{k} for: {}", v.join(","))).collect::<Vec<_>>().join("; ")
}

/// `{}` of a quota's status before anything was counted, for the controller.
pub fn empty_status(quota: &Value) -> Value {
    let hard = quota.pointer("/spec/hard").cloned().unwrap_or_else(|| json!({}));
    let used: serde_json::Map<String, Value> =
        hard.as_object().into_iter().flatten().map(|(k, _)| (k.clone(), json!("0"))).collect();
    json!({"hard": hard, "used": used})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_count_what_they_ask() {
        let pod = json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1"}}}]}});
        let u = usage("", "pods", &pod);
        let get = |k: &str| u.get(k).map(ToString::to_string);
        assert_eq!(get("pods").as_deref(), Some("1"));
        assert_eq!(get("requests.cpu").as_deref(), Some("500m"));
        assert_eq!(get("cpu").as_deref(), Some("500m"));
        assert_eq!(get("limits.cpu").as_deref(), Some("1"));
        assert_eq!(get("memory").as_deref(), Some("1Gi"));
        assert_eq!(usage("apps", "replicasets", &json!({})).keys().collect::<Vec<_>>(), ["count/replicasets.apps"]);
    }

    #[test]
    fn scopes_select_pods() {
        let quota = |s: &str| json!({"spec": {"scopes": [s]}});
        let pod = json!({"spec": {"containers": [], "activeDeadlineSeconds": 5}});
        assert!(in_scope(&quota("Terminating"), "", "pods", &pod));
        assert!(!in_scope(&quota("NotTerminating"), "", "pods", &pod));
        assert!(in_scope(&quota("BestEffort"), "", "pods", &pod));
        assert!(!in_scope(&quota("BestEffort"), "", "services", &json!({"spec": {}})));
        assert!(in_scope(&json!({"spec": {}}), "", "services", &json!({})));
    }

    #[test]
    fn what_is_left_out_is_named() {
        let pod =
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "resources": {"limits": {"cpu": "1"}}}]}});
        let hard: Usage = [("limits.cpu".to_owned(), one()), ("limits.memory".to_owned(), one())].into();
        assert_eq!(lacking(&pod, &hard), "limits.cpu for: a; limits.memory for: a,b");
    }
}

//! Defaults of pods and of every pod template (`pkg/apis/core/v1/defaults.go` says which field gets what).

use serde_json::{Map, Value, json};

use crate::kinds::edit::{
    child, each, each_field, empty, flag, int, list, put, quantities, quantity, text, unset, zero,
};
use crate::kinds::quantity::Quantity;

const MODE: i64 = 0o644;

/// Lists of containers in a pod spec.
pub const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// A pod: the spec's defaults plus those that templates do not get.
pub fn pod(object: &mut Value) {
    let spec = child(object, "spec");
    pod_spec(spec);
    for field in ["containers", "initContainers"] {
        each(spec, field, |c| requests_from_limits(child(c, "resources")));
    }
    pod_level_resources(spec);
    unset(spec, "enableServiceLinks", true);
    if flag(spec, "hostNetwork") {
        for field in ["containers", "initContainers"] {
            each(spec, field, |c| {
                each(c, "ports", |p| {
                    if let Some(n) = int(p, "containerPort") {
                        empty(p, "hostPort", n);
                    }
                });
            });
        }
    }
}

/// A pod template: `{metadata, spec}`.
pub fn template(template: &mut Value) {
    if template.is_object() {
        child(template, "metadata");
        pod_spec(child(template, "spec"));
    }
}

/// A pod spec, in a pod or in a template.
pub fn pod_spec(spec: &mut Value) {
    empty(spec, "dnsPolicy", "ClusterFirst");
    empty(spec, "restartPolicy", "Always");
    unset(spec, "securityContext", json!({}));
    unset(spec, "terminationGracePeriodSeconds", 30);
    empty(spec, "schedulerName", "default-scheduler");
    // The two names of the service account are one field.
    let account = [text(spec, "serviceAccountName"), text(spec, "serviceAccount")]
        .into_iter()
        .find(|s| !s.is_empty())
        .map(str::to_owned);
    if let Some(account) = account {
        put(spec, "serviceAccountName", account.clone());
        put(spec, "serviceAccount", account);
    }
    each(spec, "volumes", volume);
    for field in CONTAINER_LISTS {
        each(spec, field, container);
    }
    quantities(spec, "overhead");
    each_field(spec, "resources", |r| {
        quantities(r, "limits");
        quantities(r, "requests");
    });
    each(spec, "topologySpreadConstraints", |t| {
        unset(t, "nodeAffinityPolicy", Value::Null);
        unset(t, "nodeTaintsPolicy", Value::Null);
    });
    each(spec, "topologySpreadConstraints", crate::kinds::edit::drop_nulls);
}

fn container(c: &mut Value) {
    let policy = pull_policy(text(c, "image"));
    empty(c, "imagePullPolicy", policy);
    empty(c, "terminationMessagePath", "/dev/termination-log");
    empty(c, "terminationMessagePolicy", "File");
    let resources = child(c, "resources");
    quantities(resources, "limits");
    quantities(resources, "requests");
    each(c, "ports", |p| empty(p, "protocol", "TCP"));
    each(c, "env", |e| {
        each_field(e, "valueFrom", |from| {
            each_field(from, "fieldRef", |r| empty(r, "apiVersion", "v1"));
            each_field(from, "resourceFieldRef", resource_field);
            each_field(from, "fileKeyRef", |r| unset(r, "optional", false));
        });
    });
    for field in ["livenessProbe", "readinessProbe", "startupProbe"] {
        each_field(c, field, probe);
    }
    each_field(c, "lifecycle", |l| {
        for field in ["postStart", "preStop"] {
            each_field(l, field, |h| each_field(h, "httpGet", http_get));
        }
    });
    each_field(c, "securityContext", |s| {
        each_field(s, "procMount", |_| {});
    });
}

/// `Always` for the tag `latest` (or no tag at all), else `IfNotPresent`.
fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        Some((_, tag)) if tag != "latest" => "IfNotPresent",
        // What is no reference at all has no tag, and validation says so.
        _ if image.is_empty() => "IfNotPresent",
        _ => "Always",
    }
}

fn resource_field(r: &mut Value) {
    unset(r, "divisor", "0");
    quantity(r, "divisor");
}

fn probe(p: &mut Value) {
    for (field, n) in [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)] {
        empty(p, field, n);
    }
    each_field(p, "httpGet", http_get);
    each_field(p, "grpc", |g| unset(g, "service", ""));
}

fn http_get(h: &mut Value) {
    empty(h, "path", "/");
    empty(h, "scheme", "HTTP");
}

fn volume(v: &mut Value) {
    let Some(o) = v.as_object() else { return };
    if !o.iter().any(|(k, x)| k != "name" && !x.is_null()) {
        put(v, "emptyDir", json!({}));
    }
    for field in ["secret", "configMap", "downwardAPI", "projected"] {
        each_field(v, field, |s| unset(s, "defaultMode", MODE));
    }
    each_field(v, "emptyDir", |e| quantity(e, "sizeLimit"));
    each_field(v, "hostPath", |h| unset(h, "type", ""));
    each_field(v, "downwardAPI", |d| each(d, "items", downward_item));
    each_field(v, "projected", |p| {
        each(p, "sources", |s| {
            each_field(s, "serviceAccountToken", |t| unset(t, "expirationSeconds", 3600));
            each_field(s, "downwardAPI", |d| each(d, "items", downward_item));
            each_field(s, "podCertificate", |c| unset(c, "maxExpirationSeconds", 86400));
        });
    });
    each_field(v, "ephemeral", |e| {
        each_field(e, "volumeClaimTemplate", |t| each_field(t, "spec", claim_spec));
    });
    each_field(v, "image", |i| {
        let policy = pull_policy(text(i, "reference"));
        empty(i, "pullPolicy", policy);
    });
    plugin_volume(v);
}

/// Defaults of the volume sources that persistent volumes have too.
pub fn plugin_volume(v: &mut Value) {
    const TABLE: [(&str, &str, &str); 9] = [
        ("iscsi", "iscsiInterface", "default"),
        ("rbd", "pool", "rbd"),
        ("rbd", "user", "admin"),
        ("rbd", "keyring", "/etc/ceph/keyring"),
        ("azureDisk", "cachingMode", "ReadWrite"),
        ("azureDisk", "kind", "Shared"),
        ("azureDisk", "fsType", "ext4"),
        ("scaleIO", "storageMode", "ThinProvisioned"),
        ("scaleIO", "fsType", "xfs"),
    ];
    for (source, field, default) in TABLE {
        each_field(v, source, |s| empty(s, field, default));
    }
    each_field(v, "azureDisk", |s| unset(s, "readOnly", false));
}

fn downward_item(item: &mut Value) {
    each_field(item, "fieldRef", |r| empty(r, "apiVersion", "v1"));
    each_field(item, "resourceFieldRef", resource_field);
}

/// The spec of a persistent volume claim, also in templates.
pub fn claim_spec(spec: &mut Value) {
    unset(spec, "volumeMode", "Filesystem");
    let resources = child(spec, "resources");
    quantities(resources, "limits");
    quantities(resources, "requests");
}

/// What is limited but not requested is requested in the same amount.
fn requests_from_limits(resources: &mut Value) {
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else { return };
    let requests = child(resources, "requests");
    for (name, q) in limits {
        unset(requests, &name, q);
    }
}

/// Pod-level requests and limits, which are only filled in when some are given (KEP-2837).
fn pod_level_resources(spec: &mut Value) {
    if zero(spec.get("resources").and_then(|r| r.get("limits"))) {
        return;
    }
    let asked = container_requests(spec);
    let resources = child(spec, "resources");
    let limits = resources.get("limits").and_then(Value::as_object).cloned().unwrap_or_default();
    let requests = child(resources, "requests");
    for (name, q) in &asked {
        if pod_level(name) && !name.starts_with("hugepages-") {
            unset(requests, name, q.to_string());
        }
    }
    for (name, q) in &limits {
        if pod_level(name) {
            unset(requests, name, q.clone());
        }
    }
}

fn pod_level(name: &str) -> bool {
    name == "cpu" || name == "memory" || name.starts_with("hugepages-")
}

/// What the containers of a pod request together: the sum of those that run at once, or the largest init container.
pub fn container_requests(spec: &Value) -> std::collections::BTreeMap<String, Quantity> {
    aggregate(spec, "requests")
}

/// The same for `requests` or `limits`. Sidecars (restartable init containers) count with everything after them.
pub fn aggregate(spec: &Value, which: &str) -> std::collections::BTreeMap<String, Quantity> {
    type Sum = std::collections::BTreeMap<String, Quantity>;
    fn add(sum: &mut Sum, amounts: &Map<String, Value>) {
        for (name, v) in amounts {
            if let Some(q) = Quantity::from_value(v) {
                let slot = sum.entry(name.clone()).or_insert(Quantity::ZERO);
                *slot = slot.plus(q);
            }
        }
    }
    fn max(top: &mut Sum, other: &Sum) {
        for (name, q) in other {
            let slot = top.entry(name.clone()).or_insert(*q);
            *slot = (*slot).max(*q);
        }
    }
    let none = Map::new();
    let amounts = |c: &Value| -> Map<String, Value> {
        c.pointer(&format!("/resources/{which}")).and_then(Value::as_object).unwrap_or(&none).clone()
    };
    let (mut running, mut sidecars, mut peak) = (Sum::new(), Sum::new(), Sum::new());
    for c in list(spec, "containers") {
        add(&mut running, &amounts(c));
    }
    for c in list(spec, "initContainers") {
        if text(c, "restartPolicy") == "Always" {
            add(&mut sidecars, &amounts(c));
            add(&mut running, &amounts(c));
            max(&mut peak, &sidecars);
        } else {
            let mut now = sidecars.clone();
            add(&mut now, &amounts(c));
            max(&mut peak, &now);
        }
    }
    max(&mut running, &peak);
    running
}

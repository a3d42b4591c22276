//! Validation of containers: init, regular and ephemeral ones.

use serde_json::Value;

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{each, list, quantities, text};
use crate::kinds::pod::{security, volumes::Volumes};
use crate::kinds::{names, resources};

/// Fields that a fieldRef in the environment may name.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Resources that a resourceFieldRef may name.
const CONTAINER_RESOURCES: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];

/// Writes the amounts in container statuses canonically.
pub fn quantities_in_status(status: &mut Value) {
    for f in ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"] {
        each(status, f, |s| {
            quantities(s, "allocatedResources");
            crate::kinds::edit::each_field(s, "resources", |r| {
                quantities(r, "limits");
                quantities(r, "requests");
            });
        });
    }
}

/// All containers of a pod spec.
pub fn check(spec: &At<'_>, volumes: &Volumes<'_>, claims: &[&str], e: &mut Errs) {
    let grace = spec.at("terminationGracePeriodSeconds").v.as_i64();
    let regular = spec.at("containers");
    if regular.is_empty() {
        e.required(&regular, "");
    }
    let users = !spec.at("hostUsers").is_set() || spec.at("hostUsers").bool();
    let never = spec.at("restartPolicy").str() == "Never";
    let mut seen: Vec<&str> = Vec::new();
    for c in regular.items() {
        common(&c, volumes, claims, users, never, e);
        unique(&c, &mut seen, e);
        lifecycle(&c.at("lifecycle"), grace, e);
        probes(&c, grace, e);
    }
    host_ports(&regular, e);
    for c in spec.at("initContainers").items() {
        common(&c, volumes, claims, users, never, e);
        unique(&c, &mut seen, e);
        let sidecar = c.at("restartPolicy");
        if sidecar.str() == "Always" {
            lifecycle(&c.at("lifecycle"), grace, e);
            probes(&c, grace, e);
        } else {
            if c.at("lifecycle").is_set() {
                e.forbidden(&c.at("lifecycle"), "may not be set for init containers without restartPolicy=Always");
            }
            for f in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if c.at(f).is_set() {
                    e.forbidden(&c.at(f), "may not be set for init containers without restartPolicy=Always");
                }
            }
        }
        if sidecar.is_set() {
            e.one_of(&sidecar, &["Always", "Never", "OnFailure"]);
        }
    }
    for c in spec.at("ephemeralContainers").items() {
        common(&c, volumes, claims, users, never, e);
        unique(&c, &mut seen, e);
        let target = c.at("targetContainerName");
        if !target.is_zero()
            && !list(spec.v, "containers")
                .iter()
                .chain(list(spec.v, "initContainers"))
                .any(|x| text(x, "name") == target.str())
        {
            e.not_found(&target);
        }
        for f in ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resizePolicy"] {
            if !c.at(f).is_zero() {
                e.forbidden(&c.at(f), "cannot be set for an Ephemeral Container");
            }
        }
        if !c.at("resources").is_empty() {
            e.forbidden(&c.at("resources"), "cannot be set for an Ephemeral Container");
        }
        for m in c.at("volumeMounts").items() {
            for f in ["subPath", "subPathExpr"] {
                if !m.at(f).is_zero() {
                    e.forbidden(&m.at(f), "cannot be set for an Ephemeral Container");
                }
            }
        }
    }
}

fn unique<'a>(c: &At<'a>, seen: &mut Vec<&'a str>, e: &mut Errs) {
    let name = c.at("name");
    if seen.contains(&name.str()) {
        e.duplicate(&name);
    }
    seen.push(name.str());
}

fn common(c: &At<'_>, volumes: &Volumes<'_>, claims: &[&str], host_users: bool, never: bool, e: &mut Errs) {
    e.required_check(&c.at("name"), names::dns1123_label);
    let image = c.at("image");
    if image.is_zero() {
        e.required(&image, "");
    } else if image.str().trim() != image.str() {
        e.invalid(&image, "must not have leading or trailing whitespace");
    }
    e.required_one_of(&c.at("terminationMessagePolicy"), &["FallbackToLogsOnError", "File"]);
    ports(&c.at("ports"), e);
    environment(&c.at("env"), volumes, e);
    for f in c.at("envFrom").items() {
        env_from(&f, e);
    }
    mounts(c, volumes, e);
    for d in c.at("volumeDevices").items() {
        if d.at("name").is_zero() {
            e.required(&d.at("name"), "");
        } else if !volumes.names.contains(&d.at("name").str()) {
            e.not_found(&d.at("name"));
        }
        if d.at("devicePath").is_zero() {
            e.required(&d.at("devicePath"), "");
        }
    }
    e.required_one_of(&c.at("imagePullPolicy"), &["Always", "IfNotPresent", "Never"]);
    resources::requirements(&c.at("resources"), false, e);
    for r in c.at("resources").at("claims").items() {
        if !claims.contains(&r.at("name").str()) {
            e.not_found(&r.at("name"));
        }
    }
    let mut policies: Vec<&str> = Vec::new();
    for p in c.at("resizePolicy").items() {
        e.required_one_of(&p.at("resourceName"), &["cpu", "memory"]);
        e.required_one_of(&p.at("restartPolicy"), &["NotRequired", "RestartContainer"]);
        if policies.contains(&p.at("resourceName").str()) {
            e.duplicate(&c.at("resizePolicy").with(p.v));
        }
        if never && p.at("restartPolicy").str() == "RestartContainer" {
            e.invalid(&p, "must be 'NotRequired' when `restartPolicy` is 'Never'");
        }
        policies.push(p.at("resourceName").str());
    }
    security::container(&c.at("securityContext"), host_users, e);
}

fn ports(at: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<&str> = Vec::new();
    for p in at.items() {
        let name = p.at("name");
        if !name.is_zero() {
            let reasons = names::port_name(name.str());
            if reasons.is_empty() {
                if seen.contains(&name.str()) {
                    e.duplicate(&name);
                }
                seen.push(name.str());
            }
            e.reasons(&name, reasons);
        }
        let (own, host) = (p.at("containerPort"), p.at("hostPort"));
        if own.int() == 0 {
            e.required(&own, "");
        } else {
            e.reasons(&own, names::port_number(own.int()));
        }
        if host.int() != 0 {
            e.reasons(&host, names::port_number(host.int()));
        }
        e.required_one_of(&p.at("protocol"), &["SCTP", "TCP", "UDP"]);
        if !p.at("hostIP").is_zero() {
            e.check(&p.at("hostIP"), names::ip_address);
        }
    }
}

fn host_ports(regular: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<String> = Vec::new();
    for c in regular.items() {
        for p in c.at("ports").items() {
            let host = p.at("hostPort");
            if host.int() == 0 {
                continue;
            }
            let id = format!("{}/{}/{}", p.at("protocol").str(), p.at("hostIP").str(), host.int());
            if seen.contains(&id) {
                e.0.push(coracle_schema::FieldError::duplicate(host.path(), id.clone()));
            }
            seen.push(id);
        }
    }
}

fn environment(at: &At<'_>, volumes: &Volumes<'_>, e: &mut Errs) {
    for v in at.items() {
        let (name, from) = (v.at("name"), v.at("valueFrom"));
        if name.is_zero() {
            e.required(&name, "");
        } else {
            e.check(&name, names::env_var_name);
        }
        if !from.is_set() {
            continue;
        }
        let mut sources = 0;
        for f in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
            sources += usize::from(from.has(f));
        }
        if from.has("fieldRef") {
            field_ref(&from.at("fieldRef"), &ENV_FIELDS, e);
        }
        if from.has("resourceFieldRef") {
            resource_ref(&from.at("resourceFieldRef"), false, e);
        }
        for f in ["configMapKeyRef", "secretKeyRef"] {
            let r = from.at(f);
            if r.is_set() {
                if r.at("key").is_zero() {
                    e.required(&r.at("key"), "");
                } else {
                    e.check(&r.at("key"), names::config_map_key);
                }
            }
        }
        let file = from.at("fileKeyRef");
        if file.is_set() {
            if file.at("volumeName").is_zero() {
                e.required(&file.at("volumeName"), "");
            } else if !volumes.names.contains(&file.at("volumeName").str()) {
                e.not_found(&file.at("volumeName"));
            }
        }
        if !v.at("value").is_zero() && sources > 0 {
            e.invalid_value(&from, "", "may not be specified when `value` is not empty");
        } else if sources == 0 {
            e.invalid_value(&from, "", "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`");
        } else if sources > 1 {
            e.invalid_value(&from, "", "may not have more than one field specified at a time");
        }
    }
}

/// A reference to a field of the pod: `fields` are the ones allowed beside labels and annotations by key.
pub fn field_ref(r: &At<'_>, fields: &[&str], e: &mut Errs) {
    let (version, path) = (r.at("apiVersion"), r.at("fieldPath"));
    if version.is_zero() {
        return e.required(&version, "");
    }
    if path.is_zero() {
        return e.required(&path, "");
    }
    let p = path.str();
    if version.str() != "v1" {
        return e.invalid(&path, format!("error converting fieldPath: unsupported pod version: {}", version.str()));
    }
    if let Some((map, rest)) = p.split_once("['")
        && let Some(key) = rest.strip_suffix("']")
    {
        match map {
            "metadata.annotations" => e.reasons(&path.with(path.v), names::qualified_name(&key.to_lowercase())),
            "metadata.labels" => e.reasons(&path, names::qualified_name(key)),
            _ => e.invalid(&path, format!("{map:?} does not support subscript")),
        }
        return;
    }
    const KNOWN: [&str; 11] = [
        "metadata.annotations",
        "metadata.labels",
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "spec.serviceAccountName",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
        "status.podIPs",
    ];
    if !KNOWN.contains(&p)
        && !matches!(
            p,
            "spec.restartPolicy"
                | "spec.schedulerName"
                | "spec.hostNetwork"
                | "status.phase"
                | "status.nominatedNodeName"
        )
    {
        return e.invalid(&path, format!("error converting fieldPath: field label not supported: {p}"));
    }
    if !fields.contains(&p) {
        e.not_supported(&path, fields);
    }
}

/// A reference to a container's resources; volumes must name the container.
pub fn resource_ref(r: &At<'_>, volume: bool, e: &mut Errs) {
    let (container, resource) = (r.at("containerName"), r.at("resource"));
    if volume && container.is_zero() {
        e.required(&container, "");
    } else if resource.is_zero() {
        e.required(&resource, "");
    } else {
        let name = resource.str();
        let huge = name.starts_with("limits.hugepages-") || name.starts_with("requests.hugepages-");
        if !huge && !CONTAINER_RESOURCES.contains(&name) {
            return e.not_supported(&resource, &CONTAINER_RESOURCES);
        }
        let divisor = r.at("divisor").str();
        let allowed: &[&str] = if name.ends_with("cpu") {
            &["0", "1", "1m"]
        } else {
            &["0", "1", "1E", "1Ei", "1G", "1Gi", "1k", "1Ki", "1M", "1Mi", "1P", "1Pi", "1T", "1Ti"]
        };
        if !allowed.contains(&divisor) && !divisor.is_empty() {
            let what = if name.ends_with("cpu") {
                "only divisor's values 1m and 1 are supported with the cpu resource"
            } else {
                "only divisor's values 1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei are supported with the memory resource"
            };
            e.invalid(&r.at("divisor"), what);
        }
    }
}

fn env_from(f: &At<'_>, e: &mut Errs) {
    let prefix = f.at("prefix");
    if !prefix.is_zero() {
        e.check(&prefix, names::env_var_name);
    }
    let mut n = 0;
    for s in ["configMapRef", "secretRef"] {
        if f.has(s) {
            n += 1;
            if f.at(s).at("name").is_zero() {
                e.required(&f.at(s).at("name"), "");
            }
        }
    }
    match n {
        0 => e.invalid_value(f, "", "must specify one of: `configMapRef` or `secretRef`"),
        1 => {}
        _ => e.invalid_value(f, "", "may not have more than one field specified at a time"),
    }
}

fn local_path(at: &At<'_>, e: &mut Errs) {
    if at.str().starts_with('/') {
        e.invalid(at, "must be a relative path");
    }
    if at.str().split('/').any(|p| p == "..") {
        e.invalid(at, "must not contain '..'");
    }
}

fn mounts(c: &At<'_>, volumes: &Volumes<'_>, e: &mut Errs) {
    let mut paths: Vec<&str> = Vec::new();
    let privileged = c.at("securityContext").at("privileged").bool();
    for m in c.at("volumeMounts").items() {
        let (name, path) = (m.at("name"), m.at("mountPath"));
        if name.is_zero() {
            e.required(&name, "");
        }
        if !volumes.names.contains(&name.str()) {
            e.not_found(&name);
        }
        if path.is_zero() {
            e.required(&path, "");
        }
        if paths.contains(&path.str()) {
            e.invalid(&path, "must be unique");
        }
        paths.push(path.str());
        if list(c.v, "volumeDevices").iter().any(|d| text(d, "name") == name.str()) {
            e.invalid(&name, "must not already exist in volumeDevices");
        }
        let (sub, expr) = (m.at("subPath"), m.at("subPathExpr"));
        if !sub.is_zero() {
            local_path(&sub, e);
        }
        if !expr.is_zero() {
            if !sub.is_zero() {
                e.invalid(&expr, "subPathExpr and subPath are mutually exclusive");
            }
            local_path(&expr, e);
        }
        let propagation = m.at("mountPropagation");
        if propagation.is_set() {
            e.one_of(&propagation, &["Bidirectional", "HostToContainer", "None"]);
            if propagation.str() == "Bidirectional" && !privileged {
                e.forbidden(&propagation, "Bidirectional mount propagation is available only to privileged containers");
            }
        }
        let recursive = m.at("recursiveReadOnly");
        if recursive.is_set() && recursive.str() != "Disabled" {
            e.one_of(&recursive, &["Disabled", "Enabled", "IfPossible"]);
            if !m.at("readOnly").bool() {
                e.forbidden(&recursive, "may only be specified when readOnly is true");
            }
        }
    }
}

fn http_get(h: &At<'_>, e: &mut Errs) {
    if h.at("path").is_zero() {
        e.required(&h.at("path"), "");
    }
    port(&h.at("port"), e);
    e.one_of(&h.at("scheme"), &["HTTP", "HTTPS"]);
    for x in h.at("httpHeaders").items() {
        let name = x.at("name");
        let ok = !name.is_zero() && name.str().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !ok {
            e.invalid(
                &h.at("httpHeaders").with(name.v),
                names::regex_error(
                    "a valid HTTP header must consist of alphanumeric characters or '-'",
                    "[-A-Za-z0-9]+",
                    &["X-Header-Name"],
                ),
            );
        }
    }
}

fn port(p: &At<'_>, e: &mut Errs) {
    match p.v {
        Value::String(_) => e.check(p, names::port_name),
        _ => e.reasons(p, names::port_number(p.int())),
    }
}

fn handler(h: &At<'_>, kinds: &[&'static str], grace: Option<i64>, e: &mut Errs) {
    let mut n = 0;
    for k in kinds {
        let a = h.at(k);
        if !a.is_set() {
            continue;
        }
        n += 1;
        if n > 1 {
            e.forbidden(&a, "may not specify more than 1 handler type");
            continue;
        }
        match *k {
            "exec" if a.at("command").is_empty() => e.required(&a.at("command"), ""),
            "httpGet" => http_get(&a, e),
            "tcpSocket" => port(&a.at("port"), e),
            "grpc" => e.reasons(&a.at("port"), names::port_number(a.at("port").int())),
            "sleep" => {
                let s = a.at("seconds").int();
                let max = grace.unwrap_or(30);
                if s < 0 || s > max {
                    e.invalid_value(
                        h,
                        s,
                        format!("must be non-negative and less than terminationGracePeriodSeconds ({max})"),
                    );
                }
            }
            _ => {}
        }
    }
    if n == 0 {
        e.required(h, "must specify a handler type");
    }
}

fn lifecycle(l: &At<'_>, grace: Option<i64>, e: &mut Errs) {
    for f in ["postStart", "preStop"] {
        if l.at(f).is_set() {
            handler(&l.at(f), &["exec", "httpGet", "tcpSocket", "sleep"], grace, e);
        }
    }
}

fn probes(c: &At<'_>, grace: Option<i64>, e: &mut Errs) {
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let p = c.at(kind);
        if !p.is_set() {
            continue;
        }
        handler(&p, &["exec", "httpGet", "tcpSocket", "grpc"], grace, e);
        for f in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
            e.not_negative(&p.at(f));
        }
        let own = p.at("terminationGracePeriodSeconds");
        if own.is_set() && own.int() <= 0 {
            e.invalid(&own, "must be greater than 0");
        }
        if kind == "readinessProbe" {
            if own.is_set() {
                e.invalid(&own, "must not be set for readinessProbes");
            }
        } else if p.at("successThreshold").int() != 1 {
            e.invalid(&p.at("successThreshold"), "must be 1");
        }
    }
}

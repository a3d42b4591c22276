//! Cells of the core group.

use serde_json::{Value, json};

use super::cells::{NONE, UNKNOWN, UNSET, View, human, list, or, since};
use crate::kinds::Kind;
use crate::object::text;

/// Most characters of a message that a cell shows endpoints of.
const ENDPOINTS_SHOWN: usize = 3;

/// The cells of a core object; `None` for other kinds.
pub(super) fn cells(kind: &Kind, v: &View<'_>) -> Option<Vec<Value>> {
    if kind.group == "events.k8s.io" {
        return Some(event(v));
    }
    if !kind.group.is_empty() {
        return None;
    }
    Some(match kind.resource.as_str() {
        "componentstatuses" => {
            let healthy = v.condition("Healthy").unwrap_or_default();
            let status = match healthy {
                "True" => "Healthy",
                "False" => "Unhealthy",
                _ => "Unknown",
            };
            let field =
                |member: &str| v.list("/conditions").first().map(|c| text(c, member)).unwrap_or_default().to_owned();
            vec![v.name(), status.into(), field("/message").into(), field("/error").into()]
        }
        "configmaps" => vec![v.name(), (v.count("/data") + v.count("/binaryData")).to_string().into(), v.age()],
        "endpoints" => vec![v.name(), endpoints(v), v.age()],
        "events" => event(v),
        "limitranges" => vec![v.name(), v.created()],
        "namespaces" => vec![v.name(), v.text("/status/phase").into(), v.age()],
        "nodes" => node(v),
        "persistentvolumeclaims" => {
            let phase =
                if v.text("/metadata/deletionTimestamp").is_empty() { v.text("/status/phase") } else { "Terminating" };
            let bound = !v.text("/spec/volumeName").is_empty();
            let (modes, capacity) = if bound {
                (access_modes(v.list("/status/accessModes")), v.text("/status/capacity/storage"))
            } else {
                (String::new(), "")
            };
            vec![
                v.name(),
                phase.into(),
                v.text("/spec/volumeName").into(),
                capacity.into(),
                modes.into(),
                v.text("/spec/storageClassName").into(),
                or(v.text("/spec/volumeAttributesClassName"), UNSET),
                v.age(),
                or(v.text("/spec/volumeMode"), UNSET),
            ]
        }
        "persistentvolumes" => {
            let phase =
                if v.text("/metadata/deletionTimestamp").is_empty() { v.text("/status/phase") } else { "Terminating" };
            let claim = match v.object.pointer("/spec/claimRef") {
                Some(claim) if claim.is_object() => format!("{}/{}", text(claim, "/namespace"), text(claim, "/name")),
                _ => String::new(),
            };
            vec![
                v.name(),
                v.text("/spec/capacity/storage").into(),
                access_modes(v.list("/spec/accessModes")).into(),
                v.text("/spec/persistentVolumeReclaimPolicy").into(),
                phase.into(),
                claim.into(),
                v.text("/spec/storageClassName").into(),
                or(v.text("/spec/volumeAttributesClassName"), UNSET),
                v.text("/status/reason").into(),
                v.age(),
                or(v.text("/spec/volumeMode"), UNSET),
            ]
        }
        "pods" => pod(v),
        "podtemplates" => vec![
            v.name(),
            v.containers("/template/spec", "name"),
            v.containers("/template/spec", "image"),
            v.labels("/template/metadata/labels"),
        ],
        "replicationcontrollers" => vec![
            v.name(),
            v.int("/spec/replicas").into(),
            v.int("/status/replicas").into(),
            v.int("/status/readyReplicas").into(),
            v.age(),
            v.containers("/spec/template/spec", "name"),
            v.containers("/spec/template/spec", "image"),
            v.labels("/spec/selector"),
        ],
        "resourcequotas" => quota(v),
        "secrets" => vec![v.name(), v.text("/type").into(), v.count("/data").to_string().into(), v.age()],
        "serviceaccounts" => vec![v.name(), v.age()],
        "services" => service(v),
        _ => return None,
    })
}

fn access_modes(modes: &[Value]) -> String {
    let short = |mode: &Value| match mode.as_str().unwrap_or_default() {
        "ReadWriteOnce" => "RWO",
        "ReadOnlyMany" => "ROX",
        "ReadWriteMany" => "RWX",
        "ReadWriteOncePod" => "RWOP",
        _ => "",
    };
    let has: Vec<&str> = modes.iter().map(short).collect();
    ["RWO", "ROX", "RWX", "RWOP"].into_iter().filter(|mode| has.contains(mode)).collect::<Vec<_>>().join(",")
}

fn endpoints(v: &View<'_>) -> Value {
    let mut shown = Vec::new();
    let mut all = 0;
    for subset in v.list("/subsets") {
        let addresses = list(subset, "/addresses");
        let ports = list(subset, "/ports");
        for address in addresses {
            let ip = text(address, "/ip");
            let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            if ports.is_empty() {
                all += 1;
                shown.push(ip.to_owned());
            }
            for port in ports {
                all += 1;
                shown.push(format!("{host}:{}", port["port"].as_i64().unwrap_or(0)));
            }
        }
    }
    shown.truncate(ENDPOINTS_SHOWN);
    let mut line = shown.join(",");
    if all > ENDPOINTS_SHOWN {
        line.push_str(&format!(" + {} more...", all - ENDPOINTS_SHOWN));
    }
    or(&line, NONE)
}

fn event(v: &View<'_>) -> Vec<Value> {
    let first_of =
        |pointers: &[&str]| pointers.iter().map(|p| v.text(p)).find(|t| !t.is_empty()).unwrap_or_default().to_owned();
    let first = first_of(&["/firstTimestamp", "/deprecatedFirstTimestamp", "/eventTime"]);
    let last = first_of(&["/series/lastObservedTime", "/lastTimestamp", "/deprecatedLastTimestamp", "/eventTime"]);
    let count =
        [v.int("/series/count"), v.int("/count"), v.int("/deprecatedCount")].into_iter().find(|&n| n > 0).unwrap_or(1);
    let object = if v.object.get("regarding").is_some() { "/regarding" } else { "/involvedObject" };
    let kind = v.text(&format!("{object}/kind")).to_lowercase();
    let name = v.text(&format!("{object}/name"));
    let target = if name.is_empty() { kind } else { format!("{kind}/{name}") };
    let component =
        first_of(&["/source/component", "/deprecatedSource/component", "/reportingComponent", "/reportingController"]);
    let host = first_of(&["/source/host", "/deprecatedSource/host", "/reportingInstance"]);
    let source = if host.is_empty() { component } else { format!("{component}, {host}") };
    let message = first_of(&["/message", "/note"]);
    vec![
        since(&last, v.now).into(),
        v.text("/type").into(),
        v.text("/reason").into(),
        target.into(),
        v.text(&format!("{object}/fieldPath")).into(),
        source.into(),
        message.trim().into(),
        since(&first, v.now).into(),
        json!(count.to_string()),
        v.name(),
    ]
}

fn node(v: &View<'_>) -> Vec<Value> {
    let mut status: Vec<&str> = Vec::new();
    match v.condition("Ready") {
        Some("True") => status.push("Ready"),
        Some(_) => status.push("NotReady"),
        None => status.push("Unknown"),
    }
    if v.object.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true) {
        status.push("SchedulingDisabled");
    }
    let labels = v.object.pointer("/metadata/labels").and_then(Value::as_object);
    let mut roles: Vec<&str> = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => Some(role),
            _ if key == "kubernetes.io/role" => value.as_str().filter(|role| !role.is_empty()),
            _ => None,
        })
        .collect();
    roles.sort_unstable();
    roles.dedup();
    let address = |kind: &str| {
        let found = v.list("/status/addresses").iter().find(|a| text(a, "/type") == kind);
        or(found.map(|a| text(a, "/address")).unwrap_or_default(), NONE)
    };
    let info = |member: &str| or(v.text(&format!("/status/nodeInfo/{member}")), UNKNOWN);
    vec![
        v.name(),
        status.join(",").into(),
        or(&roles.join(","), NONE),
        v.age(),
        v.text("/status/nodeInfo/kubeletVersion").into(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn quota(v: &View<'_>) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    let hard = v.object.pointer("/status/hard").or_else(|| v.object.pointer("/spec/hard")).and_then(Value::as_object);
    for (name, value) in hard.into_iter().flatten() {
        let used =
            v.object.pointer("/status/used").and_then(|used| used.get(name)).and_then(Value::as_str).unwrap_or("0");
        let line = format!("{name}: {used}/{}", value.as_str().unwrap_or_default());
        if name.starts_with("limits") { limits.push(line) } else { requests.push(line) }
    }
    vec![v.name(), requests.join(", ").into(), limits.join(", ").into(), v.age()]
}

fn service(v: &View<'_>) -> Vec<Value> {
    let kind = v.text("/spec/type");
    let external: Vec<&str> = v.list("/spec/externalIPs").iter().filter_map(Value::as_str).collect();
    let external = match kind {
        "ExternalName" => v.text("/spec/externalName").to_owned(),
        "LoadBalancer" => {
            let ingress: Vec<&str> = v
                .list("/status/loadBalancer/ingress")
                .iter()
                .map(|i| if text(i, "/ip").is_empty() { text(i, "/hostname") } else { text(i, "/ip") })
                .collect();
            match (ingress.is_empty(), external.is_empty()) {
                (true, true) => "<pending>".into(),
                (true, false) => external.join(","),
                (false, true) => ingress.join(","),
                (false, false) => format!("{},{}", ingress.join(","), external.join(",")),
            }
        }
        _ if external.is_empty() => NONE.into(),
        _ => external.join(","),
    };
    let ports: Vec<String> = v
        .list("/spec/ports")
        .iter()
        .map(|port| {
            let (number, node) = (port["port"].as_i64().unwrap_or(0), port["nodePort"].as_i64().unwrap_or(0));
            let protocol = text(port, "/protocol");
            if node > 0 { format!("{number}:{node}/{protocol}") } else { format!("{number}/{protocol}") }
        })
        .collect();
    let addresses: Vec<&str> = v.list("/spec/clusterIPs").iter().filter_map(Value::as_str).collect();
    let address = addresses.first().copied().unwrap_or_else(|| v.text("/spec/clusterIP"));
    vec![
        v.name(),
        kind.into(),
        or(address, NONE),
        external.into(),
        or(&ports.join(","), NONE),
        v.age(),
        v.labels("/spec/selector"),
    ]
}

/// Time of the newest restart of some containers.
fn newest_restart<'a>(statuses: impl Iterator<Item = &'a Value>) -> &'a str {
    statuses.map(|s| text(s, "/lastState/terminated/finishedAt")).max().unwrap_or_default()
}

fn pod(v: &View<'_>) -> Vec<Value> {
    let containers = v.list("/spec/containers").len();
    let inits = v.list("/spec/initContainers");
    let restartable =
        |name: &str| inits.iter().any(|c| text(c, "/name") == name && text(c, "/restartPolicy") == "Always");
    let total = containers + inits.iter().filter(|c| text(c, "/restartPolicy") == "Always").count();
    let mut ready = 0;
    let mut restarts = 0;
    let mut sidecar_restarts = 0;
    let mut newest = "";
    let mut newest_sidecar = "";
    let mut reason = match v.text("/status/reason") {
        "" => v.text("/status/phase").to_owned(),
        reason => reason.to_owned(),
    };
    let gated = v
        .list("/status/conditions")
        .iter()
        .any(|c| text(c, "/type") == "PodScheduled" && text(c, "/reason") == "SchedulingGated");
    if gated {
        reason = "SchedulingGated".into();
    }
    let mut initializing = false;
    for (at, status) in v.list("/status/initContainerStatuses").iter().enumerate() {
        restarts += status["restartCount"].as_i64().unwrap_or(0);
        let finished = text(status, "/lastState/terminated/finishedAt");
        newest = newest.max(finished);
        let sidecar = restartable(text(status, "/name"));
        if sidecar {
            sidecar_restarts += status["restartCount"].as_i64().unwrap_or(0);
            newest_sidecar = newest_sidecar.max(finished);
        }
        let terminated = status.pointer("/state/terminated").filter(|t| t.is_object());
        let exit = terminated.and_then(|t| t["exitCode"].as_i64());
        if exit == Some(0) {
            continue;
        }
        if sidecar && status["started"].as_bool() == Some(true) {
            if status["ready"].as_bool() == Some(true) {
                ready += 1;
            }
            continue;
        }
        reason = match (terminated, text(status, "/state/waiting/reason")) {
            (Some(t), _) => format!("Init:{}", termination(t)),
            (None, waiting) if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            _ => format!("Init:{at}/{}", inits.len()),
        };
        initializing = true;
        break;
    }
    if !initializing || v.condition("Initialized") == Some("True") {
        restarts = sidecar_restarts;
        newest = newest_sidecar;
        let mut running = false;
        for status in v.list("/status/containerStatuses").iter().rev() {
            restarts += status["restartCount"].as_i64().unwrap_or(0);
            newest = newest.max(newest_restart(std::iter::once(status)));
            let waiting = text(status, "/state/waiting/reason");
            if !waiting.is_empty() {
                reason = waiting.to_owned();
            } else if let Some(terminated) = status.pointer("/state/terminated").filter(|t| t.is_object()) {
                reason = termination(terminated);
            } else if status["ready"].as_bool() == Some(true) && status.pointer("/state/running").is_some() {
                running = true;
                ready += 1;
            }
        }
        if reason == "Completed" && running {
            reason = if v.condition("Ready") == Some("True") { "Running".into() } else { "NotReady".into() };
        }
    }
    if !v.text("/metadata/deletionTimestamp").is_empty() {
        if v.text("/status/reason") == "NodeLost" {
            reason = "Unknown".into();
        } else if !matches!(v.text("/status/phase"), "Succeeded" | "Failed") {
            reason = "Terminating".into();
        }
    }
    let restarts = match newest.parse::<jiff::Timestamp>() {
        Ok(then) if restarts > 0 => format!("{restarts} ({} ago)", human(v.now.as_second() - then.as_second())),
        _ => restarts.to_string(),
    };
    let gates = v.list("/spec/readinessGates");
    let gates = if gates.is_empty() {
        NONE.to_owned()
    } else {
        let open = gates.iter().filter(|gate| v.condition(text(gate, "/conditionType")) == Some("True")).count();
        format!("{open}/{}", gates.len())
    };
    let ip = v.list("/status/podIPs").first().map(|ip| text(ip, "/ip")).unwrap_or_else(|| v.text("/status/podIP"));
    vec![
        v.name(),
        format!("{ready}/{total}").into(),
        reason.into(),
        restarts.into(),
        v.age(),
        or(ip, NONE),
        v.or_none("/spec/nodeName"),
        v.or_none("/status/nominatedNodeName"),
        gates.into(),
    ]
}

/// Why a container ended.
fn termination(state: &Value) -> String {
    let (reason, signal) = (text(state, "/reason"), state["signal"].as_i64().unwrap_or(0));
    match (reason, signal) {
        ("", 0) => format!("ExitCode:{}", state["exitCode"].as_i64().unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

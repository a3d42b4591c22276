//! Cells of networking, storage, RBAC and the rest.

use serde_json::Value;

use super::cells::{NONE, UNSET, View, human, list, or};
use crate::kinds::Kind;
use crate::object::text;

/// Most ports and endpoints that a cell lists.
const SHOWN: usize = 3;

fn object_usage<'a>(v: &View<'a>, member: &str) -> &'a str {
    v.object.pointer("/usage").and_then(|usage| usage[member].as_str()).unwrap_or_default()
}

/// What containers use together, in the unit that each of them has.
fn total(containers: &[Value], member: &str) -> String {
    let unit = if member == "cpu" { "n" } else { "Ki" };
    let amounts = containers.iter().map(|c| c["usage"][member].as_str().unwrap_or_default().trim_end_matches(unit));
    format!("{}{unit}", amounts.filter_map(|amount| amount.parse::<u64>().ok()).sum::<u64>())
}

/// The cells of an object of these groups; `None` for other kinds.
pub(super) fn cells(kind: &Kind, v: &View<'_>) -> Option<Vec<Value>> {
    let flag = |pointer: &str, unset: bool| -> Value {
        v.object.pointer(pointer).and_then(Value::as_bool).unwrap_or(unset).into()
    };
    Some(match (kind.group.as_str(), kind.resource.as_str()) {
        (crate::usage::GROUP, _) => {
            let containers = v.list("/containers");
            let sum = |member: &str| match object_usage(v, member) {
                "" => total(containers, member),
                text => text.to_owned(),
            };
            vec![v.name(), sum("cpu").into(), sum("memory").into(), v.text("/window").into()]
        }
        ("apiregistration.k8s.io", _) => {
            let service = match v.text("/spec/service/name") {
                "" => "Local".to_owned(),
                name => format!("{}/{name}", v.text("/spec/service/namespace")),
            };
            let available = v.list("/status/conditions").iter().find(|c| text(c, "/type") == "Available");
            let available = match available {
                Some(c) if text(c, "/status") == "True" => "True".to_owned(),
                Some(c) => format!("{} ({})", text(c, "/status"), text(c, "/reason")),
                None => "Unknown".to_owned(),
            };
            vec![v.name(), service.into(), available.into(), v.age()]
        }
        ("certificates.k8s.io", _) => {
            let seconds = v.object.pointer("/spec/expirationSeconds").and_then(Value::as_i64);
            vec![
                v.name(),
                v.age(),
                or(v.text("/spec/signerName"), NONE),
                v.text("/spec/username").into(),
                or(&seconds.map(human).unwrap_or_default(), NONE),
                csr_status(v).into(),
            ]
        }
        ("networking.k8s.io", "ingressclasses") => {
            let parameters = match v.text("/spec/parameters/kind") {
                "" => NONE.to_owned(),
                kind => {
                    let group = v.text("/spec/parameters/apiGroup");
                    let kind = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
                    format!("{kind}/{}", v.text("/spec/parameters/name"))
                }
            };
            vec![v.name(), v.text("/spec/controller").into(), parameters.into(), v.age()]
        }
        ("networking.k8s.io", "ingresses") => {
            let hosts: Vec<&str> =
                v.list("/spec/rules").iter().map(|r| text(r, "/host")).filter(|h| !h.is_empty()).collect();
            let addresses: Vec<&str> = v
                .list("/status/loadBalancer/ingress")
                .iter()
                .map(|i| if text(i, "/ip").is_empty() { text(i, "/hostname") } else { text(i, "/ip") })
                .collect();
            let more = if hosts.len() > SHOWN { format!(" + {} more...", hosts.len() - SHOWN) } else { String::new() };
            let hosts = format!("{}{more}", hosts.iter().take(SHOWN).copied().collect::<Vec<_>>().join(","));
            vec![
                v.name(),
                or(v.text("/spec/ingressClassName"), NONE),
                or(&hosts, "*"),
                addresses.join(",").into(),
                if v.list("/spec/tls").is_empty() { "80".into() } else { "80, 443".into() },
                v.age(),
            ]
        }
        ("networking.k8s.io", "ipaddresses") => {
            let parent = |member: &str| v.text(&format!("/spec/parentRef/{member}"));
            let path = [parent("resource"), parent("namespace"), parent("name")]
                .into_iter()
                .filter(|p| !p.is_empty())
                .collect::<Vec<_>>()
                .join("/");
            let path = match parent("group") {
                "" => path,
                group => format!("{}.{group}", path),
            };
            vec![v.name(), or(&path, NONE)]
        }
        ("networking.k8s.io", "networkpolicies") => vec![v.name(), v.selector("/spec/podSelector"), v.age()],
        ("networking.k8s.io", "servicecidrs") => {
            let cidrs: Vec<&str> = v.list("/spec/cidrs").iter().filter_map(Value::as_str).collect();
            vec![v.name(), cidrs.join(",").into(), v.age()]
        }
        ("rbac.authorization.k8s.io", "clusterrolebindings" | "rolebindings") => {
            let subjects = |kind: &str| {
                let names: Vec<String> = v
                    .list("/subjects")
                    .iter()
                    .filter(|s| text(s, "/kind") == kind)
                    .map(|s| match text(s, "/namespace") {
                        "" => text(s, "/name").to_owned(),
                        namespace => format!("{namespace}/{}", text(s, "/name")),
                    })
                    .collect();
                Value::from(names.join(", "))
            };
            let role = format!("{}/{}", v.text("/roleRef/kind"), v.text("/roleRef/name"));
            vec![v.name(), role.into(), v.age(), subjects("User"), subjects("Group"), subjects("ServiceAccount")]
        }
        ("rbac.authorization.k8s.io", _) => vec![v.name(), v.created()],
        ("storage.k8s.io", "csidrivers") => {
            let tokens: Vec<&str> = v
                .list("/spec/tokenRequests")
                .iter()
                .map(|t| text(t, "/audience"))
                .map(|audience| if audience.is_empty() { "<empty>" } else { audience })
                .collect();
            let modes: Vec<&str> = v.list("/spec/volumeLifecycleModes").iter().filter_map(Value::as_str).collect();
            vec![
                v.name(),
                flag("/spec/attachRequired", true),
                flag("/spec/podInfoOnMount", false),
                flag("/spec/storageCapacity", false),
                or(&tokens.join(","), UNSET),
                flag("/spec/requiresRepublish", false),
                or(&modes.join(","), NONE),
                v.age(),
            ]
        }
        ("storage.k8s.io", "csinodes") => vec![v.name(), v.count("/spec/drivers").into(), v.age()],
        ("storage.k8s.io", "csistoragecapacities") => vec![v.name(), v.created()],
        ("storage.k8s.io", "storageclasses") => {
            let default =
                ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
                    .iter()
                    .any(|key| {
                        v.object.pointer("/metadata/annotations").and_then(|a| a.get(*key)).and_then(Value::as_str)
                            == Some("true")
                    });
            let name = text(v.object, "/metadata/name");
            vec![
                if default { format!("{name} (default)").into() } else { name.into() },
                v.text("/provisioner").into(),
                or(v.text("/reclaimPolicy"), "Delete"),
                or(v.text("/volumeBindingMode"), "Immediate"),
                flag("/allowVolumeExpansion", false),
                v.age(),
            ]
        }
        ("storage.k8s.io", "volumeattachments") => vec![
            v.name(),
            v.text("/spec/attacher").into(),
            v.text("/spec/source/persistentVolumeName").into(),
            v.text("/spec/nodeName").into(),
            flag("/status/attached", false),
            v.age(),
        ],
        ("storage.k8s.io", "volumeattributesclasses") => {
            let default = v
                .object
                .pointer("/metadata/annotations")
                .and_then(|a| a.get("storageclass.kubernetes.io/is-default-class"))
                .and_then(Value::as_str);
            let name = text(v.object, "/metadata/name");
            vec![
                if default == Some("true") { format!("{name} (default)").into() } else { name.into() },
                v.text("/driverName").into(),
                v.age(),
            ]
        }
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations" | "validatingwebhookconfigurations") => {
            vec![v.name(), v.count("/webhooks").into(), v.age()]
        }
        ("admissionregistration.k8s.io", "mutatingadmissionpolicies" | "validatingadmissionpolicies") => {
            let list = if kind.resource.starts_with('m') { "/spec/mutations" } else { "/spec/validations" };
            let param = match v.text("/spec/paramKind/kind") {
                "" => UNSET.to_owned(),
                kind => format!("{}/{kind}", v.text("/spec/paramKind/apiVersion")),
            };
            vec![v.name(), v.count(list).into(), param.into(), v.age()]
        }
        ("admissionregistration.k8s.io", _) => {
            let param = match (v.text("/spec/paramRef/namespace"), v.text("/spec/paramRef/name")) {
                (_, "") if v.object.pointer("/spec/paramRef/selector").is_none() => UNSET.to_owned(),
                (namespace, "") => format!("{}/*", if namespace.is_empty() { "*" } else { namespace }),
                ("", name) => format!("*/{name}"),
                (namespace, name) => format!("{namespace}/{name}"),
            };
            vec![v.name(), v.text("/spec/policyName").into(), param.into(), v.age()]
        }
        ("apiextensions.k8s.io", _) => vec![v.name(), v.created()],
        ("scheduling.k8s.io", _) => {
            vec![
                v.name(),
                v.int("/value").into(),
                flag("/globalDefault", false),
                v.age(),
                v.text("/preemptionPolicy").into(),
            ]
        }
        ("coordination.k8s.io", _) => vec![v.name(), v.text("/spec/holderIdentity").into(), v.age()],
        ("node.k8s.io", _) => vec![v.name(), v.text("/handler").into(), v.age()],
        ("discovery.k8s.io", _) => endpoint_slice(v),
        ("resource.k8s.io", "resourceclaims") => {
            let mut states = Vec::new();
            if !v.text("/metadata/deletionTimestamp").is_empty() {
                states.push("deleted");
            }
            match v.object.pointer("/status/allocation") {
                Some(allocation) if allocation.is_object() => states.push("allocated"),
                _ if states.is_empty() => states.push("pending"),
                _ => {}
            }
            if v.count("/status/reservedFor") > 0 {
                states.push("reserved");
            }
            vec![v.name(), states.join(",").into(), v.age()]
        }
        ("resource.k8s.io", "resourceslices") => {
            let all = v.object.pointer("/spec/allNodes").and_then(Value::as_bool) == Some(true);
            let node = match v.text("/spec/nodeName") {
                "" if all => "<all>".into(),
                "" => "<selector>".into(),
                node => Value::from(node),
            };
            vec![v.name(), node, v.text("/spec/driver").into(), v.text("/spec/pool/name").into(), v.age()]
        }
        ("resource.k8s.io", _) => vec![v.name(), v.age()],
        ("flowcontrol.apiserver.k8s.io", "flowschemas") => {
            let missing = v.list("/status/conditions").iter().find(|c| text(c, "/type") == "Dangling");
            vec![
                v.name(),
                or(v.text("/spec/priorityLevelConfiguration/name"), NONE),
                v.int("/spec/matchingPrecedence").to_string().into(),
                or(v.text("/spec/distinguisherMethod/type"), NONE),
                v.age(),
                missing.map(|c| text(c, "/status")).filter(|s| !s.is_empty()).unwrap_or("?").into(),
            ]
        }
        ("flowcontrol.apiserver.k8s.io", _) => {
            let number = |pointer: &str| match v.object.pointer(pointer).and_then(Value::as_i64) {
                Some(n) => n.to_string().into(),
                None => Value::from(NONE),
            };
            let queuing = "/spec/limited/limitResponse/queuing";
            let shares = if v.text("/spec/type") == "Exempt" {
                "/spec/exempt/nominalConcurrencyShares"
            } else {
                "/spec/limited/nominalConcurrencyShares"
            };
            vec![
                v.name(),
                v.text("/spec/type").into(),
                number(shares),
                number(&format!("{queuing}/queues")),
                number(&format!("{queuing}/handSize")),
                number(&format!("{queuing}/queueLengthLimit")),
                v.age(),
            ]
        }
        _ => return None,
    })
}

fn csr_status(v: &View<'_>) -> String {
    let has = |name: &str| v.list("/status/conditions").iter().any(|c| text(c, "/type") == name);
    let mut status = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if has("Failed") {
        status.push_str(",Failed");
    }
    if !v.text("/status/certificate").is_empty() {
        status.push_str(",Issued");
    }
    status
}

fn endpoint_slice(v: &View<'_>) -> Vec<Value> {
    let shorten = |all: Vec<String>, unset: &str| -> Value {
        if all.is_empty() {
            return unset.into();
        }
        let more = if all.len() > SHOWN { format!(" + {} more...", all.len() - SHOWN) } else { String::new() };
        format!("{}{more}", all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(",")).into()
    };
    let ports = v
        .list("/ports")
        .iter()
        .map(|port| port["port"].as_i64().map_or_else(|| "*".to_owned(), |n| n.to_string()))
        .collect();
    let addresses = v
        .list("/endpoints")
        .iter()
        .flat_map(|endpoint| list(endpoint, "/addresses"))
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect();
    vec![v.name(), v.text("/addressType").into(), shorten(ports, UNSET), shorten(addresses, UNSET), v.age()]
}

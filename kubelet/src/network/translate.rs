//! From the API's objects to the plain values of the network's model: functions from values to values, one a kind.
//! What the API's validation lets pass but the network cannot read (an address that is none) is left out.

use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use coracle_netns::model::{
    Change, Endpoint, EndpointPort, EndpointSlice, NamedPort, NetworkPolicy, Node, ObjectKey, Operator, Peer, Pod,
    PolicyPort, PolicyRule, PortMatch, Protocol, Requirement, Selector, Service, ServicePort, TrafficPolicy,
};
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use crate::names::WIREGUARD_KEY;

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const ZONE: &str = "topology.kubernetes.io/zone";
/// `service.spec.sessionAffinityConfig.clientIP.timeoutSeconds` when absent.
const AFFINITY_SECONDS: i32 = 10_800;
/// Labels that leave a Service's addresses to another proxy, or to none.
const SERVED_ELSEWHERE: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

fn addresses<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
    texts.into_iter().filter_map(|text| text.parse().ok()).collect()
}

fn ranges<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpNet> {
    texts.into_iter().filter_map(|text| text.trim().parse().ok()).collect()
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// A Service.
pub(super) fn service(key: &ObjectKey, object: Option<&core::Service>) -> Change {
    Change::Service(key.clone(), object.and_then(|service| Some(service_spec(service.spec.as_ref()?, service))))
}

fn service_spec(spec: &core::ServiceSpec, object: &core::Service) -> Service {
    let is = |type_: &str| spec.type_.as_deref() == Some(type_);
    let local = |policy: &Option<String>| {
        if policy.as_deref() == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
    };
    let affinity = spec.session_affinity.as_deref() == Some("ClientIP");
    let timeout = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let ingress = object.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let virtual_ips =
        ingress.into_iter().flatten().filter(|ingress| ingress.ip_mode.as_deref().unwrap_or("VIP") == "VIP");
    Service {
        cluster_ips: addresses(spec.cluster_ips.iter().flatten()),
        headless: spec.cluster_ip.as_deref() == Some("None"),
        external_name: spec.external_name.clone().filter(|_| is("ExternalName")),
        ports: spec.ports.iter().flatten().filter_map(service_port).collect(),
        external_ips: addresses(spec.external_ips.iter().flatten()),
        load_balancer_ips: addresses(virtual_ips.filter_map(|ingress| ingress.ip.as_ref())),
        source_ranges: ranges(spec.load_balancer_source_ranges.iter().flatten()),
        affinity_seconds: affinity.then(|| u32::try_from(timeout.unwrap_or(AFFINITY_SECONDS)).unwrap_or_default()),
        internal_policy: local(&spec.internal_traffic_policy),
        external_policy: local(&spec.external_traffic_policy),
        health_check_node_port: spec.health_check_node_port.and_then(port),
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        served_elsewhere: SERVED_ELSEWHERE.iter().any(|label| object.labels().contains_key(*label)),
    }
}

fn service_port(source: &core::ServicePort) -> Option<ServicePort> {
    Some(ServicePort {
        name: source.name.clone().unwrap_or_default(),
        protocol: Protocol::parse(source.protocol.as_deref())?,
        port: port(source.port)?,
        node_port: source.node_port.and_then(port),
    })
}

/// An EndpointSlice of a Service; slices of names and of no Service are not for the network.
pub(super) fn slice(key: &ObjectKey, object: Option<&discovery::EndpointSlice>) -> Change {
    let ours = object.filter(|slice| slice.address_type != "FQDN");
    let translated = ours.and_then(|slice| {
        let service = slice.labels().get(SERVICE_NAME)?;
        Some(EndpointSlice {
            service: ObjectKey::new(&key.namespace, service),
            ports: slice.ports.iter().flatten().filter_map(endpoint_port).collect(),
            endpoints: slice.endpoints.iter().flatten().map(endpoint).collect(),
        })
    });
    Change::Slice(key.clone(), translated)
}

fn endpoint_port(source: &discovery::EndpointPort) -> Option<EndpointPort> {
    Some(EndpointPort {
        name: source.name.clone().unwrap_or_default(),
        protocol: Protocol::parse(source.protocol.as_deref())?,
        port: port(source.port?)?,
    })
}

fn endpoint(source: &discovery::Endpoint) -> Endpoint {
    let conditions = source.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let hints = source.hints.clone().unwrap_or_default();
    Endpoint {
        addresses: addresses(&source.addresses),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or_default(),
        hostname: source.hostname.as_deref().map(Arc::from),
        node: source.node_name.as_deref().map(Arc::from),
        zone_hints: hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect(),
        node_hints: hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect(),
    }
}

/// A pod, of any node.
pub(super) fn pod(key: &ObjectKey, object: Option<&core::Pod>) -> Change {
    Change::Pod(key.clone(), object.map(pod_spec))
}

fn pod_spec(pod: &core::Pod) -> Pod {
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.as_ref());
    let containers =
        spec.into_iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    Pod {
        uid: pod.uid().unwrap_or_default().into(),
        ips: addresses(ips.into_iter().flatten().map(|ip| &ip.ip)),
        labels: pod.labels().clone(),
        node: spec.and_then(|spec| spec.node_name.as_deref()).filter(|name| !name.is_empty()).map(Arc::from),
        host_network: spec.and_then(|spec| spec.host_network) == Some(true),
        finished: matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")),
        named_ports: containers.flat_map(|container| container.ports.iter().flatten()).filter_map(named_port).collect(),
    }
}

fn named_port(source: &core::ContainerPort) -> Option<NamedPort> {
    Some(NamedPort {
        name: source.name.clone()?,
        protocol: Protocol::parse(source.protocol.as_deref())?,
        port: port(source.container_port)?,
    })
}

/// A namespace's labels.
pub(super) fn namespace(key: &ObjectKey, object: Option<&core::Namespace>) -> Change {
    Change::Namespace(key.name.clone(), object.map(|namespace| namespace.labels().clone()))
}

/// A node's addresses and pod ranges.
pub(super) fn node(key: &ObjectKey, object: Option<&core::Node>) -> Change {
    let translated = object.map(|node| {
        let addresses_of = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let internal = addresses_of.filter(|address| address.type_ == "InternalIP").map(|address| &address.address);
        Node {
            ips: addresses(internal),
            pod_cidrs: ranges(node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten())),
            zone: node.labels().get(ZONE).map(|zone| zone.as_str().into()),
            wireguard_key: node
                .annotations()
                .get(WIREGUARD_KEY)
                .and_then(|key| BASE64.decode(key).ok()?.try_into().ok()),
        }
    });
    Change::Node(key.name.clone(), translated)
}

/// A NetworkPolicy.
pub(super) fn policy(key: &ObjectKey, object: Option<&networking::NetworkPolicy>) -> Change {
    Change::Policy(key.clone(), object.and_then(|policy| policy.spec.as_ref()).map(policy_spec))
}

fn policy_spec(spec: &networking::NetworkPolicySpec) -> NetworkPolicy {
    // The API's defaulting fills policyTypes in: Ingress always, Egress where there are egress rules.
    let types = spec.policy_types.as_deref().unwrap_or_default();
    let has = |type_: &str| types.iter().any(|listed| listed == type_);
    let ingress = |rule: &networking::NetworkPolicyIngressRule| rule_of(rule.from.as_deref(), rule.ports.as_deref());
    let egress = |rule: &networking::NetworkPolicyEgressRule| rule_of(rule.to.as_deref(), rule.ports.as_deref());
    NetworkPolicy {
        pods: spec.pod_selector.as_ref().map(selector).unwrap_or_default(),
        ingress: has("Ingress").then(|| spec.ingress.iter().flatten().map(ingress).collect()),
        egress: has("Egress").then(|| spec.egress.iter().flatten().map(egress).collect()),
    }
}

fn rule_of(
    peers: Option<&[networking::NetworkPolicyPeer]>,
    ports: Option<&[networking::NetworkPolicyPort]>,
) -> PolicyRule {
    PolicyRule {
        peers: peers.unwrap_or_default().iter().filter_map(peer).collect(),
        ports: ports.unwrap_or_default().iter().filter_map(policy_port).collect(),
    }
}

fn peer(source: &networking::NetworkPolicyPeer) -> Option<Peer> {
    if let Some(block) = &source.ip_block {
        return Some(Peer::Block { cidr: block.cidr.parse().ok()?, except: ranges(block.except.iter().flatten()) });
    }
    Some(Peer::Pods {
        namespaces: source.namespace_selector.as_ref().map(selector),
        pods: source.pod_selector.as_ref().map(selector).unwrap_or_default(),
    })
}

fn policy_port(source: &networking::NetworkPolicyPort) -> Option<PolicyPort> {
    let matched = match &source.port {
        None => PortMatch::All,
        Some(IntOrString::String(name)) => PortMatch::Named(name.clone()),
        Some(IntOrString::Int(first)) => {
            let first = port(*first)?;
            PortMatch::Range(first, source.end_port.and_then(port).unwrap_or(first))
        }
    };
    Some(PolicyPort { protocol: Protocol::parse(source.protocol.as_deref())?, port: matched })
}

/// A label selector. One with an operator that does not exist selects nothing, as the API's own parser has it.
fn selector(source: &LabelSelector) -> Selector {
    let expressions = source.match_expressions.iter().flatten().map(|requirement| Requirement {
        key: requirement.key.clone(),
        operator: match requirement.operator.as_str() {
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            // An unknown operator has no values that could be listed.
            _ => Operator::In,
        },
        values: requirement.values.clone().unwrap_or_default(),
    });
    Selector { match_labels: source.match_labels.clone().unwrap_or_default(), expressions: expressions.collect() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_service_keeps_what_the_data_path_needs() {
        let object: core::Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "n"},
            "spec": {
                "clusterIP": "10.43.0.5", "clusterIPs": ["10.43.0.5"], "type": "NodePort", "sessionAffinity": "ClientIP",
                "externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}],
            },
        }))
        .expect("a Service");
        let Change::Service(_, Some(service)) = service(&ObjectKey::new("n", "web"), Some(&object)) else {
            panic!("no service")
        };
        assert_eq!(service.cluster_ips, ["10.43.0.5".parse::<IpAddr>().expect("an address")]);
        assert_eq!(service.ports[0].node_port, Some(30080));
        assert_eq!((service.affinity_seconds, service.external_policy), (Some(10_800), TrafficPolicy::Local));
        let headless: core::Service =
            serde_json::from_value(json!({"metadata": {}, "spec": {"clusterIP": "None", "clusterIPs": ["None"]}}))
                .expect("a Service");
        let Change::Service(_, Some(headless)) = super::service(&ObjectKey::new("n", "web"), Some(&headless)) else {
            panic!("no service")
        };
        assert!(headless.headless && headless.cluster_ips.is_empty() && !headless.served_elsewhere);
        let elsewhere: core::Service = serde_json::from_value(
            json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}, "spec": {"clusterIP": "10.43.0.6"}}),
        )
        .expect("a Service");
        let Change::Service(_, Some(elsewhere)) = super::service(&ObjectKey::new("n", "web"), Some(&elsewhere)) else {
            panic!("DNS has to know it")
        };
        assert!(elsewhere.served_elsewhere);
    }

    #[test]
    fn policies_without_egress_leave_egress_open() {
        let object: networking::NetworkPolicy = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {
                "podSelector": {}, "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"a": "b"}}}], "ports": [{"port": 80, "endPort": 90}, {"port": "dns", "protocol": "UDP"}]}],
            },
        }))
        .expect("a policy");
        let Change::Policy(_, Some(policy)) = policy(&ObjectKey::new("n", "p"), Some(&object)) else {
            panic!("no policy")
        };
        assert_eq!(policy.egress, None);
        let rule = &policy.ingress.expect("ingress rules")[0];
        assert_eq!(rule.ports[0].port, PortMatch::Range(80, 90));
        assert_eq!(rule.ports[1], PolicyPort { protocol: Protocol::Udp, port: PortMatch::Named("dns".into()) });
        assert!(matches!(&rule.peers[0], Peer::Pods { namespaces: None, .. }));
    }
}

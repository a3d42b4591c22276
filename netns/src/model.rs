//! What the network knows of the cluster: plain values that the node agent translates the API's objects into, one [`Change`] per object.
//!
//! Services, their rules, DNS and policy all read the same model; `k8s.io/api` types stay outside of this crate.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ObjectKey {
    /// The key of `namespace/name`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One object appeared, changed (`Some`) or vanished (`None`).
#[derive(Clone, Debug)]
pub enum Change {
    Service(ObjectKey, Option<Service>),
    /// An EndpointSlice by its own key; the Service it belongs to is inside.
    Slice(ObjectKey, Option<EndpointSlice>),
    /// A pod of any node: read by policy (addresses, labels) and DNS. Send it as soon as labels are known; addresses may follow.
    Pod(ObjectKey, Option<Pod>),
    /// A namespace's labels.
    Namespace(Arc<str>, Option<Labels>),
    Policy(ObjectKey, Option<NetworkPolicy>),
    /// A node: its addresses and pod ranges; routes to other nodes follow from it.
    Node(Arc<str>, Option<Node>),
}

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// A transport protocol of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The protocol of the API's word (`TCP`, `UDP`, `SCTP`); an absent word means TCP.
    pub fn parse(word: Option<&str>) -> Option<Self> {
        match word {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The label in DNS SRV names.
    pub fn dns_label(self) -> &'static str {
        match self {
            Self::Tcp => "_tcp",
            Self::Udp => "_udp",
            Self::Sctp => "_sctp",
        }
    }
}

/// `spec` of a Service, and of its `status` what the data path needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// `spec.clusterIPs` without `None`; empty for headless and ExternalName.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.clusterIP: None`.
    pub headless: bool,
    /// `spec.externalName` of type ExternalName.
    pub external_name: Option<String>,
    pub ports: Vec<ServicePort>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode` absent or `VIP`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; empty: everyone.
    pub source_ranges: Vec<IpNet>,
    /// `spec.sessionAffinityConfig.clientIP.timeoutSeconds` of affinity ClientIP; `None`: no affinity.
    pub affinity_seconds: Option<u32>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`, 0 or absent: none.
    pub health_check_node_port: Option<u16>,
    /// `spec.publishNotReadyAddresses`: DNS answers with endpoints that are not ready.
    pub publish_not_ready: bool,
    /// Its labels leave its addresses to another proxy, or to none: only DNS knows it here.
    pub served_elsewhere: bool,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty for the only port of a Service.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    /// `nodePort`; `None`: not exposed on nodes.
    pub node_port: Option<u16>,
}

/// Whether traffic may leave the node it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The Service of the label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: ObjectKey,
    /// Shared by all endpoints of the slice.
    pub ports: Vec<EndpointPort>,
    /// `addressType` is told by the addresses; slices of type FQDN are not sent.
    pub endpoints: Vec<Endpoint>,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointPort {
    /// The Service port's name.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

/// An endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`, absent means true.
    pub ready: bool,
    /// `conditions.serving`, absent means the value of ready.
    pub serving: bool,
    /// `conditions.terminating`, absent means false.
    pub terminating: bool,
    pub hostname: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
    /// `hints.forZones`.
    pub zone_hints: Vec<Arc<str>>,
    /// `hints.forNodes`.
    pub node_hints: Vec<Arc<str>>,
}

impl Endpoint {
    /// A ready endpoint at one address.
    pub fn ready(address: IpAddr, node: Option<&str>) -> Self {
        Self {
            addresses: vec![address],
            ready: true,
            serving: true,
            terminating: false,
            hostname: None,
            node: node.map(Arc::from),
            zone_hints: Vec::new(),
            node_hints: Vec::new(),
        }
    }
}

/// A pod as policy and DNS see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// `status.podIPs`; empty until known. Of a pod on this node the network knows them first.
    pub ips: Vec<IpAddr>,
    pub labels: Labels,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// Pods on the host's network are no subject and no peer of policies.
    pub host_network: bool,
    /// Succeeded or Failed: its addresses may belong to another pod already.
    pub finished: bool,
    /// Named container ports.
    pub named_ports: Vec<NamedPort>,
}

/// A named port of a pod's containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `status.addresses` of type InternalIP.
    pub ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// The public key of its WireGuard link; `None`: it has none (yet).
    pub wireguard_key: Option<[u8; 32]>,
}

/// A NetworkPolicy (`networking.k8s.io/v1`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// `spec.podSelector`: the pods the policy is about.
    pub pods: Selector,
    /// Rules of what may come in; `None`: `policyTypes` lacks Ingress. An empty list lets nothing in.
    pub ingress: Option<Vec<PolicyRule>>,
    /// Rules of what may go out; `None`: `policyTypes` lacks Egress.
    pub egress: Option<Vec<PolicyRule>>,
}

/// A rule of a policy: any of the peers on any of the ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// Empty: everyone.
    pub peers: Vec<Peer>,
    /// Empty: every port and protocol.
    pub ports: Vec<PolicyPort>,
}

/// A peer of a policy rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// `podSelector` and `namespaceSelector`; without the second: the policy's own namespace.
    Pods { namespaces: Option<Selector>, pods: Selector },
    /// `ipBlock`.
    Block { cidr: IpNet, except: Vec<IpNet> },
}

/// A port of a policy rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyPort {
    pub protocol: Protocol,
    pub port: PortMatch,
}

/// Which ports a policy rule means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMatch {
    /// No `port`: all ports of the protocol.
    All,
    /// `port` to `endPort`, both inside.
    Range(u16, u16),
    /// A container port's name, looked up in the pod that is connected to.
    Named(String),
}

/// A label selector; the empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    pub match_labels: Labels,
    pub expressions: Vec<Requirement>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: Vec<String>,
}

/// The operator of a [`Requirement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Whether the selector selects an object with these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|requirement| {
                let value = labels.get(&requirement.key);
                let listed = value.is_some_and(|value| requirement.values.contains(value));
                match requirement.operator {
                    Operator::In => listed,
                    Operator::NotIn => !listed,
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

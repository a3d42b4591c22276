//! Settings of a node's network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

use crate::{CniConfig, WireGuardKey};

/// Everything the network of one node needs to know. All state lies under `run_dir`; all kernel objects carry the names given here, in the network
/// namespace of the caller, so several daemons run on one machine when each has a network namespace and a run folder of its own.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder for pinned namespaces (`netns/`) and pod records (`pods/`); cleared by a reboot, as the kernel's objects are.
    pub run_dir: PathBuf,
    /// This node's pod ranges, at most one of each family; the first is the primary family of pods.
    pub pod_cidrs: Vec<IpNet>,
    /// The pod ranges of the whole cluster: what goes there keeps its source address.
    pub cluster_cidrs: Vec<IpNet>,
    /// The ranges of cluster addresses of Services, at most one of each family.
    pub service_cidrs: Vec<IpNet>,
    /// The addresses at which the cluster's DNS answers on every node, at most one of each family; empty: no DNS server.
    pub dns_ips: Vec<IpAddr>,
    /// The port of the DNS server, 53 outside tests.
    pub dns_port: u16,
    /// The cluster's domain without a trailing dot.
    pub cluster_domain: String,
    /// Resolvers that questions outside the cluster's domain go to; empty: those of `resolv_conf`.
    pub upstreams: Vec<SocketAddr>,
    /// Domains with resolvers of their own.
    pub stub_domains: Vec<(String, Vec<SocketAddr>)>,
    /// The host's resolver file, read when `upstreams` is empty.
    pub resolv_conf: PathBuf,
    /// This node's name, to tell local endpoints and pods.
    pub node_name: String,
    /// This node's addresses (of the Node object), announced for LoadBalancer Services; `None`: found from the uplink.
    pub node_ips: Vec<IpAddr>,
    /// The ranges of local addresses at which node ports are reached; empty: every local address.
    pub node_port_addresses: Vec<IpNet>,
    /// The MTU of pod links; `None`: that of the uplink (the device of the default route), 1500 without one.
    pub mtu: Option<u32>,
    /// Name of the link that holds the node's gateway and DNS addresses.
    pub bridge: String,
    /// Prefix of the host ends of pod links; with 11 more characters they are at most 15 long.
    pub link_prefix: String,
    /// Name of the nftables tables (families ip and ip6).
    pub table: String,
    /// How packets reach the pods of other nodes.
    pub overlay: Overlay,
    /// What carries the rules out; `None`: nftables where the kernel has it, else iptables.
    pub proxy_mode: Option<ProxyMode>,
    /// The host's CNI plugins make the pods' networks, with addresses of theirs; `None`: we do.
    pub cni: Option<CniConfig>,
}

/// What carries the rules of Services and policies out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    /// The kernel's nf_tables, spoken to directly.
    Nftables,
    /// The programs `iptables-save` and `iptables-restore`, and those of IPv6.
    Iptables,
}

/// How packets reach the pods of other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// Plain routes: all nodes share one network.
    Routes,
    /// VXLAN over UDP with this network identifier and port.
    Vxlan { vni: u32, port: u16 },
    /// WireGuard over UDP with this port; the key is this node's.
    WireGuard { key: WireGuardKey, port: u16 },
}

impl Config {
    /// The settings of a single node with the documented defaults: pods 10.42.0.0/24 of 10.42.0.0/16, services 10.43.0.0/16, DNS 10.43.0.10.
    pub fn new(run_dir: impl Into<PathBuf>, node_name: impl Into<String>) -> Self {
        let net = |address: [u8; 4], length| {
            IpNet::new(Ipv4Addr::from(address).into(), length).expect("length is at most 32")
        };
        Self {
            run_dir: run_dir.into(),
            pod_cidrs: vec![net([10, 42, 0, 0], 24)],
            cluster_cidrs: vec![net([10, 42, 0, 0], 16)],
            service_cidrs: vec![net([10, 43, 0, 0], 16)],
            dns_ips: vec![Ipv4Addr::new(10, 43, 0, 10).into()],
            dns_port: 53,
            cluster_domain: "cluster.local".into(),
            upstreams: Vec::new(),
            stub_domains: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            node_name: node_name.into(),
            node_ips: Vec::new(),
            node_port_addresses: Vec::new(),
            mtu: None,
            bridge: "coracle0".into(),
            link_prefix: "cor".into(),
            table: "coracle".into(),
            overlay: Overlay::Routes,
            proxy_mode: None,
            cni: None,
        }
    }

    /// The node's own address inside its pod range of a family: the first of the range. Pods see the host under it. CNI plugins have their own.
    pub fn gateway(&self, family: Family) -> Option<IpAddr> {
        self.pod_cidr(family).filter(|_| self.cni.is_none()).map(|cidr| match cidr.network() {
            IpAddr::V4(network) => Ipv4Addr::from(u32::from(network).saturating_add(1)).into(),
            IpAddr::V6(network) => Ipv6Addr::from(u128::from(network).saturating_add(1)).into(),
        })
    }

    /// This node's pod range of a family.
    pub fn pod_cidr(&self, family: Family) -> Option<IpNet> {
        self.pod_cidrs.iter().copied().find(|cidr| Family::of(cidr.addr()) == family)
    }

    /// The address of the cluster's DNS of a family.
    pub fn dns_ip(&self, family: Family) -> Option<IpAddr> {
        self.dns_ips.iter().copied().find(|address| Family::of(*address) == family)
    }

    /// The families that pods have, the primary first.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.pod_cidrs.iter().map(|cidr| Family::of(cidr.addr()))
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The all-zero address of the family.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// Bytes of an address of the family.
    pub fn address_len(self) -> usize {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }
}

//! A pod's network: what is asked for and what is given.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{Labels, Protocol};

/// Which pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodKey {
    /// `metadata.uid`; names of kernel objects are derived from it. Letters, digits, `-` and `.`, at most 128.
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// What a pod's network has to have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNet {
    pub host_ports: Vec<HostPort>,
    /// `kubernetes.io/ingress-bandwidth`, bits a second towards the pod.
    pub ingress_bandwidth_bits: Option<u64>,
    /// `kubernetes.io/egress-bandwidth`, bits a second from the pod.
    pub egress_bandwidth_bits: Option<u64>,
    /// `metadata.labels`: policies know the pod by them from its first packet on.
    #[serde(default)]
    pub labels: Labels,
    /// A network namespace that waits for the pod, such as one that its user namespace owns; without it a new one is made.
    #[serde(default)]
    pub namespace: Option<PathBuf>,
}

/// A port of the host that leads to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostPort {
    pub protocol: Protocol,
    /// `hostIP`; `None` or unspecified: every local address.
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
}

/// A pod's network as made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// The pinned network namespace, to be opened and entered with setns(2).
    pub netns: PathBuf,
    /// The pod's addresses, the primary family first (`status.podIPs`).
    pub ips: Vec<IpAddr>,
}

//! What the runtime asks of the node's network.

use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use coracle_netns::{HostPort, PodNet, Protocol};

use crate::cri::{PortMapping, Result, RuntimeError};
use crate::names::PodKey;

/// A pod's network as made.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    /// The pinned network namespace.
    pub namespace: PathBuf,
    /// Addresses, the preferred first.
    pub ips: Vec<IpAddr>,
}

/// Makes and removes pods' networks. Both are idempotent.
#[async_trait]
pub trait PodNetworks: Send + Sync + 'static {
    /// A namespace with addresses for this pod.
    async fn setup(&self, pod: &PodKey, net: PodNet) -> Result<PodNetwork>;
    /// Takes it away.
    async fn teardown(&self, pod: &PodKey) -> Result<()>;
}

/// The network's request for these port mappings and bandwidth annotations.
///
/// # Errors
/// When a protocol or a quantity is not one.
pub fn request(mappings: &[PortMapping], annotation: impl Fn(&str) -> Option<u64>) -> Result<PodNet> {
    let host_ports = mappings
        .iter()
        .filter(|m| m.host_port != 0)
        .map(|m| {
            let protocol = Protocol::parse(Some(&m.protocol)).ok_or_else(|| {
                RuntimeError::Invalid(format!("unknown protocol {} of host port {}", m.protocol, m.host_port))
            })?;
            Ok(HostPort { protocol, host_ip: m.host_ip, host_port: m.host_port, container_port: m.container_port })
        })
        .collect::<Result<_>>()?;
    Ok(PodNet {
        host_ports,
        ingress_bandwidth_bits: annotation("kubernetes.io/ingress-bandwidth"),
        egress_bandwidth_bits: annotation("kubernetes.io/egress-bandwidth"),
    })
}

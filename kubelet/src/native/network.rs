//! What the runtime asks of the node's network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use coracle_netns::{HostPort, PodNet, Protocol};

use crate::cri::{Result, RuntimeError, SandboxConfig};
use crate::names::PodKey;

/// Bandwidths that are taken, in bits a second, as kubelet has them.
const MIN_BANDWIDTH_BITS: u64 = 1_000;
const MAX_BANDWIDTH_BITS: u64 = 1_000_000_000_000_000;

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

/// What a sandbox asks of the network: port mappings, bandwidth annotations, labels for policies.
///
/// # Errors
/// When a protocol or a quantity is not one.
pub fn request(config: &SandboxConfig) -> Result<PodNet> {
    let host_ports = config
        .port_mappings
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
        ingress_bandwidth_bits: bandwidth(&config.annotations, "kubernetes.io/ingress-bandwidth")?,
        egress_bandwidth_bits: bandwidth(&config.annotations, "kubernetes.io/egress-bandwidth")?,
        labels: config.labels.clone(),
        namespace: None,
    })
}

/// Bits a second of an annotation such as `10M`.
fn bandwidth(annotations: &BTreeMap<String, String>, name: &str) -> Result<Option<u64>> {
    let Some(text) = annotations.get(name) else { return Ok(None) };
    let bits = text.parse::<crate::volumes::Quantity>().ok().and_then(|quantity| u64::try_from(quantity.ceil()).ok());
    match bits {
        Some(bits) if (MIN_BANDWIDTH_BITS..=MAX_BANDWIDTH_BITS).contains(&bits) => Ok(Some(bits)),
        _ => Err(RuntimeError::Invalid(format!("annotation {name}: {text:?} is no bandwidth from 1k to 1P"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_quantities() {
        let of = |text: &str| {
            let annotations = BTreeMap::from([("kubernetes.io/egress-bandwidth".to_owned(), text.to_owned())]);
            request(&SandboxConfig { annotations, ..SandboxConfig::default() })
                .ok()
                .map(|net| (net.ingress_bandwidth_bits, net.egress_bandwidth_bits))
        };
        assert_eq!(of("10M"), Some((None, Some(10_000_000))));
        assert_eq!(of("1Gi"), Some((None, Some(1 << 30))));
        assert!(["", "fast", "-1", "999", "2P"].into_iter().all(|bad| of(bad).is_none()));
    }
}

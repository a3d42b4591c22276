//! What every node of a cluster must know alike. The server is told by flags and tells its agents by a ConfigMap.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, bail};
use coracle_netns::{Overlay, WireGuardKey};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Where agents find the settings.
pub(crate) const NAMESPACE: &str = "kube-system";
/// Name of the ConfigMap.
pub(crate) const NAME: &str = "coracle-agent";
/// The member of its data.
pub(crate) const MEMBER: &str = "config.json";

/// The identifier and port that flannel gives VXLAN.
const VXLAN: Overlay = Overlay::Vxlan { vni: 1, port: 8472 };

/// The port that WireGuard has by custom.
const WIREGUARD_PORT: u16 = 51820;

/// Settings of the whole cluster.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cluster {
    pub(crate) cluster_cidr: String,
    pub(crate) service_cidr: String,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) cluster_domain: String,
    pub(crate) network_backend: NetworkBackend,
    #[serde(default)]
    pub(crate) stub_domains: Vec<StubDomain>,
}

/// A domain and the resolvers of its names.
pub(crate) type StubDomain = (String, Vec<SocketAddr>);

/// Reads `DOMAIN=ADDRESS[:PORT],…`.
pub(crate) fn stub_domain(text: &str) -> Result<StubDomain, String> {
    const DNS_PORT: u16 = 53;
    let wrong = || format!("{text:?} is not of the form DOMAIN=ADDRESS,…, such as corp.example=192.0.2.1");
    let (domain, resolvers) = text.split_once('=').filter(|(domain, _)| !domain.is_empty()).ok_or_else(wrong)?;
    let resolver = |text: &str| {
        let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT)));
        address.map_err(|_| wrong())
    };
    Ok((domain.to_owned(), resolvers.split(',').map(|text| resolver(text.trim())).collect::<Result<_, _>>()?))
}

/// How packets reach the pods of other hosts.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NetworkBackend {
    /// Plain routes: all hosts are on one network
    HostGw,
    /// VXLAN (UDP port 8472): hosts are on several networks that route between each other
    Vxlan,
    /// WireGuard (UDP port 51820): what passes between hosts is encrypted
    #[value(alias = "wireguard-native")]
    Wireguard,
}

/// What carries the rules of Services and policies out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ProxyMode {
    /// The kernel's nf_tables, spoken to directly
    Nftables,
    /// The programs iptables-save and iptables-restore, and those of IPv6
    Iptables,
}

impl From<ProxyMode> for coracle_netns::ProxyMode {
    fn from(mode: ProxyMode) -> Self {
        match mode {
            ProxyMode::Nftables => Self::Nftables,
            ProxyMode::Iptables => Self::Iptables,
        }
    }
}

impl Cluster {
    /// Refuses ranges that are none, or of which two are of one family.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        for (name, text) in [("--cluster-cidr", &self.cluster_cidr), ("--service-cidr", &self.service_cidr)] {
            match range(name, text)?.as_slice() {
                [_] => {}
                [first, second] if first.network().is_ipv4() != second.network().is_ipv4() => {}
                _ => bail!("{name} {text}: give one range, or one of IPv4 and one of IPv6 with a comma between"),
            }
        }
        Ok(())
    }

    /// A node's part of the network.
    pub(crate) fn network(
        &self,
        run_dir: &std::path::Path,
        name: &str,
        ips: &[IpAddr],
        ranges: &[String],
        key: Option<WireGuardKey>,
    ) -> anyhow::Result<coracle_netns::Config> {
        Ok(coracle_netns::Config {
            pod_cidrs: range("the node's pod range", &ranges.join(","))?,
            cluster_cidrs: range("--cluster-cidr", &self.cluster_cidr)?,
            service_cidrs: range("--service-cidr", &self.service_cidr)?,
            dns_ips: self.cluster_dns.clone(),
            cluster_domain: self.cluster_domain.clone(),
            node_ips: ips.to_vec(),
            stub_domains: self.stub_domains.clone(),
            overlay: match (self.network_backend, key) {
                (NetworkBackend::HostGw, _) => Overlay::Routes,
                (NetworkBackend::Vxlan, _) => VXLAN,
                (NetworkBackend::Wireguard, Some(key)) => Overlay::WireGuard { key, port: WIREGUARD_PORT },
                (NetworkBackend::Wireguard, None) => bail!("the node has no WireGuard key"),
            },
            ..coracle_netns::Config::new(run_dir, name)
        })
    }
}

fn range(name: &str, text: &str) -> anyhow::Result<Vec<IpNet>> {
    text.split(',')
        .map(|range| range.trim().parse().with_context(|| format!("{name} {range} is no address range")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stub_domains_name_their_resolvers() {
        let read =
            |text: &str| stub_domain(text).map(|(domain, all)| (domain, all.iter().map(ToString::to_string).collect()));
        let found = |domain: &str, all: &[&str]| {
            Ok((domain.to_owned(), all.iter().map(ToString::to_string).collect::<Vec<_>>()))
        };
        assert_eq!(
            read("corp.example=192.0.2.1, 192.0.2.2:5353"),
            found("corp.example", &["192.0.2.1:53", "192.0.2.2:5353"])
        );
        assert_eq!(read("x=fd00::1,[fd00::2]:54"), found("x", &["[fd00::1]:53", "[fd00::2]:54"]));
        for wrong in ["x", "=192.0.2.1", "x=", "x=resolver.example", "x=192.0.2.1,"] {
            assert!(stub_domain(wrong).is_err(), "{wrong}");
        }
    }
}

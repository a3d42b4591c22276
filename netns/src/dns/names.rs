//! The names that a Service gives to addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::{Endpoint, EndpointSlice, Protocol, Service};
use crate::services::proxy::Entry;

/// What is known under a Service's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceNames {
    /// Addresses of the Service's own name.
    pub(super) addresses: Vec<IpAddr>,
    /// Addresses of host names below it, for headless Services.
    pub(super) hosts: BTreeMap<String, Vec<IpAddr>>,
    /// Named ports: protocol and name to the targets.
    pub(super) ports: BTreeMap<(&'static str, String), BTreeSet<Target>>,
    /// The name that an ExternalName Service stands for.
    pub(super) external: Option<String>,
}

/// Where an SRV record leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// A host name below the Service, or the Service itself.
    pub(super) host: Option<String>,
    pub(super) port: u16,
}

/// The label of an address without a host name: its digits with dashes, as users of other cluster DNS servers know it.
pub(super) fn dashed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        IpAddr::V6(address) => {
            let groups = address.segments();
            groups.iter().map(|group| format!("{group:x}")).collect::<Vec<_>>().join("-")
        }
    }
}

/// The address that a dashed label stands for.
pub(super) fn undashed(label: &str) -> Option<IpAddr> {
    let dots = label.replace('-', ".");
    dots.parse::<std::net::Ipv4Addr>()
        .map(IpAddr::V4)
        .or_else(|_| label.replace('-', ":").parse::<std::net::Ipv6Addr>().map(IpAddr::V6))
        .ok()
}

/// The names of a Service; `None` if it has none.
pub(super) fn names(entry: &Entry) -> Option<ServiceNames> {
    let service = entry.service.as_ref()?;
    let mut names = ServiceNames::default();
    if let Some(external) = &service.external_name {
        names.external = Some(external.trim_end_matches('.').to_ascii_lowercase());
    } else if service.headless {
        headless(service, entry.slices(), &mut names);
    } else {
        names.addresses.clone_from(&service.cluster_ips);
        for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
            let targets = names.ports.entry(key(port.protocol, &port.name)).or_default();
            targets.insert(Target { host: None, port: port.port });
        }
    }
    Some(names)
}

fn key(protocol: Protocol, name: &str) -> (&'static str, String) {
    (protocol.dns_label(), format!("_{}", name.to_ascii_lowercase()))
}

fn headless<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>, names: &mut ServiceNames) {
    let mut all = BTreeSet::new();
    let mut hosts: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for slice in slices {
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready || service.publish_not_ready) {
            for address in &endpoint.addresses {
                all.insert(*address);
                let host = host_name(endpoint, *address);
                hosts.entry(host.clone()).or_default().insert(*address);
                for port in slice.ports.iter().filter(|port| !port.name.is_empty()) {
                    let targets = names.ports.entry(key(port.protocol, &port.name)).or_default();
                    targets.insert(Target { host: Some(host.clone()), port: port.port });
                }
            }
        }
    }
    names.addresses = all.into_iter().collect();
    names.hosts = hosts.into_iter().map(|(host, addresses)| (host, addresses.into_iter().collect())).collect();
}

fn host_name(endpoint: &Endpoint, address: IpAddr) -> String {
    endpoint
        .hostname
        .as_deref()
        .filter(|name| !name.is_empty())
        .map_or_else(|| dashed(address), str::to_ascii_lowercase)
}

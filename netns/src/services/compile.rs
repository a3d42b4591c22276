//! What a Service means on this node: which addresses lead to which endpoints. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::Family;
use crate::model::{Endpoint, EndpointSlice, Protocol, Service, ServicePort, TrafficPolicy};

/// The map that a front is found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// Addresses of Services, for pods and the host; for the world too where [`Place::External`] has nothing.
    Services,
    /// Addresses of Services as seen by the world, where that differs.
    External,
    /// Node ports, likewise.
    NodePorts,
    NodePortsExternal,
}

/// Where a connection goes to before it is balanced. The address of a node port is the unspecified one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FrontKey {
    pub(crate) place: Place,
    pub(crate) address: IpAddr,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// What becomes of a connection to a front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Refused at once: nobody serves.
    Refuse,
    /// Dropped: somebody serves, but not on this node, and the sender is to try another.
    Drop,
    /// Balanced over endpoints.
    Balance {
        backends: Arc<[SocketAddr]>,
        /// The clients' stickiness in seconds.
        affinity: Option<u32>,
        /// The only sources that are let in, if any are told; none overlaps another.
        sources: Option<Arc<[IpNet]>>,
    },
}

/// A front and what becomes of connections to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Front {
    pub(crate) key: FrontKey,
    pub(crate) action: Action,
}

/// Where we are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Here {
    pub(crate) node: Arc<str>,
    pub(crate) zone: Option<Arc<str>>,
}

/// The endpoints that serve a port, cluster-wide and on this node.
struct Serving {
    cluster: Arc<[SocketAddr]>,
    local: Arc<[SocketAddr]>,
}

/// All fronts of a Service, each once.
pub(crate) fn fronts<'a>(
    here: &Here,
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
) -> Vec<Front> {
    let mut fronts = Vec::new();
    if service.external_name.is_some() || service.headless || service.served_elsewhere {
        return fronts;
    }
    let families: BTreeSet<Family> = service.cluster_ips.iter().map(|address| Family::of(*address)).collect();
    for family in families {
        for port in &service.ports {
            let serving = serving(here, family, port, slices.clone());
            port_fronts(service, family, port, &serving, &mut fronts);
        }
    }
    fronts.sort_by_key(|front| front.key);
    fronts.dedup_by_key(|front| front.key);
    fronts
}

/// How many endpoints of this node serve a Service, whatever the port.
pub(crate) fn local_endpoints<'a>(
    here: &Here,
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
) -> usize {
    let families: BTreeSet<Family> = service.cluster_ips.iter().map(|address| Family::of(*address)).collect();
    let ports = families.iter().flat_map(|family| service.ports.iter().map(move |port| (*family, port)));
    let all = ports.flat_map(|(family, port)| serving(here, family, port, slices.clone()).local.to_vec());
    all.map(|endpoint| endpoint.ip()).collect::<BTreeSet<IpAddr>>().len()
}

fn port_fronts(service: &Service, family: Family, port: &ServicePort, serving: &Serving, fronts: &mut Vec<Front>) {
    let of_family = |addresses: &[IpAddr]| -> Vec<IpAddr> {
        addresses.iter().copied().filter(|address| Family::of(*address) == family).collect()
    };
    let none = if serving.cluster.is_empty() { Action::Refuse } else { Action::Drop };
    let action = |backends: &Arc<[SocketAddr]>, sources: &Option<Arc<[IpNet]>>| {
        if backends.is_empty() {
            none.clone()
        } else {
            Action::Balance { backends: backends.clone(), affinity: service.affinity_seconds, sources: sources.clone() }
        }
    };
    let mut push = |place, address, port_number, action| {
        fronts.push(Front { key: FrontKey { place, address, protocol: port.protocol, port: port_number }, action });
    };
    for address in of_family(&service.cluster_ips) {
        let backends = match service.internal_policy {
            TrafficPolicy::Cluster => &serving.cluster,
            TrafficPolicy::Local => &serving.local,
        };
        push(Place::Services, address, port.port, action(backends, &None));
    }
    let local_only = service.external_policy == TrafficPolicy::Local;
    let ranges: Vec<IpNet> =
        service.source_ranges.iter().copied().filter(|range| Family::of(range.addr()) == family).collect();
    // Ranges of the other family alone let nobody of this one in.
    let allowed: Option<Arc<[IpNet]>> = (!service.source_ranges.is_empty()).then(|| IpNet::aggregate(&ranges).into());
    let outside = of_family(&service.external_ips).into_iter().map(|address| (address, None));
    for (address, sources) in
        outside.chain(of_family(&service.load_balancer_ips).into_iter().map(|address| (address, allowed.clone())))
    {
        push(Place::Services, address, port.port, action(&serving.cluster, &sources));
        if local_only {
            push(Place::External, address, port.port, action(&serving.local, &sources));
        }
    }
    if let Some(node_port) = port.node_port {
        push(Place::NodePorts, family.unspecified(), node_port, action(&serving.cluster, &None));
        if local_only {
            push(Place::NodePortsExternal, family.unspecified(), node_port, action(&serving.local, &None));
        }
    }
}

/// The endpoints that a port's connections go to: the ready ones, or, when there are none, those that still serve while they terminate.
fn serving<'a>(
    here: &Here,
    family: Family,
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> Serving {
    let mut all: Vec<(&Endpoint, SocketAddr)> = Vec::new();
    for slice in slices {
        for target in slice.ports.iter().filter(|target| target.name == port.name && target.protocol == port.protocol) {
            for endpoint in &slice.endpoints {
                let address = endpoint.addresses.iter().find(|address| Family::of(**address) == family);
                all.extend(address.map(|address| (endpoint, SocketAddr::new(*address, target.port))));
            }
        }
    }
    let is_local = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(&*here.node);
    let choose = |candidates: Vec<(&Endpoint, SocketAddr)>| -> Vec<(Hinted, SocketAddr)> {
        let ready = candidates.iter().any(|(endpoint, _)| endpoint.ready);
        let serves =
            |endpoint: &Endpoint| if ready { endpoint.ready } else { endpoint.serving && endpoint.terminating };
        let chosen: Vec<_> = candidates.into_iter().filter(|(endpoint, _)| serves(endpoint)).collect();
        chosen.into_iter().map(|(endpoint, address)| (is_hinted(here, endpoint), address)).collect()
    };
    let local = choose(all.iter().filter(|(endpoint, _)| is_local(endpoint)).copied().collect());
    let node_hints =
        all.iter().filter(|(endpoint, _)| endpoint.ready).all(|(endpoint, _)| !endpoint.node_hints.is_empty());
    let zone_hints =
        all.iter().filter(|(endpoint, _)| endpoint.ready).all(|(endpoint, _)| !endpoint.zone_hints.is_empty());
    let cluster = choose(all);
    // Hints are followed only when every endpoint has them and some of them mean us: half-made hints would overload a few.
    let hinted_here = cluster.iter().any(|(hinted, _)| hinted.node);
    let hinted_zone = cluster.iter().any(|(hinted, _)| hinted.zone);
    let cluster = cluster.into_iter().filter(|(hinted, _)| {
        if node_hints && hinted_here {
            hinted.node
        } else if zone_hints && hinted_zone {
            hinted.zone
        } else {
            true
        }
    });
    let sorted = |addresses: Vec<SocketAddr>| -> Arc<[SocketAddr]> {
        addresses.into_iter().collect::<BTreeSet<_>>().into_iter().collect()
    };
    Serving {
        cluster: sorted(cluster.map(|(_, address)| address).collect()),
        local: sorted(local.into_iter().map(|(_, address)| address).collect()),
    }
}

/// Whom an endpoint's hints mean.
#[derive(Clone, Copy)]
struct Hinted {
    node: bool,
    zone: bool,
}

fn is_hinted(here: &Here, endpoint: &Endpoint) -> Hinted {
    Hinted {
        node: endpoint.node_hints.contains(&here.node),
        zone: here.zone.as_ref().is_some_and(|zone| endpoint.zone_hints.contains(zone)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointPort, ObjectKey};

    #[test]
    fn hints_are_followed_when_all_have_them() {
        let here = Here { node: "here".into(), zone: Some("z1".into()) };
        let endpoint = |host: u8, zone: &str, node: &str| {
            let some = |text: &str| if text.is_empty() { Vec::new() } else { vec![Arc::from(text)] };
            let address = IpAddr::from([10, 42, 0, host]);
            Endpoint { zone_hints: some(zone), node_hints: some(node), ..Endpoint::ready(address, Some(node)) }
        };
        let chosen = |endpoints: Vec<Endpoint>| {
            let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 80 }];
            let slice = EndpointSlice { service: ObjectKey::new("n", "s"), ports, endpoints };
            let serving =
                serving(&here, Family::V4, &ServicePort { port: 80, ..ServicePort::default() }, [&slice].into_iter());
            serving.cluster.iter().map(|address| address.to_string()).collect::<Vec<_>>()
        };
        let (one, two, three) = ("10.42.0.1:80", "10.42.0.2:80", "10.42.0.3:80");
        // PreferSameZone (and PreferClose, its older name).
        assert_eq!(chosen(vec![endpoint(1, "z1", ""), endpoint(2, "z2", "")]), [one]);
        assert_eq!(chosen(vec![endpoint(1, "z1", ""), endpoint(2, "", "")]), [one, two], "half-made hints");
        assert_eq!(chosen(vec![endpoint(1, "z2", ""), endpoint(2, "z3", "")]), [one, two], "none for us");
        // PreferSameNode: the node, else the zone, else all.
        let (there, near, far) = (endpoint(1, "z1", "here"), endpoint(2, "z1", "there"), endpoint(3, "z2", "far"));
        assert_eq!(chosen(vec![there.clone(), near.clone(), far.clone()]), [one]);
        assert_eq!(chosen(vec![near, far.clone()]), [two]);
        assert_eq!(chosen(vec![far]), [three]);
        // An endpoint that is not ready has no say.
        let late = Endpoint { ready: false, serving: false, ..endpoint(3, "", "") };
        assert_eq!(chosen(vec![there, late]), [one]);
    }
}

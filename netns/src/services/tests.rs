//! Any history of Services and endpoints ends in tables that do what the Services say, and in the same tables as the end alone gives.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use proptest::prelude::*;

use super::layout;
use super::proxy::{Proxy, ProxyChange};
use crate::model::{Endpoint, EndpointPort, EndpointSlice, ObjectKey, Protocol, Service, ServicePort, TrafficPolicy};
use crate::nft::Table;
use crate::nft::tests::{Outcome, Packet, walk};
use crate::{Config, Family, iptables};

const NAMES: usize = 3;
const MASQUERADE: u32 = 0x4000;

fn config(family: Family) -> Config {
    let mut config = Config::new("/nowhere", "here");
    if family == Family::V6 {
        config.pod_cidrs = vec!["fd00:42::/64".parse().unwrap()];
        config.cluster_cidrs = vec!["fd00:42::/56".parse().unwrap()];
        config.service_cidrs = vec!["fd00:43::/112".parse().unwrap()];
        config.dns_ips = vec!["fd00:43::a".parse().unwrap()];
    }
    config
}

/// An address of one of the ranges: services (43), pods (42), the world (0).
fn ip(family: Family, range: u8, host: u8) -> IpAddr {
    match (family, range) {
        (Family::V4, 0) => Ipv4Addr::new(198, 51, 100, host).into(),
        (Family::V4, range) => Ipv4Addr::new(10, range, 0, host).into(),
        (Family::V6, 0) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into()).into(),
        (Family::V6, 43) => Ipv6Addr::new(0xfd00, 0x43, 0, 0, 0, 0, 0, host.into()).into(),
        (Family::V6, _) => Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, host.into()).into(),
    }
}

#[derive(Clone, Debug)]
enum Event {
    Service(usize, Option<Service>),
    Slice(usize, usize, Option<Vec<Endpoint>>),
}

fn key(n: usize) -> ObjectKey {
    ObjectKey::new("ns", &format!("s{n}"))
}

fn service(family: Family, n: usize) -> impl Strategy<Value = Service> {
    let number = u8::try_from(n).unwrap();
    (any::<[bool; 6]>(), 0_u8..3).prop_map(
        move |([sticky, internal, external, node_port, balancer, outside], ranges)| Service {
            cluster_ips: vec![ip(family, 43, 20 + number)],
            ports: [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                .map(|protocol| ServicePort {
                    name: format!("{protocol:?}"),
                    protocol,
                    port: 80,
                    node_port: node_port.then_some(30_000 + u16::from(number)),
                })
                .into(),
            external_ips: if outside { vec![ip(family, 0, 100 + number)] } else { Vec::new() },
            load_balancer_ips: if balancer { vec![ip(family, 0, 200 + number)] } else { Vec::new() },
            source_ranges: (0..ranges)
                .map(|range| IpNet::new(ip(family, 0, range * 8), if family == Family::V4 { 29 } else { 125 }).unwrap())
                .collect(),
            affinity_seconds: sticky.then_some(30),
            internal_policy: if internal { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
            external_policy: if external { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
            ..Service::default()
        },
    )
}

fn endpoint(family: Family) -> impl Strategy<Value = Endpoint> {
    (10_u8..18, any::<[bool; 4]>()).prop_map(move |(host, [ready, serving, terminating, here])| Endpoint {
        ready,
        serving,
        terminating,
        ..Endpoint::ready(ip(family, 42, host), Some(if here { "here" } else { "there" }))
    })
}

fn history(family: Family) -> impl Strategy<Value = Vec<Event>> {
    let event = (0..NAMES).prop_flat_map(move |n| {
        let slice = proptest::collection::vec(endpoint(family), 0..5);
        prop_oneof![
            proptest::option::weighted(0.8, service(family, n)).prop_map(move |service| Event::Service(n, service)),
            (0..2_usize, proptest::option::weighted(0.8, slice))
                .prop_map(move |(slice, endpoints)| Event::Slice(n, slice, endpoints)),
        ]
    });
    proptest::collection::vec(event, 1..14)
}

fn change(event: &Event) -> ProxyChange {
    match event {
        Event::Service(n, service) => ProxyChange::Service(key(*n), service.clone()),
        Event::Slice(n, slice, endpoints) => {
            let ports = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                .map(|protocol| EndpointPort { name: format!("{protocol:?}"), protocol, port: 8080 })
                .into();
            let object = endpoints.clone().map(|endpoints| EndpointSlice { service: key(*n), ports, endpoints });
            ProxyChange::Slice(ObjectKey::new("ns", &format!("s{n}-{slice}")), object)
        }
    }
}

/// The state that a history ends in.
#[derive(Default)]
struct End {
    services: BTreeMap<usize, Service>,
    slices: BTreeMap<(usize, usize), Vec<Endpoint>>,
}

fn end(history: &[Event]) -> End {
    let mut end = End::default();
    for event in history {
        match event {
            Event::Service(n, Some(service)) => drop(end.services.insert(*n, service.clone())),
            Event::Service(n, None) => drop(end.services.remove(n)),
            Event::Slice(n, slice, Some(endpoints)) => drop(end.slices.insert((*n, *slice), endpoints.clone())),
            Event::Slice(n, slice, None) => drop(end.slices.remove(&(*n, *slice))),
        }
    }
    end
}

impl End {
    fn endpoints(&self, n: usize, here_only: bool) -> BTreeSet<SocketAddr> {
        let all: Vec<&Endpoint> = self.slices.iter().filter(|((of, _), _)| *of == n).flat_map(|(_, all)| all).collect();
        let all: Vec<&Endpoint> =
            all.into_iter().filter(|endpoint| !here_only || endpoint.node.as_deref() == Some("here")).collect();
        let ready: Vec<&Endpoint> = all.iter().copied().filter(|endpoint| endpoint.ready).collect();
        let last = all.into_iter().filter(|endpoint| endpoint.serving && endpoint.terminating);
        let chosen: Vec<&Endpoint> = if ready.is_empty() { last.collect() } else { ready };
        chosen.iter().map(|endpoint| SocketAddr::new(endpoint.addresses[0], 8080)).collect()
    }

    /// Who may get a connection, and whether the sender's address is replaced; the words of the API's documentation.
    fn expected(
        &self,
        family: Family,
        source: IpAddr,
        to: IpAddr,
        port: u16,
        local: &HashSet<IpAddr>,
    ) -> (BTreeSet<SocketAddr>, Outcome, bool) {
        let inside = config(family).cluster_cidrs[0].contains(&source);
        for (n, service) in &self.services {
            let at_cluster = service.cluster_ips.contains(&to) && port == 80;
            let at_outside = service.external_ips.contains(&to) && port == 80;
            let at_balancer = service.load_balancer_ips.contains(&to) && port == 80;
            let at_node = local.contains(&to) && service.ports[0].node_port == Some(port);
            if !(at_cluster || at_outside || at_balancer || at_node) {
                continue;
            }
            let stays = if at_cluster { service.internal_policy } else { service.external_policy }
                == TrafficPolicy::Local
                && (at_cluster || !inside);
            let endpoints = self.endpoints(*n, stays);
            let shut = at_balancer
                && !service.source_ranges.is_empty()
                && !service.source_ranges.iter().any(|range| range.contains(&source));
            let outcome = match (endpoints.is_empty(), self.endpoints(*n, false).is_empty()) {
                (true, true) => Outcome::Refused,
                (true, false) => Outcome::Dropped,
                _ if shut => Outcome::Dropped,
                _ => Outcome::Accepted,
            };
            return (endpoints, outcome, !inside && (at_cluster || !stays));
        }
        let unknown = config(family).service_cidrs[0].contains(&to) && !config(family).dns_ips.contains(&to);
        (BTreeSet::new(), if unknown { Outcome::Refused } else { Outcome::Accepted }, false)
    }
}

fn tables(family: Family) -> BTreeMap<Family, Table> {
    BTreeMap::from([(family, layout::table(&config(family), family))])
}

fn check(family: Family, history: &[Event], probes: &[(u8, u8, u8, u8)], batch: usize) -> Result<(), TestCaseError> {
    let (mut stepwise, mut tables_stepwise) = (Proxy::new("here", config(family).dns_ips), tables(family));
    for events in history.chunks(batch) {
        stepwise.update(events.iter().map(change), &mut tables_stepwise);
    }
    let end = end(history);
    let (mut at_once, mut tables_at_once) = (Proxy::new("here", config(family).dns_ips), tables(family));
    let services = end.services.iter().map(|(n, service)| Event::Service(*n, Some(service.clone())));
    let slices = end.slices.iter().map(|((n, slice), endpoints)| Event::Slice(*n, *slice, Some(endpoints.clone())));
    at_once.update(services.chain(slices).map(|event| change(&event)), &mut tables_at_once);
    let (table, other) = (&tables_stepwise[&family], &tables_at_once[&family]);
    prop_assert_eq!(&table.chains, &other.chains);
    prop_assert_eq!(&table.sets, &other.sets);
    let chains = iptables::compile(&config(family), &stepwise, table);
    prop_assert_eq!(&chains, &iptables::compile(&config(family), &at_once, other));
    let local = HashSet::from([ip(family, 0, 1)]);
    for (source, to, random, protocol) in probes {
        let source = if *source < 128 { ip(family, 42, *source % 8 + 10) } else { ip(family, 0, *source % 24) };
        let n = to % 4;
        let (to, port) = match to / 4 % 4 {
            0 => (ip(family, 43, 20 + n), 80),
            1 => (ip(family, 0, 100 + n), 80),
            2 => (ip(family, 0, 200 + n), 80),
            _ => (ip(family, 0, 1), 30_000 + u16::from(n)),
        };
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][usize::from(protocol % 3)].number();
        let mut packet =
            Packet { source, destination: to, protocol, port, mark: 0, local: &local, random: u32::from(*random) };
        let mut same = packet.clone();
        let (endpoints, wanted, masquerade) = end.expected(family, source, to, port, &local);
        let walks = [(walk(table, "prerouting", &mut packet), packet), (iptables::walk(&chains, &mut same), same)];
        for (outcome, packet) in walks {
            match outcome {
                Outcome::Led(endpoint) => {
                    prop_assert_eq!(&wanted, &Outcome::Accepted, "{} to {}:{}", source, to, port);
                    prop_assert!(
                        endpoints.contains(&endpoint),
                        "{} to {}:{} led to {}, not one of {:?}",
                        source,
                        to,
                        port,
                        endpoint,
                        endpoints
                    );
                    prop_assert_eq!(packet.mark & MASQUERADE != 0, masquerade, "{} to {}:{}", source, to, port);
                }
                outcome => {
                    prop_assert!(outcome != Outcome::Accepted || endpoints.is_empty());
                    prop_assert_eq!(&outcome, &wanted, "{} to {}:{}", source, to, port);
                    prop_assert!(packet.mark & MASQUERADE == 0 || outcome != Outcome::Accepted);
                }
            }
        }
    }
    Ok(())
}

fn probes() -> impl Strategy<Value = Vec<(u8, u8, u8, u8)>> {
    proptest::collection::vec(any::<(u8, u8, u8, u8)>(), 40)
}

proptest! {
    #[test]
    fn tables_do_what_services_say(history in history(Family::V4), probes in probes(), batch in 1_usize..6) {
        check(Family::V4, &history, &probes, batch)?;
    }

    #[test]
    fn tables_do_what_services_say_of_ipv6(history in history(Family::V6), probes in probes(), batch in 1_usize..6) {
        check(Family::V6, &history, &probes, batch)?;
    }
}

#[test]
fn the_first_service_in_order_has_a_contested_address_until_it_goes() {
    let (mut proxy, mut tables) = (Proxy::new("here", Vec::new()), tables(Family::V4));
    let contested = ip(Family::V4, 0, 100);
    let service = |n: u8| Service {
        cluster_ips: vec![ip(Family::V4, 43, 20 + n)],
        external_ips: vec![contested],
        ports: vec![ServicePort { name: "Tcp".into(), port: 80, ..ServicePort::default() }],
        ..Service::default()
    };
    let slice = |n: usize, host| Event::Slice(n, 0, Some(vec![Endpoint::ready(ip(Family::V4, 42, host), None)]));
    let events = [Event::Service(1, Some(service(1))), slice(1, 11), Event::Service(0, Some(service(0))), slice(0, 10)];
    let winner = |proxy: &mut Proxy, tables: &mut BTreeMap<Family, Table>, event: &Event| {
        proxy.update([change(event)], tables);
        let mut packet = Packet {
            source: ip(Family::V4, 42, 5),
            destination: contested,
            protocol: 6,
            port: 80,
            mark: 0,
            local: &HashSet::new(),
            random: 0,
        };
        walk(&tables[&Family::V4], "prerouting", &mut packet)
    };
    let outcomes: Vec<Outcome> = events.iter().map(|event| winner(&mut proxy, &mut tables, event)).collect();
    let led = |host| Outcome::Led(SocketAddr::new(ip(Family::V4, 42, host), 8080));
    assert_eq!(outcomes, [Outcome::Refused, led(11), Outcome::Refused, led(10)]);
    assert_eq!(winner(&mut proxy, &mut tables, &Event::Service(0, None)), led(11));
}

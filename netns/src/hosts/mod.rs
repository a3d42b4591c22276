//! The host among hosts: the node's own link and addresses, the way to Services, and the routes to the pods of other nodes.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use nix::errno::Errno;

use crate::error::{Error, PathExt};
use crate::model::Node;
use crate::netlink::route::{self, Link, ROUTE_PROTOCOL, Route};
use crate::netlink::{Batch, NetlinkError, Socket};
use crate::pods::mac;
use crate::{Config, Family, Overlay};

/// The MTU of Ethernet, of a host without uplink.
const DEFAULT_MTU: u32 = 1500;
/// What VXLAN puts around a packet: IPv4 and UDP headers, VXLAN header, inner Ethernet header.
const VXLAN_OVERHEAD: u32 = 50;
/// The smallest MTU that IPv6 allows.
const MIN_MTU: u32 = 1280;

/// What the node has on the host.
pub(crate) struct Hosts {
    /// The link that holds our addresses.
    link: u32,
    vxlan: Option<u32>,
    mtu: u32,
    /// What is there of each other node.
    others: BTreeMap<Arc<str>, Node>,
}

impl Hosts {
    /// Makes the node's link with the gateway and DNS addresses, routes Services to it, and lets the host forward. What is there stays.
    pub(crate) fn prepare(config: &Config, socket: &mut Socket) -> Result<Self, Error> {
        let uplink = uplink(config, socket)?;
        let uplink_mtu = config.mtu.or(uplink.as_ref().map(|link| link.mtu)).unwrap_or(DEFAULT_MTU);
        let mtu = match config.overlay {
            Overlay::Routes => uplink_mtu,
            Overlay::Vxlan { .. } if config.mtu.is_some() => uplink_mtu,
            Overlay::Vxlan { .. } => uplink_mtu.saturating_sub(VXLAN_OVERHEAD).max(MIN_MTU),
        };
        let link = ensure(socket, &config.bridge, |batch| {
            route::add_bridge(batch, &config.bridge, mac(0, &config.node_name), mtu);
        })?;
        let mut batch = Batch::default();
        route::set_up(&mut batch, link);
        for address in
            config.families().filter_map(|family| config.gateway(family)).chain(config.dns_ips.iter().copied())
        {
            route::add_address(&mut batch, link, address);
        }
        for range in &config.service_cidrs {
            let source = config.gateway(Family::of(range.addr()));
            route::add_route(
                &mut batch,
                &Route { destination: *range, link: Some(link), gateway: None, onlink: false, source },
            );
        }
        let vxlan = match config.overlay {
            Overlay::Routes => None,
            Overlay::Vxlan { vni, port } => {
                let name = vxlan_name(config);
                let local = config.node_ips.first().copied();
                let index = ensure(socket, &name, |batch| {
                    route::add_vxlan(batch, &name, vxlan_mac(&config.node_name), mtu, vni, port, local)
                })?;
                route::set_up(&mut batch, index);
                for address in config.families().filter_map(|family| config.gateway(family)) {
                    route::add_address(&mut batch, index, address);
                }
                Some(index)
            }
        };
        socket.execute(&batch)?;
        for family in config.families() {
            allow_forwarding(family)?;
        }
        Ok(Self { link, vxlan, mtu, others: BTreeMap::new() })
    }

    /// The MTU of pods' links.
    pub(crate) fn pod_mtu(&self) -> u32 {
        self.mtu
    }

    /// Routes to the pods of other nodes as they come, change and go.
    pub(crate) fn update(
        &mut self,
        config: &Config,
        nodes: Vec<(Arc<str>, Option<Node>)>,
        socket: &mut Socket,
    ) -> Result<(), Error> {
        for (name, node) in nodes.into_iter().filter(|(name, _)| **name != *config.node_name) {
            let old = self.others.get(&name);
            if old == node.as_ref() {
                continue;
            }
            let now = node.as_ref().map(|node| self.wanted(config, &name, node)).unwrap_or_default();
            if let Some(old) = old {
                self.forget(config, &name, old, &now, socket)?;
            }
            let mut batch = Batch::default();
            if let (Some(vxlan), Some(host)) = (self.vxlan, node.as_ref().and_then(|node| peer(config, node))) {
                let hardware = vxlan_mac(&name);
                route::set_forwarding(&mut batch, vxlan, hardware, host, true);
                now.iter()
                    .filter_map(|route| route.gateway)
                    .for_each(|gateway| route::add_neighbour(&mut batch, vxlan, gateway, hardware));
            }
            now.iter().for_each(|route| route::add_route(&mut batch, route));
            match socket.execute(&batch) {
                // A node that is not on our network (yet): its pods cannot be reached by plain routes.
                Err(error) if error.is(Errno::ENETUNREACH) || error.is(Errno::EHOSTUNREACH) => {
                    tracing::warn!(node = %name, %error, "no way to the node; plain routes need all nodes on one network, else use VXLAN");
                }
                result => result?,
            }
            // Only now: a change that failed comes again.
            match node {
                Some(node) => drop(self.others.insert(name, node)),
                None => drop(self.others.remove(&name)),
            }
        }
        Ok(())
    }

    /// Makes the routes to other nodes again: those through a link that went down are gone, and nobody says so.
    pub(crate) fn restore(&self, config: &Config, socket: &mut Socket) {
        for (name, node) in &self.others {
            let mut batch = Batch::default();
            self.wanted(config, name, node).iter().for_each(|route| route::add_route(&mut batch, route));
            if let Err(error) = socket.execute(&batch) {
                tracing::warn!(node = %name, %error, "no way to the node; trying again when a link comes up");
            }
        }
    }

    fn wanted(&self, config: &Config, name: &str, node: &Node) -> Vec<Route> {
        let mut routes = Vec::new();
        for range in &node.pod_cidrs {
            let family = Family::of(range.addr());
            if overlaps(config, *range) {
                tracing::error!(node = name, %range, "the node claims pod addresses that are this node's; no route is made");
                continue;
            }
            let route = match self.vxlan {
                Some(vxlan) => {
                    let gateway = gateway_of(*range);
                    Some(Route {
                        destination: *range,
                        link: Some(vxlan),
                        gateway: Some(gateway),
                        onlink: true,
                        source: config.gateway(family),
                    })
                }
                None => node.ips.iter().find(|address| Family::of(**address) == family).map(|address| Route {
                    destination: *range,
                    link: None,
                    gateway: Some(*address),
                    onlink: false,
                    source: None,
                }),
            };
            routes.extend(route);
        }
        routes
    }

    fn forget(&self, config: &Config, name: &str, old: &Node, now: &[Route], socket: &mut Socket) -> Result<(), Error> {
        let gone = old.pod_cidrs.iter().filter(|range| !now.iter().any(|route| route.destination == **range));
        let others =
            |range: &IpNet| self.others.iter().any(|(other, node)| **other != *name && node.pod_cidrs.contains(range));
        for range in gone.filter(|range| !others(range)) {
            let mut batch = Batch::default();
            route::delete_route(&mut batch, *range);
            absent_is_fine(socket.execute(&batch))?;
        }
        if let (Some(vxlan), Some(host)) = (self.vxlan, peer(config, old)) {
            let mut batch = Batch::default();
            route::set_forwarding(&mut batch, vxlan, vxlan_mac(name), host, false);
            absent_is_fine(socket.execute(&batch))?;
        }
        Ok(())
    }

    /// Removes links and routes of ours.
    pub(crate) fn destroy(&mut self, config: &Config, socket: &mut Socket) -> Result<(), Error> {
        // Both families and the overlay, whatever the settings are now.
        for family in [Family::V4, Family::V6] {
            for known in route::routes(socket, family)?.into_iter().filter(|known| known.protocol == ROUTE_PROTOCOL) {
                let mut batch = Batch::default();
                route::delete_route(&mut batch, known.route.destination);
                absent_is_fine(socket.execute(&batch))?;
            }
        }
        for name in [config.bridge.clone(), vxlan_name(config)] {
            let mut batch = Batch::default();
            route::delete_link(&mut batch, &name);
            absent_is_fine(socket.execute(&batch))?;
        }
        self.link = 0;
        Ok(())
    }
}

fn absent_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if [Errno::ENOENT, Errno::ESRCH, Errno::ENODEV].into_iter().any(|errno| error.is(errno)) => Ok(()),
        result => result,
    }
}

/// The link of a name, made if it is missing.
fn ensure(socket: &mut Socket, name: &str, make: impl FnOnce(&mut Batch)) -> Result<u32, Error> {
    let mut batch = Batch::default();
    make(&mut batch);
    match socket.execute(&batch) {
        Err(error) if error.is(Errno::EEXIST) => {}
        result => result?,
    }
    Ok(route::link_by_name(socket, name)?.index)
}

/// The link of the default route, or the one with the node's address.
fn uplink(config: &Config, socket: &mut Socket) -> Result<Option<Link>, Error> {
    for family in config.families() {
        let default =
            route::routes(socket, family)?.into_iter().find(|known| known.route.destination.prefix_len() == 0);
        if let Some(index) = default.and_then(|known| known.route.link) {
            return Ok(route::links(socket)?.into_iter().find(|link| link.index == index));
        }
    }
    Ok(None)
}

fn overlaps(config: &Config, range: IpNet) -> bool {
    config.pod_cidrs.iter().any(|own| own.contains(&range) || range.contains(own))
}

fn gateway_of(range: IpNet) -> IpAddr {
    match range.network() {
        IpAddr::V4(network) => IpAddr::V4(u32::from(network).saturating_add(1).into()),
        IpAddr::V6(network) => IpAddr::V6(u128::from(network).saturating_add(1).into()),
    }
}

/// Where packets for a node's pods are sent in VXLAN: the link speaks the family of our first address, and no other.
fn peer(config: &Config, node: &Node) -> Option<IpAddr> {
    let ours = config.node_ips.first()?;
    node.ips.iter().copied().find(|address| address.is_ipv4() == ours.is_ipv4())
}

fn vxlan_name(config: &Config) -> String {
    /// Longest name of a link.
    const MAX_CHARS: usize = 15;
    config.bridge.chars().take(MAX_CHARS - 2).chain("vx".chars()).collect()
}

/// Every node knows the hardware address of every other's VXLAN link: nobody has to ask, nothing is flooded.
fn vxlan_mac(node: &str) -> route::Mac {
    mac(3, node)
}

/// Lets the host forward packets of a family, in the network namespace of the calling thread.
fn allow_forwarding(family: Family) -> Result<(), Error> {
    let path = Path::new(match family {
        Family::V4 => "/proc/sys/net/ipv4/ip_forward",
        Family::V6 => "/proc/sys/net/ipv6/conf/all/forwarding",
    });
    if fs::read_to_string(path).at("read", path)?.trim() == "1" {
        return Ok(());
    }
    fs::write(path, "1").at("write 1 to", path)
}

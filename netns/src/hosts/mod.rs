//! The host among hosts: the node's own link and addresses, the way to Services, and the routes to the pods of other nodes.

mod wireguard;

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

pub use wireguard::WireGuardKey;

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
    tunnel: Option<wireguard::Tunnel>,
    mtu: u32,
    /// What is there of each other node.
    others: BTreeMap<Arc<str>, Node>,
    /// No node has been told of yet: routes may be those of the daemon before us.
    inherited: bool,
}

impl Hosts {
    /// Makes the node's link with the gateway and DNS addresses, routes Services to it, and lets the host forward. What is there stays.
    pub(crate) fn prepare(config: &Config, socket: &mut Socket) -> Result<Self, Error> {
        let uplink = uplink(config, socket)?;
        let uplink_mtu = config.mtu.or(uplink.as_ref().map(|link| link.mtu)).unwrap_or(DEFAULT_MTU);
        let overhead = match config.overlay {
            _ if config.mtu.is_some() => 0,
            Overlay::Routes => 0,
            Overlay::Vxlan { .. } => VXLAN_OVERHEAD,
            Overlay::WireGuard { .. } => wireguard::OVERHEAD,
        };
        let mtu = if overhead == 0 { uplink_mtu } else { uplink_mtu.saturating_sub(overhead).max(MIN_MTU) };
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
            Overlay::Routes | Overlay::WireGuard { .. } => None,
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
        let tunnel = match &config.overlay {
            Overlay::WireGuard { key, port } => Some(wireguard::Tunnel::prepare(config, key, *port, mtu, socket)?),
            Overlay::Routes | Overlay::Vxlan { .. } => None,
        };
        for family in config.families() {
            allow_forwarding(family)?;
        }
        Ok(Self { link, vxlan, tunnel, mtu, others: BTreeMap::new(), inherited: true })
    }

    /// The MTU of pods' links.
    pub(crate) fn pod_mtu(&self) -> u32 {
        self.mtu
    }

    /// Routes to the pods of other nodes as they come, change and go. The first call brings all nodes there are.
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
            let old = old.cloned();
            self.lead(config, &name, old.as_ref(), node.as_ref(), &now, socket)?;
            // Only now: a change that failed comes again.
            match node {
                Some(node) => drop(self.others.insert(name.clone(), node)),
                None => drop(self.others.remove(&name)),
            }
            self.inherit(config, &name, &old.unwrap_or_default(), socket)?;
        }
        if std::mem::take(&mut self.inherited) {
            self.sweep(config, socket)?;
        }
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.settle(|key| self.others.values().any(|node| node.wireguard_key == Some(*key)))?;
        }
        Ok(())
    }

    /// Leads packets for a node's pods there.
    fn lead(
        &mut self,
        config: &Config,
        name: &str,
        old: Option<&Node>,
        node: Option<&Node>,
        now: &[Route],
        socket: &mut Socket,
    ) -> Result<(), Error> {
        if let Some(tunnel) = &mut self.tunnel {
            let sharers = |key: &[u8; 32]| {
                let key = *key;
                let sharers = self.others.iter().filter(move |(_, node)| node.wireguard_key == Some(key));
                sharers.map(|(other, _)| &**other).filter(|other| *other != name)
            };
            // Of two nodes that show one key the first by name is its owner.
            let own = |key: &[u8; 32]| {
                let owner = sharers(key).find(|other| *other < name);
                owner.inspect(|owner| tracing::error!(node = name, owner, "the node shows another's WireGuard key"));
                owner.is_none()
            };
            let old = old.and_then(|old| old.wireguard_key).filter(|key| sharers(key).next().is_none());
            let new = node.and_then(|node| Some((node.wireguard_key.filter(own)?, peer(config, node)?)));
            let behind: Vec<IpNet> = now.iter().map(|route| route.destination).collect();
            tunnel.change(old, new, &behind)?;
        }
        let mut batch = Batch::default();
        if let (Some(vxlan), Some(host)) = (self.vxlan, node.and_then(|node| peer(config, node))) {
            let hardware = vxlan_mac(name);
            route::set_forwarding(&mut batch, vxlan, hardware, host, true);
            now.iter()
                .filter_map(|route| route.gateway)
                .for_each(|gateway| route::add_neighbour(&mut batch, vxlan, gateway, hardware));
        }
        now.iter().for_each(|route| route::add_route(&mut batch, route));
        match socket.execute(&batch) {
            // A node that is not on our network (yet): its pods cannot be reached by plain routes.
            Err(error) if error.is(Errno::ENETUNREACH) || error.is(Errno::EHOSTUNREACH) => {
                tracing::warn!(node = name, %error, "no way to the node; plain routes need all nodes on one network, else use VXLAN");
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Nodes that claim what another one had get it, where that one gave it up.
    fn inherit(&mut self, config: &Config, from: &str, old: &Node, socket: &mut Socket) -> Result<(), Error> {
        let claims = |node: &Node| {
            let shared = |range: &IpNet| old.pod_cidrs.iter().any(|had| overlap(*had, *range));
            node.pod_cidrs.iter().any(shared)
                || (old.wireguard_key.is_some() && node.wireguard_key == old.wireguard_key)
        };
        let heirs = self.others.iter().filter(|(name, node)| ***name != *from && claims(node));
        let heirs: Vec<(Arc<str>, Node)> = heirs.map(|(name, node)| (name.clone(), node.clone())).collect();
        for (name, node) in heirs {
            let now = self.wanted(config, &name, &node);
            self.lead(config, &name, None, Some(&node), &now, socket)?;
        }
        Ok(())
    }

    /// Removes the routes that an earlier daemon made to nodes that are gone since.
    fn sweep(&self, config: &Config, socket: &mut Socket) -> Result<(), Error> {
        for family in [Family::V4, Family::V6] {
            for known in route::routes(socket, family)?.into_iter().filter(|known| known.protocol == ROUTE_PROTOCOL) {
                let to = known.route.destination;
                let own = config.pod_cidrs.iter().chain(&config.service_cidrs).any(|range| range.contains(&to));
                if !own && !self.others.values().any(|node| node.pod_cidrs.contains(&to)) {
                    let mut batch = Batch::default();
                    route::delete_route(&mut batch, to);
                    absent_is_fine(socket.execute(&batch))?;
                }
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
        for range in node.pod_cidrs.iter().copied() {
            let family = Family::of(range.addr());
            if config.pod_cidrs.iter().any(|own| overlap(*own, range)) {
                tracing::error!(node = name, %range, "the node claims pod addresses that are this node's; no route is made");
                continue;
            }
            // All nodes decide alike: the first by name.
            let mut before = self.others.iter().take_while(|(other, _)| &***other < name);
            let first = before.find(|(_, node)| node.pod_cidrs.iter().any(|other| overlap(*other, range)));
            if let Some((first, _)) = first {
                tracing::error!(node = name, %range, %first, "the node claims pod addresses of another; no route is made");
                continue;
            }
            let route =
                match (self.vxlan, &self.tunnel) {
                    // A node whose key is not known yet has its route too: nothing is sent to it in the clear.
                    (_, Some(tunnel)) => Some(Route {
                        destination: range,
                        link: Some(tunnel.link),
                        gateway: None,
                        onlink: false,
                        source: config.gateway(family),
                    }),
                    (Some(vxlan), None) => {
                        let gateway = gateway_of(range);
                        Some(Route {
                            destination: range,
                            link: Some(vxlan),
                            gateway: Some(gateway),
                            onlink: true,
                            source: config.gateway(family),
                        })
                    }
                    (None, None) => node.ips.iter().find(|address| Family::of(**address) == family).map(|address| {
                        Route { destination: range, link: None, gateway: Some(*address), onlink: false, source: None }
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
        for name in [config.bridge.clone(), vxlan_name(config), wireguard::name(config)] {
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

fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

fn gateway_of(range: IpNet) -> IpAddr {
    match range.network() {
        IpAddr::V4(network) => IpAddr::V4(u32::from(network).saturating_add(1).into()),
        IpAddr::V6(network) => IpAddr::V6(u128::from(network).saturating_add(1).into()),
    }
}

/// Where packets for a node's pods are sent in an overlay, which speaks the family of our first address and no other.
fn peer(config: &Config, node: &Node) -> Option<IpAddr> {
    let ours = config.node_ips.first()?;
    node.ips.iter().copied().find(|address| address.is_ipv4() == ours.is_ipv4())
}

fn vxlan_name(config: &Config) -> String {
    suffixed(config, "vx")
}

/// The name of a second link of the node's.
fn suffixed(config: &Config, suffix: &str) -> String {
    /// Longest name of a link.
    const MAX_CHARS: usize = 15;
    config.bridge.chars().take(MAX_CHARS - suffix.len()).chain(suffix.chars()).collect()
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

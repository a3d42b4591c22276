//! Keys and values of the tables' sets, as bytes in the kernel's order.

use std::net::{IpAddr, SocketAddr};

use super::compile::{FrontKey, Place};
use crate::model::Protocol;
use crate::nft::{Element, Field, SetData, SetSpec, Value};
use crate::{Config, Family};

/// Verdict map of Service addresses.
pub(crate) const SERVICES: &str = "services";
/// Verdict map of Service addresses for connections from outside of the cluster.
pub(crate) const EXTERNAL: &str = "external";
/// Verdict map of node ports.
pub(crate) const NODE_PORTS: &str = "node-ports";
/// Verdict map of node ports for connections from outside of the cluster.
pub(crate) const NODE_PORTS_EXTERNAL: &str = "node-ports-external";
/// From a front and a number to an endpoint.
pub(crate) const ENDPOINTS: &str = "endpoints";
/// From a client and a front to the endpoint it had last.
pub(crate) const AFFINITY: &str = "affinity";
/// The same for connections that must stay on the node.
pub(crate) const AFFINITY_LOCAL: &str = "affinity-local";
/// Fronts and the sources they are open to.
pub(crate) const ALLOWED: &str = "allowed-sources";
/// From a local address (or any) and port to a pod.
pub(crate) const HOST_PORTS: &str = "host-ports";
/// Local pods' addresses, doubled: a connection of a pod to itself.
pub(crate) const HAIRPIN: &str = "hairpin";
/// What is answered on this node without connection tracking.
pub(crate) const UNTRACKED: &str = "untracked";
/// Local addresses at which node ports are reached.
pub(crate) const NODE_ADDRESSES: &str = "node-addresses";
/// From a local pod to the chain of what it may connect to.
pub(crate) const POLICY_EGRESS: &str = "policy-egress";
/// From a local pod to the chain of what may connect to it.
pub(crate) const POLICY_INGRESS: &str = "policy-ingress";

/// Clients remembered at once; the kernel forgets none before its time, so more clients than this are balanced without memory.
const AFFINITY_MAX_CLIENTS: u32 = 262_144;

/// Numbers of endpoints for connections that must stay on the node start here.
pub(crate) const LOCAL_OFFSET: u32 = 1 << 16;

/// The name of a front's verdict map.
pub(crate) fn map_of(place: Place) -> &'static str {
    match place {
        Place::Services => SERVICES,
        Place::External => EXTERNAL,
        Place::NodePorts => NODE_PORTS,
        Place::NodePortsExternal => NODE_PORTS_EXTERNAL,
    }
}

/// The sets of a table.
pub(crate) fn sets(config: &Config, family: Family) -> Vec<(&'static str, SetSpec)> {
    use Field::{Integer, Port, Protocol as Proto};
    let address = Field::Address(family);
    let front = vec![address, Proto, Port];
    let endpoint = || SetData::Fields(vec![address, Port]);
    let with = |more: &[Field]| front.iter().chain(more).copied().collect::<Vec<_>>();
    let clients = || SetSpec {
        dynamic: Some(AFFINITY_MAX_CLIENTS),
        ..SetSpec::new(vec![address, address, Proto, Port], endpoint())
    };
    let mut sets = vec![
        (SERVICES, SetSpec::new(front.clone(), SetData::Verdict)),
        (EXTERNAL, SetSpec::new(front.clone(), SetData::Verdict)),
        (NODE_PORTS, SetSpec::new(vec![Proto, Port], SetData::Verdict)),
        (NODE_PORTS_EXTERNAL, SetSpec::new(vec![Proto, Port], SetData::Verdict)),
        (ENDPOINTS, SetSpec::new(with(&[Integer]), endpoint())),
        (AFFINITY, clients()),
        (AFFINITY_LOCAL, clients()),
        (ALLOWED, SetSpec { interval: true, ..SetSpec::new(with(&[address]), SetData::None) }),
        (HOST_PORTS, SetSpec::new(front.clone(), endpoint())),
        (HAIRPIN, SetSpec::new(vec![address, address], SetData::None)),
        (UNTRACKED, SetSpec::new(front, SetData::None)),
        (POLICY_EGRESS, SetSpec::new(vec![address], SetData::Verdict)),
        (POLICY_INGRESS, SetSpec::new(vec![address], SetData::Verdict)),
    ];
    if !config.node_port_addresses.is_empty() {
        sets.push((NODE_ADDRESSES, SetSpec { interval: true, ..SetSpec::new(vec![address, address], SetData::None) }));
    }
    sets
}

/// Builds the bytes of a concatenation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Key(Vec<u8>);

impl Key {
    pub(crate) fn address(mut self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.0.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => self.0.extend_from_slice(&address.octets()),
        }
        self
    }

    pub(crate) fn protocol(self, protocol: Protocol) -> Self {
        self.protocol_number(protocol.number())
    }

    pub(crate) fn protocol_number(mut self, number: u8) -> Self {
        self.0.extend_from_slice(&[number, 0, 0, 0]);
        self
    }

    pub(crate) fn port(mut self, port: u16) -> Self {
        let [high, low] = port.to_be_bytes();
        self.0.extend_from_slice(&[high, low, 0, 0]);
        self
    }

    pub(crate) fn number(mut self, number: u32) -> Self {
        self.0.extend_from_slice(&number.to_ne_bytes());
        self
    }

    pub(crate) fn endpoint(self, endpoint: SocketAddr) -> Self {
        self.address(endpoint.ip()).port(endpoint.port())
    }

    /// Address, protocol and port of a front.
    pub(crate) fn front(self, address: IpAddr, protocol: Protocol, port: u16) -> Self {
        self.address(address).protocol(protocol).port(port)
    }

    pub(crate) fn bytes(self) -> Box<[u8]> {
        self.0.into_boxed_slice()
    }

    pub(crate) fn element(self) -> Element {
        Element { key: self.bytes(), end: None }
    }

    /// The range from this key to `end`, both inside.
    pub(crate) fn until(self, end: Self) -> Element {
        Element { key: self.bytes(), end: Some(end.bytes()) }
    }

    pub(crate) fn data(self) -> Value {
        Value::Data(self.bytes())
    }
}

/// A front's key in its verdict map.
pub(crate) fn front_element(key: &FrontKey) -> Element {
    match key.place {
        Place::Services | Place::External => Key::default().front(key.address, key.protocol, key.port).element(),
        Place::NodePorts | Place::NodePortsExternal => Key::default().protocol(key.protocol).port(key.port).element(),
    }
}

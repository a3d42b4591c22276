//! Forgetting connections (`linux/netfilter/nfnetlink_conntrack.h`): a UDP sender that never pauses keeps its connection, and with it an endpoint that is
//! gone, for ever.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::Family;
use crate::model::Protocol;
use crate::netlink::{Batch, NetlinkError, Socket, find, messages};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// Bytes of `struct nfgenmsg`.
const HEADER_BYTES: usize = 4;

/// Which connections are stale.
#[derive(Debug, Default)]
pub(crate) struct Stale {
    /// Addresses of pods that are gone.
    pub(crate) pods: HashSet<IpAddr>,
    /// Fronts of UDP whose endpoints changed, with those that they have now. An unspecified address is any local one.
    pub(crate) fronts: HashMap<SocketAddr, HashSet<SocketAddr>>,
}

impl Stale {
    pub(crate) fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.fronts.is_empty()
    }

    /// Whether a connection to `to`, answered by `from`, is to be forgotten.
    fn contains(&self, to: SocketAddr, from: SocketAddr) -> bool {
        if self.pods.contains(&from.ip()) {
            return true;
        }
        let any = SocketAddr::new(Family::of(to.ip()).unspecified(), to.port());
        let front = match self.fronts.get(&to) {
            Some(endpoints) => Some(endpoints),
            // What was not translated is no connection to a node port.
            None if to != from => self.fronts.get(&any),
            None => None,
        };
        front.is_some_and(|endpoints| !endpoints.contains(&from))
    }
}

/// A connection: its first direction as the kernel gave it, where it went, and who answers.
struct Connection {
    original: Vec<u8>,
    to: SocketAddr,
    from: SocketAddr,
}

/// Forgets the stale UDP connections of a family.
pub(crate) fn forget(socket: &mut Socket, family: Family, stale: &Stale) -> Result<(), NetlinkError> {
    let header = [if family == Family::V4 { 2 } else { 10 }, 0, 0, 0];
    let mut list = Batch::default();
    list.push("list connections", (SUBSYSTEM << 8) | GET, REQUEST | DUMP, &header, |_| ());
    let mut found = Vec::new();
    socket.request(&list, |_, payload| {
        found.extend(connection(payload).filter(|connection| stale.contains(connection.to, connection.from)));
    })?;
    for connection in found {
        let mut delete = Batch::default();
        delete.push("forget a connection", (SUBSYSTEM << 8) | DELETE, REQUEST | ACK, &header, |a| {
            a.nest_bytes(CTA_TUPLE_ORIG, &connection.original);
        });
        match socket.execute(&delete) {
            // It ended by itself meanwhile.
            Err(error) if error.is(Errno::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

fn connection(payload: &[u8]) -> Option<Connection> {
    let attributes = payload.get(HEADER_BYTES..)?;
    let original = find(attributes, CTA_TUPLE_ORIG)?;
    let (_, to) = ends(original)?;
    let (from, _) = ends(find(attributes, CTA_TUPLE_REPLY)?)?;
    Some(Connection { original: original.to_vec(), to, from })
}

/// Source and destination of a UDP tuple.
fn ends(tuple: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let protocol = find(tuple, CTA_TUPLE_PROTO)?;
    if find(protocol, CTA_PROTO_NUM)? != [Protocol::Udp.number()] {
        return None;
    }
    let port = |kind| find(protocol, kind).and_then(|bytes| Some(u16::from_be_bytes(bytes.try_into().ok()?)));
    let addresses = find(tuple, CTA_TUPLE_IP)?;
    let address = |four: u16| {
        let v4 = find(addresses, four).and_then(|bytes| Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)));
        v4.or_else(|| find(addresses, four + 2).and_then(|bytes| Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?))))
    };
    const SOURCE: u16 = 1;
    const DESTINATION: u16 = 2;
    Some((
        SocketAddr::new(address(SOURCE)?, port(CTA_PROTO_SRC_PORT)?),
        SocketAddr::new(address(DESTINATION)?, port(CTA_PROTO_DST_PORT)?),
    ))
}

/// Reads the messages of a datagram, for fuzzers.
pub(crate) fn parse_any(bytes: &[u8]) {
    messages(bytes).for_each(|message| drop(connection(message.payload)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_leads_nowhere_is_stale() {
        let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
        let endpoints = HashSet::from([socket("10.42.0.5:53")]);
        let stale = Stale {
            pods: HashSet::from(["10.42.0.9".parse().unwrap()]),
            fronts: HashMap::from([(socket("10.43.0.7:53"), endpoints.clone()), (socket("0.0.0.0:30053"), endpoints)]),
        };
        for (to, from, wanted) in [
            ("10.43.0.7:53", "10.42.0.5:53", false),
            ("10.43.0.7:53", "10.42.0.6:53", true),
            ("10.43.0.7:53", "10.43.0.7:53", true),
            ("10.43.0.7:54", "10.42.0.6:53", false),
            ("192.0.2.1:30053", "10.42.0.6:53", true),
            ("192.0.2.1:30053", "10.42.0.5:53", false),
            ("192.0.2.1:30053", "192.0.2.1:30053", false),
            ("192.0.2.1:9", "10.42.0.9:9", true),
        ] {
            assert_eq!(stale.contains(socket(to), socket(from)), wanted, "{to} {from}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            connection(&bytes);
        }
    }
}

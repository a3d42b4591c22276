//! Entry points for fuzzers: what reads bytes that others wrote.

use crate::dns;
use crate::netlink::{route, wireguard};
use crate::{Config, conntrack};

/// A datagram to the DNS server, and the reply to it if there is one, encoded.
pub fn dns_question(bytes: &[u8]) -> Option<Vec<u8>> {
    dns::reply_to(&Config::new("/nowhere", "fuzz"), bytes)
}

/// An answer of the kernel: links, routes, WireGuard peers, connections.
pub fn netlink_answer(bytes: &[u8]) {
    route::parse_any(bytes);
    wireguard::parse_any(bytes);
    conntrack::parse_any(bytes);
}

use proptest::prelude::*;

use super::peers::{Cell, Grant, cells};
use crate::model::Protocol;

fn grants() -> impl Strategy<Value = Vec<Grant>> {
    let range = (0_u128..40, 0_u128..12).prop_map(|(low, len)| (low, low + len));
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)];
    let ports = proptest::option::of(
        (protocol, 0_u16..20, 0_u16..8).prop_map(|(protocol, low, len)| (protocol, low, low + len)),
    );
    let grant = (proptest::collection::vec(range, 0..4), ports).prop_map(|(peers, ports)| Grant { peers, ports });
    proptest::collection::vec(grant, 0..6)
}

fn in_cell(cell: &Cell, peer: u128, protocol: u8, port: u16) -> bool {
    (cell.peers.0..=cell.peers.1).contains(&peer)
        && (cell.protocols.0..=cell.protocols.1).contains(&protocol)
        && (cell.ports.0..=cell.ports.1).contains(&port)
}

proptest! {
    #[test]
    fn cells_are_the_grants_and_do_not_overlap(grants in grants()) {
        let cells = cells(&grants);
        for peer in 0..55 {
            for protocol in [1, 6, 17] {
                for port in 0..30 {
                    let granted = grants.iter().any(|grant| {
                        grant.peers.iter().any(|(low, high)| (*low..=*high).contains(&peer))
                            && grant.ports.is_none_or(|(p, low, high)| p.number() == protocol && (low..=high).contains(&port))
                    });
                    let inside = cells.iter().filter(|cell| in_cell(cell, peer, protocol, port)).count();
                    prop_assert_eq!(inside, usize::from(granted), "peer {}, protocol {}, port {}", peer, protocol, port);
                }
            }
        }
    }
}

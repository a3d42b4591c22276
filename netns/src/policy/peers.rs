//! Whom and which ports a policy rule lets through, as ranges that do not overlap (the kernel's sets of ranges take no others). Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Family;
use crate::model::Protocol;

/// A range of addresses as numbers, both ends inside.
pub(crate) type Range = (u128, u128);

/// A range of peers, protocols and ports, all ends inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) peers: Range,
    pub(crate) protocols: (u8, u8),
    pub(crate) ports: (u16, u16),
}

/// Addresses that may use some ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) peers: Vec<Range>,
    /// `None`: every protocol and port.
    pub(crate) ports: Option<(Protocol, u16, u16)>,
}

/// The number of an address.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

/// The address of a number.
pub(crate) fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        Family::V6 => IpAddr::V6(number.into()),
    }
}

/// Every address of a family.
pub(crate) fn everyone(family: Family) -> Range {
    match family {
        Family::V4 => (0, u128::from(u32::MAX)),
        Family::V6 => (0, u128::MAX),
    }
}

/// An IP block without its exceptions.
pub(crate) fn block(cidr: IpNet, except: &[IpNet]) -> Vec<Range> {
    let range = |net: &IpNet| (number(net.network()), number(net.broadcast()));
    let mut left = vec![range(&cidr)];
    for hole in except.iter().filter(|hole| Family::of(hole.addr()) == Family::of(cidr.addr())).map(range) {
        left = left
            .into_iter()
            .flat_map(|(low, high)| {
                let below = (low < hole.0).then(|| (low, high.min(hole.0 - 1)));
                let above = (high > hole.1).then(|| (low.max(hole.1 + 1), high));
                [below, above]
            })
            .flatten()
            .collect();
    }
    left
}

/// Merges ranges into the fewest that are the same together.
pub(crate) fn merge(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if last.1 == u128::MAX || low <= last.1 + 1 => last.1 = last.1.max(high),
            _ => merged.push((low, high)),
        }
    }
    merged
}

/// The union of grants as cells of which no two overlap.
pub(crate) fn cells(grants: &[Grant]) -> Vec<Cell> {
    let all = merge(
        grants.iter().filter(|grant| grant.ports.is_none()).flat_map(|grant| grant.peers.iter().copied()).collect(),
    );
    let mut cells: Vec<Cell> =
        all.iter().map(|peers| Cell { peers: *peers, protocols: (0, u8::MAX), ports: (0, u16::MAX) }).collect();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        let of_protocol: Vec<(&Grant, u16, u16)> = grants
            .iter()
            .filter_map(|grant| grant.ports.filter(|(p, ..)| *p == protocol).map(|(_, low, high)| (grant, low, high)))
            .collect();
        // Between two neighbouring starts the same grants apply to every port.
        let starts: BTreeSet<u32> =
            of_protocol.iter().flat_map(|(_, low, high)| [u32::from(*low), u32::from(*high) + 1]).collect();
        for (start, end) in starts.iter().zip(starts.iter().skip(1)) {
            let covers = |low: u16, high: u16| u32::from(low) <= *start && *start <= u32::from(high);
            let inside = of_protocol.iter().filter(|(_, low, high)| covers(*low, *high));
            let peers = merge(inside.flat_map(|(grant, ..)| grant.peers.iter().copied()).collect());
            let ports = (u16::try_from(*start).unwrap_or(u16::MAX), u16::try_from(end - 1).unwrap_or(u16::MAX));
            let number = protocol.number();
            // What is granted on every port is not granted again.
            cells.extend(subtract(peers, &all).into_iter().map(|peers| Cell {
                peers,
                protocols: (number, number),
                ports,
            }));
        }
    }
    cells
}

fn subtract(ranges: Vec<Range>, holes: &[Range]) -> Vec<Range> {
    holes.iter().fold(ranges, |ranges, hole| {
        ranges
            .into_iter()
            .flat_map(|(low, high)| {
                if high < hole.0 || low > hole.1 {
                    return [Some((low, high)), None];
                }
                let below = (low < hole.0).then(|| (low, hole.0 - 1));
                let above = (high > hole.1).then(|| (hole.1 + 1, high));
                [below, above]
            })
            .flatten()
            .collect()
    })
}

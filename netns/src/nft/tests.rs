//! What a table does to the first packet of a connection: the kernel's evaluation, read off its documentation, as slow and plain as can be.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use super::expression::{CmpOp, Expr, FibResult, NatKind, PayloadBase, Reject, Verdict};
use super::set::{Element, Value};
use super::table::Table;

/// A packet and what the kernel knows beside it.
#[derive(Clone, Debug)]
pub(crate) struct Packet<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
    pub(crate) mark: u32,
    /// What the host's routing table calls local.
    pub(crate) local: &'a HashSet<IpAddr>,
    pub(crate) random: u32,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Accepted,
    Dropped,
    Refused,
    Led(SocketAddr),
}

enum Step {
    Break,
    Next,
    Return,
    Done(Outcome),
}

/// Walks a base chain.
pub(crate) fn walk(table: &Table, chain: &str, packet: &mut Packet<'_>) -> Outcome {
    match chain_step(table, chain, packet) {
        Step::Done(outcome) => outcome,
        _ => Outcome::Accepted,
    }
}

fn chain_step(table: &Table, chain: &str, packet: &mut Packet<'_>) -> Step {
    for rule in &table.chains[chain].rules {
        let mut registers = [0; 64];
        for expression in rule {
            match evaluate(table, expression, &mut registers, packet) {
                Step::Next => {}
                Step::Break => break,
                step => return step,
            }
        }
    }
    Step::Return
}

fn verdict(table: &Table, verdict: &Verdict, packet: &mut Packet<'_>) -> Step {
    match verdict {
        Verdict::Accept => Step::Done(Outcome::Accepted),
        Verdict::Drop => Step::Done(Outcome::Dropped),
        Verdict::Return => Step::Return,
        Verdict::Goto(chain) => chain_step(table, chain, packet),
        Verdict::Jump(chain) => match chain_step(table, chain, packet) {
            Step::Return => Step::Break,
            step => step,
        },
    }
}

fn put(registers: &mut [u8; 64], at: super::Reg, bytes: &[u8]) {
    let at = usize::from(at.0) * 4;
    let end = at + bytes.len().next_multiple_of(4);
    registers[at..end].fill(0);
    registers[at..at + bytes.len()].copy_from_slice(bytes);
}

fn octets(address: IpAddr) -> Vec<u8> {
    crate::netlink::route::octets(address)
}

fn lookup<'t>(table: &'t Table, set: &str, key: super::Reg, registers: &[u8; 64]) -> Option<&'t Value> {
    let set = &table.sets[set];
    let len = match set.spec.key.as_slice() {
        [one] => one.len(),
        all => all.iter().map(|field| field.padded()).sum(),
    };
    let at = usize::from(key.0) * 4;
    let bytes = &registers[at..at + len];
    if !set.spec.interval {
        return set.elements.get(&Element { key: bytes.into(), end: None });
    }
    let inside = |element: &Element| {
        let end = element.end.as_ref().unwrap();
        let mut start = 0;
        set.spec.key.iter().all(|field| {
            let range = start..start + field.len();
            start += field.padded();
            element.key[range.clone()] <= bytes[range.clone()] && bytes[range.clone()] <= end[range]
        })
    };
    set.elements.iter().find(|(element, _)| inside(element)).map(|(_, value)| value)
}

fn evaluate(table: &Table, expression: &Expr, registers: &mut [u8; 64], packet: &mut Packet<'_>) -> Step {
    let word =
        |registers: &[u8; 64], at: super::Reg| <[u8; 4]>::try_from(&registers[usize::from(at.0) * 4..][..4]).unwrap();
    let matched = |yes| if yes { Step::Next } else { Step::Break };
    match expression {
        Expr::Meta { key: super::MetaKey::Mark, to } => put(registers, *to, &packet.mark.to_ne_bytes()),
        Expr::Meta { key: super::MetaKey::L4Proto, to } => put(registers, *to, &[packet.protocol]),
        Expr::Meta { to, .. } => put(registers, *to, b"eth0\0\0\0\0\0\0\0\0\0\0\0\0"),
        Expr::SetMark { from } => packet.mark = u32::from_ne_bytes(word(registers, *from)),
        Expr::Payload { base: PayloadBase::Transport, offset, to, .. } => {
            assert_eq!(*offset, 2);
            put(registers, *to, &packet.port.to_be_bytes());
        }
        Expr::Payload { offset: 12 | 8, to, .. } => put(registers, *to, &octets(packet.source)),
        Expr::Payload { to, .. } => put(registers, *to, &octets(packet.destination)),
        Expr::Cmp { reg, op, value } => {
            let at = usize::from(reg.0) * 4;
            let equal = registers[at..at + value.len()] == value[..];
            return matched(equal == (*op == CmpOp::Eq));
        }
        Expr::Bitwise { from, to, mask, xor } => {
            let at = usize::from(from.0) * 4;
            let all: Vec<u8> =
                mask.iter().zip(xor).zip(&registers[at..]).map(|((mask, xor), byte)| (byte & mask) ^ xor).collect();
            put(registers, *to, &all);
        }
        Expr::Load { to, value } => put(registers, *to, value),
        Expr::Verdict(wanted) => return verdict(table, wanted, packet),
        Expr::InSet { set, key, invert } => return matched(lookup(table, set, *key, registers).is_some() != *invert),
        Expr::InNamedSet { set, key, invert } => {
            return matched(lookup(table, set, *key, registers).is_some() != *invert);
        }
        Expr::Map { map, key, to } => match lookup(table, map, *key, registers) {
            Some(Value::Data(data)) => put(registers, *to, data),
            _ => return Step::Break,
        },
        Expr::VerdictMap { map, key } => match lookup(table, map, *key, registers) {
            Some(Value::Verdict(found)) => return verdict(table, found, packet),
            _ => return Step::Break,
        },
        Expr::Update { .. } | Expr::NoTrack => {}
        Expr::Random { modulus, offset, to } => put(registers, *to, &(packet.random % modulus + offset).to_ne_bytes()),
        Expr::Fib { result, to, .. } => {
            assert_eq!(*result, FibResult::AddressType);
            let kind: u32 = if packet.local.contains(&packet.destination) { 2 } else { 1 };
            put(registers, *to, &kind.to_ne_bytes());
        }
        Expr::Ct { to, .. } => put(registers, *to, &8_u32.to_ne_bytes()),
        Expr::Nat { kind: NatKind::Source, .. } | Expr::Masquerade => return Step::Done(Outcome::Accepted),
        Expr::Nat { address, port, .. } => {
            let ip = match packet.destination {
                IpAddr::V4(_) => IpAddr::from(word(registers, *address)),
                IpAddr::V6(_) => {
                    IpAddr::from(<[u8; 16]>::try_from(&registers[usize::from(address.0) * 4..][..16]).unwrap())
                }
            };
            let [high, low, ..] = word(registers, port.unwrap());
            return Step::Done(Outcome::Led(SocketAddr::new(ip, u16::from_be_bytes([high, low]))));
        }
        Expr::Reject(Reject::TcpReset | Reject::PortUnreachable) => return Step::Done(Outcome::Refused),
    }
    Step::Next
}

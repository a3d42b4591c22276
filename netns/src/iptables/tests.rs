//! What the chains do to the first packet of a connection: the kernel's evaluation, as slow and plain as can be.

use super::compile::{Chains, HOOKS};
use super::rule::{Match, Rule, Target};
use crate::nft::tests::{Outcome, Packet};

enum Step {
    Next,
    Return,
    Done(Outcome),
}

/// Walks a packet that comes in from a link: address translation first, then filters.
pub(crate) fn walk(chains: &Chains, packet: &mut Packet<'_>) -> Outcome {
    if let Some(dropped) = hook(chains, "mangle", "PREROUTING", packet) {
        return dropped;
    }
    let to = match hook(chains, "nat", "PREROUTING", packet) {
        Some(Outcome::Led(endpoint)) => Some(endpoint),
        other => {
            assert_eq!(other, None, "the nat table only leads");
            None
        }
    };
    let asked = (packet.destination, packet.port);
    (packet.destination, packet.port) = to.map_or(asked, |to| (to.ip(), to.port()));
    let place = if packet.local.contains(&packet.destination) { "INPUT" } else { "FORWARD" };
    let refused = hook(chains, "filter", place, packet);
    (packet.destination, packet.port) = asked;
    refused.or(to.map(Outcome::Led)).unwrap_or(Outcome::Accepted)
}

fn hook(chains: &Chains, table: &'static str, hook: &str, packet: &mut Packet<'_>) -> Option<Outcome> {
    let (_, _, chain) = HOOKS.into_iter().find(|(of, kernel, _)| *of == table && *kernel == hook).unwrap();
    match step(chains, table, chain, packet) {
        Step::Done(outcome) => Some(outcome),
        _ => None,
    }
}

fn step(chains: &Chains, table: &'static str, chain: &str, packet: &mut Packet<'_>) -> Step {
    for Rule { matches, target } in &chains[&(table, chain.to_owned())] {
        if !matches.iter().all(|wanted| fits(wanted, packet)) {
            continue;
        }
        let step = match target {
            Target::Jump(chain) => match step(chains, table, chain, packet) {
                Step::Return => Step::Next,
                other => other,
            },
            Target::Goto(chain) => step(chains, table, chain, packet),
            Target::Return => Step::Return,
            Target::Drop => Step::Done(Outcome::Dropped),
            Target::Refuse { .. } => Step::Done(Outcome::Refused),
            Target::SetMark(bits) => {
                packet.mark |= bits;
                Step::Next
            }
            Target::ClearMark(bits) => {
                packet.mark &= !bits;
                Step::Next
            }
            Target::To(endpoint) => Step::Done(Outcome::Led(*endpoint)),
            Target::Masquerade | Target::SourceIs(_) | Target::NoTrack => panic!("{target:?} is not on this way"),
        };
        match step {
            Step::Next => {}
            step => return step,
        }
    }
    Step::Return
}

fn fits(wanted: &Match, packet: &mut Packet<'_>) -> bool {
    match wanted {
        Match::Source(net) => net.contains(&packet.source),
        Match::Destination(net) => net.contains(&packet.destination),
        Match::SourceRange(low, high) => (low..=high).contains(&&packet.source),
        Match::DestinationRange(low, high) => (low..=high).contains(&&packet.destination),
        Match::Protocol(number) => *number == packet.protocol,
        Match::Ports(_, low, high) => (low..=high).contains(&&packet.port),
        Match::ToHost => packet.local.contains(&packet.destination),
        Match::Mark(bits) => packet.mark & bits != 0,
        Match::NewConnection => true,
        Match::OneIn(count) => {
            packet.random = packet.random.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            ((packet.random >> 16) as usize).is_multiple_of(*count)
        }
        Match::Remember { .. } => true,
        Match::From(_) | Match::By(_) | Match::Spoofed | Match::KnownConnection | Match::Recent { .. } => false,
        Match::FromPort(..) => panic!("not on this way"),
    }
}

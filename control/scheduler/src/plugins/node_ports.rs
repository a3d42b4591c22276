//! NodePorts: a host port is given once for an address and protocol.

use super::{Context, Event, Rejection};
use crate::state::{NodeState, PodState, Shape};

const ANY: &str = "0.0.0.0";

/// Whether two pods want the same host port.
fn collide(pod: &Shape, other: &Shape) -> bool {
    pod.host_ports.iter().any(|(protocol, address, number)| {
        other.host_ports.iter().any(|(other_protocol, other_address, other_number)| {
            number == other_number
                && protocol == other_protocol
                && (address == other_address || address == ANY || other_address == ANY)
        })
    })
}

pub(super) fn filter(pod: &Shape, node: &NodeState, _: &Context<'_>) -> Result<(), Rejection> {
    if !pod.host_ports.is_empty() && node.pods.values().any(|other| collide(pod, &other.shape)) {
        return Err(Rejection::resolvable("node(s) didn't have free ports for the requested pod ports"));
    }
    Ok(())
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    match event {
        Event::Node(node) => filter(&pod.shape, node, context).is_ok(),
        Event::PodLeft(other, _) => collide(&pod.shape, &other.shape),
        _ => false,
    }
}

//! NodePorts: a host port is given once for an address and protocol.

use super::Rejection;
use crate::state::{NodeState, PodState};

const ANY: &str = "0.0.0.0";

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    let taken = pod.host_ports.iter().any(|(protocol, address, number)| {
        node.pods.values().flat_map(|other| &other.host_ports).any(|(other_protocol, other_address, other_number)| {
            number == other_number
                && protocol == other_protocol
                && (address == other_address || address == ANY || other_address == ANY)
        })
    });
    if taken {
        return Err(Rejection::resolvable(vec!["node(s) didn't have free ports for the requested pod ports".into()]));
    }
    Ok(())
}

//! NodeName: a pod that names its node goes nowhere else.

use super::Rejection;
use crate::state::{NodeState, PodState};

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    match pod.spec().and_then(|spec| spec.node_name.as_deref()) {
        Some(name) if !name.is_empty() && name != node.name() => {
            Err(Rejection::unresolvable("node(s) didn't match the requested node name"))
        }
        _ => Ok(()),
    }
}

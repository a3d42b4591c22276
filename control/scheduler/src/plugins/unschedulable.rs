//! NodeUnschedulable: cordoned nodes take only pods that tolerate it.

use super::{Context, Event, Rejection, taints};
use crate::state::{NodeState, PodState, Shape};

const TAINT: &str = "node.kubernetes.io/unschedulable";

pub(super) fn filter(pod: &Shape, node: &NodeState, _: &Context<'_>) -> Result<(), Rejection> {
    if !node.is_cordoned() || taints::tolerates(pod, TAINT, "", "NoSchedule") {
        return Ok(());
    }
    Err(Rejection::unresolvable("node(s) were unschedulable"))
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    matches!(event, Event::Node(node) if filter(&pod.shape, node, context).is_ok())
}

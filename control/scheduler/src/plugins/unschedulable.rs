//! NodeUnschedulable: cordoned nodes take only pods that tolerate it.

use super::{Rejection, taints};
use crate::state::{NodeState, PodState};

const TAINT: &str = "node.kubernetes.io/unschedulable";

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    let cordoned = node.node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true);
    if !cordoned || taints::tolerates(pod, TAINT, "", "NoSchedule") {
        return Ok(());
    }
    Err(Rejection::unresolvable("node(s) were unschedulable"))
}

//! NodeResourcesFit: a node takes a pod when its requests fit beside those of the pods that are there; the emptiest node
//! gets the best mark (LeastAllocated).

use super::{MAX_SCORE, Rejection};
use crate::state::{NodeState, PodState};

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    let mut reasons = Vec::new();
    let mut unresolvable = false;
    if node.pods.len() + 1 > node.allowed_pods {
        reasons.push("Too many pods".to_owned());
    }
    let mut check = |name: &str, asked: i64, has: i64, taken: i64| {
        if asked > 0 && asked > has - taken {
            reasons.push(format!("Insufficient {name}"));
            unresolvable |= asked > has;
        }
    };
    let (asked, has, taken) = (&pod.requests, &node.allocatable, &node.requested);
    check("cpu", asked.cpu_millis, has.cpu_millis, taken.cpu_millis);
    check("memory", asked.memory_bytes, has.memory_bytes, taken.memory_bytes);
    check("ephemeral-storage", asked.ephemeral_bytes, has.ephemeral_bytes, taken.ephemeral_bytes);
    for (name, amount) in &asked.others {
        let of =
            |list: &std::collections::BTreeMap<std::sync::Arc<str>, i64>| list.get(name).copied().unwrap_or_default();
        check(name, *amount, of(&has.others), of(&taken.others));
    }
    if reasons.is_empty() { Ok(()) } else { Err(Rejection { reasons, unresolvable }) }
}

/// The free share after the pod is placed, averaged over CPU and memory.
pub(super) fn score(pod: &PodState, node: &NodeState) -> i64 {
    let free = |has: i64, taken: i64| {
        if has == 0 || taken > has { 0 } else { (has - taken) * MAX_SCORE / has }
    };
    let (asked, has, taken) = (&pod.scored_requests, &node.allocatable, &node.scored_requested);
    let cpu = free(has.cpu_millis, taken.cpu_millis + asked.cpu_millis);
    let memory = free(has.memory_bytes, taken.memory_bytes + asked.memory_bytes);
    (cpu + memory) / 2
}

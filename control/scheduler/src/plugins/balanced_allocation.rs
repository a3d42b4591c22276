//! NodeResourcesBalancedAllocation: better marks where CPU and memory are used to the same degree.

use super::MAX_SCORE;
use crate::state::{NodeState, PodState};

pub(super) fn score(pod: &PodState, node: &NodeState) -> i64 {
    let share = |has: i64, taken: i64| {
        if has == 0 { 1.0 } else { (taken as f64 / has as f64).min(1.0) }
    };
    let (asked, has, taken) = (&pod.requests, &node.allocatable, &node.requested);
    let cpu = share(has.cpu_millis, taken.cpu_millis + asked.cpu_millis);
    let memory = share(has.memory_bytes, taken.memory_bytes + asked.memory_bytes);
    // Of two values, the standard deviation is half their distance.
    let deviation = (cpu - memory).abs() / 2.0;
    ((1.0 - deviation) * MAX_SCORE as f64) as i64
}

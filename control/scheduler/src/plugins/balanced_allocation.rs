//! NodeResourcesBalancedAllocation: better marks where the resources are used to the same degree.

use super::{Context, MAX_SCORE, resources_fit};
use crate::state::{NodeState, Shape};

pub(super) fn score(pod: &Shape, node: &NodeState, context: &Context<'_>) -> i64 {
    let names = &context.args.balanced_resources;
    // A pod that asks for nothing changes no balance.
    if names.iter().all(|(name, _)| pod.requests.get(name) == 0) {
        return 0;
    }
    let share = |(name, _): &(String, i64)| {
        let (has, taken) = resources_fit::shares(pod, node, name, false)?;
        Some((taken as f64 / has as f64).min(1.0))
    };
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for share in names.iter().filter_map(share) {
        count += 1.0;
        sum += share;
        squares += share * share;
    }
    let deviation = if count == 0.0 { 0.0 } else { (squares / count - (sum / count).powi(2)).max(0.0).sqrt() };
    ((1.0 - deviation) * MAX_SCORE as f64) as i64
}

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
    let shares = || names.iter().filter_map(share);
    let count = shares().count();
    // Of two the deviation is half of the difference; written so, it rounds as the reference does.
    let deviation = if count > 2 {
        let mean = shares().sum::<f64>() / count as f64;
        (shares().map(|share| (share - mean) * (share - mean)).sum::<f64>() / count as f64).sqrt()
    } else if let [Some(first), Some(second)] = [shares().next(), shares().nth(1)] {
        ((first - second) / 2.0).abs()
    } else {
        0.0
    };
    ((1.0 - deviation) * MAX_SCORE as f64) as i64
}

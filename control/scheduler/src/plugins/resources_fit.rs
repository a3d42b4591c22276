//! NodeResourcesFit: a node takes a pod when its requests fit beside those of the pods that are there. Marks go to the
//! emptiest node (LeastAllocated), the fullest (MostAllocated), or by a function of the share used
//! (RequestedToCapacityRatio).

use super::{Context, Event, MAX_SCORE, Rejection};
use crate::config::Strategy;
use std::sync::Arc;

use crate::state::{NodeState, PodState, Resources, Shape};

/// The resources that a pod asks for, with what the node has and what its pods take.
fn asked<'a>(pod: &'a Shape, node: &'a NodeState) -> impl Iterator<Item = (&'a str, i64, i64, i64)> {
    let (asked, has, taken) = (&pod.requests, &node.allocatable, &node.requested);
    let plain = [
        ("cpu", asked.cpu_millis, has.cpu_millis, taken.cpu_millis),
        ("memory", asked.memory_bytes, has.memory_bytes, taken.memory_bytes),
        ("ephemeral-storage", asked.ephemeral_bytes, has.ephemeral_bytes, taken.ephemeral_bytes),
    ];
    let others = asked.others.iter().map(|(name, amount)| (&**name, *amount, has.get(name), taken.get(name)));
    plain.into_iter().chain(others).filter(|(_, amount, ..)| *amount > 0)
}

fn is_ignored(name: &str, context: &Context<'_>) -> bool {
    let args = context.args;
    args.ignored_resources.iter().any(|ignored| ignored == name)
        || name.split_once('/').is_some_and(|(group, _)| args.ignored_resource_groups.iter().any(|g| g == group))
}

pub(super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    let mut rejection = Rejection::default();
    if node.pods.len() + 1 > node.allowed_pods {
        rejection.reasons.push("Too many pods".to_owned());
    }
    for (name, amount, has, taken) in asked(pod, node) {
        if amount > has - taken && !is_ignored(name, context) {
            rejection.reasons.push(format!("Insufficient {name}"));
            rejection.unresolvable |= amount > has;
        }
    }
    if rejection.reasons.is_empty() { Ok(()) } else { Err(rejection) }
}

/// What a node has of a resource and what would be taken of it; `None` if it does not count.
pub(super) fn shares(pod: &Shape, node: &NodeState, name: &str, with_defaults: bool) -> Option<(i64, i64)> {
    let has = node.allocatable.get(name);
    let plain = matches!(name, "cpu" | "memory" | "ephemeral-storage");
    if has == 0 || (!plain && pod.requests.get(name) == 0) {
        return None;
    }
    let (taken, asked) = if with_defaults && plain {
        (&node.scored_requested, &pod.scored_requests)
    } else {
        (&node.requested, &pod.requests)
    };
    Some((has, taken.get(name) + asked.get(name)))
}

/// The mark for a share in percent, by straight lines between the points of a shape (percent, mark).
fn on_line(points: &[(i64, i64)], percent: i64) -> i64 {
    let Some(at) = points.iter().position(|(utilization, _)| percent <= *utilization) else {
        return points.last().map_or(0, |(_, mark)| *mark);
    };
    let (right, high) = points[at];
    match at.checked_sub(1).map(|before| points[before]) {
        Some((left, low)) => low + (high - low) * (percent - left) / (right - left),
        None => high,
    }
}

pub(super) fn score(pod: &Shape, node: &NodeState, context: &Context<'_>) -> i64 {
    let (mut sum, mut weights) = (0, 0);
    for (name, weight) in &context.args.scored_resources {
        let Some((has, taken)) = shares(pod, node, name, true) else {
            continue;
        };
        let mark = match &context.args.strategy {
            Strategy::LeastAllocated if taken > has => 0,
            Strategy::LeastAllocated => (has - taken) * MAX_SCORE / has,
            Strategy::MostAllocated => taken.min(has) * MAX_SCORE / has,
            Strategy::RequestedToCapacityRatio(points) => {
                let mark = on_line(points, if taken > has { 100 } else { taken * 100 / has });
                if mark == 0 {
                    continue;
                }
                mark
            }
        };
        sum += mark * weight;
        weights += weight;
    }
    match (&context.args.strategy, weights) {
        (_, 0) => 0,
        (Strategy::RequestedToCapacityRatio(_), _) => (sum as f64 / weights as f64).round() as i64,
        _ => sum / weights,
    }
}

/// Whether the pod fits when only those stay that it must not push away.
fn fits_beside(pod: &PodState, node: &NodeState, context: &Context<'_>) -> bool {
    let shape = &pod.shape;
    // Who has been promised a place has pushed away whom it could.
    let pushes = !shape.never_preempts && context.cache.nominated(&pod.uid).is_none();
    let comes_first = |other: &&Arc<PodState>| other.uid != pod.uid && other.shape.priority >= shape.priority;
    let rivals = node.nominated.iter().filter(comes_first);
    let standing = node.pods.values().filter(|other| !pushes || other.shape.priority >= shape.priority);
    let mut beside = Resources::default();
    let mut count = 1;
    for other in standing.chain(rivals) {
        beside.add(&other.shape.requests, 1);
        count += 1;
    }
    count <= node.allowed_pods && asked(shape, node).all(|(name, amount, has, _)| amount <= has - beside.get(name))
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    match event {
        Event::Node(node) | Event::PodLeft(_, Some(node)) => fits_beside(pod, node, context),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::on_line;

    #[test]
    fn marks_lie_on_the_lines_between_points() {
        let points = [(0, 0), (50, 100), (100, 20)];
        for (percent, mark) in [(0, 0), (25, 50), (50, 100), (75, 60), (100, 20)] {
            assert_eq!(on_line(&points, percent), mark, "{percent}");
        }
        assert_eq!(on_line(&[(10, 30), (20, 40)], 5), 30);
        assert_eq!(on_line(&[(10, 30), (20, 40)], 90), 40);
    }
}

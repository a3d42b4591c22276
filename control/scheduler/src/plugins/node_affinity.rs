//! NodeAffinity: node selectors and required terms keep pods to nodes with certain labels; preferred terms earn marks.

use super::{Context, Event, Rejection};
use crate::state::selector::any_matches;
use crate::state::{NodeState, PodState, Shape};

/// Whether a node is one of those that the pod asks for.
pub(super) fn matches(pod: &Shape, node: &NodeState) -> bool {
    pod.node_selector.matches(node.labels())
        && pod.node_terms.as_ref().is_none_or(|terms| any_matches(terms, node.name(), node.labels()))
}

pub(super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    let added = context.args.added_affinity.as_ref();
    if added.is_some_and(|terms| !any_matches(terms, node.name(), node.labels())) {
        return Err(Rejection::unresolvable("node(s) didn't match scheduler-enforced node affinity"));
    }
    if matches(pod, node) {
        return Ok(());
    }
    Err(Rejection::unresolvable("node(s) didn't match Pod's node affinity/selector"))
}

/// The weights of the preferred terms that the node satisfies.
pub(super) fn score(pod: &Shape, node: &NodeState, context: &Context<'_>) -> i64 {
    let preferred = pod.preferred_nodes.iter().chain(&context.args.added_preferred);
    preferred.filter(|(_, term)| term.matches(node.name(), node.labels())).map(|(weight, _)| weight).sum()
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    matches!(event, Event::Node(node) if filter(&pod.shape, node, context).is_ok())
}

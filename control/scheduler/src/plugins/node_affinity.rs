//! NodeAffinity: node selectors and required terms keep pods to nodes with certain labels; preferred terms earn marks.

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm};

use super::Rejection;
use crate::state::{NodeState, PodState};

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = || requirement.values.iter().flatten().map(String::as_str);
    let number = |text: &str| text.parse::<i64>().ok();
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values().any(|listed| listed == value)),
        "NotIn" => !value.is_some_and(|value| values().any(|listed| listed == value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => value.and_then(number).zip(values().next().and_then(number)).is_some_and(|(has, bound)| has > bound),
        "Lt" => value.and_then(number).zip(values().next().and_then(number)).is_some_and(|(has, bound)| has < bound),
        _ => false,
    }
}

/// Whether a node satisfies a term; an empty term matches nothing.
pub(super) fn matches(term: &NodeSelectorTerm, node: &NodeState) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if labels.is_empty() && fields.is_empty() {
        return false;
    }
    labels.iter().all(|requirement| holds(requirement, node.label(&requirement.key)))
        && fields.iter().all(|requirement| requirement.key == "metadata.name" && holds(requirement, Some(node.name())))
}

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    let Some(spec) = pod.spec() else {
        return Ok(());
    };
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| node.label(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    if selected && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| matches(term, node))) {
        return Ok(());
    }
    Err(Rejection::unresolvable("node(s) didn't match Pod's node affinity/selector"))
}

/// The weights of the preferred terms that the node satisfies.
pub(super) fn score(pod: &PodState, node: &NodeState) -> i64 {
    let affinity = pod.spec().and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
    let preferred =
        affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    preferred
        .into_iter()
        .flatten()
        .filter(|term| matches(&term.preference, node))
        .map(|term| i64::from(term.weight))
        .sum()
}

//! TaintToleration: taints keep pods away that do not tolerate them; those that merely prefer none cost marks.

use k8s_openapi::api::core::v1::Toleration;

use super::{Context, Event, Rejection};
use crate::state::{NodeState, PodState, Shape};

/// Whether a toleration covers a taint (core/v1 `ToleratesTaint`).
fn covers(toleration: &Toleration, key: &str, value: &str, effect: &str) -> bool {
    fn text(field: &Option<String>) -> &str {
        field.as_deref().unwrap_or_default()
    }
    let (own_effect, own_key) = (text(&toleration.effect), text(&toleration.key));
    if (!own_effect.is_empty() && own_effect != effect) || (!own_key.is_empty() && own_key != key) {
        return false;
    }
    let number = |text: &str| text.parse::<i64>().ok();
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => text(&toleration.value) == value,
        // KEP-5471: numeric comparison.
        Some("Lt") => number(value).zip(number(text(&toleration.value))).is_some_and(|(taint, own)| taint < own),
        Some("Gt") => number(value).zip(number(text(&toleration.value))).is_some_and(|(taint, own)| taint > own),
        Some(_) => false,
    }
}

/// Whether a pod tolerates a taint.
pub(super) fn tolerates(pod: &Shape, key: &str, value: &str, effect: &str) -> bool {
    pod.tolerations.iter().any(|toleration| covers(toleration, key, value, effect))
}

pub(super) fn filter(pod: &Shape, node: &NodeState, _: &Context<'_>) -> Result<(), Rejection> {
    for taint in node.taints().iter().filter(|taint| taint.effect != "PreferNoSchedule") {
        let value = taint.value.as_deref().unwrap_or_default();
        if !tolerates(pod, &taint.key, value, &taint.effect) {
            return Err(Rejection::unresolvable("node(s) had untolerated taint(s)"));
        }
    }
    Ok(())
}

/// How many preferences the node has against the pod.
pub(super) fn score(pod: &Shape, node: &NodeState, _: &Context<'_>) -> i64 {
    let against = node.taints().iter().filter(|taint| {
        taint.effect == "PreferNoSchedule"
            && !tolerates(pod, &taint.key, taint.value.as_deref().unwrap_or_default(), &taint.effect)
    });
    i64::try_from(against.count()).unwrap_or(i64::MAX)
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    matches!(event, Event::Node(node) if filter(&pod.shape, node, context).is_ok())
}

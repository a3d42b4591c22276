//! TaintToleration: taints keep pods away that do not tolerate them; those that merely prefer none cost marks.

use k8s_openapi::api::core::v1::Toleration;

use super::Rejection;
use crate::state::{NodeState, PodState};

/// Whether a toleration covers a taint (core/v1 `ToleratesTaint`).
fn covers(toleration: &Toleration, key: &str, value: &str, effect: &str) -> bool {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let (own_effect, own_key) = (text(&toleration.effect), text(&toleration.key));
    if (!own_effect.is_empty() && own_effect != effect) || (!own_key.is_empty() && own_key != key) {
        return false;
    }
    let number = |text: &str| text.parse::<i64>().ok();
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => text(&toleration.value) == value,
        // KEP-5471: numeric comparison.
        Some("Lt") => number(value).zip(number(&text(&toleration.value))).is_some_and(|(taint, own)| taint < own),
        Some("Gt") => number(value).zip(number(&text(&toleration.value))).is_some_and(|(taint, own)| taint > own),
        Some(_) => false,
    }
}

/// Whether a pod tolerates a taint.
pub(super) fn tolerates(pod: &PodState, key: &str, value: &str, effect: &str) -> bool {
    let tolerations = pod.spec().and_then(|spec| spec.tolerations.as_ref());
    tolerations.into_iter().flatten().any(|toleration| covers(toleration, key, value, effect))
}

pub(super) fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    let taints = node.node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    for taint in taints.into_iter().flatten().filter(|taint| taint.effect != "PreferNoSchedule") {
        let value = taint.value.as_deref().unwrap_or_default();
        if !tolerates(pod, &taint.key, value, &taint.effect) {
            return Err(Rejection::unresolvable(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)));
        }
    }
    Ok(())
}

/// How many preferences the node has against the pod.
pub(super) fn score(pod: &PodState, node: &NodeState) -> i64 {
    let taints = node.node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    let against = taints.into_iter().flatten().filter(|taint| {
        taint.effect == "PreferNoSchedule"
            && !tolerates(pod, &taint.key, taint.value.as_deref().unwrap_or_default(), &taint.effect)
    });
    i64::try_from(against.count()).unwrap_or(i64::MAX)
}

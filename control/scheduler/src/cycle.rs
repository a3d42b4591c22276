//! One scheduling cycle: filter, score, choose. A function of a pod, the nodes and a random number.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::plugins::{FILTERS, Rejection, SCORES};
use crate::state::{NodeState, PodState};

/// Why no node takes a pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Unschedulable {
    /// How many nodes were looked at.
    pub(crate) nodes: usize,
    /// How many of them rejected the pod for each reason.
    pub(crate) reasons: BTreeMap<String, usize>,
}

impl std::fmt::Display for Unschedulable {
    /// As users know it: `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        write!(f, "0/{} nodes are available:", self.nodes)?;
        let mut parts: Vec<String> = self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        parts.sort();
        write!(f, " {}.", parts.join(", "))
    }
}

/// The first reason why a node cannot take a pod.
fn filter(pod: &PodState, node: &NodeState) -> Result<(), Rejection> {
    FILTERS.iter().try_for_each(|filter| filter(pod, node))
}

/// The best node for a pod; `tie` chooses among equals.
pub(crate) fn choose<'a>(
    pod: &PodState,
    nodes: impl Iterator<Item = &'a Arc<NodeState>>,
    tie: u64,
) -> Result<&'a Arc<NodeState>, Unschedulable> {
    let mut feasible = Vec::new();
    let mut unschedulable = Unschedulable { nodes: 0, reasons: BTreeMap::new() };
    for node in nodes {
        unschedulable.nodes += 1;
        match filter(pod, node) {
            Ok(()) => feasible.push(node),
            Err(rejection) => {
                for reason in rejection.reasons {
                    *unschedulable.reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
    if feasible.len() <= 1 {
        return feasible.pop().ok_or(unschedulable);
    }
    let mut totals = vec![0_i64; feasible.len()];
    for (score, weight, normalize) in SCORES {
        let mut marks: Vec<i64> = feasible.iter().map(|node| score(pod, node)).collect();
        normalize.apply(&mut marks);
        for (total, mark) in totals.iter_mut().zip(marks) {
            *total += weight * mark;
        }
    }
    let best = totals.iter().copied().max().unwrap_or_default();
    let equals: Vec<_> =
        feasible.into_iter().zip(totals).filter(|(_, total)| *total == best).map(|(node, _)| node).collect();
    let index = usize::try_from(tie % equals.len() as u64).unwrap_or_default();
    Ok(equals[index])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, cpu: &str, spec: Value, labels: Value) -> Arc<NodeState> {
        let json = json!({
            "metadata": {"name": name, "labels": labels}, "spec": spec,
            "status": {"allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "10"}},
        });
        Arc::new(NodeState::new(Arc::new(serde_json::from_value(json).expect("a node"))))
    }

    fn pod(spec: Value) -> PodState {
        let mut spec = spec;
        spec["containers"] = json!([{"name": "a", "resources": {"requests": spec["requests"].clone()}}]);
        PodState::new(Arc::new(
            serde_json::from_value(json!({"metadata": {"name": "p", "uid": "p"}, "spec": spec})).expect("a pod"),
        ))
    }

    #[test]
    fn the_words_are_those_of_the_reference_scheduler() {
        let nodes = [
            node("full", "1", json!({}), json!({})),
            node("cordoned", "4", json!({"unschedulable": true}), json!({})),
            node(
                "tainted",
                "4",
                json!({"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}),
                json!({}),
            ),
        ];
        let error = choose(&pod(json!({"requests": {"cpu": "2"}})), nodes.iter(), 0).expect_err("no node");
        assert_eq!(
            error.to_string(),
            "0/3 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint {gpu: yes}, 1 node(s) were unschedulable."
        );
        assert_eq!(
            choose(&pod(json!({})), [].iter(), 0).expect_err("no node").to_string(),
            "no nodes available to schedule pods"
        );
    }

    #[test]
    fn selectors_tolerations_and_room_decide() {
        let nodes = [
            node("small", "1", json!({}), json!({"disk": "ssd"})),
            node("large", "8", json!({}), json!({"disk": "ssd"})),
            node("other", "16", json!({}), json!({"disk": "hdd"})),
        ];
        let chosen = |spec| choose(&pod(spec), nodes.iter(), 7).expect("a node").name().to_owned();
        assert_eq!(chosen(json!({"nodeSelector": {"disk": "ssd"}, "requests": {"cpu": "500m"}})), "large");
        assert_eq!(chosen(json!({"nodeSelector": {"disk": "hdd"}})), "other");
        assert_eq!(chosen(json!({"nodeName": "small"})), "small");
    }
}

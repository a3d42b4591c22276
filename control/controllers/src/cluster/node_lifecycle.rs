//! Node life cycle: a node whose lease is no longer renewed becomes unknown, is tainted, and its pods are not ready.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, PodCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Namespace of the nodes' leases.
const LEASES: &str = "kube-node-lease";
/// Time without a sign of life after which a node counts as unknown (`--node-monitor-grace-period`).
const GRACE: SignedDuration = SignedDuration::from_secs(50);
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// Conditions that mirror into taints with effect NoSchedule, by status.
const CONDITION_TAINTS: &[(&str, &str, &str)] = &[
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

pub(crate) struct NodeLifecycle {
    host: Host,
    nodes: Arc<Informer<Node>>,
    leases: Arc<Informer<Lease>>,
    pods: Arc<Informer<Pod>>,
}

impl NodeLifecycle {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { nodes: host.informer(), leases: host.informer(), pods: host.informer(), host }
    }

    /// When the node last showed life: its lease, its conditions' heartbeat, or its creation.
    fn last_seen(&self, node: &Node) -> Option<Timestamp> {
        let lease = self
            .leases
            .get(LEASES, &node.name_any())
            .and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
        let heartbeat = ready(node).and_then(|condition| condition.last_heartbeat_time.as_ref().map(|time| time.0));
        [lease, heartbeat, node.creation_timestamp().map(|time| time.0)].into_iter().flatten().max()
    }

    async fn mark_unknown(&self, node: &Node, now: Timestamp) -> Result<Node, Error> {
        let mut changed = node.clone();
        let conditions = changed.status.get_or_insert_default().conditions.get_or_insert_default();
        let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
        for type_ in ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"] {
            let before = conditions.iter().position(|condition| condition.type_ == type_);
            let heartbeat = before.and_then(|index| conditions[index].last_heartbeat_time.clone());
            let never = heartbeat.is_none();
            let condition = NodeCondition {
                type_: type_.into(),
                status: "Unknown".into(),
                reason: Some(if never { "NodeStatusNeverUpdated" } else { "NodeStatusUnknown" }.into()),
                message: Some(
                    if never { "Kubelet never posted node status." } else { "Kubelet stopped posting node status." }
                        .into(),
                ),
                last_heartbeat_time: heartbeat,
                last_transition_time: Some(now.clone()),
            };
            match before {
                Some(index) if conditions[index].status != "Unknown" => conditions[index] = condition,
                Some(_) => {}
                None => conditions.push(condition),
            }
        }
        let api: Api<Node> = Api::all(self.host.client.clone());
        let note = format!("Node {} status is now: NodeNotReady", node.name_any());
        self.host.event(node, EventType::Normal, "NodeNotReady", "Monitor", note).await;
        self.host.replace_status(&api, &changed).await
    }

    /// Pods of a node that is not ready do not serve.
    async fn mark_pods_not_ready(&self, node: &Node) -> Result<(), Error> {
        let name = node.name_any();
        for pod in self.pods.list() {
            let on_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(&name));
            if !on_node || !crate::common::pods::is_ready(&pod) {
                continue;
            }
            let mut changed = (*pod).clone();
            for condition in changed
                .status
                .get_or_insert_default()
                .conditions
                .get_or_insert_default()
                .iter_mut()
                .filter(|condition| condition.type_ == "Ready")
            {
                not_ready(condition);
            }
            let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &pod.namespace().unwrap_or_default());
            self.host.replace_status(&api, &changed).await?;
        }
        Ok(())
    }
}

fn not_ready(condition: &mut PodCondition) {
    let now = Timestamp::now();
    condition.status = "False".into();
    condition.last_transition_time = Some(Time(Timestamp::from_second(now.as_second()).unwrap_or(now)));
}

fn ready(node: &Node) -> Option<&NodeCondition> {
    node.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == "Ready")
}

/// The taints that the conditions call for, with all others of the node kept as they are.
fn taints(node: &Node, now: Timestamp) -> Vec<Taint> {
    let spec = node.spec.clone().unwrap_or_default();
    let before = spec.taints.unwrap_or_default();
    let status = |type_: &str| {
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().find(|condition| condition.type_ == type_).map(|condition| condition.status.clone())
    };
    let mut wanted: Vec<(&str, &str)> = CONDITION_TAINTS
        .iter()
        .filter(|(type_, value, _)| status(type_).as_deref() == Some(*value))
        .map(|(_, _, key)| (*key, "NoSchedule"))
        .collect();
    if spec.unschedulable == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    match status("Ready").as_deref() {
        Some("True") => {}
        Some("Unknown") => wanted.push((UNREACHABLE, "NoExecute")),
        _ => wanted.push((NOT_READY, "NoExecute")),
    }
    let managed = |taint: &Taint| {
        let of_condition = CONDITION_TAINTS.iter().any(|(_, _, key)| *key == taint.key) || taint.key == UNSCHEDULABLE;
        of_condition && ["NoSchedule", "NoExecute"].contains(&taint.effect.as_str())
    };
    let mut taints: Vec<Taint> = before
        .iter()
        .filter(|taint| !managed(taint) || wanted.contains(&(taint.key.as_str(), taint.effect.as_str())))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !taints.iter().any(|taint| taint.key == key && taint.effect == effect) {
            let time_added = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
            taints.push(Taint { key: key.into(), effect: effect.into(), value: None, time_added: Some(time_added) });
        }
    }
    taints
}

impl Controller for NodeLifecycle {
    const NAME: &'static str = "node-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.nodes, |_, delta, queue| {
            if let Some(node) = &delta.new {
                queue.add(Key::of(&**node));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(node) = self.nodes.get("", &key.name) else {
            return Ok(Outcome::Done);
        };
        let now = Timestamp::now();
        let silent = self.last_seen(&node).map_or(GRACE, |seen| now.duration_since(seen));
        let mut node = (*node).clone();
        if silent >= GRACE && ready(&node).is_none_or(|condition| condition.status != "Unknown") {
            node = self.mark_unknown(&node, now).await?;
        }
        let taints = taints(&node, now);
        if taints != node.spec.clone().unwrap_or_default().taints.unwrap_or_default() {
            let api: Api<Node> = Api::all(self.host.client.clone());
            let patch = serde_json::json!({"metadata": {"resourceVersion": node.resource_version()}, "spec": {"taints": taints}});
            node = self.host.patch(&api, &key.name, patch).await?;
        }
        if ready(&node).is_some_and(|condition| condition.status != "True") {
            self.mark_pods_not_ready(&node).await?;
        }
        // The lease alone keeps the node alive, so look again when it would run out.
        let left = Duration::try_from(GRACE - silent).unwrap_or_default();
        Ok(Outcome::After(if left.is_zero() { Duration::from_secs(5) } else { left }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: &str, taints: serde_json::Value) -> Node {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n"},
            "spec": {"taints": taints},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }))
        .expect("a node")
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let now = Timestamp::UNIX_EPOCH;
        let pairs =
            |node: &Node| taints(node, now).into_iter().map(|taint| (taint.key, taint.effect)).collect::<Vec<_>>();
        let own =
            serde_json::json!([{"key": "gpu", "effect": "NoSchedule"}, {"key": NOT_READY, "effect": "NoExecute"}]);
        assert_eq!(pairs(&node("True", own.clone())), [("gpu".to_owned(), "NoSchedule".to_owned())]);
        let unknown = pairs(&node("Unknown", own));
        assert!(
            unknown.contains(&(UNREACHABLE.into(), "NoExecute".into()))
                && unknown.contains(&(UNREACHABLE.into(), "NoSchedule".into()))
        );
        assert!(!unknown.iter().any(|(key, _)| key == NOT_READY));
    }
}

//! Node life cycle: a node whose lease is no longer renewed becomes unknown, is tainted, and its pods are not ready.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, PodCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::zones::Zones;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Namespace of the nodes' leases.
const LEASES: &str = "kube-node-lease";
/// Time without a sign of life after which a node counts as unknown (`--node-monitor-grace-period`).
const GRACE: SignedDuration = SignedDuration::from_secs(50);
/// How often a node that is unknown is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
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
    on_node: Arc<Index<Pod>>,
    /// Signs of life as last seen, by node, and when they were first seen like this: clocks of hosts are not compared.
    seen: Mutex<HashMap<String, (Signs, Timestamp)>>,
    zones: Mutex<Zones>,
}

/// Lease renewal and heartbeat.
type Signs = (Option<Timestamp>, Option<Timestamp>);

impl NodeLifecycle {
    pub(crate) fn new(api: &Arc<ApiServer>, on_node: &Arc<Index<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        // The eviction of pods reads them; this controller only waits until they are there.
        drop(host.informer::<Pod>());
        Self {
            nodes: host.informer(),
            leases: host.informer(),
            on_node: on_node.clone(),
            seen: Mutex::default(),
            zones: Mutex::default(),
            host,
        }
    }

    /// When the node last showed life, by this process's clock. What was there when the process began counts from when the
    /// node wrote it, since nothing better is known.
    fn last_seen(&self, node: &Node) -> Timestamp {
        let now = Timestamp::now();
        let name = node.name_any();
        let lease = self.leases.get(LEASES, &name);
        let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
        let heartbeat = ready(node).and_then(|condition| condition.last_heartbeat_time.as_ref().map(|time| time.0));
        let created = node.creation_timestamp().map(|time| time.0);
        let signs = (renewed, heartbeat);
        let mut seen = self.seen.lock();
        match seen.get(&name) {
            Some((known, since)) if *known == signs => *since,
            known => {
                let written = renewed.max(heartbeat).or(created).unwrap_or(now);
                let since = if known.is_some() { now } else { written.min(now) };
                seen.insert(name, (signs, since));
                since
            }
        }
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
        for pod in self.on_node.get(&name) {
            if !crate::common::pods::is_ready(&pod) {
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

/// Whether a taint of this controller drives pods away.
fn evicting(taint: &Taint) -> bool {
    taint.effect == "NoExecute" && [NOT_READY, UNREACHABLE].contains(&taint.key.as_str())
}

fn evicts(taints: &[Taint]) -> bool {
    taints.iter().any(evicting)
}

/// Region and zone.
fn zone(node: &Node) -> String {
    let label = |name: &str| node.labels().get(name).map(String::as_str).unwrap_or_default();
    format!("{}/{}", label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
}

fn is_ready(node: &Node) -> bool {
    ready(node).is_some_and(|condition| condition.status == "True")
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
        sources.watch(&self.nodes, |this, delta, queue| {
            if let Some(node) = &delta.new {
                this.last_seen(node);
                this.zones.lock().put(&node.name_any(), zone(node), is_ready(node));
                queue.add(Key::of(&**node));
            } else if let Some(gone) = &delta.old {
                this.seen.lock().remove(&gone.name_any());
                this.zones.lock().remove(&gone.name_any());
            }
        });
        // Only noted: what a lease says is looked at when the node's time runs out, so that renewals cost next to nothing.
        sources.watch(&self.leases, |this, delta, queue| {
            let Some(lease) = delta.new.as_ref().filter(|lease| lease.namespace().as_deref() == Some(LEASES)) else {
                return;
            };
            let Some(node) = this.nodes.get("", &lease.name_any()) else { return };
            this.last_seen(&node);
            if !is_ready(&node) {
                queue.add(Key::of(&*node));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(node) = self.nodes.get("", &key.name) else {
            return Ok(Outcome::Done);
        };
        let now = Timestamp::now();
        let silent = now.duration_since(self.last_seen(&node));
        let mut node = (*node).clone();
        if silent >= GRACE && ready(&node).is_none_or(|condition| condition.status != "Unknown") {
            node = self.mark_unknown(&node, now).await?;
        }
        self.zones.lock().put(&key.name, zone(&node), is_ready(&node));
        let before = node.spec.clone().unwrap_or_default().taints.unwrap_or_default();
        let mut taints = taints(&node, now);
        let mut turn = None;
        if self.zones.lock().are_silent() {
            taints.retain(|taint| !evicting(taint));
        } else if evicts(&taints) && !evicts(&before) {
            // Pods leave at a bounded rate, so that a fault of the network does not move everything at once.
            turn = self.zones.lock().turn(&zone(&node), Instant::now());
            if turn.is_some() {
                taints.retain(|taint| !evicting(taint));
            }
        }
        if taints != before {
            let api: Api<Node> = Api::all(self.host.client.clone());
            let patch = serde_json::json!({"metadata": {"resourceVersion": node.resource_version()}, "spec": {"taints": taints}});
            node = self.host.patch(&api, &key.name, patch).await?;
        }
        if ready(&node).is_some_and(|condition| condition.status != "True") {
            self.mark_pods_not_ready(&node).await?;
        }
        // The lease alone keeps the node alive, so look again when it would run out.
        let left = Duration::try_from(GRACE - silent).unwrap_or_default();
        let left = if left.is_zero() { LOOK_AGAIN } else { left };
        Ok(Outcome::After(turn.map_or(left, |turn| left.min(turn))))
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

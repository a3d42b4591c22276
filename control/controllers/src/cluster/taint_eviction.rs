//! Eviction by taint: pods leave a node with a NoExecute taint that they do not tolerate, or once they have tolerated it for
//! as long as they said.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;

use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

pub(crate) struct TaintEviction {
    host: Host,
    nodes: Arc<Informer<Node>>,
    pods: Arc<Informer<Pod>>,
    on_node: Arc<Index<Pod>>,
    /// Since when a node has had taints that do not say it themselves, by node; only nodes with such taints are here.
    first_seen: Mutex<HashMap<String, Vec<(Taint, Timestamp)>>>,
}

/// When a pod must go because of one taint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stay {
    Forever,
    Until(Timestamp),
}

impl TaintEviction {
    pub(crate) fn new(api: &Arc<ApiServer>, on_node: &Arc<Index<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            nodes: host.informer(),
            pods: host.informer(),
            on_node: on_node.clone(),
            first_seen: Mutex::default(),
            host,
        }
    }

    /// Remembers since when the node has had each of its taints.
    fn observe(&self, name: &str, taints: &[Taint]) {
        let mut seen = self.first_seen.lock();
        let before = seen.remove(name).unwrap_or_default();
        let since = |taint: &Taint| {
            let known = before.iter().find(|(known, _)| known == taint).map(|(_, since)| *since);
            taint.time_added.as_ref().map(|time| time.0).or(known).unwrap_or_else(Timestamp::now)
        };
        if !taints.is_empty() {
            let now: Vec<_> = taints.iter().map(|taint| (taint.clone(), since(taint))).collect();
            seen.insert(name.to_owned(), now);
        }
    }

    async fn evict(&self, pod: &Pod) -> Result<(), Error> {
        let namespace = pod.namespace().unwrap_or_default();
        let note = format!("Marking for deletion Pod {namespace}/{}", pod.name_any());
        self.host.event(pod, EventType::Normal, "TaintManagerEviction", "Evict", note).await;
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &namespace);
        let message = "Taint manager: deleting due to NoExecute taint";
        pods::mark_disrupted(&self.host, &api, pod, "DeletionByTaintManager", message, false).await?;
        self.host.delete(&api, pod).await
    }
}

fn no_execute(node: &Node) -> Vec<Taint> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.filter(|taint| taint.effect == "NoExecute").cloned().collect()
}

/// Whether a toleration covers a taint (core/v1 `ToleratesTaint`).
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let any = |field: &Option<String>| field.as_deref().unwrap_or_default().is_empty();
    let same = |field: &Option<String>, value: &str| field.as_deref().unwrap_or_default() == value;
    if !any(&toleration.effect) && !same(&toleration.effect, &taint.effect)
        || !any(&toleration.key) && !same(&toleration.key, &taint.key)
    {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => same(&toleration.value, taint.value.as_deref().unwrap_or_default()),
        "Exists" => true,
        _ => false,
    }
}

/// How long a pod that has been on the node since `bound` may stay.
fn stay(tolerations: &[Toleration], taints: &[(Taint, Timestamp)], bound: Timestamp) -> Stay {
    let mut until = Stay::Forever;
    for (taint, since) in taints {
        let Some(toleration) = tolerations.iter().find(|toleration| tolerates(toleration, taint)) else {
            return Stay::Until(Timestamp::MIN);
        };
        let Some(seconds) = toleration.toleration_seconds else { continue };
        let from = (*since).max(bound);
        let end = if seconds <= 0 { Timestamp::MIN } else { from + SignedDuration::from_secs(seconds) };
        until = match until {
            Stay::Until(earlier) if earlier <= end => until,
            _ => Stay::Until(end),
        };
    }
    until
}

/// Since when a pod has been bound to its node.
fn bound_at(pod: &Pod) -> Timestamp {
    let scheduled = pods::condition(pod, "PodScheduled").and_then(|condition| condition.last_transition_time.as_ref());
    scheduled.or(pod.metadata.creation_timestamp.as_ref()).map_or(Timestamp::MIN, |time| time.0)
}

impl Controller for TaintEviction {
    // The identity that may delete pods of nodes in the bootstrap roles.
    const NAME: &'static str = "node-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.nodes, |this, delta, queue| {
            let taints = |node: &Option<Arc<Node>>| node.as_ref().map(|node| no_execute(node)).unwrap_or_default();
            let (before, now) = (taints(&delta.old), taints(&delta.new));
            let Some(name) = delta.new.as_ref().or(delta.old.as_ref()).map(|node| node.name_any()) else { return };
            if before != now {
                this.observe(&name, &now);
                this.on_node.get(&name).for_each(|pod| queue.add(Key::of(&*pod)));
            }
        });
        sources.watch(&self.pods, |_, delta, queue| {
            let view = |pod: &Option<Arc<Pod>>| {
                let spec = pod.as_ref().and_then(|pod| pod.spec.as_ref());
                spec.map(|spec| (spec.node_name.clone(), spec.tolerations.clone()))
            };
            if let Some(pod) = &delta.new
                && view(&delta.old) != view(&delta.new)
            {
                queue.add(Key::of(&**pod));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        let Some(spec) = &pod.spec else { return Ok(Outcome::Done) };
        if !pods::is_active(&pod) {
            return Ok(Outcome::Done);
        }
        let taints =
            spec.node_name.as_ref().and_then(|node| self.first_seen.lock().get(node).cloned()).unwrap_or_default();
        if taints.is_empty() {
            return Ok(Outcome::Done);
        }
        let now = Timestamp::now();
        match stay(spec.tolerations.as_deref().unwrap_or_default(), &taints, bound_at(&pod)) {
            Stay::Forever => Ok(Outcome::Done),
            Stay::Until(end) if end > now => {
                Ok(Outcome::After(Duration::try_from(end.duration_since(now)).unwrap_or_default()))
            }
            Stay::Until(_) => {
                self.evict(&pod).await?;
                Ok(Outcome::Done)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn taint(key: &str, value: &str) -> Taint {
        Taint { key: key.into(), value: Some(value.into()), effect: "NoExecute".into(), time_added: None }
    }

    fn toleration(json: serde_json::Value) -> Toleration {
        serde_json::from_value(json).expect("a toleration")
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    #[test]
    fn the_shortest_toleration_counts_from_the_later_of_taint_and_binding() {
        let taints = [(taint("a", "x"), at(100)), (taint("b", ""), at(50))];
        let exists = toleration(json!({"key": "b", "operator": "Exists", "tolerationSeconds": 500}));
        let equal = toleration(json!({"key": "a", "value": "x", "effect": "NoExecute", "tolerationSeconds": 10}));
        let all = [exists.clone(), equal.clone()];
        assert_eq!(stay(&all, &taints, at(0)), Stay::Until(at(110)));
        assert_eq!(stay(&all, &taints, at(200)), Stay::Until(at(210)));
        assert_eq!(stay(&[exists], &taints, at(0)), Stay::Until(Timestamp::MIN), "one is not tolerated");
        assert_eq!(stay(&[toleration(json!({"operator": "Exists"}))], &taints, at(0)), Stay::Forever);
        assert_eq!(stay(&all, &[], at(0)), Stay::Forever);
    }

    proptest! {
        /// More tolerations never shorten a stay that began with none.
        #[test]
        fn a_pod_stays_only_if_every_taint_is_tolerated(keys in prop::collection::vec(0..4_u8, 0..4), held in prop::collection::vec(0..4_u8, 0..4)) {
            let taints: Vec<_> = keys.iter().map(|key| (taint(&key.to_string(), ""), at(0))).collect();
            let tolerations: Vec<_> = held.iter().map(|key| toleration(json!({"key": key.to_string(), "operator": "Exists"}))).collect();
            let all = keys.iter().all(|key| held.contains(key));
            prop_assert_eq!(stay(&tolerations, &taints, at(0)) == Stay::Forever, all);
        }
    }
}

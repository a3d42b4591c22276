//! PodDisruptionBudget: how many pods may be evicted now. Eviction (`coracle-api`) takes one at a time from what this loop
//! writes into the status, and notes the pod there until it is seen to go.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::common::labelled::Labelled;
use crate::common::{intstr, pods, scale, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_of};

/// After so long an eviction that was granted and not carried out is granted to somebody else.
const DELETION_TIMEOUT: SignedDuration = SignedDuration::from_secs(120);

pub(crate) struct Budgets {
    api: Arc<ApiServer>,
    host: Host,
    budgets: Arc<Informer<PodDisruptionBudget>>,
    pods: Arc<Informer<Pod>>,
    labelled: Arc<Labelled>,
    replica_sets: Arc<Informer<ReplicaSet>>,
    deployments: Arc<Informer<Deployment>>,
    stateful_sets: Arc<Informer<StatefulSet>>,
    controllers: Arc<Informer<ReplicationController>>,
}

/// What a budget comes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Verdict {
    expected: i32,
    healthy: i32,
    desired: i32,
}

impl Verdict {
    /// How many pods may go now.
    fn allowed(self) -> i32 {
        if self.expected <= 0 { 0 } else { (self.healthy - self.desired).max(0) }
    }
}

fn selects(budget: &PodDisruptionBudget, labels: Option<&BTreeMap<String, String>>) -> bool {
    let wanted = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    wanted.is_some_and(|wanted| selector::matches(wanted, labels))
}

/// Evictions that were granted and not yet seen: the pod is there, is not on its way out, and its time is not over.
fn still_disrupted(status: &PodDisruptionBudgetStatus, pods: &[Arc<Pod>], now: Timestamp) -> BTreeMap<String, Time> {
    let waits = |name: &String, since: &Time| {
        let pod = pods.iter().find(|pod| pod.name_any() == *name);
        pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_none())
            && now.duration_since(since.0) < DELETION_TIMEOUT
    };
    let granted = status.disrupted_pods.iter().flatten();
    granted.filter(|(name, since)| waits(name, since)).map(|(name, since)| (name.clone(), since.clone())).collect()
}

/// The healthy pods: ready, staying, and not granted to an eviction.
fn healthy(pods: &[Arc<Pod>], disrupted: &BTreeMap<String, Time>) -> i32 {
    let counts = |pod: &&Arc<Pod>| {
        pod.metadata.deletion_timestamp.is_none() && pods::is_ready(pod) && !disrupted.contains_key(&pod.name_any())
    };
    i32::try_from(pods.iter().filter(counts).count()).unwrap_or(i32::MAX)
}

impl Budgets {
    pub(crate) fn new(api: &Arc<ApiServer>, labelled: &Arc<Labelled>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            api: api.clone(),
            budgets: host.informer(),
            pods: host.informer(),
            labelled: labelled.clone(),
            replica_sets: host.informer(),
            deployments: host.informer(),
            stateful_sets: host.informer(),
            controllers: host.informer(),
            host,
        }
    }

    /// The size of what manages a pod: who it is, and how many pods it is to have.
    async fn scale(&self, namespace: &str, pod: &Pod) -> Result<Option<(String, i32)>, String> {
        let Some(owner) = controller_of(&pod.metadata) else { return Ok(None) };
        let lost =
            || format!("found no controller {:?} of kind {} for pod {:?}", owner.name, owner.kind, pod.name_any());
        let count = |uid: Option<String>, replicas: Option<i32>| {
            uid.filter(|uid| *uid == owner.uid).map(|uid| (uid, replicas.unwrap_or(1))).ok_or_else(lost)
        };
        match owner.kind.as_str() {
            "ReplicaSet" => {
                let set = self.replica_sets.get(namespace, &owner.name).ok_or_else(lost)?;
                let above = controller_of(&set.metadata).filter(|above| above.kind == "Deployment");
                if let Some(deployment) = above.and_then(|above| self.deployments.get(namespace, &above.name)) {
                    let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas);
                    return Ok(Some((deployment.uid().unwrap_or_default(), replicas.unwrap_or(1))));
                }
                count(set.uid(), set.spec.as_ref().and_then(|spec| spec.replicas)).map(Some)
            }
            "StatefulSet" => {
                let set = self.stateful_sets.get(namespace, &owner.name).ok_or_else(lost)?;
                count(set.uid(), set.spec.as_ref().and_then(|spec| spec.replicas)).map(Some)
            }
            "ReplicationController" => {
                let set = self.controllers.get(namespace, &owner.name).ok_or_else(lost)?;
                count(set.uid(), set.spec.as_ref().and_then(|spec| spec.replicas)).map(Some)
            }
            kind => {
                let named = (owner.api_version.as_str(), kind, owner.name.as_str());
                let scaled = scale::get(&self.api, &self.host, namespace, named).await?;
                count(scaled.scale.metadata.uid.clone(), Some(scaled.wanted())).map(Some)
            }
        }
    }

    /// How many pods there should be, by those who manage them.
    async fn expected(&self, namespace: &str, pods: &[Arc<Pod>]) -> Result<i32, String> {
        let mut asked = HashSet::new();
        let mut sizes: BTreeMap<String, i32> = BTreeMap::new();
        for pod in pods {
            // One question for all pods of one owner.
            let Some(owner) = controller_of(&pod.metadata) else { continue };
            if asked.insert(&owner.uid) {
                sizes.extend(self.scale(namespace, pod).await?);
            }
        }
        Ok(sizes.values().sum())
    }

    async fn verdict(
        &self,
        budget: &PodDisruptionBudget,
        namespace: &str,
        pods: &[Arc<Pod>],
        disrupted: &BTreeMap<String, Time>,
    ) -> Result<Verdict, String> {
        let spec = budget.spec.clone().unwrap_or_default();
        let healthy = healthy(pods, disrupted);
        let malformed = || "malformed percentage".to_owned();
        match (&spec.max_unavailable, &spec.min_available) {
            (Some(most), _) => {
                let expected = self.expected(namespace, pods).await?;
                let unavailable = intstr::scaled(most, expected, true).ok_or_else(malformed)?;
                Ok(Verdict { expected, healthy, desired: (expected - unavailable).max(0) })
            }
            (None, Some(IntOrString::Int(least))) => {
                Ok(Verdict { expected: i32::try_from(pods.len()).unwrap_or(i32::MAX), healthy, desired: *least })
            }
            (None, Some(percent)) => {
                let expected = self.expected(namespace, pods).await?;
                Ok(Verdict {
                    expected,
                    healthy,
                    desired: intstr::scaled(percent, expected, true).ok_or_else(malformed)?,
                })
            }
            (None, None) => Ok(Verdict { expected: 0, healthy, desired: 0 }),
        }
    }
}

/// The condition that says whether pods may go, its transition time kept while it stands.
fn condition(old: &PodDisruptionBudgetStatus, generation: Option<i64>, verdict: &Result<Verdict, String>) -> Condition {
    let (status, reason, message) = match verdict {
        Ok(verdict) if verdict.allowed() > 0 => ("True", "SufficientPods", String::new()),
        Ok(_) => ("False", "InsufficientPods", String::new()),
        Err(why) => ("False", "SyncFailed", why.clone()),
    };
    let known = old.conditions.iter().flatten().find(|c| c.type_ == "DisruptionAllowed" && c.status == status);
    Condition {
        type_: "DisruptionAllowed".into(),
        status: status.into(),
        reason: reason.into(),
        message,
        observed_generation: generation,
        last_transition_time: known.map_or_else(pods::now, |known| known.last_transition_time.clone()),
    }
}

impl Controller for Budgets {
    const NAME: &'static str = "disruption-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.budgets, |_, delta, queue: &WorkQueue<Key>| {
            if let Some(budget) = delta.new.as_ref().or(delta.old.as_ref()) {
                queue.add(Key::of(&**budget));
            }
        });
        sources.watch(&self.pods, |this, delta, queue| {
            for pod in [&delta.old, &delta.new].into_iter().flatten() {
                for budget in this.budgets.list_ns(&pod.namespace().unwrap_or_default()) {
                    if selects(&budget, pod.metadata.labels.as_ref()) {
                        queue.add(Key::of(&*budget));
                    }
                }
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(budget) = self.budgets.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        let matching: Vec<_> = self.labelled.select(&key.namespace, |labels| selects(&budget, Some(labels))).collect();
        let (now, old) = (Timestamp::now(), budget.status.clone().unwrap_or_default());
        let disrupted = still_disrupted(&old, &matching, now);
        let verdict = self.verdict(&budget, &key.namespace, &matching, &disrupted).await;
        if let Err(why) = &verdict {
            let action = "CalculateExpectedPodCount";
            self.host.event(&*budget, EventType::Warning, "CalculateExpectedPodCountFailed", action, why.clone()).await;
        }
        let mut conditions = old.conditions.clone().unwrap_or_default();
        conditions.retain(|condition| condition.type_ != "DisruptionAllowed");
        conditions.push(condition(&old, budget.metadata.generation, &verdict));
        // Where the count is not known nobody may go; the other numbers stay as they were last known.
        let counted = verdict.as_ref().ok();
        let status = PodDisruptionBudgetStatus {
            conditions: Some(conditions),
            current_healthy: counted.map_or(old.current_healthy, |v| Some(v.healthy)),
            desired_healthy: counted.map_or(old.desired_healthy, |v| Some(v.desired)),
            expected_pods: counted.map_or(old.expected_pods, |v| Some(v.expected)),
            disruptions_allowed: Some(counted.map_or(0, |v| v.allowed())),
            disrupted_pods: (!disrupted.is_empty()).then(|| disrupted.clone()),
            observed_generation: budget.metadata.generation,
        };
        if budget.status.as_ref() != Some(&status) {
            let changed = PodDisruptionBudget { status: Some(status), ..(*budget).clone() };
            self.host.replace_status(&Api::namespaced(self.host.client.clone(), &key.namespace), &changed).await?;
        }
        let next = disrupted.values().map(|since| DELETION_TIMEOUT - now.duration_since(since.0)).min();
        Ok(next.and_then(|left| Duration::try_from(left).ok()).map_or(Outcome::Done, Outcome::After))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, ready: bool, leaving: bool) -> Arc<Pod> {
        let mut pod = json!({"metadata": {"name": name},
            "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        if leaving {
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        Arc::new(serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn granted_evictions_count_until_they_are_seen_or_too_old() {
        let now: Timestamp = "2026-01-01T00:02:00Z".parse().expect("a time");
        let status: PodDisruptionBudgetStatus = serde_json::from_value(json!({
            "currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0,
            "disruptedPods": {"waits": "2026-01-01T00:01:00Z", "old": "2026-01-01T00:00:00Z",
                "leaves": "2026-01-01T00:01:00Z", "gone": "2026-01-01T00:01:00Z"},
        }))
        .expect("a status");
        let pods =
            [pod("waits", true, false), pod("old", true, false), pod("leaves", true, true), pod("sick", false, false)];
        let disrupted = still_disrupted(&status, &pods, now);
        assert_eq!(disrupted.keys().collect::<Vec<_>>(), ["waits"]);
        assert_eq!(healthy(&pods, &disrupted), 1, "the old one alone");
    }

    #[test]
    fn nothing_may_go_where_nothing_is_expected() {
        assert_eq!(Verdict { expected: 0, healthy: 3, desired: 0 }.allowed(), 0);
        assert_eq!(Verdict { expected: 3, healthy: 3, desired: 2 }.allowed(), 1);
        assert_eq!(Verdict { expected: 3, healthy: 1, desired: 2 }.allowed(), 0);
    }
}

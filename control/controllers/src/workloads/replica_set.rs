//! ReplicaSet: as many pods of a template as asked for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use futures::stream::{self, StreamExt};
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::common::{pods, selector};
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_of, controller_reference, is_controlled_by,
};

/// Most pods one reconciliation makes or removes; the next one goes on.
const BURST: usize = 500;
/// Calls to the API under way at once for one ReplicaSet.
const PARALLEL: usize = 16;

pub(crate) struct ReplicaSets {
    host: Host,
    sets: Arc<Informer<ReplicaSet>>,
    pods: Arc<Informer<Pod>>,
}

impl ReplicaSets {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { sets: host.informer(), pods: host.informer(), host }
    }

    /// Queues whoever a pod's change concerns: its controller, or every set that might adopt an orphan.
    fn pod_changed(&self, delta: &Delta<Pod>, queue: &WorkQueue<Key>) {
        for pod in [&delta.old, &delta.new].into_iter().flatten() {
            let namespace = pod.namespace().unwrap_or_default();
            match controller_of(&pod.metadata) {
                Some(owner) if owner.kind == "ReplicaSet" => queue.add(Key::new(&namespace, &owner.name)),
                Some(_) => {}
                None => {
                    for set in self.sets.list_ns(&namespace) {
                        if set
                            .spec
                            .as_ref()
                            .is_some_and(|spec| selector::matches(&spec.selector, pod.metadata.labels.as_ref()))
                        {
                            queue.add(Key::of(&*set));
                        }
                    }
                }
            }
        }
    }

    /// Active pods of the set: those it controls, after adopting what matches and has no controller and letting go of
    /// what matches no longer.
    async fn claim(&self, set: &ReplicaSet, api: &Api<Pod>) -> Result<Vec<Arc<Pod>>, Error> {
        let (Some(spec), uid) = (&set.spec, set.uid().unwrap_or_default()) else {
            return Ok(Vec::new());
        };
        let mut claimed = Vec::new();
        for pod in self.pods.list_ns(&set.namespace().unwrap_or_default()) {
            if !pods::is_active(&pod) {
                continue;
            }
            let matching = selector::matches(&spec.selector, pod.metadata.labels.as_ref());
            let ours = is_controlled_by(&pod.metadata, &uid);
            if ours && matching {
                claimed.push(pod);
            } else if set.metadata.deletion_timestamp.is_some() {
                // A set on its way out neither adopts nor releases.
            } else if ours {
                let patch =
                    serde_json::json!({"metadata": {"uid": pod.uid(), "ownerReferences": owners_without(&pod, &uid)}});
                self.host.patch(api, &pod.name_any(), patch).await?;
            } else if matching && controller_of(&pod.metadata).is_none() {
                let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
                owners.push(controller_reference(set));
                let patch = serde_json::json!({"metadata": {"uid": pod.uid(), "ownerReferences": owners}});
                claimed.push(Arc::new(self.host.patch(api, &pod.name_any(), patch).await?));
            }
        }
        Ok(claimed)
    }

    /// How many of its pods are on their way out.
    fn terminating(&self, set: &ReplicaSet) -> usize {
        let uid = set.uid().unwrap_or_default();
        let leaving = |pod: &Arc<Pod>| {
            is_controlled_by(&pod.metadata, &uid)
                && pod.metadata.deletion_timestamp.is_some()
                && !matches!(pods::phase(pod), "Succeeded" | "Failed")
        };
        self.pods.list_ns(&set.namespace().unwrap_or_default()).iter().filter(|pod| leaving(pod)).count()
    }

    /// Makes or removes pods until there are as many as wanted; returns what the API refused.
    async fn scale(&self, set: &ReplicaSet, api: &Api<Pod>, active: &[Arc<Pod>], wanted: usize) -> Result<(), Error> {
        if active.len() < wanted {
            let Some(template) = set.spec.as_ref().and_then(|spec| spec.template.as_ref()) else {
                return Ok(());
            };
            let missing = (wanted - active.len()).min(BURST);
            let pod = pods::from_template(template, &set.name_any(), controller_reference(set));
            // The first alone: where a quota or webhook refuses one, it refuses all.
            self.make(set, api, &pod).await?;
            return collect(stream::iter(1..missing).map(|_| self.make(set, api, &pod))).await;
        }
        let mut surplus = active.to_vec();
        let mut on_node: HashMap<String, usize> = HashMap::new();
        for pod in active {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            *on_node.entry(node).or_default() += 1;
        }
        pods::rank_for_removal(&mut surplus, &on_node);
        surplus.truncate((active.len() - wanted).min(BURST));
        collect(stream::iter(surplus).map(|pod| async move {
            self.host.delete(api, &*pod).await?;
            let note = format!("Deleted pod: {}", pod.name_any());
            self.host.event(set, EventType::Normal, "SuccessfulDelete", "Delete", note).await;
            Ok(())
        }))
        .await
    }

    async fn make(&self, set: &ReplicaSet, api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
        match self.host.create(api, pod).await {
            Ok(made) => {
                let note = format!("Created pod: {}", made.name_any());
                self.host.event(set, EventType::Normal, "SuccessfulCreate", "Create", note).await;
                Ok(())
            }
            Err(error) => {
                let note = format!("Error creating: {error}");
                self.host.event(set, EventType::Warning, "FailedCreate", "Create", note).await;
                Err(error)
            }
        }
    }
}

/// Runs the calls, a bounded number at once; the first failure is reported after all have ended.
async fn collect<F: Future<Output = Result<(), Error>>>(calls: impl stream::Stream<Item = F>) -> Result<(), Error> {
    calls.buffer_unordered(PARALLEL).fold(Ok(()), |all, one| async move { all.and(one) }).await
}

fn owners_without(pod: &Pod, uid: &str) -> Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference> {
    pod.metadata.owner_references.iter().flatten().filter(|owner| owner.uid != uid).cloned().collect()
}

impl Controller for ReplicaSets {
    const NAME: &'static str = "replicaset-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.sets, |_, delta, queue| {
            if let Some(set) = delta.new.as_ref().or(delta.old.as_ref()) {
                queue.add(Key::of(&**set));
            }
        });
        sources.watch(&self.pods, |this, delta, queue| this.pod_changed(delta, queue));
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(set) = self.sets.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let active = self.claim(&set, &api).await?;
        let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let scaled = if set.metadata.deletion_timestamp.is_none()
            && active.len() != usize::try_from(wanted).unwrap_or_default()
        {
            self.scale(&set, &api, &active, usize::try_from(wanted).unwrap_or_default()).await
        } else {
            Ok(())
        };
        let now = Timestamp::now();
        let (status, next) = status(&set, &active, self.terminating(&set), scaled.as_ref().err(), now);
        if set.status.as_ref() != Some(&status) {
            let mut changed = (*set).clone();
            changed.status = Some(status);
            let sets: Api<ReplicaSet> = Api::namespaced(self.host.client.clone(), &key.namespace);
            self.host.replace_status(&sets, &changed).await?;
        }
        scaled?;
        Ok(next.map_or(Outcome::Done, Outcome::After))
    }
}

/// The status that the pods amount to, and when it changes by time alone.
fn status(
    set: &ReplicaSet,
    active: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&Error>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = set.spec.clone().unwrap_or_default();
    let labels =
        spec.template.as_ref().and_then(|template| template.metadata.as_ref()?.labels.clone()).unwrap_or_default();
    let count =
        |keep: &dyn Fn(&Pod) -> bool| i32::try_from(active.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX);
    let min_ready = spec.min_ready_seconds.unwrap_or_default();
    let waits: Vec<_> = active.iter().filter_map(|pod| pods::until_available(pod, min_ready, now)).collect();
    let available = waits.iter().filter(|wait| wait.is_zero()).count();
    let next = waits.iter().filter(|wait| !wait.is_zero()).min().copied();
    let old = set.status.clone().unwrap_or_default();
    let mut conditions = old.conditions.unwrap_or_default();
    let replica_failure = conditions.iter().position(|condition| condition.type_ == "ReplicaFailure");
    match (failure, replica_failure) {
        (Some(error), None) => conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some(
                if active.len() < usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or_default() {
                    "FailedCreate"
                } else {
                    "FailedDelete"
                }
                .into(),
            ),
            message: Some(error.to_string()),
            last_transition_time: Some(Time(truncated(now))),
        }),
        (None, Some(index)) => {
            conditions.remove(index);
        }
        _ => {}
    }
    let status = ReplicaSetStatus {
        replicas: count(&|_| true),
        fully_labeled_replicas: non_zero(count(&|pod| selector::matches_map(&labels, pod.metadata.labels.as_ref()))),
        ready_replicas: non_zero(count(&|pod| pods::is_ready(pod))),
        available_replicas: non_zero(i32::try_from(available).unwrap_or(i32::MAX)),
        observed_generation: set.metadata.generation,
        conditions: (!conditions.is_empty()).then_some(conditions),
        terminating_replicas: Some(i32::try_from(terminating).unwrap_or(i32::MAX)),
    };
    (status, next.and_then(|wait: SignedDuration| Duration::try_from(wait).ok()))
}

/// Go leaves zero counts out.
fn non_zero(count: i32) -> Option<i32> {
    (count != 0).then_some(count)
}

/// Whole seconds, which is what `metav1.Time` keeps.
pub(super) fn truncated(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

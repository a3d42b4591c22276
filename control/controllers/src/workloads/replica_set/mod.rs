//! ReplicaSet and ReplicationController: as many pods of a template as asked for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};

use crate::common::owned::{self, Owner};
use crate::common::replica::{Replica, Replicas};
use crate::common::{control, pods, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, controller_reference, own};

type Labels = BTreeMap<String, String>;

/// Time between two looks at a set, for each pod of it: to count those of a large one takes a while, and its pods change all
/// the time while they start.
const PACE_OF_POD: Duration = Duration::from_micros(20);

/// A kind that keeps a number of equal pods.
pub(crate) trait Replicated: Owner {
    /// Name of the controller's service account.
    const CONTROLLER: &'static str;
    fn wanted(&self) -> i32;
    fn min_ready_seconds(&self) -> i32;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn selects(&self, labels: Option<&Labels>) -> bool;
    fn status(&self) -> ReplicaSetStatus;
    fn set_status(&mut self, status: ReplicaSetStatus);
}

impl Replicated for ReplicaSet {
    const CONTROLLER: &'static str = "replicaset-controller";
    fn wanted(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or_default()
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn selects(&self, labels: Option<&Labels>) -> bool {
        self.spec.as_ref().is_some_and(|spec| selector::matches(&spec.selector, labels))
    }
    fn status(&self) -> ReplicaSetStatus {
        self.status.clone().unwrap_or_default()
    }
    fn set_status(&mut self, status: ReplicaSetStatus) {
        self.status = Some(status);
    }
}

impl Replicated for ReplicationController {
    const CONTROLLER: &'static str = "replication-controller";
    fn wanted(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or_default()
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn selects(&self, labels: Option<&Labels>) -> bool {
        let selector = self.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        // One without a selector selects nothing.
        selector.is_some_and(|selector| !selector.is_empty() && selector::matches_map(selector, labels))
    }
    fn status(&self) -> ReplicaSetStatus {
        let status = self.status.clone().unwrap_or_default();
        let conditions = status.conditions.map(|conditions| {
            let same = |c: ReplicationControllerCondition| ReplicaSetCondition {
                type_: c.type_,
                status: c.status,
                reason: c.reason,
                message: c.message,
                last_transition_time: c.last_transition_time,
            };
            conditions.into_iter().map(same).collect()
        });
        ReplicaSetStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            conditions,
            terminating_replicas: None,
        }
    }
    fn set_status(&mut self, status: ReplicaSetStatus) {
        let conditions = status.conditions.map(|conditions| {
            let same = |c: ReplicaSetCondition| ReplicationControllerCondition {
                type_: c.type_,
                status: c.status,
                reason: c.reason,
                message: c.message,
                last_transition_time: c.last_transition_time,
            };
            conditions.into_iter().map(same).collect()
        });
        self.status = Some(ReplicationControllerStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            conditions,
        });
    }
}

pub(crate) struct Sets<K> {
    host: Host,
    sets: Arc<Informer<K>>,
    pods: Arc<Informer<Pod>>,
    replicas: Arc<Replicas>,
}

impl<K: Replicated> Sets<K> {
    pub(crate) fn new(api: &Arc<ApiServer>, replicas: &Arc<Replicas>) -> Self {
        let mut host = Host::new(api, K::CONTROLLER);
        Self { sets: host.informer(), pods: host.informer(), replicas: replicas.clone(), host }
    }

    /// The active pods of the set, after adopting and releasing; of the others only how many are on their way out.
    async fn claim(&self, set: &K) -> Result<(Vec<Arc<Replica>>, usize), Error> {
        let (ours, others) = (self.replicas.of(&set.uid().unwrap_or_default()), self.replicas.orphans(set));
        let leaving = ours.iter().filter(|pod| pod.is_leaving).count();
        let mut selects = once_a_template(|labels| set.selects(Some(labels)));
        let ours = ours.into_iter().filter(|pod| pod.is_active);
        let (mut active, strays): (Vec<_>, Vec<_>) = ours.partition(|pod| selects(pod));
        let orphans = others.into_iter().filter(|pod| pod.is_active && selects(pod));
        let namespace = set.namespace().unwrap_or_default();
        let open = strays.into_iter().chain(orphans).filter_map(|pod| self.pods.get(&namespace, &pod.name));
        let open: Vec<_> = open.collect();
        let selects = |pod: &Pod| set.selects(pod.metadata.labels.as_ref());
        let adopted = owned::claim(&self.host, set, open, None, selects).await?;
        active.extend(adopted.iter().map(|pod| Arc::new(Replica::of(pod))));
        Ok((active, leaving))
    }

    /// Makes or removes pods until there are as many as wanted; returns what the API refused.
    async fn scale(&self, set: &K, active: &[Arc<Replica>], wanted: usize) -> Result<(), Error> {
        let namespace = set.namespace().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &namespace);
        if active.len() < wanted {
            let Some(template) = set.template() else {
                return Ok(());
            };
            let missing = (wanted - active.len()).min(control::BURST);
            let pod = pods::from_template(template, &set.name_any(), controller_reference(set));
            return control::create_all(&self.host, set, &api, vec![pod; missing]).await;
        }
        let neighbours = self.neighbours(set);
        let doubled = |pod: &Replica| neighbours.get(pod.node.as_deref().unwrap_or_default()).copied();
        let mut surplus = active.to_vec();
        surplus.sort_by_cached_key(|pod| pod.rank(doubled(pod).unwrap_or_default()));
        surplus.truncate((active.len() - wanted).min(control::BURST));
        let surplus: Vec<_> = surplus.iter().filter_map(|pod| self.pods.get(&namespace, &pod.name)).collect();
        control::delete_all(&self.host, set, &api, surplus).await
    }

    /// How many pods of the set, and of others with the same owner, are on each node: the sets of one Deployment look at
    /// each other's pods, so that what is given up is what is doubled up.
    fn neighbours(&self, set: &K) -> HashMap<Box<str>, usize> {
        let owner = crate::machine::controller_of(set.meta()).map(|owner| owner.uid.clone());
        let related = self.sets.list_ns(&set.namespace().unwrap_or_default()).filter(|other| {
            other.uid() == set.uid()
                || owner.as_ref().is_some_and(|uid| crate::machine::is_controlled_by(other.meta(), uid))
        });
        let mut on_node: HashMap<Box<str>, usize> = HashMap::new();
        for pod in related.flat_map(|other| self.replicas.of(&other.uid().unwrap_or_default())) {
            if let Some(node) = pod.node.as_ref().filter(|_| pod.is_active) {
                *on_node.entry(node.clone()).or_default() += 1;
            }
        }
        on_node
    }
}

/// A test of labels that is done once for pods one after the other that share them, as those of one template do.
fn once_a_template(test: impl Fn(&Labels) -> bool) -> impl FnMut(&Replica) -> bool {
    let mut last: Option<(Arc<Labels>, bool)> = None;
    move |pod| match &last {
        Some((labels, passed)) if Arc::ptr_eq(labels, &pod.labels) => *passed,
        _ => last.insert((pod.labels.clone(), test(&pod.labels))).1,
    }
}

/// Whether a change of a pod is one to who counts it.
fn is_news(delta: &Delta<Pod>) -> bool {
    let (Some(old), Some(new)) = (&delta.old, &delta.new) else { return true };
    old.metadata.owner_references != new.metadata.owner_references
        || old.metadata.uid != new.metadata.uid
        || !Replica::of(old).counts_as(&Replica::of(new))
}

impl<K: Replicated> Controller for Sets<K> {
    const NAME: &'static str = K::CONTROLLER;

    fn host(&self) -> &Host {
        &self.host
    }

    fn pace(&self, key: &Key) -> Duration {
        let wanted = self.sets.get(&key.namespace, &key.name).map(|set| set.wanted()).unwrap_or_default();
        PACE_OF_POD * u32::try_from(wanted).unwrap_or_default()
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.sets, own);
        sources.watch(&self.pods, |this, delta, queue| {
            if is_news(delta) {
                owned::enqueue(delta, &this.sets, queue, K::selects);
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(set) = self.sets.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let (active, leaving) = self.claim(&*set).await?;
        let wanted = usize::try_from(set.wanted()).unwrap_or_default();
        let scaled = if set.meta().deletion_timestamp.is_none() && active.len() != wanted {
            self.scale(&set, &active, wanted).await
        } else {
            Ok(())
        };
        let (status, next) = status(&*set, &active, leaving, scaled.as_ref().err(), Timestamp::now());
        let mut changed = (*set).clone();
        changed.set_status(status);
        if changed.status() != set.status() {
            let sets: Api<K> = Api::namespaced(self.host.client.clone(), &key.namespace);
            self.host.replace_status(&sets, &changed).await?;
        }
        scaled?;
        Ok(next.map_or(Outcome::Done, Outcome::After))
    }
}

/// The status that the pods amount to, and when it changes by time alone.
fn status<K: Replicated>(
    set: &K,
    active: &[Arc<Replica>],
    terminating: usize,
    failure: Option<&Error>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let labels = set.template().and_then(|template| template.metadata.as_ref()?.labels.clone()).unwrap_or_default();
    let mut labelled = once_a_template(|own| selector::matches_map(&labels, Some(own)));
    let count = |keep: &mut dyn FnMut(&Replica) -> bool| {
        i32::try_from(active.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX)
    };
    let (available, next) = pods::available(active.iter().map(|pod| pod.until_available(set.min_ready_seconds(), now)));
    let old = set.status();
    let mut conditions = old.conditions.unwrap_or_default();
    let replica_failure = conditions.iter().position(|condition| condition.type_ == "ReplicaFailure");
    match (failure, replica_failure) {
        (Some(error), None) => conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some(
                if active.len() < usize::try_from(set.wanted()).unwrap_or_default() {
                    "FailedCreate"
                } else {
                    "FailedDelete"
                }
                .into(),
            ),
            message: Some(error.message()),
            last_transition_time: Some(Time(truncated(now))),
        }),
        (None, Some(index)) => {
            conditions.remove(index);
        }
        _ => {}
    }
    let status = ReplicaSetStatus {
        replicas: count(&mut |_| true),
        fully_labeled_replicas: non_zero(count(&mut labelled)),
        ready_replicas: non_zero(count(&mut |pod| pod.is_ready)),
        available_replicas: non_zero(i32::try_from(available).unwrap_or(i32::MAX)),
        observed_generation: set.meta().generation,
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
pub(crate) fn truncated(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

//! DaemonSet: one pod on every node that fits.

mod fit;
mod plan;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetSpec, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod, PodTemplateSpec};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;

use self::plan::{Limits, Plan};
use crate::common::owned::{self, Owned};
use crate::common::{control, pods, revisions, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_reference};

/// First pause before a failed pod is replaced; doubles with each further failure on the same node.
const FAILED_FIRST: Duration = Duration::from_secs(1);
/// Longest pause before a failed pod is replaced.
const FAILED_MOST: Duration = Duration::from_secs(15 * 60);
/// Label with the counter of template changes, for old clients.
const GENERATION_LABEL: &str = "pod-template-generation";
const GENERATION: &str = "deprecated.daemonset.template.generation";

pub(crate) struct DaemonSets {
    host: Host,
    sets: Arc<Informer<DaemonSet>>,
    pods: Arc<Informer<Pod>>,
    nodes: Arc<Informer<Node>>,
    revisions: Arc<Informer<ControllerRevision>>,
    owned_pods: Arc<Owned<Pod>>,
    owned_revisions: Arc<Owned<ControllerRevision>>,
    /// When a failed pod was last replaced, and after which pause, by UID of the set and node. Entries that no longer
    /// hold anything back are dropped, so there are at most as many as failing pods.
    failures: Mutex<HashMap<(String, String), (Timestamp, Duration)>>,
}

impl DaemonSets {
    pub(crate) fn new(
        api: &Arc<ApiServer>,
        owned_pods: &Arc<Owned<Pod>>,
        owned_revisions: &Arc<Owned<ControllerRevision>>,
    ) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            sets: host.informer(),
            pods: host.informer(),
            nodes: host.informer(),
            revisions: host.informer(),
            owned_pods: owned_pods.clone(),
            owned_revisions: owned_revisions.clone(),
            failures: Mutex::default(),
            host,
        }
    }

    /// A node's change concerns every set if it changes where pods fit.
    fn node_changed(&self, delta: &Delta<Node>, queue: &WorkQueue<Key>) {
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && old.metadata.labels == new.metadata.labels
            && old.spec.as_ref().map(|spec| (&spec.taints, spec.unschedulable))
                == new.spec.as_ref().map(|spec| (&spec.taints, spec.unschedulable))
        {
            return;
        }
        for set in self.sets.list() {
            queue.add(Key::of(&*set));
        }
    }

    async fn history(&self, set: &DaemonSet, spec: &DaemonSetSpec) -> Result<revisions::History, Error> {
        let known = owned::claim(
            &self.host,
            set,
            self.owned_revisions.candidates(set),
            None,
            |revision: &ControllerRevision| selector::matches(&spec.selector, revision.metadata.labels.as_ref()),
        )
        .await?;
        let template_labels = spec.template.metadata.as_ref().and_then(|meta| meta.labels.clone());
        let naming = revisions::Naming {
            hash_label: revisions::HASH_LABEL,
            labels: template_labels.unwrap_or_default(),
            annotations: set.metadata.annotations.clone().unwrap_or_default(),
        };
        let collisions = set.status.as_ref().and_then(|status| status.collision_count);
        revisions::ensure(&self.host, set, known, &spec.template, collisions, naming).await
    }

    /// Whether a pod that failed on this node may be replaced by now; if not, how long it has to wait.
    fn may_replace(&self, set: &DaemonSet, node: &str, now: Timestamp) -> Result<(), Duration> {
        let mut failures = self.failures.lock();
        failures.retain(|_, (since, pause)| {
            Duration::try_from(now.duration_since(*since)).is_ok_and(|age| age < *pause * 2)
        });
        let key = (set.uid().unwrap_or_default(), node.to_owned());
        let pause = match failures.get(&key) {
            None => FAILED_FIRST,
            Some((since, pause)) => {
                let age = Duration::try_from(now.duration_since(*since)).unwrap_or_default();
                if age < *pause {
                    return Err(*pause - age);
                }
                (*pause * 2).min(FAILED_MOST)
            }
        };
        failures.insert(key, (now, pause));
        Ok(())
    }

    /// Removes pods that have ended, each after its pause; returns when the next may go.
    async fn replace_ended(
        &self,
        set: &DaemonSet,
        api: &Api<Pod>,
        ended: &[(String, Arc<Pod>)],
        now: Timestamp,
    ) -> Result<Option<Duration>, Error> {
        let mut next: Option<Duration> = None;
        for (node, pod) in ended {
            let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
            if pods::phase(pod) == "Failed" {
                if let Err(wait) = self.may_replace(set, node, now) {
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                    continue;
                }
                let note = format!("Found failed daemon pod {name} on node {node}, will try to kill it");
                self.host.event(set, EventType::Warning, "FailedDaemonPod", "Delete", note).await;
            } else {
                let note = format!("Found succeeded daemon pod {name} on node {node}, will try to delete it");
                self.host.event(set, EventType::Normal, "SucceededDaemonPod", "Delete", note).await;
            }
            control::delete(&self.host, set, api, pod).await?;
        }
        Ok(next)
    }
}

/// The template with the labels that tell its revision.
fn labelled(set: &DaemonSet, template: &PodTemplateSpec, hash: &str) -> PodTemplateSpec {
    let mut template = template.clone();
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(revisions::HASH_LABEL.into(), hash.into());
    if let Some(generation) = set.annotations().get(GENERATION) {
        labels.insert(GENERATION_LABEL.into(), generation.clone());
    }
    template
}

fn hash_of(revision: &ControllerRevision) -> String {
    revision.labels().get(revisions::HASH_LABEL).cloned().unwrap_or_default()
}

impl Controller for DaemonSets {
    const NAME: &'static str = "daemon-set-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.sets, |this, delta, queue| {
            if let Some(set) = delta.new.as_ref().or(delta.old.as_ref()) {
                queue.add(Key::of(&**set));
            }
            if let (Some(old), None) = (&delta.old, &delta.new) {
                let uid = old.uid().unwrap_or_default();
                this.failures.lock().retain(|(of, _), _| *of != uid);
            }
        });
        sources.watch(&self.pods, |this, delta, queue| {
            owned::enqueue(delta, &this.sets, queue, |set, labels| {
                set.spec.as_ref().is_some_and(|spec| selector::matches(&spec.selector, labels))
            });
        });
        sources.watch(&self.nodes, |this, delta, queue| this.node_changed(delta, queue));
        // A revision that somebody removes is made again.
        sources.watch(&self.revisions, |this, delta, queue| {
            if delta.new.is_none() {
                owned::enqueue(delta, &this.sets, queue, |_, _| false);
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(set) = self.sets.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let Some(spec) = &set.spec else { return Ok(Outcome::Done) };
        if spec.selector == Default::default() {
            let note = "This daemon set is selecting all pods. A non-empty selector is required.".into();
            self.host.event(&*set, EventType::Warning, "SelectingAll", "Select", note).await;
            return Ok(Outcome::Done);
        }
        if set.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Done);
        }
        let history = self.history(&set, spec).await?;
        let hash = hash_of(&history.current);
        let mine = owned::claim(&self.host, &*set, self.owned_pods.candidates(&*set), None, |pod: &Pod| {
            selector::matches(&spec.selector, pod.metadata.labels.as_ref())
        })
        .await?;
        let nodes: Vec<_> = self.nodes.list().collect();
        let now = Timestamp::now();
        let template = labelled(&set, &spec.template, &hash);
        let plan = Plan::new(spec, &fit::Wants::of(&template), &nodes, &mine, &hash, now);
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let done = async {
            let wait = self.replace_ended(&set, &api, &plan.ended, now).await?;
            control::delete_all(&self.host, &*set, &api, plan.delete.iter().cloned()).await?;
            let owner = controller_reference(&*set);
            let missing = plan.create.iter().take(control::BURST);
            let pods = missing.map(|node| fit::pod_for(&template, &set.name_any(), owner.clone(), node)).collect();
            control::create_all(&self.host, &*set, &api, pods).await?;
            Ok::<_, Error>(wait)
        }
        .await;
        self.write_status(&set, &plan, history.collisions).await?;
        let wait = done?;
        let live: BTreeSet<String> =
            mine.iter().filter_map(|pod| pod.labels().get(revisions::HASH_LABEL).cloned()).collect();
        revisions::truncate(&self.host, &*set, &history.old, &live, spec.revision_history_limit, hash_of).await?;
        let (_, next) = pods::available(
            mine.iter().map(|pod| pods::until_available(pod, spec.min_ready_seconds.unwrap_or_default(), now)),
        );
        let next = next.and_then(|wait| Duration::try_from(wait).ok());
        Ok(wait.into_iter().chain(next).min().map_or(Outcome::Done, Outcome::After))
    }
}

impl DaemonSets {
    async fn write_status(&self, set: &DaemonSet, plan: &Plan, collisions: Option<i32>) -> Result<(), Error> {
        let counts = plan.counts;
        let non_zero = |count: i32| (count > 0).then_some(count);
        let status = DaemonSetStatus {
            observed_generation: set.metadata.generation,
            desired_number_scheduled: counts.desired,
            current_number_scheduled: counts.current,
            number_misscheduled: counts.misscheduled,
            number_ready: counts.ready,
            updated_number_scheduled: non_zero(counts.updated),
            number_available: non_zero(counts.available),
            number_unavailable: non_zero(counts.desired - counts.available),
            collision_count: collisions,
            conditions: set.status.as_ref().and_then(|status| status.conditions.clone()),
        };
        if set.status.as_ref() != Some(&status) {
            let api: Api<DaemonSet> = Api::namespaced(self.host.client.clone(), &set.namespace().unwrap_or_default());
            let mut changed = set.clone();
            changed.status = Some(status);
            self.host.replace_status(&api, &changed).await?;
        }
        Ok(())
    }
}

/// The pods of a set by the node they are on or meant for.
fn by_node(pods: &[Arc<Pod>]) -> BTreeMap<String, Vec<Arc<Pod>>> {
    let mut found: BTreeMap<String, Vec<Arc<Pod>>> = BTreeMap::new();
    for pod in pods {
        if let Some(node) = fit::node_of(pod) {
            found.entry(node.to_owned()).or_default().push(pod.clone());
        }
    }
    found
}

fn limits(spec: &DaemonSetSpec, desired: i32) -> Limits {
    let strategy = spec.update_strategy.as_ref();
    if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
        return Limits::OnDelete;
    }
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let count = |value: Option<&_>, otherwise| {
        value.map_or(otherwise, |value| crate::common::intstr::scaled(value, desired, true).unwrap_or_default())
    };
    let surge = count(rolling.and_then(|rolling| rolling.max_surge.as_ref()), 0);
    let unavailable = count(rolling.and_then(|rolling| rolling.max_unavailable.as_ref()), 1);
    if surge > 0 { Limits::Surge(surge) } else { Limits::Unavailable(unavailable.max(1)) }
}

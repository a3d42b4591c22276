//! StatefulSet: pods with a name, a place in an order and claims of their own that outlive them.

mod claims;
mod identity;
mod plan;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use self::identity::parent;
use self::plan::{Step, View};
use crate::common::owned::{self, Owned};
use crate::common::{control, pods, revisions, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue, own};

/// Label of a set's revisions that holds their hash.
const HASH_LABEL: &str = "controller.kubernetes.io/hash";

pub(crate) struct StatefulSets {
    host: Host,
    sets: Arc<Informer<StatefulSet>>,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    revisions: Arc<Informer<ControllerRevision>>,
    owned_pods: Arc<Owned<Pod>>,
    owned_revisions: Arc<Owned<ControllerRevision>>,
}

impl StatefulSets {
    pub(crate) fn new(
        api: &Arc<ApiServer>,
        owned_pods: &Arc<Owned<Pod>>,
        owned_revisions: &Arc<Owned<ControllerRevision>>,
    ) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            sets: host.informer(),
            pods: host.informer(),
            claims: host.informer(),
            revisions: host.informer(),
            owned_pods: owned_pods.clone(),
            owned_revisions: owned_revisions.clone(),
            host,
        }
    }

    fn pods_api(&self, set: &StatefulSet) -> Api<Pod> {
        Api::namespaced(self.host.client.clone(), &set.namespace().unwrap_or_default())
    }

    /// The revision of the template of now and the one that pods below the partition have.
    async fn history(&self, set: &StatefulSet, spec: &StatefulSetSpec) -> Result<revisions::History, Error> {
        let known = owned::claim(
            &self.host,
            set,
            self.owned_revisions.candidates(set),
            None,
            |revision: &ControllerRevision| selector::matches(&spec.selector, revision.metadata.labels.as_ref()),
        )
        .await?;
        let naming = revisions::Naming {
            hash_label: HASH_LABEL,
            labels: spec.selector.match_labels.clone().unwrap_or_default(),
            annotations: Default::default(),
        };
        let collisions = Some(set.status.as_ref().and_then(|status| status.collision_count).unwrap_or_default());
        revisions::ensure(&self.host, set, known, &spec.template, collisions, naming).await
    }

    /// Does what the plan says, in its order.
    async fn carry_out(
        &self,
        set: &StatefulSet,
        spec: &StatefulSetSpec,
        view: &View<'_>,
        steps: Vec<Step>,
    ) -> Result<(), Error> {
        if spec.pod_management_policy.as_deref() == Some("Parallel") {
            return control::collect(
                steps.into_iter().take(control::BURST).map(|step| self.step(set, spec, view, step)),
            )
            .await;
        }
        for step in steps {
            self.step(set, spec, view, step).await?;
        }
        Ok(())
    }

    async fn step(&self, set: &StatefulSet, spec: &StatefulSetSpec, view: &View<'_>, step: Step) -> Result<(), Error> {
        match step {
            Step::Create(ordinal) => self.create(set, spec, view, ordinal).await,
            Step::Claims(pod) => self.make_claims(set, spec, &pod).await,
            Step::Identity(pod) => {
                self.make_claims(set, spec, &pod).await?;
                let patch =
                    serde_json::json!({"metadata": {"uid": pod.uid(), "labels": identity::labels(&pod.name_any())}});
                self.host.patch(&self.pods_api(set), &pod.name_any(), patch).await.map(|_| ())
            }
            Step::Replace(pod) => {
                let (what, type_, reason) = match pods::phase(&pod) {
                    "Failed" => ("failed", EventType::Warning, "RecreatingFailedPod"),
                    _ => ("terminated", EventType::Normal, "RecreatingTerminatedPod"),
                };
                let note = format!("StatefulSet {} is recreating {what} Pod {}", Key::of(set), pod.name_any());
                self.host.event(set, type_, reason, "Recreate", note).await;
                self.delete(set, &pod).await
            }
            Step::Delete(pod) => self.delete(set, &pod).await,
        }
    }

    async fn create(
        &self,
        set: &StatefulSet,
        spec: &StatefulSetSpec,
        view: &View<'_>,
        ordinal: i32,
    ) -> Result<(), Error> {
        let revision = view.revision_for(ordinal);
        let template = revisions::template(revision)?;
        let pod = identity::pod(set, spec, &template, &revision.name_any(), ordinal);
        if self.stale_claims(set, spec, &pod) {
            // The garbage collector is about to remove them; the set is looked at again when they are gone.
            return Ok(());
        }
        let name = pod.name_any();
        let made = match self.make_claims(set, spec, &pod).await {
            Ok(()) => self.host.create(&self.pods_api(set), &pod).await,
            Err(error) => Err(error),
        };
        let set_name = set.name_any();
        match made {
            Ok(_) => {
                let note = format!("create Pod {name} in StatefulSet {set_name} successful");
                self.host.event(set, EventType::Normal, "SuccessfulCreate", "Create", note).await;
                Ok(())
            }
            Err(error) if error.in_terminating_namespace() => Ok(()),
            Err(error) => {
                let note = format!("create Pod {name} in StatefulSet {set_name} failed error: {}", error.message());
                self.host.event(set, EventType::Warning, "FailedCreate", "Create", note).await;
                Err(error)
            }
        }
    }

    async fn delete(&self, set: &StatefulSet, pod: &Pod) -> Result<(), Error> {
        self.host.delete(&self.pods_api(set), pod).await?;
        let note = format!("delete Pod {} in StatefulSet {} successful", pod.name_any(), set.name_any());
        self.host.event(set, EventType::Normal, "SuccessfulDelete", "Delete", note).await;
        Ok(())
    }

    /// Queues the set that a claim belongs to: one that goes may be in the way of a pod.
    fn claim_changed(&self, delta: &Delta<PersistentVolumeClaim>, queue: &WorkQueue<Key>) {
        let (Some(claim), None) = (&delta.old, &delta.new) else { return };
        for set in self.sets.list_ns(&claim.namespace().unwrap_or_default()) {
            if claims::belongs(&set, claim) {
                queue.add(Key::of(&*set));
            }
        }
    }
}

impl Controller for StatefulSets {
    const NAME: &'static str = "statefulset-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.sets, own);
        sources.watch(&self.pods, |this, delta, queue| {
            owned::enqueue(delta, &this.sets, queue, |set, labels| {
                set.spec.as_ref().is_some_and(|spec| selector::matches(&spec.selector, labels))
            });
        });
        sources.watch(&self.claims, |this, delta, queue| this.claim_changed(delta, queue));
        // Only so that a revision's own writes are waited for, and one that is deleted is made again.
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
            let note = "This StatefulSet is selecting all pods. A non-empty selector is required.".into();
            self.host.event(&*set, EventType::Warning, "SelectingAll", "Select", note).await;
            return Ok(Outcome::Done);
        }
        let mine = owned::claim(&self.host, &*set, self.owned_pods.candidates(&*set), None, |pod: &Pod| {
            parent(pod) == Some(&*set.name_any()) && selector::matches(&spec.selector, pod.metadata.labels.as_ref())
        })
        .await?;
        let history = if set.metadata.deletion_timestamp.is_none() {
            self.history(&set, spec).await?
        } else {
            return Ok(Outcome::Done);
        };
        let now = Timestamp::now();
        let view = View::new(&set, spec, &history, mine.clone(), now);
        // Before any pod goes: the claims of one that does are to go with it or not.
        for pod in view.pods() {
            self.retain(&set, spec, pod).await?;
        }
        let steps = view.plan();
        let mut status = view.status(&set, &history);
        view.account_for(&steps, &mut status);
        let done = self.carry_out(&set, spec, &view, steps).await;
        let current = self.write_status(&set, status).await?;
        done?;
        let mut live: BTreeSet<String> =
            mine.iter().filter_map(|pod| identity::revision(pod)).map(str::to_owned).collect();
        live.extend(current);
        revisions::truncate(&self.host, &*set, &history.old, &live, spec.revision_history_limit, |revision| {
            revision.name_any()
        })
        .await?;
        let (_, next) = pods::available(
            mine.iter().map(|pod| pods::until_available(pod, spec.min_ready_seconds.unwrap_or_default(), now)),
        );
        Ok(next.and_then(|wait| Duration::try_from(wait).ok()).map_or(Outcome::Done, Outcome::After))
    }
}

impl StatefulSets {
    /// Writes the status if it changed; returns the revisions it names.
    async fn write_status(&self, set: &StatefulSet, mut status: StatefulSetStatus) -> Result<Vec<String>, Error> {
        plan::complete(set, &mut status);
        let named = status.current_revision.iter().chain(&status.update_revision).cloned().collect();
        if set.status.as_ref() != Some(&status) {
            let api: Api<StatefulSet> = Api::namespaced(self.host.client.clone(), &set.namespace().unwrap_or_default());
            let mut changed = set.clone();
            changed.status = Some(status);
            self.host.replace_status(&api, &changed).await?;
        }
        Ok(named)
    }
}

//! Deployment: rolls a template out over ReplicaSets.

mod rollout;
mod status;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet, ReplicaSetSpec, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use self::rollout::{Bounds, Size, grow, proportion, shrink};
use crate::common::owned::{self, Owned};
use crate::common::{hash, pods, selector};
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, controller_of, controller_reference, is_controlled_by, own,
};

/// Label that tells the pods of one template from those of another.
const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const DEFAULT_HISTORY: i32 = 10;

pub(crate) struct Deployments {
    host: Host,
    deployments: Arc<Informer<Deployment>>,
    sets: Arc<Informer<ReplicaSet>>,
    pods: Arc<Informer<Pod>>,
    owned: Owned<ReplicaSet>,
    /// Pods by their sets.
    of_sets: Arc<Owned<Pod>>,
}

/// The ReplicaSets of a Deployment, as one reconciliation sees and changes them.
struct Sets {
    new: Option<ReplicaSet>,
    /// Oldest first.
    old: Vec<ReplicaSet>,
}

impl Sets {
    fn all(&self) -> impl Iterator<Item = &ReplicaSet> {
        self.old.iter().chain(&self.new)
    }
}

fn wanted(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

fn status_of(set: &ReplicaSet, count: impl Fn(&ReplicaSetStatus) -> Option<i32>) -> i32 {
    set.status.as_ref().and_then(count).unwrap_or_default()
}

fn size(set: &ReplicaSet) -> Size {
    Size {
        wanted: wanted(set),
        // A set that was made smaller a moment ago still counts what is about to go.
        available: status_of(set, |status| status.available_replicas).min(wanted(set)),
        max: set.annotations().get(MAXIMUM).and_then(|max| max.parse().ok()).unwrap_or_default(),
    }
}

fn revision(set: &ReplicaSet) -> i64 {
    set.annotations().get(REVISION).and_then(|revision| revision.parse().ok()).unwrap_or_default()
}

/// A template without the label that the controller adds.
fn bare(template: Option<&PodTemplateSpec>) -> PodTemplateSpec {
    let mut template = template.cloned().unwrap_or_default();
    if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.remove(HASH_LABEL);
    }
    template
}

impl Deployments {
    pub(crate) fn new(api: &Arc<ApiServer>, pods: &Arc<Owned<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            deployments: host.informer(),
            sets: host.informer(),
            pods: host.informer(),
            owned: Owned::new(api),
            of_sets: pods.clone(),
            host,
        }
    }

    fn sets_api(&self, namespace: &str) -> Api<ReplicaSet> {
        Api::namespaced(self.host.client.clone(), namespace)
    }

    fn deployments_api(&self, deployment: &Deployment) -> Api<Deployment> {
        Api::namespaced(self.host.client.clone(), &deployment.namespace().unwrap_or_default())
    }

    /// The ReplicaSets of the Deployment after adopting and releasing, and which of them is the new one.
    async fn claim(&self, deployment: &Deployment, spec: &DeploymentSpec) -> Result<Sets, Error> {
        let selects = |set: &ReplicaSet| selector::matches(&spec.selector, set.metadata.labels.as_ref());
        let claimed = owned::claim(&self.host, deployment, self.owned.candidates(deployment), None, selects).await?;
        let mut claimed: Vec<ReplicaSet> = claimed.iter().map(|set| (**set).clone()).collect();
        claimed.sort_by_key(|set| (set.creation_timestamp(), set.name_any()));
        let template = bare(Some(&spec.template));
        let new =
            claimed.iter().position(|set| bare(set.spec.as_ref().and_then(|spec| spec.template.as_ref())) == template);
        let new = new.map(|index| claimed.remove(index));
        Ok(Sets { new, old: claimed })
    }

    /// Brings revision and annotations of the new set up to date; makes the set if `create` and it is missing.
    async fn new_set(
        &self,
        deployment: &Deployment,
        spec: &DeploymentSpec,
        sets: &mut Sets,
        create: bool,
    ) -> Result<(), Error> {
        let namespace = deployment.namespace().unwrap_or_default();
        let api = self.sets_api(&namespace);
        let latest = sets.old.iter().map(revision).max().unwrap_or_default() + 1;
        if let Some(new) = &sets.new {
            let mut annotations = copied_annotations(deployment, new.annotations());
            let own = revision(new);
            if own < latest {
                if own > 0 {
                    let history = annotations.get(REVISION_HISTORY).map(|history| format!("{history},{own}"));
                    annotations.insert(REVISION_HISTORY.into(), history.unwrap_or_else(|| own.to_string()));
                }
                annotations.insert(REVISION.into(), latest.to_string());
            }
            let min_ready = new.spec.as_ref().and_then(|set| set.min_ready_seconds).unwrap_or_default();
            if &annotations != new.annotations() || min_ready != spec.min_ready_seconds.unwrap_or_default() {
                let patch = serde_json::json!({
                    "metadata": {"annotations": annotations},
                    "spec": {"minReadySeconds": spec.min_ready_seconds},
                });
                sets.new = Some(self.host.patch(&api, &new.name_any(), patch).await?);
            }
        } else if create {
            sets.new = self.create_set(deployment, spec, sets, &api, latest).await?;
        }
        Ok(())
    }

    async fn create_set(
        &self,
        deployment: &Deployment,
        spec: &DeploymentSpec,
        sets: &Sets,
        api: &Api<ReplicaSet>,
        revision: i64,
    ) -> Result<Option<ReplicaSet>, Error> {
        let collisions = deployment.status.as_ref().and_then(|status| status.collision_count).unwrap_or_default();
        let hash =
            hash::of(&bare(Some(&spec.template)), collisions).map_err(|error| Error::Invalid(error.to_string()))?;
        let mut template = spec.template.clone();
        template
            .metadata
            .get_or_insert_default()
            .labels
            .get_or_insert_default()
            .insert(HASH_LABEL.into(), hash.clone());
        let mut selector = spec.selector.clone();
        selector.match_labels.get_or_insert_default().insert(HASH_LABEL.into(), hash.clone());
        let total = spec.replicas.unwrap_or(1);
        let bounds = bounds(spec);
        let old_total: i32 = sets.old.iter().map(wanted).sum();
        let replicas = match strategy(spec) {
            "Recreate" => total,
            _ => grow(Size::default(), old_total, total, bounds),
        };
        let mut annotations = copied_annotations(deployment, &BTreeMap::new());
        annotations.insert(REVISION.into(), revision.to_string());
        annotations.insert(DESIRED.into(), total.to_string());
        annotations.insert(MAXIMUM.into(), (total + bounds.max_surge).to_string());
        let name = format!("{}-{hash}", deployment.name_any());
        let set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: deployment.namespace(),
                labels: template.metadata.as_ref().and_then(|meta| meta.labels.clone()),
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(deployment)]),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                min_ready_seconds: spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        match self.host.create(api, &set).await {
            Ok(made) => {
                if replicas > 0 {
                    let note = format!("Scaled up replica set {name} from 0 to {replicas}");
                    self.host
                        .event(deployment, EventType::Normal, "ScalingReplicaSet", "ScalingReplicaSet", note)
                        .await;
                }
                Ok(Some(made))
            }
            Err(error) if error.is_already_exists() => {
                let found = api.get_opt(&name).await.map_err(Error::at("get the replica set"))?;
                let ours = found.filter(|found| {
                    deployment.uid().is_some_and(|uid| is_controlled_by(&found.metadata, &uid))
                        && bare(found.spec.as_ref().and_then(|spec| spec.template.as_ref()))
                            == bare(Some(&spec.template))
                });
                if ours.is_some() {
                    return Ok(ours);
                }
                // Another template with the same hash, or somebody else's set: count the collision, take another name.
                let mut changed = deployment.clone();
                changed.status.get_or_insert_default().collision_count = Some(collisions + 1);
                self.host.replace_status(&self.deployments_api(deployment), &changed).await?;
                Ok(None)
            }
            Err(error) if error.in_terminating_namespace() => Ok(None),
            Err(error) => {
                let note = format!("Failed to create new replica set \"{name}\": {}", error.message());
                let mut changed = deployment.clone();
                if status::failed_to_create(&mut changed, &note, Timestamp::now()) {
                    self.host.replace_status(&self.deployments_api(deployment), &changed).await?;
                }
                let reason = "ReplicaSetCreateError";
                self.host.event(deployment, EventType::Warning, reason, reason, note).await;
                Err(error)
            }
        }
    }

    /// Sets the size of a set, and what annotations remember of the Deployment's.
    async fn resize(
        &self,
        deployment: &Deployment,
        spec: &DeploymentSpec,
        set: &mut ReplicaSet,
        to: i32,
    ) -> Result<(), Error> {
        let from = wanted(set);
        let total = spec.replicas.unwrap_or(1);
        let (desired, maximum) = (total.to_string(), (total + bounds(spec).max_surge).to_string());
        let remembered =
            set.annotations().get(DESIRED) == Some(&desired) && set.annotations().get(MAXIMUM) == Some(&maximum);
        if from == to && remembered {
            return Ok(());
        }
        let patch = serde_json::json!({
            // What was counted may have changed, and who counted may lead no longer: then this is not to be written.
            "metadata": {"resourceVersion": set.resource_version(), "annotations": {DESIRED: desired, MAXIMUM: maximum}},
            "spec": {"replicas": to},
        });
        let api = self.sets_api(&deployment.namespace().unwrap_or_default());
        *set = self.host.patch(&api, &set.name_any(), patch).await?;
        if from != to {
            let direction = if to > from { "up" } else { "down" };
            let note = format!("Scaled {direction} replica set {} from {from} to {to}", set.name_any());
            self.host.event(deployment, EventType::Normal, "ScalingReplicaSet", "ScalingReplicaSet", note).await;
        }
        Ok(())
    }

    /// After the Deployment's own size changed: the one active set takes all, several share in proportion.
    async fn scale(&self, deployment: &Deployment, spec: &DeploymentSpec, sets: &mut Sets) -> Result<(), Error> {
        let total = spec.replicas.unwrap_or(1);
        let active = sets.all().filter(|set| wanted(set) > 0).count();
        let saturated = sets.new.as_ref().is_some_and(|new| size(new).available >= total && wanted(new) == total);
        if active <= 1 {
            // The one with pods; without any the newest that there is.
            let old = sets.old.iter().position(|set| wanted(set) > 0);
            let old = old.or(sets.new.is_none().then(|| sets.old.len().checked_sub(1)).flatten());
            let target = old.map(|index| &mut sets.old[index]).or(sets.new.as_mut());
            if let Some(set) = target {
                self.resize(deployment, spec, set, total).await?;
            }
            return Ok(());
        }
        if saturated {
            for set in sets.old.iter_mut().filter(|set| wanted(set) > 0) {
                self.resize(deployment, spec, set, 0).await?;
            }
            return Ok(());
        }
        if strategy(spec) != "RollingUpdate" {
            return Ok(());
        }
        let mut order: Vec<&mut ReplicaSet> =
            sets.new.iter_mut().chain(sets.old.iter_mut()).filter(|set| wanted(set) > 0).collect();
        order.sort_by_key(|set| (Reverse(wanted(set)), set.creation_timestamp()));
        let sizes = proportion(&order.iter().map(|set| size(set)).collect::<Vec<_>>(), total, bounds(spec));
        for (set, to) in order.into_iter().zip(sizes) {
            self.resize(deployment, spec, set, to).await?;
        }
        Ok(())
    }

    async fn roll(&self, deployment: &Deployment, spec: &DeploymentSpec, sets: &mut Sets) -> Result<(), Error> {
        self.new_set(deployment, spec, sets, true).await?;
        let Some(new) = &mut sets.new else {
            return Ok(());
        };
        let (total, bounds) = (spec.replicas.unwrap_or(1), bounds(spec));
        let old_total: i32 = sets.old.iter().map(wanted).sum();
        let to = grow(size(new), old_total, total, bounds);
        if to != wanted(new) {
            return self.resize(deployment, spec, new, to).await;
        }
        let sizes = shrink(&sets.old.iter().map(size).collect::<Vec<_>>(), size(new), total, bounds);
        for (set, to) in sets.old.iter_mut().zip(sizes) {
            if to != wanted(set) {
                self.resize(deployment, spec, set, to).await?;
            }
        }
        Ok(())
    }

    async fn recreate(&self, deployment: &Deployment, spec: &DeploymentSpec, sets: &mut Sets) -> Result<(), Error> {
        self.new_set(deployment, spec, sets, false).await?;
        let mut shrunk = false;
        for index in 0..sets.old.len() {
            shrunk |= wanted(&sets.old[index]) > 0;
            self.resize(deployment, spec, &mut sets.old[index], 0).await?;
        }
        if shrunk || self.old_pods_live(sets) {
            return Ok(());
        }
        self.new_set(deployment, spec, sets, true).await?;
        if let Some(new) = &mut sets.new {
            self.resize(deployment, spec, new, spec.replicas.unwrap_or(1)).await?;
        }
        Ok(())
    }

    fn old_pods_live(&self, sets: &Sets) -> bool {
        let pods = sets.old.iter().flat_map(|set| self.of_sets.of(set.metadata.uid.as_deref().unwrap_or_default()));
        pods.into_iter().any(|pod| !matches!(pods::phase(&pod), "Succeeded" | "Failed"))
    }

    /// Removes the oldest sets beyond the history limit, as far as nothing of them runs.
    async fn forget_history(&self, deployment: &Deployment, spec: &DeploymentSpec, sets: &Sets) -> Result<(), Error> {
        let keep = usize::try_from(spec.revision_history_limit.unwrap_or(DEFAULT_HISTORY)).unwrap_or_default();
        let idle = |set: &&&ReplicaSet| {
            wanted(set) == 0
                && status_of(set, |status| Some(status.replicas)) == 0
                && set.metadata.generation <= set.status.as_ref().and_then(|status| status.observed_generation)
        };
        let mut old: Vec<_> = sets.old.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
        old.sort_by_key(|set| (revision(set), set.creation_timestamp()));
        let surplus = old.len().saturating_sub(keep);
        let api = self.sets_api(&deployment.namespace().unwrap_or_default());
        for set in old[..surplus].iter().filter(idle) {
            self.host.delete(&api, *set).await?;
        }
        Ok(())
    }

    async fn write_back(&self, deployment: &Deployment, spec: &DeploymentSpec, sets: &Sets) -> Result<Outcome, Error> {
        let api = self.deployments_api(deployment);
        let newest =
            sets.new.as_ref().map(revision).filter(|revision| *revision > 0).map(|revision| revision.to_string());
        let mut current = deployment.clone();
        if let Some(newest) = newest.filter(|newest| deployment.annotations().get(REVISION) != Some(newest)) {
            // The role of this controller may update, not patch.
            current.annotations_mut().insert(REVISION.into(), newest);
            current = self.host.replace(&api, &current).await?;
        }
        let (status, next) = status::of(&current, spec, sets, Timestamp::now());
        if current.status.as_ref() != Some(&status) {
            current.status = Some(status);
            self.host.replace_status(&api, &current).await?;
        }
        Ok(next.map_or(Outcome::Done, Outcome::After))
    }
}

fn strategy(spec: &DeploymentSpec) -> &str {
    spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate")
}

fn bounds(spec: &DeploymentSpec) -> Bounds {
    if strategy(spec) != "RollingUpdate" {
        return Bounds { max_surge: 0, max_unavailable: 0 };
    }
    let rolling = spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
    Bounds::resolve(
        rolling.and_then(|rolling| rolling.max_surge.as_ref()),
        rolling.and_then(|rolling| rolling.max_unavailable.as_ref()),
        spec.replicas.unwrap_or(1),
    )
}

/// The annotations of a set with those of the Deployment laid over, except the ones each keeps for itself.
fn copied_annotations(deployment: &Deployment, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kept = [LAST_APPLIED, REVISION, REVISION_HISTORY, DESIRED, MAXIMUM];
    let mut annotations = own.clone();
    for (key, value) in deployment.annotations().iter().filter(|(key, _)| !kept.contains(&key.as_str())) {
        annotations.insert(key.clone(), value.clone());
    }
    annotations
}

impl Controller for Deployments {
    const NAME: &'static str = "deployment-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.deployments, own);
        let selects = |deployment: &Deployment, labels: Option<&BTreeMap<String, String>>| {
            deployment.spec.as_ref().is_some_and(|spec| selector::matches(&spec.selector, labels))
        };
        sources.watch(&self.sets, move |this, delta, queue| owned::enqueue(delta, &this.deployments, queue, selects));
        // Recreate goes on when the last old pod is gone.
        sources.watch(&self.pods, |this, delta, queue| {
            let (Some(pod), None) = (&delta.old, &delta.new) else {
                return;
            };
            let namespace = pod.namespace().unwrap_or_default();
            let set = controller_of(&pod.metadata).and_then(|owner| this.sets.get(&namespace, &owner.name));
            if let Some(owner) = set.as_ref().and_then(|set| controller_of(&set.metadata)) {
                queue.add(Key::new(&namespace, &owner.name));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(deployment) = self.deployments.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let Some(spec) = deployment.spec.clone() else {
            return Ok(Outcome::Done);
        };
        let everything = k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector::default();
        if spec.selector == everything {
            let note = "This deployment is selecting all pods. A non-empty selector is required.".into();
            self.host.event(&*deployment, EventType::Warning, "SelectingAll", "Select", note).await;
            return Ok(Outcome::Done);
        }
        let mut sets = self.claim(&deployment, &spec).await?;
        if deployment.metadata.deletion_timestamp.is_some() {
            return self.write_back(&deployment, &spec, &sets).await;
        }
        let total = spec.replicas.unwrap_or(1).to_string();
        let scaled = sets
            .all()
            .any(|set| wanted(set) > 0 && set.annotations().get(DESIRED).is_some_and(|desired| *desired != total));
        if spec.paused == Some(true) || scaled {
            self.new_set(&deployment, &spec, &mut sets, false).await?;
            self.scale(&deployment, &spec, &mut sets).await?;
        } else if strategy(&spec) == "Recreate" {
            self.recreate(&deployment, &spec, &mut sets).await?;
        } else {
            self.roll(&deployment, &spec, &mut sets).await?;
        }
        if spec.paused != Some(true) && status::is_complete(&deployment, &spec) {
            self.forget_history(&deployment, &spec, &sets).await?;
        }
        self.write_back(&deployment, &spec, &sets).await
    }
}

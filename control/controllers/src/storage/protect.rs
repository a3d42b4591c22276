//! Protection of claims, volumes and attribute classes: each holds a finalizer for as long as something uses it.

use std::sync::Arc;

use coracle_api::informer::{Cached, Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::VolumeAttributesClass;
use kube::{Api, ResourceExt};

use crate::common::pods::claims_of;
use crate::machine::{Controller, Error, Host, Key, Kind, Outcome, Sources, is_controlled_by};

/// Takes the finalizer from an object that goes and is used no more, and gives it to one that lacks it.
async fn protect<K: Kind>(host: &Host, api: &Api<K>, object: &K, finalizer: &str, used: bool) -> Result<(), Error> {
    let held = object.finalizers().iter().any(|name| name == finalizer);
    let goes = object.meta().deletion_timestamp.is_some();
    let mut changed = object.clone();
    match (held, goes, used) {
        (true, true, false) => changed.finalizers_mut().retain(|name| name != finalizer),
        (false, false, _) => changed.finalizers_mut().push(finalizer.into()),
        _ => return Ok(()),
    }
    host.replace(api, &changed).await?;
    Ok(())
}

/// Queues an object that changed and still is.
fn itself<C: Controller, K: Cached>(sources: &mut Sources<C>, informer: &Arc<Informer<K>>) {
    sources.watch(informer, |_, delta, queue| {
        if let Some(object) = &delta.new {
            queue.add(Key::of(&**object));
        }
    });
}

/// Claims: used by pods that are bound to a node.
pub(crate) struct Claims {
    host: Host,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    pods: Arc<Informer<Pod>>,
    users: Arc<Index<Pod>>,
}

impl Claims {
    pub(crate) fn new(api: &Arc<ApiServer>, users: &Arc<Index<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { claims: host.informer(), pods: host.informer(), users: users.clone(), host }
    }

    fn uses(claim: &PersistentVolumeClaim, pod: &Pod) -> bool {
        let bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_ref().is_some_and(|name| !name.is_empty()));
        let named = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let named = named.filter_map(|volume| volume.persistent_volume_claim.as_ref());
        let name = claim.name_any();
        // A claim of the name that an ephemeral volume would have, made by somebody else, is not in use by the pod.
        let own = is_controlled_by(&claim.metadata, &pod.uid().unwrap_or_default());
        bound && (own || named.into_iter().any(|source| source.claim_name == name))
    }
}

impl Controller for Claims {
    const NAME: &'static str = "pvc-protection-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        itself(sources, &self.claims);
        sources.watch(&self.pods, |_, delta, queue| {
            // Only the end of a use sets a claim free.
            if let (Some(gone), None) = (&delta.old, &delta.new) {
                for claim in claims_of(gone) {
                    if let Some((namespace, name)) = claim.split_once('/') {
                        queue.add(Key::new(namespace, name));
                    }
                }
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(claim) = self.claims.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let mut used = self.users.get(&key.to_string()).any(|pod| Self::uses(&claim, &pod));
        if claim.metadata.deletion_timestamp.is_some() && !used {
            // The cache may not show a pod that was made and bound just now; the API does.
            let pods: Api<Pod> = Api::namespaced(self.host.client.clone(), &key.namespace);
            let all = pods.list(&kube::api::ListParams::default()).await.map_err(Error::at("list the pods"))?;
            used = all.iter().any(|pod| claims_of(pod).contains(&key.to_string()) && Self::uses(&claim, pod));
        }
        protect(&self.host, &api, &claim, "kubernetes.io/pvc-protection", used).await?;
        Ok(Outcome::Done)
    }
}

/// Volumes: used while they are bound.
pub(crate) struct Volumes {
    host: Host,
    volumes: Arc<Informer<PersistentVolume>>,
}

impl Volumes {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { volumes: host.informer(), host }
    }
}

impl Controller for Volumes {
    const NAME: &'static str = "pv-protection-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        itself(sources, &self.volumes);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(volume) = self.volumes.get("", &key.name) else { return Ok(Outcome::Done) };
        let used = volume.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Bound"));
        let api: Api<PersistentVolume> = Api::all(self.host.client.clone());
        protect(&self.host, &api, &volume, "kubernetes.io/pv-protection", used).await?;
        Ok(Outcome::Done)
    }
}

/// Attribute classes: used by the claims and volumes that name them (KEP-3751).
pub(crate) struct AttributeClasses {
    host: Host,
    classes: Arc<Informer<VolumeAttributesClass>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
}

fn classes_of_claim(claim: &PersistentVolumeClaim) -> Vec<String> {
    let status = claim.status.as_ref();
    let wanted = claim.spec.as_ref().and_then(|spec| spec.volume_attributes_class_name.clone());
    let current = status.and_then(|status| status.current_volume_attributes_class_name.clone());
    let target =
        status.and_then(|status| status.modify_volume_status.as_ref()?.target_volume_attributes_class_name.clone());
    [wanted, current, target].into_iter().flatten().collect()
}

fn class_of_volume(volume: &PersistentVolume) -> Option<String> {
    volume.spec.as_ref()?.volume_attributes_class_name.clone()
}

impl AttributeClasses {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { classes: host.informer(), claims: host.informer(), volumes: host.informer(), host }
    }
}

impl Controller for AttributeClasses {
    const NAME: &'static str = "volumeattributesclass-protection-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        itself(sources, &self.classes);
        sources.watch(&self.claims, |_, delta, queue| {
            delta.old.iter().flat_map(|claim| classes_of_claim(claim)).for_each(|name| queue.add(Key::new("", &name)));
        });
        sources.watch(&self.volumes, |_, delta, queue| {
            delta
                .old
                .iter()
                .filter_map(|volume| class_of_volume(volume))
                .for_each(|name| queue.add(Key::new("", &name)));
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(class) = self.classes.get("", &key.name) else { return Ok(Outcome::Done) };
        let used = self.claims.list().any(|claim| classes_of_claim(&claim).iter().any(|name| **name == *key.name))
            || self.volumes.list().any(|volume| class_of_volume(&volume).is_some_and(|name| *name == *key.name));
        let api: Api<VolumeAttributesClass> = Api::all(self.host.client.clone());
        protect(&self.host, &api, &class, "kubernetes.io/vac-protection", used).await?;
        Ok(Outcome::Done)
    }
}

//! The volume binder: brings claims and volumes together, says what phase each is in, and gives volumes back when their
//! claims are gone.

use std::sync::Arc;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{
    Node, ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeStatus,
};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use super::local::{self, PROVISIONER};
use super::matching::{best, capacity, claim_ref, class_of, class_of_volume, mismatch, refers_to, requested};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue};

pub(super) const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
pub(super) const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
pub(super) const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Where the scheduler writes which node a claim is to be served on.
pub(super) const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// By these an external provisioner learns that a claim is its own.
const STORAGE_PROVISIONER: [&str; 2] =
    ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";
const DEFAULT_CLASS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];

pub(crate) struct Binder {
    pub(super) host: Host,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
    pub(super) classes: Arc<Informer<StorageClass>>,
    pub(super) nodes: Arc<Informer<Node>>,
}

pub(super) fn claims_of(client: &kube::Client, namespace: &str) -> Api<PersistentVolumeClaim> {
    Api::namespaced(client.clone(), namespace)
}

fn phase(volume: &PersistentVolume) -> &str {
    volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether the class has its volumes made or chosen when a pod has a node, not before.
fn waits_for_consumer(class: Option<&StorageClass>) -> bool {
    class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
}

impl Binder {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            claims: host.informer(),
            volumes: host.informer(),
            classes: host.informer(),
            nodes: host.informer(),
            host,
        }
    }

    pub(super) fn volumes_api(&self) -> Api<PersistentVolume> {
        Api::all(self.host.client.clone())
    }

    async fn note(&self, claim: &PersistentVolumeClaim, warn: bool, reason: &str, note: impl Into<String>) {
        let type_ = if warn { EventType::Warning } else { EventType::Normal };
        self.host.event(claim, type_, reason, "Bind", note.into()).await;
    }

    /// Moves one claim on.
    async fn claim(&self, claim: &PersistentVolumeClaim) -> Result<(), Error> {
        let completed = claim.annotations().contains_key(BIND_COMPLETED);
        let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
        match (completed, named) {
            (false, None) => self.find(claim).await,
            (false, Some(name)) => self.take(claim, &name).await,
            (true, None) => {
                self.lose(
                    claim,
                    "ClaimLost",
                    "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!",
                )
                .await
            }
            (true, Some(name)) => match self.volumes.get("", &name) {
                None => {
                    self.lose(
                        claim,
                        "ClaimLost",
                        "Bound claim has lost its PersistentVolume. Data on the volume is lost!",
                    )
                    .await
                }
                Some(volume) if claim_ref(&volume).is_none_or(|held| refers_to(held, claim)) => {
                    self.bind(claim, &volume).await?;
                    local::grow(self, claim, &volume).await
                }
                Some(_) => {
                    self.lose(
                        claim,
                        "ClaimMisbound",
                        "Two claims are bound to the same volume, this one is bound incorrectly",
                    )
                    .await
                }
            },
        }
    }

    /// Finds a volume for a claim that names none, or has one made.
    async fn find(&self, claim: &PersistentVolumeClaim) -> Result<(), Error> {
        let class_name = class_of(claim);
        if class_name.is_none()
            && let Some(default) = self.default_class()
        {
            // A class became the default after the claim was made.
            let patched = PersistentVolumeClaim {
                spec: claim.spec.clone().map(|spec| k8s_openapi::api::core::v1::PersistentVolumeClaimSpec {
                    storage_class_name: Some(default),
                    ..spec
                }),
                ..claim.clone()
            };
            self.host.replace(&claims_of(&self.host.client, &claim.namespace().unwrap_or_default()), &patched).await?;
            return Ok(());
        }
        let class_name = class_name.unwrap_or_default();
        let class = self.classes.get("", &class_name);
        let selected = claim.annotations().get(SELECTED_NODE);
        let waits = waits_for_consumer(class.as_deref()) && selected.is_none();
        let node = selected.and_then(|name| self.nodes.get("", name));
        if let Some(volume) = best(&self.volumes.list().collect::<Vec<_>>(), claim, node.as_deref(), waits) {
            return self.bind(claim, &volume).await;
        }
        self.pending(claim).await?;
        if claim.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        if waits {
            self.note(claim, false, "WaitForFirstConsumer", "waiting for first consumer to be created before binding")
                .await;
            return Ok(());
        }
        if class_name.is_empty() {
            let note = "no persistent volumes available for this claim and no storage class is set";
            self.note(claim, false, "FailedBinding", note).await;
            return Ok(());
        }
        let Some(class) = class else {
            let note = format!("storageclass.storage.k8s.io \"{class_name}\" not found");
            self.note(claim, true, "ProvisioningFailed", note).await;
            return Ok(());
        };
        match class.provisioner.as_str() {
            PROVISIONER => local::provision(self, claim, &class).await,
            NO_PROVISIONER => {
                let note =
                    format!("no volume of storage class {class_name} serves this claim, and the class makes none");
                self.note(claim, false, "FailedBinding", note).await;
                Ok(())
            }
            external => self.hand_over(claim, external).await,
        }
    }

    fn default_class(&self) -> Option<String> {
        let marked = |class: &Arc<StorageClass>| {
            DEFAULT_CLASS.iter().any(|mark| class.annotations().get(*mark).is_some_and(|value| value == "true"))
        };
        let newest = |class: &Arc<StorageClass>| {
            (class.creation_timestamp().map(|time| time.0), std::cmp::Reverse(class.name_any()))
        };
        self.classes.list().filter(marked).max_by_key(newest).map(|class| class.name_any())
    }

    /// Leaves a claim to the provisioner of its class, which watches for the annotation.
    async fn hand_over(&self, claim: &PersistentVolumeClaim, provisioner: &str) -> Result<(), Error> {
        if claim.annotations().get(STORAGE_PROVISIONER[0]).is_none_or(|held| held != provisioner) {
            let mut changed = claim.clone();
            for annotation in STORAGE_PROVISIONER {
                changed.annotations_mut().insert(annotation.into(), provisioner.into());
            }
            self.host.replace(&claims_of(&self.host.client, &claim.namespace().unwrap_or_default()), &changed).await?;
        }
        let note = format!(
            "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the system administrator. If volume creation is delayed, please verify that the provisioner is running and correctly registered."
        );
        self.note(claim, false, "ExternalProvisioning", note).await;
        Ok(())
    }

    /// Binds a claim to the volume that it names, once that is there and nobody else's.
    async fn take(&self, claim: &PersistentVolumeClaim, name: &str) -> Result<(), Error> {
        let Some(volume) = self.volumes.get("", name) else { return self.pending(claim).await };
        match claim_ref(&volume) {
            Some(held) if !refers_to(held, claim) => {
                let note = format!("volume \"{name}\" already bound to a different claim.");
                self.note(claim, true, "FailedBinding", note).await;
                self.pending(claim).await
            }
            None if mismatch(&volume, claim).is_some() => {
                let why = mismatch(&volume, claim).unwrap_or_default();
                let note = format!("Cannot bind to requested volume \"{name}\": {why}");
                self.note(claim, true, "VolumeMismatch", note).await;
                self.pending(claim).await
            }
            _ => self.bind(claim, &volume).await,
        }
    }

    /// Ties the two together, the volume first: whoever comes back after a crash finds which of them is for which.
    async fn bind(&self, claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<(), Error> {
        let mut volume = volume.clone();
        let held = claim_ref(&volume).cloned();
        if held.as_ref().and_then(|held| held.uid.as_ref()) != claim.metadata.uid.as_ref() {
            if held.is_none() {
                volume.annotations_mut().insert(BOUND_BY_CONTROLLER.into(), "yes".into());
            }
            volume.spec.get_or_insert_default().claim_ref = Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                name: claim.metadata.name.clone(),
                namespace: claim.metadata.namespace.clone(),
                uid: claim.metadata.uid.clone(),
                resource_version: claim.metadata.resource_version.clone(),
                ..ObjectReference::default()
            });
            volume = self.host.replace(&self.volumes_api(), &volume).await?;
        }
        if phase(&volume) != "Bound" {
            volume = self.set_phase(&volume, "Bound", None).await?;
        }
        let api = claims_of(&self.host.client, &claim.namespace().unwrap_or_default());
        let mut claim = claim.clone();
        let spec = claim.spec.get_or_insert_default();
        let named = spec.volume_name.as_deref() == Some(&volume.name_any());
        if !named {
            spec.volume_name = Some(volume.name_any());
            claim.annotations_mut().insert(BOUND_BY_CONTROLLER.into(), "yes".into());
        }
        if !named || !claim.annotations().contains_key(BIND_COMPLETED) {
            claim.annotations_mut().insert(BIND_COMPLETED.into(), "yes".into());
            claim = self.host.replace(&api, &claim).await?;
        }
        let mut status = claim.status.clone().unwrap_or_default();
        if status.phase.as_deref() != Some("Bound") {
            let spec = volume.spec.clone().unwrap_or_default();
            status.phase = Some("Bound".into());
            status.access_modes = spec.access_modes;
            status.capacity = spec.capacity;
            status.current_volume_attributes_class_name =
                spec.volume_attributes_class_name.filter(|name| !name.is_empty());
            claim.status = Some(status);
            self.host.replace_status(&api, &claim).await?;
        }
        Ok(())
    }

    async fn pending(&self, claim: &PersistentVolumeClaim) -> Result<(), Error> {
        self.claim_phase(claim, "Pending").await
    }

    async fn lose(&self, claim: &PersistentVolumeClaim, reason: &str, note: &str) -> Result<(), Error> {
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Lost") {
            self.note(claim, true, reason, note).await;
        }
        self.claim_phase(claim, "Lost").await
    }

    async fn claim_phase(&self, claim: &PersistentVolumeClaim, phase: &str) -> Result<(), Error> {
        let mut changed = claim.clone();
        let status = changed.status.get_or_insert_default();
        if status.phase.as_deref() == Some(phase) {
            return Ok(());
        }
        status.phase = Some(phase.into());
        if phase == "Lost" {
            status.access_modes = None;
            status.capacity = None;
        }
        let api = claims_of(&self.host.client, &claim.namespace().unwrap_or_default());
        self.host.replace_status(&api, &changed).await?;
        Ok(())
    }

    async fn set_phase(
        &self,
        volume: &PersistentVolume,
        phase: &str,
        message: Option<String>,
    ) -> Result<PersistentVolume, Error> {
        let changed = PersistentVolume {
            status: Some(PersistentVolumeStatus {
                phase: Some(phase.into()),
                message,
                last_phase_transition_time: Some(crate::common::pods::now()),
                ..PersistentVolumeStatus::default()
            }),
            ..volume.clone()
        };
        self.host.replace_status(&self.volumes_api(), &changed).await
    }

    /// Moves one volume on.
    async fn volume(&self, volume: &PersistentVolume) -> Result<(), Error> {
        let Some(held) = claim_ref(volume) else {
            return self.be(volume, "Available").await;
        };
        if held.uid.as_ref().is_none_or(String::is_empty) {
            // Reserved by a user; the claim comes for it.
            return self.be(volume, "Available").await;
        }
        let (namespace, name) = (held.namespace.clone().unwrap_or_default(), held.name.clone().unwrap_or_default());
        // The cache may be behind, and what follows may remove data: ask the API.
        let claim =
            claims_of(&self.host.client, &namespace).get_opt(&name).await.map_err(Error::at("look for the claim"))?;
        let claim = claim.filter(|claim| claim.metadata.uid == held.uid);
        let Some(claim) = claim else { return self.release(volume).await };
        let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
        if named == volume.name_any() {
            return self.be(volume, "Bound").await;
        }
        if named.is_empty() {
            return Ok(());
        }
        // The claim went elsewhere: what was made for it goes, what was chosen for it is free again.
        let made = volume.annotations().contains_key(PROVISIONED_BY);
        let spec = volume.spec.clone().unwrap_or_default();
        if made && spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete") {
            return self.release(volume).await;
        }
        if volume.annotations().contains_key(BOUND_BY_CONTROLLER) {
            let mut changed = volume.clone();
            changed.annotations_mut().remove(BOUND_BY_CONTROLLER);
            changed.spec.get_or_insert_default().claim_ref = None;
            let changed = self.host.replace(&self.volumes_api(), &changed).await?;
            return self.be(&changed, "Available").await;
        }
        Ok(())
    }

    async fn be(&self, volume: &PersistentVolume, wanted: &str) -> Result<(), Error> {
        if phase(volume) != wanted {
            self.set_phase(volume, wanted, None).await?;
        }
        Ok(())
    }

    /// Does with a volume whose claim is gone as its policy says.
    async fn release(&self, volume: &PersistentVolume) -> Result<(), Error> {
        let mut volume = volume.clone();
        if !["Released", "Failed"].contains(&phase(&volume)) {
            volume = self.set_phase(&volume, "Released", None).await?;
        }
        let spec = volume.spec.clone().unwrap_or_default();
        let made_by = volume.annotations().get(PROVISIONED_BY).cloned();
        match (spec.persistent_volume_reclaim_policy.as_deref(), made_by.as_deref()) {
            (Some("Delete"), Some(PROVISIONER)) => local::remove(self, &volume).await,
            // Whoever made it removes it; so do drivers with the volumes that are theirs.
            (Some("Delete"), Some(_)) => Ok(()),
            (Some("Delete"), None) if spec.csi.is_some() => Ok(()),
            (Some("Delete"), None) => {
                let why = "error getting deleter volume plugin for volume: no deletable volume plugin matched";
                self.fail(&volume, "VolumeFailedDelete", why).await
            }
            (Some("Recycle"), _) => {
                let why = "the policy Recycle is not supported: use Delete with a class that makes volumes, or Retain";
                self.fail(&volume, "VolumeFailedRecycle", why).await
            }
            _ => Ok(()),
        }
    }

    async fn fail(&self, volume: &PersistentVolume, reason: &str, why: &str) -> Result<(), Error> {
        if phase(volume) == "Failed" {
            return Ok(());
        }
        let failed = self.set_phase(volume, "Failed", Some(why.into())).await?;
        self.host.event(&failed, EventType::Warning, reason, "Reclaim", why.into()).await;
        Ok(())
    }

    /// Queues the claims that a changed volume may serve, and the one that it is for.
    fn volume_changed(&self, delta: &Delta<PersistentVolume>, queue: &WorkQueue<Key>) {
        let Some(volume) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
        if delta.new.is_some() {
            queue.add(Key::of(&**volume));
        }
        let held = claim_ref(volume);
        if let Some(held) = held {
            queue
                .add(Key::new(held.namespace.as_deref().unwrap_or_default(), held.name.as_deref().unwrap_or_default()));
        }
        let name = volume.name_any();
        for claim in self.claims.list() {
            let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
            let waits = named.is_empty()
                && held.is_none()
                && class_of(&claim).unwrap_or_default() == class_of_volume(volume)
                && requested(&claim) <= capacity(volume);
            if waits || named == name {
                queue.add(Key::of(&*claim));
            }
        }
    }
}

impl Controller for Binder {
    const NAME: &'static str = "persistent-volume-binder";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.claims, |this, delta, queue| {
            if let Some(claim) = &delta.new {
                queue.add(Key::of(&**claim));
            }
            for claim in [&delta.old, &delta.new].into_iter().flatten() {
                let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
                if delta.new.is_none() || !named.is_empty() {
                    // Also those that are reserved for it without its knowing.
                    for volume in this.volumes.list().filter(|volume| {
                        volume.name_any() == named || claim_ref(volume).is_some_and(|held| refers_to(held, claim))
                    }) {
                        queue.add(Key::of(&*volume));
                    }
                }
            }
        });
        sources.watch(&self.volumes, |this, delta, queue| this.volume_changed(delta, queue));
        sources.watch(&self.classes, |this, delta, queue| {
            let Some(class) = &delta.new else { return };
            for claim in this.claims.list() {
                let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
                if named.is_empty() && class_of(&claim).is_none_or(|name| name == class.name_any()) {
                    queue.add(Key::of(&*claim));
                }
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        if key.namespace.is_empty() {
            if let Some(volume) = self.volumes.get("", &key.name) {
                self.volume(&volume).await?;
            }
        } else if let Some(claim) = self.claims.get(&key.namespace, &key.name) {
            self.claim(&claim).await?;
        }
        Ok(Outcome::Done)
    }
}

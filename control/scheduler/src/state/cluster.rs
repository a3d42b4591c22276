//! Objects beside nodes and pods that decide where a pod may go.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, ReplicationController, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{AllocationResult, DeviceClass, ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass, VolumeAttachment};
use kube::Resource;

use super::selector::Labels;
use crate::plugins::Programs;

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Table<K> {
    /// By namespace (empty for cluster-scoped kinds), then name.
    rows: HashMap<String, HashMap<String, Arc<K>>>,
    /// Grows with every change.
    pub(crate) version: u64,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { rows: HashMap::new(), version: 0 }
    }
}

impl<K: Resource<DynamicType = ()>> Table<K> {
    /// Takes a new version of an object, or forgets it; `news` says whether that matters to anybody.
    pub(crate) fn set(&mut self, old: Option<&Arc<K>>, new: Option<&Arc<K>>, news: bool) {
        let Some(meta) = new.or(old).map(|object| object.meta()) else {
            return;
        };
        let (namespace, name) = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
        self.version += u64::from(news);
        match new {
            Some(new) => {
                self.rows.entry(namespace).or_default().insert(name, new.clone());
            }
            None => {
                if let Some(rows) = self.rows.get_mut(&namespace) {
                    rows.remove(&name);
                    if rows.is_empty() {
                        self.rows.remove(&namespace);
                    }
                }
            }
        }
    }

    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<&Arc<K>> {
        self.rows.get(namespace)?.get(name)
    }

    pub(crate) fn list(&self, namespace: &str) -> impl Iterator<Item = &Arc<K>> {
        self.rows.get(namespace).into_iter().flat_map(HashMap::values)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<K>> {
        self.rows.values().flat_map(HashMap::values)
    }
}

/// The objects that plug-ins look things up in.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) namespaces: Table<Namespace>,
    pub(crate) services: Table<Service>,
    pub(crate) replication_controllers: Table<ReplicationController>,
    pub(crate) replica_sets: Table<ReplicaSet>,
    pub(crate) stateful_sets: Table<StatefulSet>,
    pub(crate) budgets: Table<PodDisruptionBudget>,
    pub(crate) volumes: Table<PersistentVolume>,
    pub(crate) volume_claims: Table<PersistentVolumeClaim>,
    pub(crate) storage_classes: Table<StorageClass>,
    pub(crate) csi_nodes: Table<CSINode>,
    pub(crate) csi_drivers: Table<CSIDriver>,
    pub(crate) capacities: Table<CSIStorageCapacity>,
    pub(crate) attachments: Table<VolumeAttachment>,
    pub(crate) resource_claims: Table<ResourceClaim>,
    pub(crate) resource_slices: Table<ResourceSlice>,
    pub(crate) device_classes: Table<DeviceClass>,
    /// What claims are being given, by UID of the claim: not seen in the tables yet.
    pub(crate) assumed_claims: HashMap<String, AllocationResult>,
    /// Selectors of devices.
    pub(crate) programs: Programs,
    /// Claims of pods whose binding is under way, by name of the volume that was chosen: not seen in the tables yet.
    pub(crate) assumed_volumes: HashMap<String, (String, String)>,
    /// Grows with every change of `assumed_volumes`.
    pub(crate) assumed_version: u64,
}

static NO_LABELS: Labels = Labels::new();

impl Cluster {
    /// The labels of a namespace.
    pub(crate) fn namespace_labels(&self, name: &str) -> &Labels {
        self.namespaces.get("", name).and_then(|namespace| namespace.metadata.labels.as_ref()).unwrap_or(&NO_LABELS)
    }

    /// A number that changes whenever verdicts about volumes may.
    pub(crate) fn storage_version(&self) -> u64 {
        self.volumes.version
            + self.volume_claims.version
            + self.storage_classes.version
            + self.csi_nodes.version
            + self.csi_drivers.version
            + self.capacities.version
            + self.attachments.version
            + self.assumed_version
    }

    /// A number that changes whenever the default spreading may.
    pub(crate) fn owners_version(&self) -> u64 {
        self.services.version
            + self.replication_controllers.version
            + self.replica_sets.version
            + self.stateful_sets.version
    }
}

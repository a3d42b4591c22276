//! Changes of objects that scheduling depends on, and what they may help.

use coracle_api::informer::Delta;
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass, VolumeAttachment};

use crate::plugins::Event;
use crate::state::{Cache, Cluster};

/// A change of an object.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each variant is named for its kind")]
pub enum Update {
    Node(Delta<Node>),
    Pod(Delta<Pod>),
    Namespace(Delta<Namespace>),
    Service(Delta<Service>),
    ReplicationController(Delta<ReplicationController>),
    ReplicaSet(Delta<ReplicaSet>),
    StatefulSet(Delta<StatefulSet>),
    Budget(Delta<PodDisruptionBudget>),
    Volume(Delta<PersistentVolume>),
    Claim(Delta<PersistentVolumeClaim>),
    StorageClass(Delta<StorageClass>),
    CsiNode(Delta<CSINode>),
    CsiDriver(Delta<CSIDriver>),
    Capacity(Delta<CSIStorageCapacity>),
    Attachment(Delta<VolumeAttachment>),
    ResourceClaim(Delta<ResourceClaim>),
    ResourceSlice(Delta<ResourceSlice>),
    DeviceClass(Delta<DeviceClass>),
}

/// Whether something of an object differs between its versions.
fn differs<K, T: PartialEq>(delta: &Delta<K>, part: impl Fn(&K) -> T) -> bool {
    match (&delta.old, &delta.new) {
        (Some(old), Some(new)) => part(old) != part(new),
        _ => true,
    }
}

impl Update {
    /// Takes the change into the tables; says what it may help.
    pub(crate) fn apply(&self, cluster: &mut Cluster, cache: &mut Cache) -> Option<Event<'static>> {
        macro_rules! set {
            ($table:ident, $delta:expr, $news:expr, $event:expr) => {{
                let news = $news;
                cluster.$table.set($delta.old.as_ref(), $delta.new.as_ref(), news);
                $event.filter(|_| news)
            }};
        }
        let storage = Some(Event::Storage);
        match self {
            Self::Node(_) | Self::Pod(_) => None,
            Self::Namespace(delta) => {
                let news = differs(delta, |namespace| namespace.metadata.labels.clone());
                if news {
                    cache.bump();
                }
                set!(namespaces, delta, news, Some(Event::Namespace))
            }
            Self::Service(delta) => {
                let news = differs(delta, |service| service.spec.as_ref().and_then(|spec| spec.selector.clone()));
                set!(services, delta, news, None)
            }
            Self::ReplicationController(delta) => {
                let news = differs(delta, |owner| owner.spec.as_ref().and_then(|spec| spec.selector.clone()));
                set!(replication_controllers, delta, news, None)
            }
            Self::ReplicaSet(delta) => {
                let news = differs(delta, |owner| owner.spec.as_ref().map(|spec| spec.selector.clone()));
                set!(replica_sets, delta, news, None)
            }
            Self::StatefulSet(delta) => {
                let news = differs(delta, |owner| owner.spec.as_ref().map(|spec| spec.selector.clone()));
                set!(stateful_sets, delta, news, None)
            }
            Self::Budget(delta) => set!(budgets, delta, true, None),
            Self::Volume(delta) => set!(volumes, delta, true, storage),
            Self::Claim(delta) => set!(volume_claims, delta, true, storage),
            Self::StorageClass(delta) => set!(storage_classes, delta, true, storage),
            Self::CsiNode(delta) => set!(csi_nodes, delta, true, storage),
            Self::CsiDriver(delta) => set!(csi_drivers, delta, true, storage),
            Self::Capacity(delta) => set!(capacities, delta, true, storage),
            Self::Attachment(delta) => set!(attachments, delta, true, storage),
            Self::ResourceClaim(delta) => {
                // What was assumed of a claim is seen now, or will never be.
                let stored = |claim: &ResourceClaim| claim.status.as_ref().is_some_and(|s| s.allocation.is_some());
                let seen = delta.new.as_deref().is_none_or(stored);
                for uid in
                    [&delta.old, &delta.new].into_iter().flatten().filter_map(|claim| claim.metadata.uid.as_ref())
                {
                    if seen || delta.new.as_ref().is_some_and(|new| new.metadata.uid.as_ref() != Some(uid)) {
                        cluster.assumed_claims.remove(uid);
                    }
                }
                set!(resource_claims, delta, true, Some(Event::Devices))
            }
            Self::ResourceSlice(delta) => set!(resource_slices, delta, true, Some(Event::Devices)),
            Self::DeviceClass(delta) => set!(device_classes, delta, true, Some(Event::Devices)),
        }
    }
}

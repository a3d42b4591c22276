//! What volumes demand of nodes: to be bound, to be reachable, to be free, to be few enough.

pub(super) mod binding;
pub(super) mod limits;
pub(super) mod restrictions;
pub(super) mod zone;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::ResourceExt;

use super::{Context, Event};
use crate::state::{Cluster, PodState, Shape};

pub(crate) use binding::{Binding, SELECTED_NODE, VolumeChoice, choose as choose_volumes};

/// Set on a claim when its volume is bound for good.
const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";

/// The volume that a claim is bound to, by name.
pub(crate) fn bound_to(claim: &PersistentVolumeClaim) -> Option<&str> {
    let name = claim.spec.as_ref()?.volume_name.as_deref().filter(|name| !name.is_empty())?;
    claim.annotations().contains_key(BIND_COMPLETED).then_some(name)
}

/// The claims of a pod that exist.
fn claims<'a>(pod: &'a Shape, cluster: &'a Cluster) -> impl Iterator<Item = &'a Arc<PersistentVolumeClaim>> {
    pod.volume_claims.iter().filter_map(|(name, _)| cluster.volume_claims.get(&pod.namespace, name))
}

/// The volumes that the claims of a pod are bound to.
fn bound_volumes<'a>(pod: &'a Shape, cluster: &'a Cluster) -> impl Iterator<Item = &'a Arc<PersistentVolume>> {
    claims(pod, cluster).filter_map(|claim| cluster.volumes.get("", bound_to(claim)?))
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, _: &Context<'_>) -> bool {
    match event {
        Event::Node(_) | Event::Storage => true,
        Event::PodLeft(other, _) => !other.shape.volumes.is_empty() && !pod.shape.volumes.is_empty(),
        Event::PodCame(_) | Event::NodeGone | Event::Namespace | Event::Devices => false,
    }
}

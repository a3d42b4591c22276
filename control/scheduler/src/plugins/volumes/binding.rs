//! VolumeBinding: claims of a pod are bound already, or (WaitForFirstConsumer) can be on the node: to a volume that is
//! there, or to one that is made for it.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{NodeSelectorTerm, PersistentVolume, PersistentVolumeClaim, TopologySelectorTerm};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;

use super::super::{Context, Rejection};
use super::bound_to;
use crate::state::selector::{NodeTerm, Selector, any_matches};
use crate::state::{Cluster, NodeState, Shape, units};

/// Says on a claim for which node its volume is to be made.
pub(crate) const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Of classes whose volumes are made by hand.
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

/// What happens to one unbound claim on the node.
#[derive(Clone, Debug)]
pub(crate) enum Binding {
    /// It gets this volume.
    Volume(Arc<PersistentVolumeClaim>, Arc<PersistentVolume>),
    /// A volume is made for it.
    Provision(Arc<PersistentVolumeClaim>),
}

/// What happens to the unbound claims of a pod.
pub(crate) type VolumeChoice = Vec<Binding>;

fn class_of<'a>(claim: &PersistentVolumeClaim, cluster: &'a Cluster) -> Option<&'a Arc<StorageClass>> {
    cluster.storage_classes.get("", claim.spec.as_ref()?.storage_class_name.as_deref()?)
}

fn waits(claim: &PersistentVolumeClaim, cluster: &Cluster) -> bool {
    let mode = class_of(claim, cluster).and_then(|class| class.volume_binding_mode.as_deref());
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    mode == Some("WaitForFirstConsumer") && volume.is_empty()
}

pub(in super::super) fn pre_filter(pod: &Shape, context: &Context<'_>) -> Result<(), Rejection> {
    let mut immediate = false;
    for (name, is_own) in &pod.volume_claims {
        let Some(claim) = context.cluster.volume_claims.get(&pod.namespace, name) else {
            let words = if *is_own {
                format!("waiting for ephemeral volume controller to create the persistentvolumeclaim {name:?}")
            } else {
                format!("persistentvolumeclaim {name:?} not found")
            };
            return Err(Rejection::unresolvable(words));
        };
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(Rejection::unresolvable(format!("persistentvolumeclaim {name:?} is being deleted")));
        }
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Lost") {
            let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
            let words = format!("persistentvolumeclaim {name:?} bound to non-existent persistentvolume {volume:?}");
            return Err(Rejection::unresolvable(words));
        }
        immediate |= bound_to(claim).is_none() && !waits(claim, context.cluster);
    }
    if immediate {
        return Err(Rejection::unresolvable("pod has unbound immediate PersistentVolumeClaims"));
    }
    Ok(())
}

pub(in super::super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    choose(pod, node, context.cluster).map(drop)
}

fn reaches(terms: &[NodeSelectorTerm], node: &NodeState) -> bool {
    let terms: Vec<_> = terms.iter().map(NodeTerm::new).collect();
    any_matches(&terms, node.name(), node.labels())
}

/// Whether a volume can be used on a node.
fn is_reachable(volume: &PersistentVolume, node: &NodeState) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required.as_ref());
    required.is_none_or(|required| reaches(&required.node_selector_terms, node))
}

fn asked_bytes(claim: &PersistentVolumeClaim) -> i64 {
    let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
    requests.and_then(|requests| requests.get("storage")).map_or(0, units)
}

fn has_bytes(volume: &PersistentVolume) -> i64 {
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
    capacity.and_then(|capacity| capacity.get("storage")).map_or(0, units)
}

/// Whether a volume is free for a claim and of the kind it asks for.
fn suits(volume: &PersistentVolume, claim: &PersistentVolumeClaim, cluster: &Cluster) -> bool {
    let (Some(own), Some(asked)) = (&volume.spec, &claim.spec) else {
        return false;
    };
    let name = |text: &Option<String>| text.clone().unwrap_or_default();
    let mode = |text: &Option<String>| text.clone().unwrap_or_else(|| "Filesystem".into());
    let id = (name(&claim.metadata.namespace), name(&claim.metadata.name));
    let assumed = cluster.assumed_volumes.get(volume.metadata.name.as_deref().unwrap_or_default());
    let free = match &own.claim_ref {
        Some(owner) => {
            (name(&owner.namespace), name(&owner.name)) == id
                && owner.uid.as_ref().is_none_or(|uid| Some(uid) == claim.metadata.uid.as_ref())
        }
        None => {
            let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
            phase.is_none_or(|phase| phase == "Available") && assumed.is_none_or(|owner| *owner == id)
        }
    };
    let modes = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let offered = modes(&own.access_modes);
    free && volume.metadata.deletion_timestamp.is_none()
        && name(&own.storage_class_name) == name(&asked.storage_class_name)
        && name(&own.volume_attributes_class_name) == name(&asked.volume_attributes_class_name)
        && mode(&own.volume_mode) == mode(&asked.volume_mode)
        && modes(&asked.access_modes).iter().all(|mode| offered.contains(mode))
        && has_bytes(volume) >= asked_bytes(claim)
        && asked.selector.as_ref().is_none_or(|selector| Selector::new(selector).matches(volume.labels()))
}

fn is_allowed(terms: Option<&Vec<TopologySelectorTerm>>, node: &NodeState) -> bool {
    let terms = terms.map(Vec::as_slice).unwrap_or_default();
    let holds = |term: &TopologySelectorTerm| {
        term.match_label_expressions.iter().flatten().all(|expression| {
            node.label(&expression.key).is_some_and(|value| expression.values.iter().any(|v| v == value))
        })
    };
    terms.is_empty() || terms.iter().any(holds)
}

/// Whether the driver has room for the claim where the node is; drivers that do not tell always have.
fn has_room(class: &StorageClass, claim: &PersistentVolumeClaim, node: &NodeState, cluster: &Cluster) -> bool {
    let driver = cluster.csi_drivers.get("", &class.provisioner);
    if driver.and_then(|driver| driver.spec.storage_capacity) != Some(true) {
        return true;
    }
    let asked = asked_bytes(claim);
    cluster.capacities.all().any(|capacity| {
        let room = capacity.maximum_volume_size.as_ref().or(capacity.capacity.as_ref()).map_or(0, units);
        Some(&capacity.storage_class_name) == class.metadata.name.as_ref()
            && room >= asked
            && capacity.node_topology.as_ref().is_some_and(|selector| Selector::new(selector).matches(node.labels()))
    })
}

/// What would happen to the unbound claims of a pod on a node, or why it cannot have its volumes there.
pub(crate) fn choose(pod: &Shape, node: &NodeState, cluster: &Cluster) -> Result<VolumeChoice, Rejection> {
    let none = || Rejection::unresolvable("node(s) didn't find available persistent volumes to bind");
    let mut unbound = Vec::new();
    for claim in super::claims(pod, cluster) {
        let Some(name) = bound_to(claim) else {
            unbound.push(claim);
            continue;
        };
        let Some(volume) = cluster.volumes.get("", name) else {
            return Err(Rejection::unresolvable(
                "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)",
            ));
        };
        if !is_reachable(volume, node) {
            return Err(Rejection::unresolvable("node(s) didn't match PersistentVolume's node affinity"));
        }
    }
    // Small claims first, so that each gets the smallest volume that does.
    unbound.sort_by_key(|claim| asked_bytes(claim));
    let mut taken = BTreeSet::new();
    let mut choice = Vec::new();
    for claim in unbound {
        match claim.annotations().get(SELECTED_NODE) {
            Some(selected) if selected != node.name() => return Err(none()),
            Some(_) => {
                choice.push(Binding::Provision(claim.clone()));
                continue;
            }
            None => {}
        }
        let free = cluster.volumes.all().filter(|volume| {
            !taken.contains(&volume.metadata.name) && suits(volume, claim, cluster) && is_reachable(volume, node)
        });
        // One that is meant for the claim comes before one that is merely small.
        let best = free.min_by_key(|volume| {
            let is_meant = volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some());
            (!is_meant, has_bytes(volume), volume.metadata.name.clone())
        });
        if let Some(volume) = best {
            taken.insert(volume.metadata.name.clone());
            choice.push(Binding::Volume(claim.clone(), volume.clone()));
            continue;
        }
        let Some(class) = class_of(claim, cluster) else { return Err(none()) };
        if class.provisioner.is_empty() || class.provisioner == NO_PROVISIONER {
            return Err(none());
        }
        if !is_allowed(class.allowed_topologies.as_ref(), node) {
            return Err(none());
        }
        if !has_room(class, claim, node, cluster) {
            return Err(Rejection::unresolvable("node(s) did not have enough free storage"));
        }
        choice.push(Binding::Provision(claim.clone()));
    }
    Ok(choice)
}

//! DynamicResources: the claims of a pod (resource.k8s.io/v1) are allocated where the node is, or can be.

mod allocate;
mod capacity;
mod demand;
mod device;
mod pools;

use std::sync::Arc;

use k8s_openapi::api::resource::v1::{AllocationResult, ResourceClaim};
use kube::ResourceExt;

use super::{Context, Event, Rejection};
use crate::state::selector::{NodeTerm, any_matches};
use crate::state::{Cluster, NodeState, PodState, Shape};

pub(crate) use device::Programs;

/// Pods that may share a claim (`ResourceClaimReservedForMaxSize`).
const MAX_CONSUMERS: usize = 256;

/// What is done with a claim when its pod is bound.
#[derive(Clone, Debug)]
pub(crate) struct ClaimChoice {
    pub(crate) claim: Arc<ResourceClaim>,
    /// `None`: it has devices already, and only the pod is to be noted.
    pub(crate) allocation: Option<AllocationResult>,
}

/// The claims of a pod, or why they are not all there.
fn claims<'a>(pod: &Shape, cluster: &'a Cluster) -> Result<Vec<&'a Arc<ResourceClaim>>, Rejection> {
    let mut found = Vec::new();
    for (entry, name) in &pod.device_claims {
        let Some(name) = name else {
            let words = format!("waiting for dynamic resource controller to create the resourceclaim {entry:?}");
            return Err(Rejection::unresolvable(words));
        };
        let Some(claim) = cluster.resource_claims.get(&pod.namespace, name) else {
            return Err(Rejection::unresolvable(format!("resourceclaim {name:?} not found")));
        };
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(Rejection::unresolvable(format!("resourceclaim {name:?} is being deleted")));
        }
        found.push(claim);
    }
    Ok(found)
}

/// What a claim has, as stored or as is being stored.
fn allocation<'a>(claim: &'a ResourceClaim, cluster: &'a Cluster) -> Option<&'a AllocationResult> {
    let stored = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    stored.or_else(|| cluster.assumed_claims.get(claim.metadata.uid.as_deref().unwrap_or_default()))
}

pub(super) fn pre_filter(pod: &Shape, context: &Context<'_>) -> Result<(), Rejection> {
    if pod.device_claims.is_empty() {
        return Ok(());
    }
    for claim in claims(pod, context.cluster)? {
        let consumers = claim.status.iter().flat_map(|status| status.reserved_for.iter().flatten());
        let others = consumers.filter(|consumer| consumer.uid != *pod.uid).count();
        if others >= MAX_CONSUMERS {
            return Err(Rejection::unresolvable("resourceclaim in use"));
        }
        if allocation(claim, context.cluster).is_none() {
            demand::check(claim, context.cluster).map_err(Rejection::unresolvable)?;
        }
    }
    Ok(())
}

pub(super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    if pod.device_claims.is_empty() {
        return Ok(());
    }
    choose(pod, node, context.cluster).map(drop)
}

/// What would happen to the claims of a pod on a node, or why it cannot have its devices there.
pub(crate) fn choose(pod: &Shape, node: &NodeState, cluster: &Cluster) -> Result<Vec<ClaimChoice>, Rejection> {
    if pod.device_claims.is_empty() {
        return Ok(Vec::new());
    }
    let claims = claims(pod, cluster)?;
    let mut wanting: Vec<&Arc<ResourceClaim>> = Vec::new();
    let mut choices = Vec::new();
    for claim in claims {
        let Some(allocation) = allocation(claim, cluster) else {
            if !wanting.iter().any(|known| known.uid() == claim.uid()) {
                wanting.push(claim);
            }
            continue;
        };
        if let Some(selector) = &allocation.node_selector {
            let terms: Vec<_> = selector.node_selector_terms.iter().map(NodeTerm::new).collect();
            if !any_matches(&terms, node.name(), node.labels()) {
                return Err(Rejection::unresolvable("resourceclaim not available on the node"));
            }
        }
        choices.push(ClaimChoice { claim: claim.clone(), allocation: None });
    }
    if !wanting.is_empty() {
        let results = demand::allocate(&wanting, node, cluster).map_err(Rejection::unresolvable)?;
        let new = wanting.into_iter().zip(results);
        choices.extend(new.map(|(claim, result)| ClaimChoice { claim: claim.clone(), allocation: Some(result) }));
    }
    Ok(choices)
}

pub(super) fn helps(_: &PodState, event: Event<'_>, _: &Context<'_>) -> bool {
    matches!(event, Event::Node(_) | Event::Devices)
}

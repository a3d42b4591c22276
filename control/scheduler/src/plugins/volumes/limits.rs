//! NodeVolumeLimits: a CSI driver says how many volumes it can attach to a node.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{Context, Rejection};
use super::{bound_to, claims};
use crate::state::{NodeState, Shape};

/// Volumes by driver; a volume that is not there yet goes by its claim.
type Attached = BTreeMap<String, BTreeSet<String>>;

fn collect(pod: &Shape, context: &Context<'_>, into: &mut Attached) {
    for claim in claims(pod, context.cluster) {
        let Some(spec) = &claim.spec else { continue };
        let of_volume = || {
            let volume = context.cluster.volumes.get("", bound_to(claim)?)?;
            let csi = volume.spec.as_ref()?.csi.as_ref()?;
            Some((csi.driver.clone(), csi.volume_handle.clone()))
        };
        let of_class = || {
            let class = context.cluster.storage_classes.get("", spec.storage_class_name.as_deref()?)?;
            let name = claim.metadata.name.as_deref().unwrap_or_default();
            Some((class.provisioner.clone(), format!("{}/{name}", pod.namespace)))
        };
        let found = if bound_to(claim).is_some() { of_volume() } else { of_class() };
        if let Some((driver, volume)) = found {
            into.entry(driver).or_default().insert(volume);
        }
    }
}

pub(in super::super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    if pod.volume_claims.is_empty() {
        return Ok(());
    }
    let Some(csi) = context.cluster.csi_nodes.get("", node.name()) else {
        return Ok(());
    };
    let limits: BTreeMap<&str, usize> = csi
        .spec
        .drivers
        .iter()
        .filter_map(|driver| {
            let count = driver.allocatable.as_ref()?.count?;
            Some((driver.name.as_str(), usize::try_from(count).unwrap_or_default()))
        })
        .collect();
    if limits.is_empty() {
        return Ok(());
    }
    let mut wanted = Attached::new();
    collect(pod, context, &mut wanted);
    let mut attached = Attached::new();
    for other in node.pods.values() {
        collect(&other.shape, context, &mut attached);
    }
    for attachment in context.cluster.attachments.all().filter(|attachment| attachment.spec.node_name == node.name()) {
        let name = attachment.spec.source.persistent_volume_name.as_deref().unwrap_or_default();
        let volume = context.cluster.volumes.get("", name).and_then(|volume| volume.spec.as_ref());
        if let Some(csi) = volume.and_then(|spec| spec.csi.as_ref()) {
            attached.entry(csi.driver.clone()).or_default().insert(csi.volume_handle.clone());
        }
    }
    for (driver, volumes) in wanted {
        let Some(limit) = limits.get(driver.as_str()) else { continue };
        let there = attached.entry(driver).or_default();
        let new = volumes.difference(there).count();
        if new > 0 && there.len() + new > *limit {
            return Err(Rejection::resolvable("node(s) exceed max volume count"));
        }
    }
    Ok(())
}

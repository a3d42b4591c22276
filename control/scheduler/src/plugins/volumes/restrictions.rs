//! VolumeRestrictions: disks that only one pod of a node may write, and claims that only one pod may use at all.

use k8s_openapi::api::core::v1::Volume;

use super::super::{Context, Rejection};
use super::claims;
use crate::state::{NodeState, Shape};

const ONE_POD: &str = "ReadWriteOncePod";

/// Whether two pods of one node must not have both volumes.
fn collide(a: &Volume, b: &Volume) -> bool {
    let both_read = |a: Option<bool>, b: Option<bool>| a == Some(true) && b == Some(true);
    if let (Some(a), Some(b)) = (&a.gce_persistent_disk, &b.gce_persistent_disk) {
        return a.pd_name == b.pd_name && !both_read(a.read_only, b.read_only);
    }
    if let (Some(a), Some(b)) = (&a.aws_elastic_block_store, &b.aws_elastic_block_store) {
        return a.volume_id == b.volume_id;
    }
    if let (Some(a), Some(b)) = (&a.iscsi, &b.iscsi) {
        return a.iqn == b.iqn && !both_read(a.read_only, b.read_only);
    }
    if let (Some(a), Some(b)) = (&a.rbd, &b.rbd) {
        return a.monitors.iter().any(|monitor| b.monitors.contains(monitor))
            && a.pool == b.pool
            && a.image == b.image
            && !both_read(a.read_only, b.read_only);
    }
    false
}

/// The claims of a pod that no other pod may use at the same time.
fn exclusive<'a>(pod: &'a Shape, context: &Context<'a>) -> impl Iterator<Item = &'a str> {
    claims(pod, context.cluster).filter_map(|claim| {
        let modes = claim.spec.as_ref()?.access_modes.as_ref()?;
        modes.iter().any(|mode| mode == ONE_POD).then_some(claim.metadata.name.as_deref()?)
    })
}

pub(in super::super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    if pod.volumes.is_empty() {
        return Ok(());
    }
    let mut others = node.pods.values().flat_map(|other| &other.shape.volumes);
    if others.any(|other| pod.volumes.iter().any(|own| collide(own, other))) {
        return Err(Rejection::resolvable("node(s) had no available disk"));
    }
    for claim in exclusive(pod, context) {
        let mut users = context.cache.users_of(&pod.namespace, claim);
        if users.any(|(uid, place)| **place != *node.name() || node.pods.contains_key(uid)) {
            return Err(Rejection::resolvable(
                "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn disks_collide_unless_all_only_read() {
        let volume = |value| serde_json::from_value::<Volume>(value).expect("a volume");
        let disk = |name: &str, read_only: bool| {
            volume(json!({"name": "v", "gcePersistentDisk": {"pdName": name, "readOnly": read_only}}))
        };
        assert!(collide(&disk("a", false), &disk("a", true)));
        assert!(!collide(&disk("a", true), &disk("a", true)));
        assert!(!collide(&disk("a", false), &disk("b", false)));
        let block = volume(json!({"name": "v", "awsElasticBlockStore": {"volumeID": "x", "readOnly": true}}));
        assert!(collide(&block, &block));
        assert!(!collide(&block, &disk("x", false)));
    }
}

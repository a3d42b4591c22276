//! VolumeZone: a volume with labels of a zone or region is used there alone.

use super::super::{Context, Rejection};
use super::bound_volumes;
use crate::state::{NodeState, Shape};

const KEYS: [&str; 4] = [
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
];
/// Between the zones of a volume that is in several.
const SEPARATOR: &str = "__";

/// A node's value of a key, or of the key that took its place.
fn value<'a>(node: &'a NodeState, key: &str) -> Option<&'a str> {
    let newer = match key {
        "failure-domain.beta.kubernetes.io/zone" => "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region" => "topology.kubernetes.io/region",
        key => key,
    };
    node.label(key).or_else(|| node.label(newer))
}

pub(in super::super) fn filter(pod: &Shape, node: &NodeState, context: &Context<'_>) -> Result<(), Rejection> {
    if pod.volume_claims.is_empty() || KEYS.iter().all(|key| node.label(key).is_none()) {
        return Ok(());
    }
    for volume in bound_volumes(pod, context.cluster) {
        for (key, zones) in volume.metadata.labels.iter().flatten().filter(|(key, _)| KEYS.contains(&key.as_str())) {
            if !value(node, key).is_some_and(|own| zones.split(SEPARATOR).any(|zone| zone == own)) {
                return Err(Rejection::unresolvable("node(s) had no available volume zone"));
            }
        }
    }
    Ok(())
}

//! Which volume serves which claim: functions of the two objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::kinds::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference, PersistentVolume, PersistentVolumeClaim,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Amount;
use kube::ResourceExt;

use crate::common::selector;

/// The older way to name a class.
const BETA_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

/// The class that a claim asks for, empty for volumes without one; `None` when it leaves the choice to the default.
pub(super) fn class_of(claim: &PersistentVolumeClaim) -> Option<String> {
    let beta = claim.annotations().get(BETA_CLASS).cloned();
    beta.or_else(|| claim.spec.as_ref()?.storage_class_name.clone())
}

pub(super) fn class_of_volume(volume: &PersistentVolume) -> String {
    let beta = volume.annotations().get(BETA_CLASS).cloned();
    beta.or_else(|| volume.spec.as_ref()?.storage_class_name.clone()).unwrap_or_default()
}

fn storage(amounts: Option<&BTreeMap<String, Amount>>) -> Quantity {
    amounts.and_then(|amounts| Quantity::parse(&amounts.get("storage")?.0)).unwrap_or(Quantity::ZERO)
}

/// What a claim asks for.
pub(super) fn requested(claim: &PersistentVolumeClaim) -> Quantity {
    storage(claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref()))
}

pub(super) fn capacity(volume: &PersistentVolume) -> Quantity {
    storage(volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()))
}

/// Whether a volume's reference names this claim; a reference without UID names whichever has the name.
pub(super) fn refers_to(reference: &ObjectReference, claim: &PersistentVolumeClaim) -> bool {
    reference.name == claim.metadata.name
        && reference.namespace == claim.metadata.namespace
        && reference.uid.as_ref().is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_ref())
}

pub(super) fn claim_ref(volume: &PersistentVolume) -> Option<&ObjectReference> {
    volume.spec.as_ref()?.claim_ref.as_ref()
}

/// Why a volume cannot serve a claim, whoever wants it to.
pub(super) fn mismatch(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<&'static str> {
    let (volume_spec, claim_spec) = (volume.spec.as_ref()?, claim.spec.as_ref()?);
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".into());
    let modes = volume_spec.access_modes.as_deref().unwrap_or_default();
    let attributes = |name: &Option<String>| name.clone().unwrap_or_default();
    if capacity(volume) < requested(claim) {
        Some("requested PV is too small")
    } else if class_of_volume(volume) != class_of(claim).unwrap_or_default() {
        Some("storageClassName does not match")
    } else if mode(&volume_spec.volume_mode) != mode(&claim_spec.volume_mode) {
        Some("incompatible volumeMode")
    } else if !claim_spec.access_modes.iter().flatten().all(|wanted| modes.contains(wanted)) {
        Some("incompatible accessMode")
    } else if attributes(&volume_spec.volume_attributes_class_name)
        != attributes(&claim_spec.volume_attributes_class_name)
    {
        Some("volumeAttributesClassName does not match")
    } else {
        None
    }
}

/// The volume for a claim: the one that is reserved for it, otherwise, unless only that counts, the smallest that serves it
/// and can be reached from the node, if one was chosen.
pub(super) fn best(
    volumes: &[Arc<PersistentVolume>],
    claim: &PersistentVolumeClaim,
    node: Option<&Node>,
    reserved_only: bool,
) -> Option<Arc<PersistentVolume>> {
    let fits = volumes.iter().filter(|volume| mismatch(volume, claim).is_none());
    let reserved = |volume: &&Arc<PersistentVolume>| claim_ref(volume).is_some_and(|held| refers_to(held, claim));
    if let Some(volume) = fits.clone().find(reserved) {
        return Some(volume.clone());
    }
    if reserved_only {
        return None;
    }
    let selected = |volume: &PersistentVolume| {
        let wanted = claim.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        wanted.is_none_or(|wanted| selector::matches(wanted, volume.metadata.labels.as_ref()))
    };
    let free = |volume: &PersistentVolume| {
        claim_ref(volume).is_none()
            && volume.metadata.deletion_timestamp.is_none()
            && volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Available")
    };
    fits.filter(|volume| free(volume) && selected(volume) && node.is_none_or(|node| reachable(volume, node)))
        .min_by_key(|volume| (capacity(volume), volume.name_any()))
        .cloned()
}

/// Whether a volume can be used on a node.
pub(super) fn reachable(volume: &PersistentVolume, node: &Node) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref()?.required.as_ref());
    affinity.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let name = node.name_any();
    !(labels.is_empty() && fields.is_empty())
        && labels.iter().all(|wanted| requirement(wanted, node.labels().get(&wanted.key).map(String::as_str)))
        && fields
            .iter()
            .all(|wanted| requirement(wanted, Some(name.as_str()).filter(|_| wanted.key == "metadata.name")))
}

fn requirement(wanted: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let listed = || value.is_some_and(|value| values.iter().any(|listed| listed == value));
    let number = |text: &str| text.parse::<i64>().ok();
    let compared = || Some((number(value?)?, number(values.first()?)?));
    match wanted.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared().is_some_and(|(value, bound)| value > bound),
        "Lt" => compared().is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn volume(name: &str, gigabytes: u32, more: Value) -> Arc<PersistentVolume> {
        let mut object = json!({
            "metadata": {"name": name, "labels": {"tier": name}},
            "spec": {"capacity": {"storage": format!("{gigabytes}Gi")}, "accessModes": ["ReadWriteOnce"], "storageClassName": "c"},
            "status": {"phase": "Available"},
        });
        for (field, value) in more.as_object().expect("fields") {
            object["spec"][field] = value.clone();
        }
        Arc::new(serde_json::from_value(object).expect("a volume"))
    }

    fn claim(gigabytes: u32, more: Value) -> PersistentVolumeClaim {
        let mut object = json!({
            "metadata": {"name": "claim", "namespace": "n", "uid": "u"},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "c", "resources": {"requests": {"storage": format!("{gigabytes}Gi")}}},
        });
        for (field, value) in more.as_object().expect("fields") {
            object["spec"][field] = value.clone();
        }
        serde_json::from_value(object).expect("a claim")
    }

    fn chosen(volumes: &[Arc<PersistentVolume>], claim: &PersistentVolumeClaim) -> Option<String> {
        best(volumes, claim, None, false).map(|volume| volume.name_any())
    }

    #[test]
    fn the_smallest_that_fits_is_taken() {
        let volumes = [
            volume("large", 10, json!({})),
            volume("small", 1, json!({})),
            volume("right", 5, json!({})),
            volume("block", 4, json!({"volumeMode": "Block"})),
            volume("many", 4, json!({"accessModes": ["ReadOnlyMany"]})),
            volume("other", 4, json!({"storageClassName": "d"})),
            volume("taken", 4, json!({"claimRef": {"namespace": "n", "name": "another", "uid": "v"}})),
        ];
        assert_eq!(chosen(&volumes, &claim(3, json!({}))), Some("right".into()));
        assert_eq!(
            chosen(&volumes, &claim(3, json!({"selector": {"matchLabels": {"tier": "large"}}}))),
            Some("large".into())
        );
        assert_eq!(chosen(&volumes, &claim(11, json!({}))), None);
        assert!(best(&volumes, &claim(3, json!({})), None, true).is_none());
    }

    #[test]
    fn a_reserved_volume_comes_first() {
        let volumes = [
            volume("small", 3, json!({})),
            volume("mine", 30, json!({"claimRef": {"namespace": "n", "name": "claim"}})),
        ];
        assert_eq!(chosen(&volumes, &claim(3, json!({}))), Some("mine".into()));
        let other = [volume("former", 30, json!({"claimRef": {"namespace": "n", "name": "claim", "uid": "old"}}))];
        assert_eq!(chosen(&other, &claim(3, json!({}))), None);
    }

    #[test]
    fn local_volumes_stay_with_their_node() {
        let affinity = json!({"nodeAffinity": {"required": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["a"]}]}]}}});
        let volume = volume("local", 1, affinity);
        let node = |name: &str| -> Node {
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}))
                .expect("a node")
        };
        assert!(reachable(&volume, &node("a")) && !reachable(&volume, &node("b")));
        assert!(best(&[volume], &claim(1, json!({})), Some(&node("b")), false).is_none());
    }

    proptest! {
        /// Against the obvious way: no smaller volume that is large enough was passed over.
        #[test]
        fn no_better_volume_is_passed_over(sizes in prop::collection::vec(1..20_u32, 0..10), wanted in 1..20_u32) {
            let volumes: Vec<_> = sizes.iter().enumerate().map(|(index, size)| volume(&format!("v{index}"), *size, json!({}))).collect();
            let found = best(&volumes, &claim(wanted, json!({})), None, false).map(|volume| capacity(&volume).units());
            let obvious = sizes.iter().filter(|size| **size >= wanted).min().map(|size| i64::from(*size) << 30);
            prop_assert_eq!(found, obvious);
        }
    }
}

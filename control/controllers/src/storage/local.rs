//! Local volumes on demand (class `coracle-local`): a folder of the node that the scheduler chose. The node makes the folder
//! when a pod first uses it, and removes it when its name stands in the node's list of removals; this side writes that list
//! before it lets the volume go, so that neither forgets a folder, whichever of them dies when.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    LocalVolumeSource, Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference,
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, VolumeNodeAffinity,
};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use serde_json::json;

use super::bind::{BOUND_BY_CONTROLLER, Binder, PROVISIONED_BY, SELECTED_NODE, claims_of};
use super::matching::{capacity, requested};
use crate::machine::{Error, Host};

/// Name of this provisioner in classes.
pub(super) const PROVISIONER: &str = "coracle.io/local";
/// Annotation of a node: the folder in which it keeps such volumes.
const FOLDER: &str = "coracle.io/local-volumes";
/// Annotation of a node: names of the volumes whose folders it is to remove, with commas between.
const REMOVALS: &str = "coracle.io/local-volumes-to-remove";
/// Removals that one node has before it at most; more wait.
const REMOVALS_MOST: usize = 1000;
const HOSTNAME: &str = "kubernetes.io/hostname";

async fn refuse(host: &Host, claim: &PersistentVolumeClaim, note: String) {
    host.event(claim, EventType::Warning, "ProvisioningFailed", "Provision", note).await;
}

/// Makes the volume of a claim on the node that was selected for it.
pub(super) async fn provision(
    binder: &Binder,
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
) -> Result<(), Error> {
    let host = &binder.host;
    let spec = claim.spec.clone().unwrap_or_default();
    let Some(selected) = claim.annotations().get(SELECTED_NODE) else {
        let note = format!(
            "local volumes need to know their node: set volumeBindingMode WaitForFirstConsumer in class {}",
            class.name_any()
        );
        refuse(host, claim, note).await;
        return Ok(());
    };
    let shared = spec.access_modes.iter().flatten().find(|mode| !mode.starts_with("ReadWriteOnce"));
    let unsupported = match shared {
        Some(mode) => Some(format!("local volumes are of one node and cannot be {mode}")),
        None if spec.volume_mode.as_deref() == Some("Block") => {
            Some("local volumes are folders, not block devices".into())
        }
        None if spec.data_source.is_some() || spec.data_source_ref.is_some() => {
            Some("local volumes cannot be filled from a data source".into())
        }
        None => None,
    };
    if let Some(note) = unsupported {
        refuse(host, claim, note).await;
        return Ok(());
    }
    let folder = binder.nodes.get("", selected).and_then(|node| node.annotations().get(FOLDER).cloned());
    let Some(folder) = folder else {
        // Let the scheduler choose again.
        let mut changed = claim.clone();
        changed.annotations_mut().remove(SELECTED_NODE);
        host.replace(&claims_of(&host.client, &claim.namespace().unwrap_or_default()), &changed).await?;
        refuse(host, claim, format!("node {selected} keeps no local volumes")).await;
        return Ok(());
    };
    let volume = volume(claim, class, selected, &folder);
    match host.create(&binder.volumes_api(), &volume).await {
        Ok(_) => {
            let note = format!("Successfully provisioned volume {}", volume.name_any());
            host.event(claim, EventType::Normal, "ProvisioningSucceeded", "Provision", note).await;
            Ok(())
        }
        // Made by an earlier run that did not live to see it.
        Err(Error::Api { source: kube::Error::Api(status), .. }) if status.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}

fn volume(claim: &PersistentVolumeClaim, class: &StorageClass, node: &str, folder: &str) -> PersistentVolume {
    let spec = claim.spec.clone().unwrap_or_default();
    let name = format!("pvc-{}", claim.uid().unwrap_or_default());
    let on_node =
        NodeSelectorRequirement { key: HOSTNAME.into(), operator: "In".into(), values: Some(vec![node.into()]) };
    let term = NodeSelectorTerm { match_expressions: Some(vec![on_node]), ..NodeSelectorTerm::default() };
    let annotations = [(PROVISIONED_BY, PROVISIONER), (BOUND_BY_CONTROLLER, "yes")];
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            annotations: Some(annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: spec.access_modes,
            capacity: spec.resources.and_then(|resources| resources.requests).map(|mut requests| {
                requests.retain(|resource, _| resource == "storage");
                requests
            }),
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                name: claim.metadata.name.clone(),
                namespace: claim.metadata.namespace.clone(),
                uid: claim.metadata.uid.clone(),
                ..ObjectReference::default()
            }),
            local: Some(LocalVolumeSource { path: format!("{folder}/{name}"), ..LocalVolumeSource::default() }),
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector { node_selector_terms: vec![term] }),
            }),
            persistent_volume_reclaim_policy: class.reclaim_policy.clone(),
            storage_class_name: class.metadata.name.clone(),
            volume_mode: spec.volume_mode,
            mount_options: class.mount_options.clone(),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

/// The node on which a local volume lies.
fn node_of(volume: &PersistentVolume) -> Option<String> {
    let affinity = volume.spec.as_ref()?.node_affinity.as_ref()?.required.as_ref()?;
    let expressions = affinity.node_selector_terms.iter().flat_map(|term| term.match_expressions.iter().flatten());
    let mut named = expressions.filter(|wanted| wanted.key == HOSTNAME);
    named.next()?.values.as_ref()?.first().cloned()
}

/// Lets a volume go: first its folder is put on its node's list, then the volume is deleted.
pub(super) async fn remove(binder: &Binder, volume: &PersistentVolume) -> Result<(), Error> {
    let name = volume.name_any();
    if let Some(node) = node_of(volume) {
        let nodes: Api<Node> = Api::all(binder.host.client.clone());
        // A node that is gone has taken its folders along.
        if let Some(node) = nodes.get_opt(&node).await.map_err(Error::at("look for the node"))? {
            let mut list: Vec<String> = removals(&node);
            if list.len() >= REMOVALS_MOST {
                let why = format!("node {} has {REMOVALS_MOST} local volumes to remove before it", node.name_any());
                return Err(Error::Invalid(why));
            }
            if !list.contains(&name) {
                list.push(name.clone());
                let patch = json!({"metadata": {"resourceVersion": node.resource_version(),
                    "annotations": {REMOVALS: list.join(",")}}});
                binder.host.patch(&nodes, &node.name_any(), patch).await?;
            }
        }
    }
    binder.host.delete(&binder.volumes_api(), volume).await
}

fn removals(node: &Node) -> Vec<String> {
    let list = node.annotations().get(REMOVALS).map(String::as_str).unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// A claim that asks for more gets it: folders have no size of their own.
pub(super) async fn grow(
    binder: &Binder,
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
) -> Result<(), Error> {
    if volume.annotations().get(PROVISIONED_BY).is_none_or(|by| by != PROVISIONER)
        || claim.metadata.deletion_timestamp.is_some()
    {
        return Ok(());
    }
    let wanted = requested(claim);
    let asked: BTreeMap<_, _> = claim
        .spec
        .iter()
        .filter_map(|spec| spec.resources.as_ref()?.requests.as_ref()?.get("storage"))
        .map(|amount| ("storage".to_owned(), amount.clone()))
        .collect();
    let mut volume = volume.clone();
    if capacity(&volume) < wanted {
        volume.spec.get_or_insert_default().capacity = Some(asked.clone());
        volume = binder.host.replace(&binder.volumes_api(), &volume).await?;
    }
    let held = claim.status.as_ref().and_then(|status| status.capacity.as_ref()?.get("storage").cloned());
    let held = held.and_then(|held| coracle_api::kinds::quantity::Quantity::parse(&held.0));
    if held.is_some_and(|held| held < wanted) {
        let api = claims_of(&binder.host.client, &claim.namespace().unwrap_or_default());
        // The claim may have changed while it was being bound.
        let mut changed = api.get(&claim.name_any()).await.map_err(Error::at("read the claim"))?;
        changed.status.get_or_insert_default().capacity = volume.spec.and_then(|spec| spec.capacity);
        binder.host.replace_status(&api, &changed).await?;
        let note = "the local volume grew with its claim".to_owned();
        binder.host.event(claim, EventType::Normal, "VolumeResizeSuccessful", "Resize", note).await;
    }
    Ok(())
}

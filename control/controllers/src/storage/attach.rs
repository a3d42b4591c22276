//! Attachment of volumes whose driver needs it (CSI): a VolumeAttachment for each volume on each node where a pod uses it,
//! for as long as that is so and, on a node that answers, until the node has let go of the volume.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue};

/// Time for a node to let go of a volume that no pod there uses, before it is detached all the same
/// (`maxWaitForUnmountDuration`).
const UNMOUNT_MOST: Duration = Duration::from_secs(360);
/// How often a node that has not let go is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

pub(crate) struct Attach {
    host: Host,
    pods: Arc<Informer<Pod>>,
    on_node: Arc<Index<Pod>>,
    users: Arc<Index<Pod>>,
    nodes: Arc<Informer<Node>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
    drivers: Arc<Informer<CSIDriver>>,
    attachments: Arc<Informer<VolumeAttachment>>,
    /// Since when an attachment has been unwanted, by its name; only such are here.
    unwanted: Mutex<BTreeMap<String, Instant>>,
    /// Nodes that volumes of one node were given to, by volume: the cache may not know it yet.
    given: Mutex<BTreeMap<String, String>>,
    /// Attachments that a node does not get as long as another has the volume, by node; their pods have been told.
    refused: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Attach {
    pub(crate) fn new(api: &Arc<ApiServer>, on_node: &Arc<Index<Pod>>, users: &Arc<Index<Pod>>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self {
            pods: host.informer(),
            on_node: on_node.clone(),
            users: users.clone(),
            nodes: host.informer(),
            claims: host.informer(),
            volumes: host.informer(),
            drivers: host.informer(),
            attachments: host.informer(),
            unwanted: Mutex::default(),
            given: Mutex::default(),
            refused: Mutex::default(),
            host,
        }
    }

    /// The bound volumes of a pod.
    fn volumes_of(&self, pod: &Pod) -> Vec<Arc<PersistentVolume>> {
        let namespace = pod.namespace().unwrap_or_default();
        let sources = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        sources
            .filter_map(|volume| {
                let name = match (&volume.persistent_volume_claim, &volume.ephemeral) {
                    (Some(claim), _) => claim.claim_name.clone(),
                    (None, Some(_)) => format!("{}-{}", pod.name_any(), volume.name),
                    _ => return None,
                };
                let claim = self.claims.get(&namespace, &name)?;
                self.volumes.get("", claim.spec.as_ref()?.volume_name.as_deref()?)
            })
            .collect()
    }

    /// Whether the volume's driver wants to be told to attach it; of a driver that does not say so it does.
    fn needs_attachment(&self, volume: &PersistentVolume) -> bool {
        let Some(csi) = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()) else { return false };
        self.drivers.get("", &csi.driver).is_none_or(|driver| driver.spec.attach_required != Some(false))
    }

    /// What is to be attached to a node, by the name of the attachment.
    fn wanted(&self, node: &str) -> BTreeMap<String, VolumeAttachment> {
        let mut wanted = BTreeMap::new();
        for pod in self.on_node.get(node).filter(|pod| !matches!(pods::phase(pod), "Succeeded" | "Failed")) {
            for volume in self.volumes_of(&pod).iter().filter(|volume| self.needs_attachment(volume)) {
                if let Some(attachment) = attachment(volume, node) {
                    wanted.insert(attachment.name_any(), attachment);
                }
            }
        }
        wanted
    }

    /// Whether the node may still have the volume mounted.
    fn in_use(&self, held: &VolumeAttachment, node: &str) -> bool {
        let Some(node) = self.nodes.get("", node) else { return false };
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        if taints.into_iter().any(|taint| taint.key == OUT_OF_SERVICE) {
            return false;
        }
        let volume = held.spec.source.persistent_volume_name.as_deref().and_then(|name| self.volumes.get("", name));
        let Some(csi) = volume.as_ref().and_then(|volume| volume.spec.as_ref()?.csi.as_ref()) else { return false };
        let unique = format!("kubernetes.io/csi/{}^{}", csi.driver, csi.volume_handle);
        node.status.iter().flat_map(|status| status.volumes_in_use.iter().flatten()).any(|name| *name == unique)
    }

    /// Gives a volume of one node to this one; false if another has it.
    fn gives(&self, attachment: &VolumeAttachment) -> bool {
        let (name, node) = (volume_name(attachment), &attachment.spec.node_name);
        let Some(volume) = self.volumes.get("", name).filter(|volume| is_of_one_node(volume)) else { return true };
        let mut given = self.given.lock();
        let mut held = self.attachments.list();
        if held.any(|held| volume_name(&held) == name && held.spec.node_name != *node) {
            return false;
        }
        given.entry(volume.name_any()).or_insert_with(|| node.clone()) == node
    }

    /// Tells the pods of a node why they do not get a volume.
    async fn tell(&self, refused: &VolumeAttachment) {
        let (name, node) = (volume_name(refused), &refused.spec.node_name);
        let Some(volume) = self.volumes.get("", name) else { return };
        let users = |pod: &Arc<Pod>| self.volumes_of(pod).iter().any(|used| used.name_any() == name);
        let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        let claim = claim.map(|claim| {
            format!("{}/{}", claim.namespace.as_deref().unwrap_or_default(), claim.name.as_deref().unwrap_or_default())
        });
        let elsewhere = |pod: &Arc<Pod>| pods::node_of(pod).iter().any(|other| other != node);
        let others: Vec<_> = claim.iter().flat_map(|claim| self.users.get(claim)).filter(elsewhere).collect();
        let waiting: Vec<_> = self.on_node.get(node).filter(|pod| users(pod)).collect();
        for pod in waiting {
            let why = if others.is_empty() {
                "already exclusively attached to one node and can't be attached to another".to_owned()
            } else {
                let names: Vec<_> = others.iter().map(|other| other.name_any()).collect();
                format!("already used by pod(s) {}", names.join(", "))
            };
            let note = format!("Multi-Attach error for volume \"{name}\" Volume is {why}");
            self.host.event(&*pod, EventType::Warning, "FailedAttachVolume", "FailedAttachVolume", note).await;
        }
    }

    fn queue_pod(&self, pod: &Pod, queue: &WorkQueue<Key>) {
        for node in pods::node_of(pod) {
            if self.volumes_of(pod).iter().any(|volume| self.needs_attachment(volume)) {
                queue.add(Key::new("", &node));
            }
        }
    }
}

/// The attachment of a volume to a node; its name says which, as `csi-` and a hash of volume, driver and node.
fn attachment(volume: &PersistentVolume, node: &str) -> Option<VolumeAttachment> {
    let csi = volume.spec.as_ref()?.csi.as_ref()?;
    let name = hex::encode(Sha256::digest(format!("{}{}{node}", csi.volume_handle, csi.driver)));
    Some(VolumeAttachment {
        metadata: ObjectMeta { name: Some(format!("csi-{name}")), ..ObjectMeta::default() },
        spec: VolumeAttachmentSpec {
            attacher: csi.driver.clone(),
            node_name: node.into(),
            source: VolumeAttachmentSource {
                persistent_volume_name: volume.metadata.name.clone(),
                ..VolumeAttachmentSource::default()
            },
        },
        status: None,
    })
}

fn volume_name(attachment: &VolumeAttachment) -> &str {
    attachment.spec.source.persistent_volume_name.as_deref().unwrap_or_default()
}

/// Whether only one node at a time may have the volume.
fn is_of_one_node(volume: &PersistentVolume) -> bool {
    let modes: Vec<_> = volume.spec.iter().flat_map(|spec| spec.access_modes.iter().flatten()).collect();
    !modes.is_empty() && modes.iter().all(|mode| matches!(mode.as_str(), "ReadWriteOnce" | "ReadWriteOncePod"))
}

/// Whether an attachment is named as ours are: others are their makers' affair.
fn is_ours(name: &str) -> bool {
    let digits = |hash: &str| hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.strip_prefix("csi-").is_some_and(digits)
}

impl Controller for Attach {
    const NAME: &'static str = "attachdetach-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.pods, |this, delta, queue| {
            let view = |pod: &Option<Arc<Pod>>| pod.as_ref().map(|pod| (pods::node_of(pod), pods::is_active(pod)));
            if view(&delta.old) != view(&delta.new) {
                for pod in [&delta.old, &delta.new].into_iter().flatten() {
                    this.queue_pod(pod, queue);
                }
            }
        });
        // A claim that is bound late changes what its pods need.
        sources.watch(&self.claims, |this, delta, queue| {
            let named = |claim: &Option<Arc<PersistentVolumeClaim>>| {
                claim.as_ref().and_then(|claim| claim.spec.as_ref()?.volume_name.clone())
            };
            let Some(claim) = delta.new.as_ref().filter(|_| named(&delta.old) != named(&delta.new)) else { return };
            let claim = format!("{}/{}", claim.namespace().unwrap_or_default(), claim.name_any());
            this.users.get(&claim).for_each(|pod| this.queue_pod(&pod, queue));
        });
        sources.watch(&self.attachments, |this, delta, queue| {
            for held in [&delta.old, &delta.new].into_iter().flatten() {
                queue.add(Key::new("", &held.spec.node_name));
            }
            if let (Some(gone), None) = (&delta.old, &delta.new) {
                let name = volume_name(gone);
                this.given.lock().retain(|volume, node| volume != name || *node != gone.spec.node_name);
                // Another node may wait for it.
                this.refused.lock().keys().for_each(|node| queue.add(Key::new("", node)));
            }
        });
        sources.watch(&self.nodes, |_, delta, queue| {
            let view = |node: &Option<Arc<Node>>| {
                let node = node.as_ref()?;
                Some((node.status.as_ref()?.volumes_in_use.clone(), node.spec.as_ref()?.taints.clone()))
            };
            if let Some(node) = delta.new.as_ref().or(delta.old.as_ref())
                && view(&delta.old) != view(&delta.new)
            {
                queue.add(Key::new("", &node.name_any()));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let node = &*key.name;
        let api: Api<VolumeAttachment> = Api::all(self.host.client.clone());
        let mut wanted = self.wanted(node);
        let all = self.attachments.list();
        let held: Vec<_> = all.filter(|held| held.spec.node_name == node && is_ours(&held.name_any())).collect();
        let mut outcome = Outcome::Done;
        let mut unwanted = BTreeSet::new();
        for held in held {
            if wanted.remove(&held.name_any()).is_some() || held.metadata.deletion_timestamp.is_some() {
                self.unwanted.lock().remove(&held.name_any());
                continue;
            }
            unwanted.insert(held.name_any());
            let since = *self.unwanted.lock().entry(held.name_any()).or_insert_with(Instant::now);
            if self.in_use(&held, node) && since.elapsed() < UNMOUNT_MOST {
                outcome = Outcome::After(LOOK_AGAIN);
                continue;
            }
            self.host.delete(&api, &*held).await?;
            self.unwanted.lock().remove(&held.name_any());
        }
        if !wanted.is_empty() {
            // So that a volume that is let go from here on brings this node back.
            self.refused.lock().entry(node.to_owned()).or_default();
        }
        let mut refused = BTreeSet::new();
        for (name, attachment) in &wanted {
            if !self.gives(attachment) {
                refused.insert(name.clone());
                if !self.refused.lock().get(node).is_some_and(|told| told.contains(name)) {
                    self.tell(attachment).await;
                }
                continue;
            }
            if let Err(error) = self.host.create(&api, attachment).await {
                self.given.lock().remove(volume_name(attachment));
                return Err(error);
            }
        }
        let mut all = self.refused.lock();
        all.remove(node);
        if !refused.is_empty() {
            all.insert(node.to_owned(), refused);
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_named_for_volume_driver_and_node() {
        let volume: PersistentVolume = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "v"}, "spec": {"csi": {"driver": "d", "volumeHandle": "h"}},
        }))
        .expect("a volume");
        let made = attachment(&volume, "n").expect("an attachment");
        // sha256 of "hdn", as other parts of Kubernetes compute it.
        assert_eq!(made.name_any().len(), "csi-".len() + 64);
        assert!(is_ours(&made.name_any()) && !is_ours("va-e2e-1") && !is_ours("csi-of-somebody"));
        assert_ne!(made.name_any(), attachment(&volume, "m").expect("an attachment").name_any());
        assert_eq!((made.spec.attacher.as_str(), made.spec.source.persistent_volume_name.as_deref()), ("d", Some("v")));
    }
}

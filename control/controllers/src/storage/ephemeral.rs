//! Generic ephemeral volumes: the claim that a pod's volume template asks for, owned by the pod (KEP-1698).

use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, controller_reference, is_controlled_by};

pub(crate) struct Ephemeral {
    host: Host,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
}

impl Ephemeral {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { pods: host.informer(), claims: host.informer(), host }
    }
}

fn templates(pod: &Pod) -> impl Iterator<Item = &Volume> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter(|volume| volume.ephemeral.as_ref().is_some_and(|source| source.volume_claim_template.is_some()))
}

fn claim(pod: &Pod, volume: &Volume) -> Option<PersistentVolumeClaim> {
    let template = volume.ephemeral.as_ref()?.volume_claim_template.clone()?;
    let meta = template.metadata.unwrap_or_default();
    Some(PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", pod.name_any(), volume.name)),
            namespace: pod.namespace(),
            labels: meta.labels,
            annotations: meta.annotations,
            owner_references: Some(vec![controller_reference(pod)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec),
        status: None,
    })
}

impl Controller for Ephemeral {
    const NAME: &'static str = "ephemeral-volume-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.pods, |_, delta, queue| {
            // A pod's volumes never change.
            if let (None, Some(pod)) = (&delta.old, &delta.new)
                && templates(pod).next().is_some()
            {
                queue.add(Key::of(&**pod));
            }
        });
        sources.watch(&self.claims, |_, delta, queue| {
            if let (Some(gone), None) = (&delta.old, &delta.new)
                && let Some(owner) = crate::machine::controller_of(&gone.metadata).filter(|owner| owner.kind == "Pod")
            {
                queue.add(Key::new(gone.metadata.namespace.as_deref().unwrap_or_default(), &owner.name));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        if !pods::is_active(&pod) {
            return Ok(Outcome::Done);
        }
        let uid = pod.uid().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.host.client.clone(), &key.namespace);
        for wanted in templates(&pod).filter_map(|volume| claim(&pod, volume)) {
            let name = wanted.name_any();
            match self.claims.get(&key.namespace, &name) {
                None => drop(self.host.create(&api, &wanted).await?),
                Some(held) if is_controlled_by(&held.metadata, &uid) => {}
                Some(_) => {
                    let note = format!(
                        "PVC {}/{name} was not created for pod {}/{} (pod is not owner)",
                        key.namespace, key.namespace, key.name
                    );
                    self.host.event(&*pod, EventType::Warning, "FailedCreate", "Create", note.clone()).await;
                    return Err(Error::Invalid(note));
                }
            }
        }
        Ok(Outcome::Done)
    }
}

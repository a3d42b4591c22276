//! ResourceClaims of pods (resource.k8s.io/v1): claims made from templates, and what is reserved for pods that need it no
//! more given back.

use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{Pod, PodResourceClaim, PodResourceClaimStatus};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimConsumerReference, ResourceClaimTemplate};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::common::pods;
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, controller_of, controller_reference, is_controlled_by,
};

/// Annotation that says for which entry of its pod a claim was made.
const POD_CLAIM: &str = "resource.kubernetes.io/pod-claim-name";
/// Finalizer of claims that hold devices.
const PROTECTION: &str = "resource.kubernetes.io/delete-protection";
/// Marks the keys of claims beside those of pods.
const CLAIM: &str = "claim:";

pub(crate) struct ResourceClaims {
    host: Host,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<ResourceClaim>>,
    templates: Arc<Informer<ResourceClaimTemplate>>,
}

impl ResourceClaims {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { pods: host.informer(), claims: host.informer(), templates: host.informer(), host }
    }

    fn claims_api(&self, namespace: &str) -> Api<ResourceClaim> {
        Api::namespaced(self.host.client.clone(), namespace)
    }

    /// Makes the claims of a pod that are to come from templates, and writes their names into its status.
    async fn pod(&self, pod: &Pod) -> Result<(), Error> {
        let namespace = pod.namespace().unwrap_or_default();
        let uid = pod.uid().unwrap_or_default();
        let held = pod.status.as_ref().and_then(|status| status.resource_claim_statuses.clone()).unwrap_or_default();
        let mut statuses = Vec::new();
        for entry in entries(pod) {
            let Some(template) = &entry.resource_claim_template_name else { continue };
            let named = held
                .iter()
                .find(|status| status.name == entry.name)
                .and_then(|status| status.resource_claim_name.clone());
            if let Some(name) = &named
                && self.claims.get(&namespace, name).is_some()
            {
                statuses.push(PodResourceClaimStatus { name: entry.name.clone(), resource_claim_name: named });
                continue;
            }
            // One that an earlier run made and did not live to write down.
            let made = self.claims.list_ns(&namespace).find(|claim| {
                is_controlled_by(&claim.metadata, &uid)
                    && claim.annotations().get(POD_CLAIM) == Some(&entry.name)
                    && claim.metadata.deletion_timestamp.is_none()
            });
            let name = match made {
                Some(made) => made.name_any(),
                None => self.make(pod, &namespace, &entry.name, template).await?,
            };
            statuses.push(PodResourceClaimStatus { name: entry.name.clone(), resource_claim_name: Some(name) });
        }
        if statuses != held {
            let patch = json!({"metadata": {"uid": uid}, "status": {"resourceClaimStatuses": statuses}});
            let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &namespace);
            self.host.patch_status(&api, &pod.name_any(), patch).await?;
        }
        Ok(())
    }

    async fn make(&self, pod: &Pod, namespace: &str, entry: &str, template: &str) -> Result<String, Error> {
        let Some(template) = self.templates.get(namespace, template) else {
            let note = format!("PodResourceClaim {entry}: resource claim template \"{template}\" not found");
            self.host.event(pod, EventType::Warning, "FailedResourceClaimCreation", "Create", note.clone()).await;
            return Err(Error::Invalid(note));
        };
        let meta = template.spec.metadata.clone().unwrap_or_default();
        let mut annotations = meta.annotations.unwrap_or_default();
        annotations.insert(POD_CLAIM.into(), entry.into());
        let claim = ResourceClaim {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-{entry}-", pod.name_any())),
                labels: meta.labels,
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(pod)]),
                ..ObjectMeta::default()
            },
            spec: template.spec.spec.clone(),
            status: None,
        };
        Ok(self.host.create(&self.claims_api(namespace), &claim).await?.name_any())
    }

    /// Whether a pod still needs what is reserved for it. The cache may be behind when it does not know the pod.
    async fn needs(&self, namespace: &str, reference: &ResourceClaimConsumerReference) -> Result<bool, Error> {
        if reference.resource != "pods" || !reference.api_group.as_deref().unwrap_or_default().is_empty() {
            // Reserved by somebody whom only they know.
            return Ok(true);
        }
        let cached =
            self.pods.get(namespace, &reference.name).filter(|pod| pod.metadata.uid.as_ref() == Some(&reference.uid));
        let pod = match cached {
            Some(pod) => Some((*pod).clone()),
            None => {
                let api: Api<Pod> = Api::namespaced(self.host.client.clone(), namespace);
                let found = api.get_opt(&reference.name).await.map_err(Error::at("look for the pod"))?;
                found.filter(|pod| pod.metadata.uid.as_ref() == Some(&reference.uid))
            }
        };
        Ok(pod.is_some_and(|pod| is_live(&pod)))
    }

    /// Gives back what is reserved for nobody any more.
    async fn claim(&self, claim: &ResourceClaim) -> Result<(), Error> {
        let namespace = claim.namespace().unwrap_or_default();
        let api = self.claims_api(&namespace);
        let mut claim = claim.clone();
        let status = claim.status.clone().unwrap_or_default();
        let reserved = status.reserved_for.clone().unwrap_or_default();
        let mut kept = Vec::new();
        for reference in &reserved {
            if self.needs(&namespace, reference).await? {
                kept.push(reference.clone());
            }
        }
        let owner = controller_of(&claim.metadata).filter(|owner| owner.kind == "Pod").cloned();
        let done = match &owner {
            Some(owner) => {
                let reference = ResourceClaimConsumerReference {
                    resource: "pods".into(),
                    name: owner.name.clone(),
                    uid: owner.uid.clone(),
                    ..ResourceClaimConsumerReference::default()
                };
                !self.needs(&namespace, &reference).await?
            }
            None => false,
        };
        let goes = claim.metadata.deletion_timestamp.is_some();
        let free = kept.is_empty() && (goes || done) && status.allocation.is_some();
        if kept != reserved || free {
            let changed = claim.status.get_or_insert_default();
            changed.reserved_for = Some(kept.clone()).filter(|kept| !kept.is_empty());
            if free {
                changed.allocation = None;
                changed.devices = None;
            }
            claim = self.host.replace_status(&api, &claim).await?;
        }
        let allocated = claim.status.as_ref().is_some_and(|status| status.allocation.is_some());
        if !allocated && kept.is_empty() && claim.finalizers().iter().any(|name| name == PROTECTION) {
            claim.finalizers_mut().retain(|name| name != PROTECTION);
            claim = self.host.replace(&api, &claim).await?;
        }
        if done && !goes {
            self.host.delete(&api, &claim).await?;
        }
        Ok(())
    }

    /// Reserves allocated claims for a pod that was put on its node by somebody else than the scheduler.
    async fn reserve(&self, pod: &Pod) -> Result<(), Error> {
        let namespace = pod.namespace().unwrap_or_default();
        for name in claim_names(pod) {
            let Some(claim) = self.claims.get(&namespace, &name) else { continue };
            let Some(status) = claim.status.as_ref().filter(|status| status.allocation.is_some()) else { continue };
            let uid = pod.uid().unwrap_or_default();
            if status.reserved_for.iter().flatten().any(|reference| reference.uid == uid) {
                continue;
            }
            let mut changed = (*claim).clone();
            changed.status.get_or_insert_default().reserved_for.get_or_insert_default().push(
                ResourceClaimConsumerReference {
                    resource: "pods".into(),
                    name: pod.name_any(),
                    uid,
                    ..ResourceClaimConsumerReference::default()
                },
            );
            self.host.replace_status(&self.claims_api(&namespace), &changed).await?;
        }
        Ok(())
    }
}

fn entries(pod: &Pod) -> impl Iterator<Item = &PodResourceClaim> {
    pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten())
}

/// The claims that a pod names, and those that were made for it.
pub(super) fn claim_names(pod: &Pod) -> Vec<String> {
    let made = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let made = made.filter_map(|status| status.resource_claim_name.clone());
    entries(pod).filter_map(|entry| entry.resource_claim_name.clone()).chain(made).collect()
}

/// Whether a pod may still use devices: it has not finished, and was not deleted before it had a node.
fn is_live(pod: &Pod) -> bool {
    let finished = matches!(pods::phase(pod), "Succeeded" | "Failed");
    let never = pod.metadata.deletion_timestamp.is_some() && pods::node_of(pod).is_empty();
    !finished && !never
}

impl Controller for ResourceClaims {
    const NAME: &'static str = "resource-claim-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        let claim_key = |namespace: &str, name: &str| Key::new(namespace, &format!("{CLAIM}{name}"));
        sources.watch(&self.pods, move |_, delta, queue| {
            let Some(pod) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            if entries(pod).next().is_none() {
                return;
            }
            let view =
                |pod: &Option<Arc<Pod>>| pod.as_ref().map(|pod| (is_live(pod), pods::node_of(pod), claim_names(pod)));
            if view(&delta.old) == view(&delta.new) {
                return;
            }
            queue.add(Key::of(&**pod));
            for name in claim_names(pod) {
                queue.add(claim_key(&pod.namespace().unwrap_or_default(), &name));
            }
        });
        sources.watch(&self.claims, move |_, delta, queue| {
            let Some(claim) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            let namespace = claim.namespace().unwrap_or_default();
            if delta.new.is_some() {
                queue.add(claim_key(&namespace, &claim.name_any()));
            }
            if let Some(owner) = controller_of(&claim.metadata).filter(|owner| owner.kind == "Pod") {
                queue.add(Key::new(&namespace, &owner.name));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        if let Some(name) = key.name.strip_prefix(CLAIM) {
            if let Some(claim) = self.claims.get(&key.namespace, name) {
                self.claim(&claim).await?;
            }
            return Ok(Outcome::Done);
        }
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        if is_live(&pod) && pod.metadata.deletion_timestamp.is_none() {
            self.pod(&pod).await?;
            if !pods::node_of(&pod).is_empty() {
                self.reserve(&pod).await?;
            }
        }
        Ok(Outcome::Done)
    }
}

//! The claims of a StatefulSet's pods: made before the pod, and kept or removed with set or pod as the retention policy
//! says, by way of owner references.

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::runtime::events::EventType;
use kube::{Api, Resource, ResourceExt};

use super::identity::{claim_name, ordinal};
use super::{StatefulSets, plan};
use crate::machine::{Error, controller_of, controller_reference};

/// Whether the claim's name is one of the set's.
pub(super) fn belongs(set: &StatefulSet, claim: &PersistentVolumeClaim) -> bool {
    let name = claim.name_any();
    set.spec.iter().flat_map(|spec| spec.volume_claim_templates.iter().flatten()).any(|template| {
        name.strip_prefix(&*claim_name(&template.name_any(), &set.name_any()))
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|ordinal| ordinal.parse::<u32>().is_ok())
    })
}

/// Who decides over the end of a claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Decides {
    Nobody,
    Set,
    Pod,
}

fn decides(spec: &StatefulSetSpec, pod: &Pod) -> Decides {
    let policy = spec.persistent_volume_claim_retention_policy.as_ref();
    let deletes = |when: Option<&String>| when.is_some_and(|when| when == "Delete");
    let when_deleted = deletes(policy.and_then(|policy| policy.when_deleted.as_ref()));
    let when_scaled = deletes(policy.and_then(|policy| policy.when_scaled.as_ref()));
    let scaled_away = ordinal(pod).is_some_and(|ordinal| !plan::range(spec).contains(&ordinal));
    match (when_deleted, when_scaled) {
        (_, true) if scaled_away => Decides::Pod,
        (true, _) => Decides::Set,
        _ => Decides::Nobody,
    }
}

/// The owner references that a claim should have: those of others, and that of whoever decides.
fn owners(claim: &PersistentVolumeClaim, set: &StatefulSet, spec: &StatefulSetSpec, pod: &Pod) -> Vec<OwnerReference> {
    let mine = |owner: &OwnerReference| {
        Some(&owner.uid) == set.metadata.uid.as_ref() || (owner.kind == Pod::kind(&()) && owner.name == pod.name_any())
    };
    let mut owners: Vec<_> =
        claim.metadata.owner_references.iter().flatten().filter(|owner| !mine(owner)).cloned().collect();
    match decides(spec, pod) {
        Decides::Nobody => {}
        Decides::Set => owners.push(controller_reference(set)),
        Decides::Pod => owners.push(controller_reference(pod)),
    }
    owners
}

impl StatefulSets {
    fn claims_of(
        &self,
        set: &StatefulSet,
        spec: &StatefulSetSpec,
        pod: &str,
    ) -> Vec<std::sync::Arc<PersistentVolumeClaim>> {
        let namespace = set.namespace().unwrap_or_default();
        let names = spec.volume_claim_templates.iter().flatten().map(|template| claim_name(&template.name_any(), pod));
        names.filter_map(|name| self.claims.get(&namespace, &name)).collect()
    }

    /// Makes the claims that the pod needs and that are missing.
    pub(super) async fn make_claims(&self, set: &StatefulSet, spec: &StatefulSetSpec, pod: &Pod) -> Result<(), Error> {
        let namespace = set.namespace().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.host.client.clone(), &namespace);
        for template in spec.volume_claim_templates.iter().flatten() {
            let name = claim_name(&template.name_any(), &pod.name_any());
            if let Some(there) = self.claims.get(&namespace, &name) {
                if there.metadata.deletion_timestamp.is_some() {
                    return Err(Error::Invalid(format!("pvc {name} is being deleted")));
                }
                continue;
            }
            let mut claim = template.clone();
            claim.metadata.name = Some(name.clone());
            claim.metadata.namespace = Some(namespace.clone());
            claim
                .metadata
                .labels
                .get_or_insert_default()
                .extend(spec.selector.match_labels.clone().unwrap_or_default());
            claim.status = None;
            if decides(spec, pod) == Decides::Set {
                claim.metadata.owner_references = Some(owners(&claim, set, spec, pod));
            }
            let what = format!("Claim {name} Pod {} in StatefulSet {}", pod.name_any(), set.name_any());
            match self.host.create(&api, &claim).await {
                Ok(_) => {
                    let note = format!("create {what} success");
                    self.host.event(set, EventType::Normal, "SuccessfulCreate", "Create", note).await;
                }
                Err(error) if error.is_already_exists() => {}
                Err(error) => {
                    let note = format!("create {what} failed error: {}", error.message());
                    self.host.event(set, EventType::Warning, "FailedCreate", "Create", note).await;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether claims of an earlier pod of this name are about to be removed with it.
    pub(super) fn stale_claims(&self, set: &StatefulSet, spec: &StatefulSetSpec, pod: &Pod) -> bool {
        self.claims_of(set, spec, &pod.name_any()).iter().any(|claim| {
            let owners = claim.metadata.owner_references.iter().flatten();
            let mut pods = owners.filter(|owner| owner.kind == Pod::kind(&()) && owner.name == pod.name_any());
            pods.any(|owner| Some(&owner.uid) != pod.metadata.uid.as_ref())
        })
    }

    /// Gives the pod's claims the owners that the retention policy asks for.
    pub(super) async fn retain(&self, set: &StatefulSet, spec: &StatefulSetSpec, pod: &Pod) -> Result<(), Error> {
        let api: Api<PersistentVolumeClaim> =
            Api::namespaced(self.host.client.clone(), &set.namespace().unwrap_or_default());
        for claim in self.claims_of(set, spec, &pod.name_any()) {
            let wanted = owners(&claim, set, spec, pod);
            if !foreign(&claim, set, pod)
                && !same(claim.metadata.owner_references.as_deref().unwrap_or_default(), &wanted)
            {
                let mut changed = (*claim).clone();
                changed.metadata.owner_references = Some(wanted);
                self.host.replace(&api, &changed).await?;
            }
        }
        Ok(())
    }
}

/// Whether somebody else manages the claim, so that it is left alone.
fn foreign(claim: &PersistentVolumeClaim, set: &StatefulSet, pod: &Pod) -> bool {
    controller_of(&claim.metadata)
        .is_some_and(|owner| Some(&owner.uid) != set.metadata.uid.as_ref() && owner.name != pod.name_any())
}

fn same(have: &[OwnerReference], wanted: &[OwnerReference]) -> bool {
    let uids = |owners: &[OwnerReference]| {
        owners.iter().map(|owner| owner.uid.clone()).collect::<std::collections::BTreeSet<_>>()
    };
    uids(have) == uids(wanted)
}

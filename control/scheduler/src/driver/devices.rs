//! Claims for devices: what was chosen is written into them, and the pod is noted as one that uses them.

use k8s_openapi::api::resource::v1::{AllocationResult, ResourceClaim, ResourceClaimConsumerReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::PostParams;
use kube::{Api, ResourceExt};

use super::Writer;
use crate::engine::Bind;
use crate::plugins::ClaimChoice;

/// Keeps a claim that has devices from going before they are given back.
const PROTECTION: &str = "resource.kubernetes.io/delete-protection";
/// Tries of a write that others' writes cross.
const TRIES: usize = 5;

/// Writes all claims of a pod. What was written is taken out of the choice, so that it is not taken back.
pub(super) async fn bind(writer: &Writer, bind: &mut Bind) -> Result<(), String> {
    let namespace = bind.pod.shape.namespace.to_string();
    let api: Api<ResourceClaim> = Api::namespaced(writer.client.clone(), &namespace);
    let consumer = ResourceClaimConsumerReference {
        api_group: None,
        resource: "pods".into(),
        name: bind.pod.name.to_string(),
        uid: bind.pod.uid.to_string(),
    };
    for choice in &mut bind.devices {
        let name = choice.claim.name_any();
        let mut tries = 0;
        loop {
            tries += 1;
            match write(&api, choice, &consumer).await {
                Ok(()) => break,
                Err(kube::Error::Api(answer)) if answer.code == 409 && tries < TRIES => {}
                Err(error) => {
                    return Err(format!("running PreBind plugin \"DynamicResources\": claim {name}: {error}"));
                }
            }
        }
        choice.allocation = None;
    }
    Ok(())
}

async fn write(
    api: &Api<ResourceClaim>,
    choice: &ClaimChoice,
    consumer: &ResourceClaimConsumerReference,
) -> Result<(), kube::Error> {
    let parameters = PostParams { field_manager: Some("kube-scheduler".into()), ..PostParams::default() };
    let mut claim = api.get(&choice.claim.name_any()).await?;
    let stored = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    let crossed = |why: &str| kube::Error::Service(format!("{why} in the meantime").into());
    if claim.uid() != choice.claim.uid() {
        return Err(crossed("it was deleted"));
    }
    match (&choice.allocation, stored) {
        (Some(ours), Some(stored)) if ours.devices != stored.devices => {
            return Err(crossed("it was allocated otherwise"));
        }
        (None, None) => return Err(crossed("its devices were given back")),
        (Some(_), None) if !claim.finalizers().iter().any(|held| held == PROTECTION) => {
            claim.finalizers_mut().push(PROTECTION.into());
            claim = api.replace(&claim.name_any(), &parameters, &claim).await?;
        }
        _ => {}
    }
    let status = claim.status.get_or_insert_default();
    if let Some(allocation) = &choice.allocation {
        let now = Some(Time(k8s_openapi::jiff::Timestamp::now()));
        status.allocation = Some(AllocationResult { allocation_timestamp: now, ..allocation.clone() });
    }
    let consumers = status.reserved_for.get_or_insert_default();
    if !consumers.contains(consumer) {
        consumers.push(consumer.clone());
    }
    api.replace_status(&claim.name_any(), &parameters, &claim).await.map(drop)
}

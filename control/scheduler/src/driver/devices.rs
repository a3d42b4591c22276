//! Claims for devices: what was chosen is written into them, and the pod is noted as one that uses them.

use std::time::Duration;

use k8s_openapi::api::resource::v1::{AllocationResult, ResourceClaim, ResourceClaimConsumerReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::PostParams;
use kube::{Api, ResourceExt};

use super::Writer;
use super::bind::{RECHECK, pod_is_gone};
use crate::engine::Bind;
use crate::plugins::ClaimChoice;

/// Keeps a claim that has devices from going before they are given back.
const PROTECTION: &str = "resource.kubernetes.io/delete-protection";
/// Tries of a write that others' writes cross.
const TRIES: usize = 5;

/// Time for devices to be made ready for their pod (the reference's `bindingTimeout`).
const BINDING_TIMEOUT: Duration = Duration::from_secs(600);

/// Writes all claims of a pod, and waits until their devices are ready. What was written is taken out of the choice, so that it
/// is not taken back; of devices that cannot be made ready the claim is given back.
pub(super) async fn bind(writer: &Writer, bind: &mut Bind) -> Result<(), String> {
    let claims: Vec<String> = bind.devices.iter().filter(|choice| is_made_ready(choice)).map(name_of).collect();
    let chosen: Vec<_> = bind.devices.iter().map(|choice| choice.allocation.clone()).collect();
    write_all(writer, bind).await?;
    let mut changed = writer.storage.subscribe();
    let wait = async {
        loop {
            let mut waits = false;
            for name in &claims {
                let claim = writer.resource_claims.get(&bind.pod.shape.namespace, name);
                let gone = || Readiness::Failed("it was deleted".to_owned());
                match claim.as_deref().map_or_else(gone, readiness) {
                    Readiness::Ready => {}
                    Readiness::Waits if pod_is_gone(&writer.pods, bind) => {
                        return Err((name.clone(), "the pod was deleted".to_owned()));
                    }
                    Readiness::Waits => waits = true,
                    Readiness::Failed(why) => return Err((name.clone(), why)),
                }
            }
            if !waits {
                return Ok(());
            }
            // The sender lives as long as the writer.
            let _ = tokio::time::timeout(RECHECK, changed.changed()).await;
        }
    };
    let failed = match tokio::time::timeout(BINDING_TIMEOUT, wait).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err((name, why))) => vec![(name, why)],
        Err(_) => claims.iter().map(|name| (name.clone(), "device binding timeout".to_owned())).collect(),
    };
    let api: Api<ResourceClaim> = Api::namespaced(writer.client.clone(), &bind.pod.shape.namespace);
    for (name, _) in &failed {
        if let Err(error) = give_back(&api, name, &bind.pod.uid).await {
            tracing::warn!(claim = %name, %error, "devices that are not ready were not given back");
        }
    }
    // They may never be seen as allocated: what is assumed of them ends with the binding.
    for (choice, chosen) in bind.devices.iter_mut().zip(chosen) {
        choice.allocation = chosen;
    }
    let words: Vec<String> = failed.iter().map(|(name, why)| format!("claim {name}: {why}")).collect();
    Err(format!("running PreBind plugin \"DynamicResources\": {}", words.join(", ")))
}

fn name_of(choice: &ClaimChoice) -> String {
    choice.claim.name_any()
}

/// Whether somebody has to make a device of the claim ready for the node.
fn is_made_ready(choice: &ClaimChoice) -> bool {
    let stored = || choice.claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    let devices = choice.allocation.as_ref().or_else(stored).and_then(|allocation| allocation.devices.as_ref());
    let mut results = devices.into_iter().flat_map(|devices| devices.results.iter().flatten());
    results.any(|result| result.binding_conditions.iter().any(|conditions| !conditions.is_empty()))
}

/// Whether the devices of a claim may be used by now (KEP-5007).
#[derive(Debug, PartialEq)]
enum Readiness {
    Ready,
    Waits,
    Failed(String),
}

fn readiness(claim: &ResourceClaim) -> Readiness {
    let Some(status) = &claim.status else { return Readiness::Waits };
    let Some(devices) = status.allocation.as_ref().and_then(|allocation| allocation.devices.as_ref()) else {
        return Readiness::Waits;
    };
    let mut waits = false;
    for result in devices.results.iter().flatten() {
        let said = status.devices.iter().flatten().find(|said| {
            (&said.driver, &said.pool, &said.device, &said.share_id)
                == (&result.driver, &result.pool, &result.device, &result.share_id)
        });
        let conditions = said.and_then(|said| said.conditions.as_deref()).unwrap_or_default();
        let holds = |type_: &String| conditions.iter().any(|held| held.type_ == *type_ && held.status == "True");
        if let Some(failure) = result.binding_failure_conditions.iter().flatten().find(|type_| holds(type_)) {
            return Readiness::Failed(format!("device {}: binding failed: {failure}", result.device));
        }
        waits |= !result.binding_conditions.iter().flatten().all(holds);
    }
    if waits { Readiness::Waits } else { Readiness::Ready }
}

/// Takes the devices from a claim that only this pod has.
async fn give_back(api: &Api<ResourceClaim>, name: &str, pod: &str) -> Result<(), kube::Error> {
    let mut claim = api.get(name).await?;
    let Some(status) = &mut claim.status else { return Ok(()) };
    status.reserved_for.iter_mut().for_each(|consumers| consumers.retain(|consumer| consumer.uid != pod));
    if status.reserved_for.iter().all(Vec::is_empty) {
        (status.allocation, status.devices) = (None, None);
    }
    let parameters = PostParams { field_manager: Some("kube-scheduler".into()), ..PostParams::default() };
    api.replace_status(name, &parameters, &claim).await.map(drop)
}

async fn write_all(writer: &Writer, bind: &mut Bind) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_device_is_waited_for_until_all_its_conditions_hold_or_one_that_means_failure() {
        let claim = |conditions: Value| -> ResourceClaim {
            let result = json!({"request": "r", "driver": "d", "pool": "p", "device": "x",
                "bindingConditions": ["Attached", "Warm"], "bindingFailureConditions": ["Broken"]});
            let said = json!([{"driver": "d", "pool": "p", "device": "x", "conditions": conditions}]);
            let status = json!({"allocation": {"devices": {"results": [result]}}, "devices": said});
            serde_json::from_value(json!({"metadata": {"name": "c"}, "spec": {}, "status": status})).expect("a claim")
        };
        let condition = |type_: &str, status: &str| json!({"type": type_, "status": status, "reason": "r", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        assert_eq!(readiness(&claim(json!([]))), Readiness::Waits);
        let half = json!([condition("Attached", "True"), condition("Warm", "False")]);
        assert_eq!(readiness(&claim(half)), Readiness::Waits);
        let all = [condition("Attached", "True"), condition("Warm", "True"), condition("Broken", "False")];
        assert_eq!(readiness(&claim(json!(all))), Readiness::Ready);
        let broken = [condition("Attached", "True"), condition("Broken", "True")];
        assert!(matches!(readiness(&claim(json!(broken))), Readiness::Failed(_)));
    }
}

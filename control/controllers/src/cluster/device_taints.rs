//! Eviction by taints of devices (resource.k8s.io/v1, KEP-5055): pods leave when a device that they hold gets a NoExecute taint
//! which their claim does not tolerate, or has tolerated for as long as it said.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::{
    DeviceRequestAllocationResult, DeviceTaint, DeviceToleration, ResourceClaim, ResourceSlice,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use super::resource_claims::claim_names;
use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue};

pub(crate) struct DeviceTaints {
    host: Host,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<ResourceClaim>>,
    slices: Arc<Informer<ResourceSlice>>,
    /// Slices by their pool.
    of_pool: Index<ResourceSlice>,
    /// Claims by the pools of their devices.
    holding: Index<ResourceClaim>,
}

/// The index value of a pool of devices; drivers' names have no slash.
fn pool(driver: &str, name: &str) -> String {
    format!("{driver}/{name}")
}

fn results(claim: &ResourceClaim) -> impl Iterator<Item = &DeviceRequestAllocationResult> {
    let allocation = claim.status.iter().filter_map(|status| status.allocation.as_ref());
    allocation.filter_map(|allocation| allocation.devices.as_ref()).flat_map(|devices| devices.results.iter().flatten())
}

fn users(
    claim: &ResourceClaim,
) -> impl Iterator<Item = &k8s_openapi::api::resource::v1::ResourceClaimConsumerReference> {
    let reserved = claim.status.iter().flat_map(|status| status.reserved_for.iter().flatten());
    reserved.filter(|user| user.resource == "pods" && user.api_group.as_deref().unwrap_or_default().is_empty())
}

/// The taints of a slice that make pods leave, with the devices that have them.
fn evicting(slice: &ResourceSlice) -> Vec<(&str, &DeviceTaint)> {
    let devices = slice.spec.devices.iter().flatten();
    let taints = devices.flat_map(|device| device.taints.iter().flatten().map(|taint| (&*device.name, taint)));
    taints.filter(|(_, taint)| taint.effect == "NoExecute").collect()
}

fn tolerates(toleration: &DeviceToleration, taint: &DeviceTaint) -> bool {
    let is = |field: &Option<String>, value: &str| field.as_deref().is_none_or(|held| held.is_empty() || held == value);
    is(&toleration.effect, &taint.effect)
        && is(&toleration.key, &taint.key)
        && match toleration.operator.as_deref() {
            Some("Exists") => true,
            None | Some("" | "Equal") => {
                toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
            }
            Some(_) => false,
        }
}

/// When whoever holds a device with this taint must go; `None` if never.
fn end(taint: &DeviceTaint, tolerations: &[DeviceToleration]) -> Option<Timestamp> {
    let since = taint.time_added.as_ref().map_or(Timestamp::MIN, |time| time.0);
    let matching = tolerations.iter().filter(|toleration| tolerates(toleration, taint));
    let mut shortest: Option<i64> = None;
    for toleration in matching {
        let seconds = toleration.toleration_seconds?.max(0);
        shortest = Some(shortest.map_or(seconds, |known| known.min(seconds)));
    }
    let stay = SignedDuration::from_secs(shortest.unwrap_or_default());
    Some(since.checked_add(stay).unwrap_or(Timestamp::MAX))
}

impl DeviceTaints {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let (claims, slices): (Arc<Informer<ResourceClaim>>, Arc<Informer<ResourceSlice>>) =
            (host.informer(), host.informer());
        Self {
            of_pool: slices.index(|slice| vec![pool(&slice.spec.driver, &slice.spec.pool.name)]),
            holding: claims.index(|claim| results(claim).map(|result| pool(&result.driver, &result.pool)).collect()),
            pods: host.informer(),
            claims,
            slices,
            host,
        }
    }

    /// When the holders of a device must go because of its taints.
    fn end_of(&self, result: &DeviceRequestAllocationResult) -> Option<Timestamp> {
        let slices: Vec<_> = self.of_pool.get(&pool(&result.driver, &result.pool)).collect();
        // What a driver has not removed yet says nothing about the pool as it is.
        let newest = slices.iter().map(|slice| slice.spec.pool.generation).max();
        let current = slices.iter().filter(|slice| Some(slice.spec.pool.generation) == newest);
        let taints = current.flat_map(|slice| evicting(slice)).filter(|(device, _)| *device == result.device);
        taints.filter_map(|(_, taint)| end(taint, result.tolerations.as_deref().unwrap_or_default())).min()
    }

    /// When a pod must go because of the devices that it holds.
    fn end_for(&self, pod: &Pod) -> Option<Timestamp> {
        let namespace = pod.namespace().unwrap_or_default();
        let names = claim_names(pod);
        let claims = names.iter().filter_map(|name| self.claims.get(&namespace, name));
        let held = claims.filter(|claim| users(claim).any(|user| Some(&user.uid) == pod.metadata.uid.as_ref()));
        held.filter_map(|claim| results(&claim).filter_map(|result| self.end_of(result)).min()).min()
    }

    async fn evict(&self, pod: &Pod) -> Result<(), Error> {
        let namespace = pod.namespace().unwrap_or_default();
        let note = format!("Marking for deletion Pod {namespace}/{}", pod.name_any());
        self.host.event(pod, EventType::Normal, "DeviceTaintManagerEviction", "Evict", note).await;
        let api: Api<Pod> = Api::namespaced(self.host.client.clone(), &namespace);
        let message = "Device Taint manager: deleting due to NoExecute taint";
        pods::mark_disrupted(&self.host, &api, pod, "DeletionByDeviceTaintManager", message, false).await?;
        self.host.delete(&api, pod).await
    }
}

fn queue_users(claim: &ResourceClaim, queue: &WorkQueue<Key>) {
    let namespace = claim.namespace().unwrap_or_default();
    users(claim).for_each(|user| queue.add(Key::new(&namespace, &user.name)));
}

impl Controller for DeviceTaints {
    const NAME: &'static str = "device-taint-eviction-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.slices, |this, delta, queue| {
            let taints = |slice: &Option<Arc<ResourceSlice>>| -> Vec<(String, DeviceTaint)> {
                let taints = slice.as_ref().map(|slice| {
                    evicting(slice).into_iter().map(|(device, taint)| (device.to_owned(), taint.clone())).collect()
                });
                taints.unwrap_or_default()
            };
            if taints(&delta.old) == taints(&delta.new) {
                return;
            }
            for slice in [&delta.old, &delta.new].into_iter().flatten() {
                for claim in this.holding.get(&pool(&slice.spec.driver, &slice.spec.pool.name)) {
                    queue_users(&claim, queue);
                }
            }
        });
        sources.watch(&self.claims, |_, delta, queue| {
            if let Some(claim) = &delta.new {
                queue_users(claim, queue);
            }
        });
        sources.watch(&self.pods, |_, delta, queue| {
            if let Some(pod) = delta.new.as_ref().filter(|pod| !claim_names(pod).is_empty())
                && delta.old.as_ref().is_none_or(|old| pods::node_of(old) != pods::node_of(pod))
            {
                queue.add(Key::of(&**pod));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        if !pods::is_active(&pod) || pods::node_of(&pod).is_empty() {
            return Ok(Outcome::Done);
        }
        let Some(end) = self.end_for(&pod) else { return Ok(Outcome::Done) };
        let left = end.duration_since(Timestamp::now());
        match Duration::try_from(left) {
            Ok(left) if !left.is_zero() => Ok(Outcome::After(left)),
            _ => {
                self.evict(&pod).await?;
                Ok(Outcome::Done)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_shortest_toleration_counts_and_only_one_without_end_lasts() {
        let taint: DeviceTaint = serde_json::from_value(
            json!({"key": "broken", "value": "yes", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"}),
        )
        .expect("a taint");
        let after = |tolerations: Value| {
            let tolerations: Vec<DeviceToleration> = serde_json::from_value(tolerations).expect("tolerations");
            end(&taint, &tolerations)
                .map(|end| end.duration_since("2026-01-01T00:00:00Z".parse().expect("a time")).as_secs())
        };
        let equal = |seconds: i64| json!({"key": "broken", "value": "yes", "effect": "NoExecute", "tolerationSeconds": seconds});
        assert_eq!(after(json!([])), Some(0));
        assert_eq!(after(json!([equal(30), equal(10), equal(-5)])), Some(0));
        assert_eq!(after(json!([equal(30), equal(10)])), Some(10));
        assert_eq!(after(json!([{"operator": "Exists"}])), None);
        assert_eq!(after(json!([{"operator": "Exists", "effect": "NoSchedule"}])), Some(0));
        assert_eq!(after(json!([{"key": "broken", "value": "no"}])), Some(0));
    }
}

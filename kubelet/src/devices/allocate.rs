//! Which devices a container gets, and what it needs to use them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::checkpoint::{self, Entry};
use super::plugin::{ANSWER_TIMEOUT, Endpoint};
use super::{Devices, api};
use crate::cri::{Device, Mount};

/// What plugins say that a container needs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Given {
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) devices: Vec<Device>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) cdi_devices: Vec<String>,
}

/// The devices to take: those that must be, then what the plugin prefers, then the first of the rest.
fn choose(
    free: &BTreeSet<String>,
    reusable: &BTreeSet<String>,
    preferred: &[String],
    count: usize,
) -> Option<BTreeSet<String>> {
    let preferred = preferred.iter().filter(|id| free.contains(*id) || reusable.contains(*id));
    let mut chosen = BTreeSet::new();
    for id in reusable.iter().chain(preferred).chain(free) {
        if chosen.len() == count {
            break;
        }
        chosen.insert(id.clone());
    }
    (chosen.len() == count).then_some(chosen)
}

impl Devices {
    fn endpoint(&self, resource: &str) -> Result<Arc<Endpoint>, String> {
        let endpoint = self.0.state.lock().resources.get(resource).and_then(|resource| resource.endpoint.clone());
        endpoint.ok_or_else(|| format!("the plugin of {resource} does not run"))
    }

    /// The devices that work and nobody has.
    pub(super) fn free(&self, resource: &str) -> BTreeSet<String> {
        let state = self.0.state.lock();
        let taken: BTreeSet<_> =
            state.entries.iter().filter(|entry| entry.resource == resource).flat_map(|e| &e.devices).collect();
        let all = state.resources.get(resource).into_iter().flat_map(|resource| &resource.devices);
        all.filter(|(id, device)| device.healthy && !taken.contains(id)).map(|(id, _)| id.clone()).collect()
    }

    /// Takes devices for a container and writes down that it has them. The caller has the turn.
    pub(super) async fn allocate(
        &self,
        pod: &str,
        container: &str,
        resource: &str,
        count: usize,
        reusable: &BTreeSet<String>,
    ) -> Result<BTreeSet<String>, String> {
        let free = self.free(resource);
        let short = || {
            format!(
                "Allocate failed due to requested number of devices unavailable for {resource}. Requested: {count}, Available: {}, which is unexpected",
                free.len() + reusable.len()
            )
        };
        let mut chosen = choose(&free, reusable, &[], count).ok_or_else(short)?;
        let failed =
            |status: tonic::Status| format!("Allocate failed due to {}, which is unexpected", status.message());
        let endpoint = self.endpoint(resource).map_err(|why| format!("Allocate failed due to {why}"))?;
        if endpoint.options.get_preferred_allocation_available && free.len() + reusable.len() > count {
            let request = api::ContainerPreferredAllocationRequest {
                available_device_ids: free.union(reusable).cloned().collect(),
                must_include_device_ids: reusable.iter().take(count).cloned().collect(),
                allocation_size: i32::try_from(count).unwrap_or(i32::MAX),
            };
            let request = api::PreferredAllocationRequest { container_requests: vec![request] };
            let method = "/v1beta1.DevicePlugin/GetPreferredAllocation";
            let answer: api::PreferredAllocationResponse =
                endpoint.client.call(method, request, ANSWER_TIMEOUT).await.map_err(failed)?;
            let preferred = answer.container_responses.into_iter().next().unwrap_or_default().device_ids;
            chosen = choose(&free, reusable, &preferred, count).ok_or_else(short)?;
        }
        let request = api::ContainerAllocateRequest { devices_ids: chosen.iter().cloned().collect() };
        let request = api::AllocateRequest { container_requests: vec![request] };
        let method = "/v1beta1.DevicePlugin/Allocate";
        let answer: api::AllocateResponse =
            endpoint.client.call(method, request, ANSWER_TIMEOUT).await.map_err(failed)?;
        let mut answers = answer.container_responses.into_iter();
        let (Some(answer), None) = (answers.next(), answers.next()) else {
            return Err(format!("Allocate failed due to the plugin of {resource} not answering for one container"));
        };
        let (pod, container, resource) = (pod.to_owned(), container.to_owned(), resource.to_owned());
        let mut state = self.0.state.lock();
        state.entries.push(Entry { pod, container, resource, devices: chosen.clone(), answer });
        if let Err(error) = checkpoint::save(&self.0.layout, &state) {
            state.entries.pop();
            return Err(format!("Allocate failed due to the devices not being written down: {error}"));
        }
        Ok(chosen)
    }

    /// What a container needs for its devices; plugins that want to prepare them are asked to.
    pub(crate) async fn prepare(&self, pod: &str, container: &str) -> Result<Given, String> {
        let own: Vec<Entry> = {
            let state = self.0.state.lock();
            let own = state.entries.iter().filter(|entry| entry.pod == pod && entry.container == container);
            own.cloned().collect()
        };
        let mut given = Given::default();
        for entry in own {
            self.pre_start(&entry).await?;
            let answer = entry.answer;
            given.environment.extend(answer.envs);
            given.annotations.extend(answer.annotations);
            given.cdi_devices.extend(answer.cdi_devices.into_iter().map(|device| device.name));
            given.mounts.extend(answer.mounts.into_iter().map(|mount| Mount {
                container_path: mount.container_path.into(),
                host_path: mount.host_path.into(),
                readonly: mount.read_only,
                ..Mount::default()
            }));
            given.devices.extend(answer.devices.into_iter().map(|device| Device {
                container_path: device.container_path.into(),
                host_path: device.host_path.into(),
                permissions: device.permissions,
            }));
        }
        Ok(given)
    }

    async fn pre_start(&self, entry: &Entry) -> Result<(), String> {
        // A container may start again while its plugin is away: what it has it keeps.
        let Ok(endpoint) = self.endpoint(&entry.resource) else { return Ok(()) };
        if !endpoint.options.pre_start_required {
            return Ok(());
        }
        let request = api::PreStartContainerRequest { devices_ids: entry.devices.iter().cloned().collect() };
        let method = "/v1beta1.DevicePlugin/PreStartContainer";
        let answer = endpoint.client.call::<_, api::PreStartContainerResponse>(method, request, ANSWER_TIMEOUT).await;
        answer.map(drop).map_err(|status| format!("prepare devices {}: {}", entry.resource, status.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_chosen_as_they_must_and_as_is_preferred() {
        let set = |ids: &str| ids.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>();
        let prefer = |ids: &str| ids.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let choose = |free, reusable, preferred, count| choose(&set(free), &set(reusable), &prefer(preferred), count);
        assert_eq!(choose("a b c", "", "c", 2), Some(set("a c")));
        assert_eq!(choose("a b", "z", "", 2), Some(set("a z")));
        assert_eq!(choose("a b", "", "x", 1), Some(set("a")), "what is not free cannot be preferred");
        assert_eq!(choose("a", "", "", 2), None);
    }
}

//! Who has which devices, for whoever monitors them: `v1.PodResourcesLister` on a socket of its own.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Container;
use tonic::Status;

use super::Devices;
use super::api::{NumaNode, TopologyInfo};
use crate::dra::Dra;
use crate::grpc::{self, Router, proto};
use crate::names::Layout;
use crate::pods::PodTable;
use crate::pods::table::PodEntry;

proto! {
message AllocatableResourcesRequest {}
message AllocatableResourcesResponse { repeated ContainerDevices devices = 1; repeated int64 cpu_ids = 2; }
message ListPodResourcesRequest {}
message ListPodResourcesResponse { repeated PodResources pod_resources = 1; }
message GetPodResourcesRequest { string pod_name = 1; string pod_namespace = 2; }
message GetPodResourcesResponse { PodResources pod_resources = 1; }
message PodResources { string name = 1; string namespace = 2; repeated ContainerResources containers = 3; }
message ContainerResources { string name = 1; repeated ContainerDevices devices = 2; repeated DynamicResource dynamic_resources = 5; }
message ContainerDevices { string resource_name = 1; repeated string device_ids = 2; TopologyInfo topology = 3; }
message DynamicResource { string claim_name = 2; string claim_namespace = 3; repeated ClaimResource claim_resources = 4; }
message ClaimResource {
    repeated CdiName cdi_devices = 1; string driver_name = 2; string pool_name = 3; string device_name = 4;
}
message CdiName { string name = 1; }
}

/// Answers until dropped.
///
/// # Errors
/// When the socket cannot be had.
pub(crate) async fn serve(layout: Layout, devices: Devices, dra: Dra, table: Arc<PodTable>) -> std::io::Result<()> {
    let folder = layout.pod_resources();
    std::fs::create_dir_all(&folder)?;
    let listener = grpc::bind(&folder.join("kubelet.sock")).await?;
    let allocatable = devices.clone();
    let node = Arc::new(Node { devices, dra });
    let (of_all, of_one) = ((node.clone(), table.clone()), (node, table));
    let router = Router::default()
        .unary("/v1.PodResourcesLister/List", move |_: ListPodResourcesRequest| {
            let (node, table) = &of_all;
            let pods = table.list().iter().filter(|entry| !is_over(entry)).map(|entry| node.of(entry)).collect();
            async move { Ok(ListPodResourcesResponse { pod_resources: pods }) }
        })
        .unary("/v1.PodResourcesLister/Get", move |asked: GetPodResourcesRequest| {
            let (node, table) = &of_one;
            let named = |entry: &Arc<PodEntry>| {
                entry.key.name == asked.pod_name && entry.key.namespace == asked.pod_namespace && !is_over(entry)
            };
            let found = table.list().into_iter().find(named).map(|entry| node.of(&entry));
            async move {
                let missing = || Status::not_found(format!("pod {}/{} not found", asked.pod_namespace, asked.pod_name));
                found.map(|pod| GetPodResourcesResponse { pod_resources: Some(pod) }).ok_or_else(missing)
            }
        })
        .unary("/v1.PodResourcesLister/GetAllocatableResources", move |_: AllocatableResourcesRequest| {
            let all = allocatable.all();
            let healthy = all.into_iter().flat_map(|(name, devices)| {
                let usable = devices.into_iter().filter(|(_, device)| device.healthy);
                usable.map(move |(id, device)| listed(&name, &[(id, device.numa)])).collect::<Vec<_>>()
            });
            let answer = AllocatableResourcesResponse { devices: healthy.collect(), cpu_ids: Vec::new() };
            async move { Ok(answer) }
        });
    grpc::serve(listener, router).await
}

fn is_over(entry: &PodEntry) -> bool {
    let phase = entry.pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn listed(name: &str, devices: &[(String, Vec<i64>)]) -> ContainerDevices {
    let mut nodes: Vec<i64> = devices.iter().flat_map(|(_, nodes)| nodes.clone()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let topology = TopologyInfo { nodes: nodes.into_iter().map(|id| NumaNode { id }).collect() };
    ContainerDevices {
        resource_name: name.to_owned(),
        device_ids: devices.iter().map(|(id, _)| id.clone()).collect(),
        topology: (!topology.nodes.is_empty()).then_some(topology),
    }
}

/// Where it is known who has what.
struct Node {
    devices: Devices,
    dra: Dra,
}

impl Node {
    fn of(&self, entry: &PodEntry) -> PodResources {
        let all = self.devices.all();
        let containers = entry.spec().into_iter().flat_map(|spec| {
            let sidecars = spec.init_containers.iter().flatten().filter(|one| one.restart_policy.is_some());
            sidecars.chain(&spec.containers)
        });
        let container = |container: &Container| {
            let own = self.devices.of(&entry.key.uid, &container.name).into_iter().map(|(resource, ids)| {
                let known = all.get(&resource);
                let numa = |id: &String| known.and_then(|known| known.get(id)).map(|device| device.numa.clone());
                let ids: Vec<_> = ids.into_iter().map(|id| (id.clone(), numa(&id).unwrap_or_default())).collect();
                listed(&resource, &ids)
            });
            let mut claims: Vec<DynamicResource> = Vec::new();
            for device in self.dra.of(&entry.key.uid, container) {
                let same = |known: &&mut DynamicResource| {
                    known.claim_name == device.claim && known.claim_namespace == device.namespace
                };
                let resource = ClaimResource {
                    cdi_devices: device.cdi.into_iter().map(|name| CdiName { name }).collect(),
                    driver_name: device.driver,
                    pool_name: device.pool,
                    device_name: device.device,
                };
                match claims.iter_mut().find(same) {
                    Some(known) => known.claim_resources.push(resource),
                    None => claims.push(DynamicResource {
                        claim_name: device.claim,
                        claim_namespace: device.namespace,
                        claim_resources: vec![resource],
                    }),
                }
            }
            ContainerResources { name: container.name.clone(), devices: own.collect(), dynamic_resources: claims }
        };
        PodResources {
            name: entry.key.name.clone(),
            namespace: entry.key.namespace.clone(),
            containers: containers.map(container).collect(),
        }
    }
}

//! EndpointSlice: the addresses behind each Service with a selector, in slices of a bounded size (discovery.k8s.io/v1).

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{ContainerPort, Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointHints, EndpointSlice, ForNode, ForZone};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::slices::{self, Group, HEADLESS, MANAGED_BY, SERVICE_NAME};
use crate::common::labelled::Labelled;
use crate::common::{pods, selector};
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_reference, is_controlled_by, own,
};

const MANAGER: &str = "endpointslice-controller.k8s.io";
const ZONE: &str = "topology.kubernetes.io/zone";

pub(crate) struct EndpointSlices {
    host: Host,
    services: Arc<Informer<Service>>,
    pods: Arc<Informer<Pod>>,
    labelled: Arc<Labelled>,
    nodes: Arc<Informer<Node>>,
    slices: Arc<Informer<EndpointSlice>>,
}

impl EndpointSlices {
    pub(crate) fn new(api: &Arc<ApiServer>, labelled: &Arc<Labelled>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let (services, pods, nodes, slices) = (host.informer(), host.informer(), host.informer(), host.informer());
        Self { services, pods, labelled: labelled.clone(), nodes, slices, host }
    }

    /// The endpoints that the Service should have, by group.
    fn wanted(&self, service: &Service) -> BTreeMap<Group, Vec<Endpoint>> {
        let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
        let Some(spec) = &service.spec else {
            return groups;
        };
        let Some(wanted) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else {
            return groups;
        };
        let publish_all = spec.publish_not_ready_addresses == Some(true);
        let families = spec.ip_families.clone().unwrap_or_else(|| vec!["IPv4".into()]);
        let namespace = service.namespace().unwrap_or_default();
        for pod in self.labelled.select(&namespace, |labels| selector::matches_map(wanted, Some(labels))) {
            if matches!(pods::phase(&pod), "Succeeded" | "Failed") {
                continue;
            }
            for family in &families {
                let Some(address_type) = ["IPv4", "IPv6"].into_iter().find(|known| known == family) else {
                    continue;
                };
                let Some(address) = address(&pod, address_type) else {
                    continue;
                };
                let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
                let zone = node.as_ref().and_then(|node| self.nodes.get("", node)?.labels().get(ZONE).cloned());
                let group = Group { address_type, ports: ports(spec.ports.as_deref().unwrap_or_default(), &pod) };
                groups.entry(group).or_default().push(endpoint(service, &pod, address, node, zone, publish_all));
            }
        }
        for endpoint in groups.values_mut().flatten() {
            endpoint.hints = hints(endpoint, spec.traffic_distribution.as_deref());
        }
        if groups.is_empty() {
            // A Service without pods has an empty slice for each family, so that its consumers know it was seen.
            for family in families {
                if let Some(address_type) = ["IPv4", "IPv6"].into_iter().find(|known| *known == family) {
                    groups.insert(Group { address_type, ports: Vec::new() }, Vec::new());
                }
            }
        }
        groups
    }
}

/// Queues the Services that a changed pod belongs or belonged to.
pub(super) fn pod_changed(services: &Informer<Service>, delta: &Delta<Pod>, queue: &WorkQueue<Key>) {
    let Some(pod) = delta.new.as_ref().or(delta.old.as_ref()) else {
        return;
    };
    if let (Some(old), Some(new)) = (&delta.old, &delta.new)
        && view(old) == view(new)
    {
        return;
    }
    for service in services.list_ns(&pod.namespace().unwrap_or_default()) {
        let Some(wanted) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
            continue;
        };
        let belongs = |pod: &Arc<Pod>| selector::matches_map(wanted, pod.metadata.labels.as_ref());
        if !wanted.is_empty() && [&delta.old, &delta.new].into_iter().flatten().any(belongs) {
            queue.add(Key::of(&*service));
        }
    }
}

/// What endpoints depend on of a pod.
fn view(pod: &Pod) -> impl PartialEq + use<> {
    (
        pod.metadata.labels.clone(),
        pod.metadata.deletion_timestamp.is_some(),
        pods::is_ready(pod),
        pods::phase(pod).to_owned(),
        pod.status.as_ref().and_then(|status| status.pod_ips.clone()),
        pod.spec.as_ref().map(|spec| (spec.node_name.clone(), spec.hostname.clone(), spec.subdomain.clone())),
    )
}

/// Where traffic to a ready endpoint should come from (KEP-4444, KEP-3015).
fn hints(endpoint: &Endpoint, distribution: Option<&str>) -> Option<EndpointHints> {
    let by_node = match distribution? {
        "PreferClose" | "PreferSameZone" => false,
        "PreferSameNode" => true,
        _ => return None,
    };
    endpoint.conditions.as_ref().filter(|conditions| conditions.ready == Some(true))?;
    let zones = endpoint.zone.iter().map(|name| ForZone { name: name.clone() }).collect::<Vec<_>>();
    let nodes =
        endpoint.node_name.iter().filter(|_| by_node).map(|name| ForNode { name: name.clone() }).collect::<Vec<_>>();
    if zones.is_empty() && nodes.is_empty() {
        return None;
    }
    Some(EndpointHints {
        for_zones: Some(zones).filter(|zones| !zones.is_empty()),
        for_nodes: Some(nodes).filter(|nodes| !nodes.is_empty()),
    })
}

pub(super) fn address(pod: &Pod, address_type: &str) -> Option<String> {
    let ips = pod.status.as_ref()?.pod_ips.as_ref()?;
    ips.iter().map(|ip| ip.ip.clone()).find(|ip| ip.contains(':') == (address_type == "IPv6"))
}

/// The Service's ports as this pod serves them; a port by name that the pod does not have is left out.
fn ports(ports: &[ServicePort], pod: &Pod) -> Vec<(String, i32, String, Option<String>)> {
    ports
        .iter()
        .filter_map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
            let number = match &port.target_port {
                None => port.port,
                Some(IntOrString::Int(0)) => port.port,
                Some(IntOrString::Int(number)) => *number,
                Some(IntOrString::String(name)) => named_port(pod, name, &protocol)?,
            };
            Some((port.name.clone().unwrap_or_default(), number, protocol, port.app_protocol.clone()))
        })
        .collect()
}

pub(super) fn named_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let sidecars =
        spec.init_containers.iter().flatten().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let named = |port: &&ContainerPort| {
        port.name.as_deref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == protocol
    };
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(named)
        .map(|port| port.container_port)
}

fn endpoint(
    service: &Service,
    pod: &Pod,
    address: String,
    node: Option<String>,
    zone: Option<String>,
    publish_all: bool,
) -> Endpoint {
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let serving = pods::is_ready(pod);
    let spec = pod.spec.as_ref();
    let subdomain = spec.and_then(|spec| spec.subdomain.as_ref());
    Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(publish_all || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: spec.and_then(|spec| spec.hostname.clone()).filter(|_| subdomain == Some(&service.name_any())),
        node_name: node,
        zone,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.namespace(),
            name: Some(pod.name_any()),
            uid: pod.uid(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

/// What the Service's slices have in common.
fn model(service: &Service) -> EndpointSlice {
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS);
    labels.insert(SERVICE_NAME.into(), service.name_any());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if service.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None")) {
        labels.insert(HEADLESS.into(), String::new());
    }
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name_any())),
            namespace: service.namespace(),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(service)]),
            ..ObjectMeta::default()
        },
        ..EndpointSlice::default()
    }
}

impl Controller for EndpointSlices {
    const NAME: &'static str = "endpointslice-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.services, own);
        sources.watch(&self.pods, |this, delta, queue| pod_changed(&this.services, delta, queue));
        sources.watch(&self.nodes, |this, delta, queue| {
            let zone = |node: &Option<Arc<Node>>| node.as_ref().and_then(|node| node.labels().get(ZONE).cloned());
            if zone(&delta.old) != zone(&delta.new) {
                this.services.list().for_each(|service| queue.add(Key::of(&*service)));
            }
        });
        sources.watch(&self.slices, |_, delta, queue| slices::changed(delta, MANAGER, queue));
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(service) = self.services.get(&key.namespace, &key.name) else {
            return Ok(Outcome::Done);
        };
        let spec = service.spec.clone().unwrap_or_default();
        if service.metadata.deletion_timestamp.is_some()
            || spec.selector.is_none()
            || spec.type_.as_deref() == Some("ExternalName")
        {
            return Ok(Outcome::Done);
        }
        let uid = service.uid().unwrap_or_default();
        let existing = self
            .slices
            .list_ns(&key.namespace)
            .filter(|slice| is_controlled_by(&slice.metadata, &uid) && slices::is_managed(slice, MANAGER))
            .collect();
        slices::apply(&self.host, &model(&service), existing, self.wanted(&service)).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_follow_the_traffic_distribution() {
        let endpoint = |ready| Endpoint {
            conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
            zone: Some("z".into()),
            node_name: Some("n".into()),
            ..Endpoint::default()
        };
        assert_eq!(hints(&endpoint(true), None), None);
        assert_eq!(hints(&endpoint(false), Some("PreferSameZone")), None);
        let close = hints(&endpoint(true), Some("PreferClose")).expect("hints");
        assert_eq!((close.for_zones.expect("zones")[0].name.as_str(), close.for_nodes), ("z", None));
        let node = hints(&endpoint(true), Some("PreferSameNode")).expect("hints");
        assert_eq!(node.for_nodes.expect("nodes")[0].name, "n");
    }
}

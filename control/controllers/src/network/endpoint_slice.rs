//! EndpointSlice: the addresses behind each Service with a selector, in slices of a bounded size (discovery.k8s.io/v1).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coracle_api::informer::{Delta, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{ContainerPort, Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Api, ResourceExt};

use crate::common::{pods, selector};
use crate::machine::{
    Controller, Error, Host, Key, Outcome, Sources, WorkQueue, controller_reference, is_controlled_by,
};

/// Label that names the Service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints of one slice (`--max-endpoints-per-slice`).
const MAX_ENDPOINTS: usize = 100;
const ZONE: &str = "topology.kubernetes.io/zone";

pub(crate) struct EndpointSlices {
    host: Host,
    services: Arc<Informer<Service>>,
    pods: Arc<Informer<Pod>>,
    nodes: Arc<Informer<Node>>,
    slices: Arc<Informer<EndpointSlice>>,
}

/// What endpoints must share to stand in one slice.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Group {
    address_type: &'static str,
    /// Name, number, protocol, application protocol of each port.
    ports: Vec<(String, i32, String, Option<String>)>,
}

impl EndpointSlices {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { services: host.informer(), pods: host.informer(), nodes: host.informer(), slices: host.informer(), host }
    }

    /// Queues the Services that a changed pod belongs or belonged to.
    fn pod_changed(&self, delta: &Delta<Pod>, queue: &WorkQueue<Key>) {
        let Some(pod) = delta.new.as_ref().or(delta.old.as_ref()) else {
            return;
        };
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && view(old) == view(new)
        {
            return;
        }
        for service in self.services.list_ns(&pod.namespace().unwrap_or_default()) {
            let Some(wanted) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
                continue;
            };
            let belongs = |pod: &Arc<Pod>| selector::matches_map(wanted, pod.metadata.labels.as_ref());
            if !wanted.is_empty() && [&delta.old, &delta.new].into_iter().flatten().any(belongs) {
                queue.add(Key::of(&*service));
            }
        }
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
        for pod in self.pods.list_ns(&service.namespace().unwrap_or_default()) {
            if !selector::matches_map(wanted, pod.metadata.labels.as_ref())
                || matches!(pods::phase(&pod), "Succeeded" | "Failed")
            {
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
        for endpoints in groups.values_mut() {
            endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
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

fn address(pod: &Pod, address_type: &str) -> Option<String> {
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

fn named_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
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

fn slice(service: &Service, owner: &OwnerReference, group: &Group, endpoints: Vec<Endpoint>) -> EndpointSlice {
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
            owner_references: Some(vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        address_type: group.address_type.into(),
        endpoints: Some(endpoints),
        ports: Some(
            group
                .ports
                .iter()
                .map(|(name, port, protocol, app_protocol)| EndpointPort {
                    name: Some(name.clone()),
                    port: Some(*port),
                    protocol: Some(protocol.clone()),
                    app_protocol: app_protocol.clone(),
                })
                .collect(),
        ),
    }
}

/// Shares endpoints out over the slices that exist: what a slice holds and is still wanted stays there, so that a change
/// of one endpoint rewrites one slice; the rest fills gaps, then new slices.
fn share_out(
    existing: &[Arc<EndpointSlice>],
    wanted: Vec<Endpoint>,
) -> Vec<(Option<Arc<EndpointSlice>>, Vec<Endpoint>)> {
    let mut left: BTreeMap<Vec<String>, Endpoint> =
        wanted.into_iter().map(|endpoint| (endpoint.addresses.clone(), endpoint)).collect();
    let mut shares: Vec<_> = existing
        .iter()
        .map(|slice| {
            let kept: Vec<_> =
                slice.endpoints.iter().flatten().filter_map(|held| left.remove(&held.addresses)).collect();
            (Some(slice.clone()), kept)
        })
        .collect();
    let mut left = left.into_values();
    for (_, share) in &mut shares {
        let room = MAX_ENDPOINTS.saturating_sub(share.len());
        share.extend(left.by_ref().take(room));
    }
    loop {
        let share: Vec<_> = left.by_ref().take(MAX_ENDPOINTS).collect();
        if share.is_empty() {
            break;
        }
        shares.push((None, share));
    }
    if shares.is_empty() {
        shares.push((None, Vec::new()));
    }
    shares
}

impl Controller for EndpointSlices {
    const NAME: &'static str = "endpointslice-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.services, |_, delta, queue| {
            if let Some(service) = delta.new.as_ref().or(delta.old.as_ref()) {
                queue.add(Key::of(&**service));
            }
        });
        sources.watch(&self.pods, |this, delta, queue| this.pod_changed(delta, queue));
        sources.watch(&self.slices, |_, delta, queue| {
            let Some(slice) = delta.new.as_ref().or(delta.old.as_ref()) else {
                return;
            };
            if let Some(service) = slice
                .labels()
                .get(SERVICE_NAME)
                .filter(|_| slice.labels().get(MANAGED_BY).is_some_and(|by| by == MANAGER))
            {
                queue.add(Key::new(&slice.namespace().unwrap_or_default(), service));
            }
        });
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
        let api: Api<EndpointSlice> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let uid = service.uid().unwrap_or_default();
        let owner = controller_reference(&*service);
        let mut existing: Vec<_> = self
            .slices
            .list_ns(&key.namespace)
            .into_iter()
            .filter(|slice| {
                is_controlled_by(&slice.metadata, &uid)
                    && slice.labels().get(MANAGED_BY).is_some_and(|by| by == MANAGER)
            })
            .collect();
        existing.sort_by_key(|slice| slice.name_any());
        let mut kept = BTreeSet::new();
        for (group, endpoints) in self.wanted(&service) {
            let model = slice(&service, &owner, &group, Vec::new());
            let same: Vec<_> = existing
                .iter()
                .filter(|slice| {
                    slice.address_type == model.address_type
                        && slice.ports.as_deref().unwrap_or_default() == model.ports.as_deref().unwrap_or_default()
                })
                .cloned()
                .collect();
            for (held, share) in share_out(&same, endpoints) {
                match held {
                    Some(_)
                        if share.is_empty()
                            && kept.iter().any(|name| same.iter().any(|slice| &slice.name_any() == name)) => {}
                    Some(held) => {
                        kept.insert(held.name_any());
                        let changed = EndpointSlice {
                            metadata: ObjectMeta { labels: model.metadata.labels.clone(), ..held.metadata.clone() },
                            endpoints: Some(share),
                            ..model.clone()
                        };
                        if changed.metadata.labels != held.metadata.labels
                            || changed.endpoints.as_deref().unwrap_or_default()
                                != held.endpoints.as_deref().unwrap_or_default()
                        {
                            self.host.replace(&api, &changed).await?;
                        }
                    }
                    None => {
                        let made =
                            self.host.create(&api, &EndpointSlice { endpoints: Some(share), ..model.clone() }).await?;
                        kept.insert(made.name_any());
                    }
                }
            }
        }
        for slice in existing.iter().filter(|slice| !kept.contains(&slice.name_any())) {
            self.host.delete(&api, &**slice).await?;
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(number: usize) -> Endpoint {
        Endpoint { addresses: vec![format!("10.42.{}.{}", number / 250, number % 250)], ..Endpoint::default() }
    }

    fn held(name: &str, numbers: impl Iterator<Item = usize>) -> Arc<EndpointSlice> {
        Arc::new(EndpointSlice {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            endpoints: Some(numbers.map(endpoint).collect()),
            ..EndpointSlice::default()
        })
    }

    #[test]
    fn endpoints_stay_in_their_slices_and_new_ones_fill_gaps() {
        let existing = [held("a", 0..100), held("b", 100..150)];
        let shares = share_out(&existing, (1..260).map(endpoint).collect());
        let sizes: Vec<_> = shares.iter().map(|(_, share)| share.len()).collect();
        assert_eq!(sizes, [100, 100, 59]);
        assert!((1..100).all(|number| shares[0].1.contains(&endpoint(number))), "an endpoint moved");
        let all: usize = sizes.iter().sum();
        assert_eq!(all, 259);
    }

    #[test]
    fn a_service_without_pods_keeps_one_empty_slice() {
        assert_eq!(share_out(&[], Vec::new()).len(), 1);
    }
}

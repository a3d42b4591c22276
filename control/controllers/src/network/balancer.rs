//! Services of type LoadBalancer: each node is its own balancer. A Service is announced at the addresses of the ready nodes as
//! long as none of its ports is taken there; every node's Service rules lead these addresses to its pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use coracle_api::informer::{Index, Informer};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, Node, Pod, Service};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Class of Services that this controller serves beside those without a class.
const CLASS: &str = "coracle.io/nodes";
/// Label that keeps a node out of the balancers.
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Ports that the hosts themselves need: SSH, and the node's own API.
const RESERVED: [u16; 2] = [22, 10250];
/// Addresses that one Service is announced at, at most.
const MAX_ADDRESSES: usize = 100;

/// Protocol and number.
type Port = (String, i32);

pub(crate) struct Balancer {
    host: Host,
    services: Arc<Informer<Service>>,
    nodes: Arc<Informer<Node>>,
    pods: Arc<Informer<Pod>>,
    /// Pods by their host ports.
    holders: Index<Pod, Port>,
    /// Ports that nobody may take: those of the host, and of the API itself.
    reserved: Vec<Port>,
}

impl Balancer {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let reserved = RESERVED.into_iter().chain([api.config.advertise.port()]);
        let reserved = reserved.map(|port| ("TCP".to_owned(), i32::from(port))).collect();
        let pods: Arc<Informer<Pod>> = host.informer();
        let holders = pods.index(|pod| host_ports(pod).collect());
        Self { services: host.informer(), nodes: host.informer(), pods, holders, reserved, host }
    }

    /// Who holds one of these ports already: the older Service, the host, or a pod with a host port.
    fn rival(&self, service: &Service) -> Option<String> {
        let wanted = ports(service);
        if let Some((protocol, port)) = wanted.iter().find(|port| self.reserved.contains(port)) {
            return Some(format!("port {port}/{protocol} belongs to the hosts"));
        }
        let age = |service: &Service| {
            (service.creation_timestamp().map(|time| time.0), service.namespace(), service.name_any())
        };
        let older = self.services.list().find(|other| {
            is_ours(other)
                && other.metadata.deletion_timestamp.is_none()
                && age(other) < age(service)
                && ports(other).iter().any(|port| wanted.contains(port))
        });
        if let Some(older) = older {
            let namespace = older.namespace().unwrap_or_default();
            return Some(format!("Service {namespace}/{} has one of its ports", older.name_any()));
        }
        let pod = wanted.iter().find_map(|port| self.holders.get(port).next())?;
        Some(format!(
            "pod {}/{} has one of its ports as a host port",
            pod.namespace().unwrap_or_default(),
            pod.name_any()
        ))
    }

    /// The addresses of the ready nodes in the Service's families, one a node and family.
    fn addresses(&self, service: &Service) -> Vec<String> {
        let families = service.spec.as_ref().and_then(|spec| spec.ip_families.clone()).unwrap_or_default();
        let mut found = Vec::new();
        for node in self.nodes.list().filter(|node| is_balancing(node)) {
            for family in &families {
                let of_family = |type_: &str| address(&node, type_, family);
                found.extend(of_family("ExternalIP").or_else(|| of_family("InternalIP")));
            }
        }
        found.truncate(MAX_ADDRESSES);
        found
    }
}

fn address(node: &Node, type_: &str, family: &str) -> Option<String> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    let fits = |text: &str| text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == (family == "IPv6"));
    addresses.iter().find(|address| address.type_ == type_ && fits(&address.address)).map(|found| found.address.clone())
}

fn is_balancing(node: &Node) -> bool {
    let ready = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = ready.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && !node.labels().contains_key(EXCLUDED) && node.metadata.deletion_timestamp.is_none()
}

fn is_ours(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        spec.type_.as_deref() == Some("LoadBalancer")
            && spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS)
    })
}

fn ports(service: &Service) -> Vec<Port> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports.map(|port| (port.protocol.clone().unwrap_or_else(|| "TCP".into()), port.port)).collect()
}

fn host_ports(pod: &Pod) -> impl Iterator<Item = Port> + '_ {
    let live = !matches!(crate::common::pods::phase(pod), "Succeeded" | "Failed");
    let containers = pod.spec.iter().filter(move |_| live).flat_map(|spec| &spec.containers);
    containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| Some((port.protocol.clone().unwrap_or_else(|| "TCP".into()), port.host_port?)))
        .filter(|(_, port)| *port > 0)
}

impl Controller for Balancer {
    const NAME: &'static str = "service-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        fn all(this: &Balancer, queue: &crate::machine::WorkQueue<Key>) {
            for service in this.services.list().filter(|service| is_ours(service)) {
                queue.add(Key::of(&*service));
            }
        }
        sources.watch(&self.services, |this, delta, queue| {
            if let Some(service) = &delta.new {
                queue.add(Key::of(&**service));
            }
            // What one gives up another may have waited for.
            let before = delta.old.as_ref().filter(|service| is_ours(service)).map(|service| ports(service));
            if before.is_some() && before != delta.new.as_ref().map(|service| ports(service)) {
                all(this, queue);
            }
        });
        let mut seen: BTreeMap<String, (Vec<Option<String>>, bool)> = BTreeMap::new();
        sources.watch(&self.nodes, move |this, delta, queue| {
            let Some(node) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            let view = delta.new.as_ref().map(|node| {
                let of = |type_, family| address(node, type_, family);
                let addresses = ["IPv4", "IPv6"].into_iter().flat_map(|f| [of("ExternalIP", f), of("InternalIP", f)]);
                (addresses.collect::<Vec<_>>(), is_balancing(node))
            });
            let before = match &view {
                Some(view) => seen.insert(node.name_any(), view.clone()),
                None => seen.remove(&node.name_any()),
            };
            if before != view {
                all(this, queue);
            }
        });
        sources.watch(&self.pods, |this, delta, queue| {
            let held = |pod: &Option<Arc<Pod>>| pod.as_ref().is_some_and(|pod| host_ports(pod).next().is_some());
            if held(&delta.old) != held(&delta.new) {
                all(this, queue);
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(service) = self.services.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        let held = service
            .status
            .as_ref()
            .and_then(|status| status.load_balancer.as_ref()?.ingress.clone())
            .unwrap_or_default();
        let was_balanced = service.spec.as_ref().is_some_and(|spec| spec.type_.as_deref() != Some("LoadBalancer"));
        if service.metadata.deletion_timestamp.is_some() || (!is_ours(&service) && !was_balanced) {
            return Ok(Outcome::Done);
        }
        let rival = if was_balanced { None } else { self.rival(&service) };
        let wanted: Vec<_> = if was_balanced || rival.is_some() { Vec::new() } else { self.addresses(&service) };
        let wanted: Vec<_> = wanted
            .into_iter()
            .map(|ip| LoadBalancerIngress {
                ip: Some(ip),
                ip_mode: Some("VIP".into()),
                ..LoadBalancerIngress::default()
            })
            .collect();
        if wanted == held {
            return Ok(Outcome::Done);
        }
        let mut changed = (*service).clone();
        changed.status.get_or_insert_default().load_balancer =
            Some(LoadBalancerStatus { ingress: Some(wanted.clone()).filter(|list| !list.is_empty()) });
        let api: Api<Service> = Api::namespaced(self.host.client.clone(), &key.namespace);
        self.host.replace_status(&api, &changed).await?;
        if let Some(rival) = rival {
            let note = format!("Error syncing load balancer: {rival}");
            self.host.event(&*service, EventType::Warning, "SyncLoadBalancerFailed", "Announce", note).await;
        } else if held.is_empty() {
            let note = "Ensured load balancer".to_owned();
            self.host.event(&*service, EventType::Normal, "EnsuredLoadBalancer", "Announce", note).await;
        }
        Ok(Outcome::Done)
    }
}

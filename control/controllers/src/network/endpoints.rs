//! Endpoints: the older form of what EndpointSlices say, one object a Service (core/v1).

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service, ServicePort,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Api, ResourceExt};

use super::endpoint_slice::{address, named_port, pod_changed};
use super::slices::HEADLESS;
use crate::common::labelled::Labelled;
use crate::common::{pods, selector};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

/// Addresses that one object holds at most; more are cut off, which the annotation says.
const MAX_ADDRESSES: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";
/// Annotation of objects that serve to elect a leader and belong to no Service.
pub(super) const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";

pub(crate) struct EndpointsController {
    host: Host,
    services: Arc<Informer<Service>>,
    pods: Arc<Informer<Pod>>,
    labelled: Arc<Labelled>,
    endpoints: Arc<Informer<Endpoints>>,
}

/// A port as it sorts: name, number, protocol, application protocol.
type Port = (Option<String>, i32, String, Option<String>);
/// What tells addresses apart: address and pod.
type Place = (String, String);
/// Addresses, with whether they are ready.
type Addresses = BTreeMap<Place, (EndpointAddress, bool)>;

impl EndpointsController {
    pub(crate) fn new(api: &Arc<ApiServer>, labelled: &Arc<Labelled>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let (services, pods, endpoints) = (host.informer(), host.informer(), host.informer());
        Self { services, pods, labelled: labelled.clone(), endpoints, host }
    }

    fn subsets(&self, service: &Service) -> Vec<EndpointSubset> {
        let wanted = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        let Some(wanted) = wanted.filter(|selector| !selector.is_empty()) else { return Vec::new() };
        let namespace = service.namespace().unwrap_or_default();
        let pods = self.labelled.select(&namespace, |labels| selector::matches_map(wanted, Some(labels)));
        subsets(service, pods)
    }
}

/// The subsets of a Service: addresses that share their ports stand together.
fn subsets(service: &Service, pods: impl Iterator<Item = impl Deref<Target = Pod>>) -> Vec<EndpointSubset> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let Some(wanted) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else { return Vec::new() };
    let family = spec.ip_families.as_ref().and_then(|families| families.first()).map_or("IPv4", String::as_str);
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let mut by_port: BTreeMap<Option<Port>, Addresses> = BTreeMap::new();
    for pod in pods {
        let pod = &*pod;
        let ended = matches!(pods::phase(pod), "Succeeded" | "Failed");
        let leaves = pod.metadata.deletion_timestamp.is_some() && !publish_all;
        if ended || leaves || !selector::matches_map(wanted, pod.metadata.labels.as_ref()) {
            continue;
        }
        let Some(ip) = address(pod, family) else { continue };
        let entry = (endpoint(service, pod, ip.clone()), publish_all || pods::is_ready(pod));
        let key = (ip, pod.uid().unwrap_or_default());
        let ports = spec.ports.as_deref().unwrap_or_default();
        if ports.is_empty() {
            // Only Services without an address of their own may have no port.
            by_port.entry(None).or_default().insert(key, entry);
        } else {
            for port in ports.iter().filter_map(|port| served(port, pod)) {
                by_port.entry(Some(port)).or_default().insert(key.clone(), entry.clone());
            }
        }
    }
    let mut by_addresses: BTreeMap<Vec<Place>, (Addresses, Vec<Port>)> = BTreeMap::new();
    for (port, addresses) in by_port {
        let slot = by_addresses.entry(addresses.keys().cloned().collect()).or_insert((addresses, Vec::new()));
        slot.1.extend(port);
    }
    by_addresses.into_values().map(|(addresses, ports)| subset(addresses, ports)).collect()
}

fn subset(addresses: Addresses, ports: Vec<Port>) -> EndpointSubset {
    let (ready, unready): (Vec<_>, Vec<_>) = addresses.into_values().partition(|(_, ready)| *ready);
    let some = |list: Vec<(EndpointAddress, bool)>| {
        Some(list.into_iter().map(|(address, _)| address).collect::<Vec<_>>()).filter(|list| !list.is_empty())
    };
    let ports: Vec<_> = ports
        .into_iter()
        .map(|(name, port, protocol, app_protocol)| EndpointPort { name, port, protocol: Some(protocol), app_protocol })
        .collect();
    EndpointSubset {
        addresses: some(ready),
        not_ready_addresses: some(unready),
        ports: Some(ports).filter(|ports| !ports.is_empty()),
    }
}

fn served(port: &ServicePort, pod: &Pod) -> Option<Port> {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => named_port(pod, name, &protocol)?,
    };
    Some((port.name.clone().filter(|name| !name.is_empty()), number, protocol, port.app_protocol.clone()))
}

fn endpoint(service: &Service, pod: &Pod, ip: String) -> EndpointAddress {
    let spec = pod.spec.as_ref();
    let subdomain = spec.and_then(|spec| spec.subdomain.as_ref());
    EndpointAddress {
        ip,
        hostname: spec.and_then(|spec| spec.hostname.clone()).filter(|_| subdomain == Some(&service.name_any())),
        node_name: spec.and_then(|spec| spec.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.namespace(),
            name: Some(pod.name_any()),
            uid: pod.uid(),
            ..ObjectReference::default()
        }),
    }
}

/// Cuts off what one object cannot hold, ready addresses last; whether something was cut.
fn truncate(subsets: &mut Vec<EndpointSubset>) -> bool {
    let mut room = MAX_ADDRESSES;
    let mut cut = false;
    let mut shorten = |list: &mut Option<Vec<EndpointAddress>>| {
        let Some(addresses) = list else { return };
        cut |= addresses.len() > room;
        addresses.truncate(room);
        room -= addresses.len();
        if addresses.is_empty() {
            *list = None;
        }
    };
    subsets.iter_mut().for_each(|subset| shorten(&mut subset.addresses));
    subsets.iter_mut().for_each(|subset| shorten(&mut subset.not_ready_addresses));
    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
    cut
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS);
    if service.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None")) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    labels
}

impl Controller for EndpointsController {
    const NAME: &'static str = "endpoint-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        // What was there before this process began may have lost its Service in the meantime.
        let (me, queue) = (self.clone(), sources.queue.clone());
        sources.spawn(async move {
            me.host.synced().await;
            for endpoints in me.endpoints.list() {
                if !endpoints.annotations().contains_key(LEADER) {
                    queue.add(Key::of(&*endpoints));
                }
            }
        });
        sources.watch(&self.services, own);
        sources.watch(&self.pods, |this, delta, queue| pod_changed(&this.services, delta, queue));
        sources.watch(&self.endpoints, |this, delta, queue| {
            let Some(endpoints) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            let key = Key::of(&**endpoints);
            // Endpoints that somebody makes before their Service are left alone.
            if this.services.get(&key.namespace, &key.name).is_some() {
                queue.add(key);
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let api: Api<Endpoints> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let held = self.endpoints.get(&key.namespace, &key.name);
        let Some(service) = self.services.get(&key.namespace, &key.name) else {
            if let Some(held) = held {
                self.host.delete(&api, &*held).await?;
            }
            return Ok(Outcome::Done);
        };
        let selects = service.spec.as_ref().is_some_and(|spec| {
            spec.selector.as_ref().is_some_and(|selector| !selector.is_empty())
                && spec.type_.as_deref() != Some("ExternalName")
        });
        if !selects || service.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Done);
        }
        let mut subsets = self.subsets(&service);
        let cut = truncate(&mut subsets);
        let mut wanted = held.as_ref().map_or_else(
            || Endpoints {
                metadata: ObjectMeta {
                    name: Some(key.name.to_string()),
                    namespace: Some(key.namespace.to_string()),
                    ..ObjectMeta::default()
                },
                subsets: None,
            },
            |held| (**held).clone(),
        );
        wanted.metadata.labels = Some(labels(&service));
        wanted.subsets = Some(subsets).filter(|subsets| !subsets.is_empty());
        if cut {
            wanted.annotations_mut().insert(OVER_CAPACITY.into(), "truncated".into());
        } else if let Some(annotations) = &mut wanted.metadata.annotations {
            annotations.remove(OVER_CAPACITY);
        }
        match held {
            None => drop(self.host.create(&api, &wanted).await?),
            Some(held) if same(&held, &wanted) => {}
            Some(_) => drop(self.host.replace(&api, &wanted).await?),
        }
        Ok(Outcome::Done)
    }
}

fn same(held: &Endpoints, wanted: &Endpoints) -> bool {
    let flag = |endpoints: &Endpoints| endpoints.annotations().contains_key(OVER_CAPACITY);
    held.subsets.as_deref().unwrap_or_default() == wanted.subsets.as_deref().unwrap_or_default()
        && held.metadata.labels == wanted.metadata.labels
        && flag(held) == flag(wanted)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "s", "namespace": "n"},
            "spec": {"selector": {"app": "a"}, "ports": ports, "ipFamilies": ["IPv4"]},
        }))
        .expect("a service")
    }

    fn pod(number: usize, ready: bool, port: i32) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": format!("p{number}"), "namespace": "n", "uid": format!("u{number}"), "labels": {"app": "a"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": format!("10.0.{}.{}", number / 250, number % 250)}],
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        }))
        .expect("a pod")
    }

    #[test]
    fn pods_with_the_same_ports_share_a_subset() {
        let service = service(json!([
            {"name": "web", "port": 80, "targetPort": "web"}, {"name": "admin", "port": 81, "targetPort": 9000},
        ]));
        let pods = [pod(1, true, 8080), pod(2, false, 8080), pod(3, true, 8081)];
        let found = subsets(&service, pods.iter());
        let view: Vec<_> = found
            .iter()
            .map(|subset| {
                let ips = |list: &Option<Vec<EndpointAddress>>| {
                    list.iter().flatten().map(|a| a.ip.clone()).collect::<Vec<_>>()
                };
                let ports = subset.ports.iter().flatten().map(|port| port.port).collect::<Vec<_>>();
                (ips(&subset.addresses), ips(&subset.not_ready_addresses), ports)
            })
            .collect();
        let text = |ips: &[&str]| ips.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            view,
            [
                (text(&["10.0.0.1"]), text(&["10.0.0.2"]), vec![8080]),
                (text(&["10.0.0.1", "10.0.0.3"]), text(&["10.0.0.2"]), vec![9000]),
                (text(&["10.0.0.3"]), text(&[]), vec![8081]),
            ]
        );
    }

    #[test]
    fn more_than_a_thousand_addresses_are_cut_and_ready_ones_stay() {
        let service = service(json!([{"port": 80}]));
        let pods: Vec<_> = (0..1200).map(|number| pod(number, number >= 300, 80)).collect();
        let mut found = subsets(&service, pods.iter());
        assert!(truncate(&mut found));
        let count = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
        assert_eq!((count(&found[0].addresses), count(&found[0].not_ready_addresses)), (900, 100));
        assert!(!truncate(&mut found));
    }
}

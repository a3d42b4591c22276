//! EndpointSlice mirroring: Endpoints that users write for a Service without a selector, as slices (KEP-0752).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::endpoints::LEADER;
use super::slices::{self, Group, MANAGED_BY, SERVICE_NAME};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, controller_reference, own};

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
/// Label of Endpoints that are not mirrored.
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Annotation of kubectl that is about the other object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Addresses of a subset that are mirrored (`--mirroring-max-endpoints-per-subset`).
const MAX_ADDRESSES: usize = 1000;

pub(crate) struct Mirror {
    host: Host,
    services: Arc<Informer<Service>>,
    endpoints: Arc<Informer<Endpoints>>,
    slices: Arc<Informer<EndpointSlice>>,
}

impl Mirror {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { services: host.informer(), endpoints: host.informer(), slices: host.informer(), host }
    }

    /// The Endpoints of this name, if they are to be mirrored.
    fn mirrored(&self, key: &Key) -> Option<Arc<Endpoints>> {
        let service = self.services.get(&key.namespace, &key.name)?;
        let selects = service.spec.as_ref()?.selector.as_ref().is_some_and(|selector| !selector.is_empty());
        let endpoints = self.endpoints.get(&key.namespace, &key.name)?;
        let skipped = endpoints.labels().get(SKIP).is_some_and(|value| value == "true")
            || endpoints.annotations().contains_key(LEADER);
        (!selects && !skipped && endpoints.metadata.deletion_timestamp.is_none()).then_some(endpoints)
    }
}

fn wanted(subsets: &[EndpointSubset]) -> BTreeMap<Group, Vec<Endpoint>> {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for subset in subsets {
        let ports: Vec<_> = subset
            .ports
            .iter()
            .flatten()
            .map(|port| {
                let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
                (port.name.clone().unwrap_or_default(), port.port, protocol, port.app_protocol.clone())
            })
            .collect();
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        for (address, ready) in ready.chain(unready).take(MAX_ADDRESSES) {
            let address_type = match address.ip.parse() {
                Ok(IpAddr::V4(_)) => "IPv4",
                Ok(IpAddr::V6(_)) => "IPv6",
                Err(_) => continue,
            };
            groups.entry(Group { address_type, ports: ports.clone() }).or_default().push(endpoint(address, ready));
        }
    }
    groups
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn model(endpoints: &Endpoints) -> EndpointSlice {
    let mut labels = endpoints.labels().clone();
    labels.insert(SERVICE_NAME.into(), endpoints.name_any());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    let mut annotations = endpoints.annotations().clone();
    annotations.remove(LAST_APPLIED);
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", endpoints.name_any())),
            namespace: endpoints.namespace(),
            labels: Some(labels),
            annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
            owner_references: Some(vec![controller_reference(endpoints)]),
            ..ObjectMeta::default()
        },
        ..EndpointSlice::default()
    }
}

impl Controller for Mirror {
    const NAME: &'static str = "endpointslicemirroring-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.services, own);
        sources.watch(&self.endpoints, own);
        sources.watch(&self.slices, |_, delta, queue| slices::changed(delta, MANAGER, queue));
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let existing: Vec<_> = self
            .slices
            .list_ns(&key.namespace)
            .filter(|slice| {
                slices::is_managed(slice, MANAGER)
                    && slice.labels().get(SERVICE_NAME).is_some_and(|of| **of == *key.name)
            })
            .collect();
        let (model, wanted) = match self.mirrored(key) {
            Some(endpoints) => (model(&endpoints), wanted(endpoints.subsets.as_deref().unwrap_or_default())),
            None if existing.is_empty() => return Ok(Outcome::Done),
            None => {
                let metadata = ObjectMeta { namespace: Some(key.namespace.to_string()), ..ObjectMeta::default() };
                (EndpointSlice { metadata, ..EndpointSlice::default() }, BTreeMap::new())
            }
        };
        slices::apply(&self.host, &model, existing, wanted).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_and_ports_make_groups() {
        let subsets: Vec<EndpointSubset> = serde_json::from_value(serde_json::json!([
            {"addresses": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}], "notReadyAddresses": [{"ip": "192.0.2.2"}], "ports": [{"port": 80}]},
            {"addresses": [{"ip": "192.0.2.1"}], "ports": [{"port": 81}]},
        ]))
        .expect("subsets");
        let groups = wanted(&subsets);
        let sizes: Vec<_> = groups.iter().map(|(group, endpoints)| (group.address_type, endpoints.len())).collect();
        assert_eq!(sizes, [("IPv4", 2), ("IPv4", 1), ("IPv6", 1)]);
        let unready = &groups.values().next().expect("a group")[1];
        assert_eq!(unready.conditions.as_ref().and_then(|conditions| conditions.ready), Some(false));
    }
}

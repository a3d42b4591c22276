//! Ranges of Service addresses: each is ready once it is known, and goes only when no address of it is in use any more;
//! addresses whose Service is gone are given back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};

use crate::common::pods;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const MANAGER_LABEL: &str = "ipaddress.kubernetes.io/managed-by";
const MANAGER: &str = "ipallocator.k8s.io";
/// Time that an address may be without its Service: one that is being made has its address first.
const GRACE: SignedDuration = SignedDuration::from_secs(60);
/// Marks the keys of addresses beside those of ranges.
const ADDRESS: &str = "address:";

pub(crate) struct ServiceCidrs {
    host: Host,
    ranges: Arc<Informer<ServiceCIDR>>,
    addresses: Arc<Informer<IPAddress>>,
    services: Arc<Informer<Service>>,
}

/// Whether an address is in a range such as `10.43.0.0/16`.
fn contains(range: &str, address: IpAddr) -> bool {
    let Some((base, prefix)) = range.split_once('/') else { return false };
    let (Ok(base), Ok(prefix)) = (base.parse::<IpAddr>(), prefix.parse::<u32>()) else { return false };
    let shifted = |bits: u128, width: u32| bits.checked_shr(width.saturating_sub(prefix)).unwrap_or_default();
    match (base, address) {
        (IpAddr::V4(base), IpAddr::V4(address)) => {
            shifted(u32::from(base).into(), 32) == shifted(u32::from(address).into(), 32)
        }
        (IpAddr::V6(base), IpAddr::V6(address)) => shifted(base.into(), 128) == shifted(address.into(), 128),
        _ => false,
    }
}

fn holds(range: &ServiceCIDR, address: IpAddr) -> bool {
    range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten()).any(|cidr| contains(cidr, address))
}

impl ServiceCidrs {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { ranges: host.informer(), addresses: host.informer(), services: host.informer(), host }
    }

    /// Whether an address that is in use is in this range and in no other.
    fn is_needed(&self, range: &ServiceCIDR) -> bool {
        let others = self
            .ranges
            .list()
            .filter(|other| other.metadata.name != range.metadata.name && other.metadata.deletion_timestamp.is_none());
        let others: Vec<_> = others.collect();
        self.addresses
            .list()
            .filter_map(|address| address.name_any().parse().ok())
            .any(|address| holds(range, address) && !others.iter().any(|other| holds(other, address)))
    }

    async fn range(&self, range: &ServiceCIDR) -> Result<Outcome, Error> {
        let api: Api<ServiceCIDR> = Api::all(self.host.client.clone());
        let held = range.finalizers().iter().any(|name| name == FINALIZER);
        if range.metadata.deletion_timestamp.is_none() {
            if !held {
                let mut finalizers = range.finalizers().to_vec();
                finalizers.push(FINALIZER.into());
                self.finalizers(&api, range, &finalizers).await?;
                return Ok(Outcome::Done);
            }
            self.ready(&api, range, true, "", "Kubernetes Service CIDR is ready").await?;
            return Ok(Outcome::Done);
        }
        if !held {
            return Ok(Outcome::Done);
        }
        if self.is_needed(range) {
            let message = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
            self.ready(&api, range, false, "Terminating", message).await?;
            return Ok(Outcome::Done);
        }
        let left: Vec<_> = range.finalizers().iter().filter(|name| *name != FINALIZER).cloned().collect();
        self.finalizers(&api, range, &left).await?;
        Ok(Outcome::Done)
    }

    async fn finalizers(&self, api: &Api<ServiceCIDR>, range: &ServiceCIDR, all: &[String]) -> Result<(), Error> {
        let patch = serde_json::json!({"metadata": {"resourceVersion": range.resource_version(), "finalizers": all}});
        self.host.patch(api, &range.name_any(), patch).await?;
        Ok(())
    }

    async fn ready(
        &self,
        api: &Api<ServiceCIDR>,
        range: &ServiceCIDR,
        ready: bool,
        reason: &str,
        message: &str,
    ) -> Result<(), Error> {
        let status = if ready { "True" } else { "False" };
        let mut conditions = range.status.clone().unwrap_or_default().conditions.unwrap_or_default();
        if conditions.iter().any(|held| held.type_ == "Ready" && held.status == status) {
            return Ok(());
        }
        conditions.retain(|held| held.type_ != "Ready");
        conditions.push(Condition {
            type_: "Ready".into(),
            status: status.into(),
            reason: reason.into(),
            message: message.into(),
            last_transition_time: pods::now(),
            observed_generation: None,
        });
        let patch = serde_json::json!({"status": {"conditions": conditions}});
        self.host.patch_status(api, &range.name_any(), patch).await?;
        Ok(())
    }

    /// Gives back an address whose Service is gone.
    async fn address(&self, address: &IPAddress) -> Result<Outcome, Error> {
        let parent = &address.spec.parent_ref;
        if address.labels().get(MANAGER_LABEL).is_none_or(|by| by != MANAGER) || parent.resource != "services" {
            return Ok(Outcome::Done);
        }
        let namespace = parent.namespace.clone().unwrap_or_default();
        let name = address.name_any();
        let ip: Option<IpAddr> = name.parse().ok();
        let uses = |service: &Service| {
            let spec = service.spec.clone().unwrap_or_default();
            // A Service keeps the address as it was written; the object's name is its one usual form.
            spec.cluster_ips
                .iter()
                .flatten()
                .chain(&spec.cluster_ip)
                .any(|text| ip.is_some() && text.parse().ok() == ip)
        };
        if self.services.get(&namespace, &parent.name).is_some_and(|service| uses(&service)) {
            return Ok(Outcome::Done);
        }
        let age = address.creation_timestamp().map_or(GRACE, |made| Timestamp::now().duration_since(made.0));
        if age < GRACE {
            return Ok(Outcome::After(Duration::try_from(GRACE - age).unwrap_or_default()));
        }
        let services: Api<Service> = Api::namespaced(self.host.client.clone(), &namespace);
        let found = services.get_opt(&parent.name).await.map_err(Error::at("look for the Service"))?;
        if !found.is_some_and(|service| uses(&service)) {
            self.host.delete(&Api::<IPAddress>::all(self.host.client.clone()), address).await?;
        }
        Ok(Outcome::Done)
    }
}

impl Controller for ServiceCidrs {
    const NAME: &'static str = "service-cidrs-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.ranges, |this, _, queue| {
            // What one range covers another may be rid of.
            this.ranges.list().for_each(|range| queue.add(Key::of(&*range)));
        });
        sources.watch(&self.addresses, |this, delta, queue| {
            if let Some(address) = &delta.new {
                queue.add(Key::new("", &format!("{ADDRESS}{}", address.name_any())));
            }
            if delta.new.is_none() {
                for range in this.ranges.list().filter(|range| range.metadata.deletion_timestamp.is_some()) {
                    queue.add(Key::of(&*range));
                }
            }
        });
        sources.watch(&self.services, |_, delta, queue| {
            let addresses = |service: &Option<Arc<Service>>| {
                service.as_ref().and_then(|service| service.spec.as_ref()?.cluster_ips.clone()).unwrap_or_default()
            };
            let now = addresses(&delta.new);
            for gone in addresses(&delta.old).iter().filter(|address| !now.contains(address)) {
                queue.add(Key::new("", &format!("{ADDRESS}{gone}")));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        match key.name.strip_prefix(ADDRESS) {
            Some(name) => match self.addresses.get("", name) {
                Some(address) => self.address(&address).await,
                None => Ok(Outcome::Done),
            },
            None => match self.ranges.get("", &key.name) {
                Some(range) => self.range(&range).await,
                None => Ok(Outcome::Done),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_their_addresses() {
        let is_in = |range: &str, address: &str| contains(range, address.parse().expect("an address"));
        assert!(is_in("10.43.0.0/16", "10.43.255.1") && !is_in("10.43.0.0/16", "10.44.0.1"));
        assert!(is_in("fd00::/112", "fd00::1") && !is_in("fd00::/112", "fd00::1:1"));
        assert!(is_in("0.0.0.0/0", "10.0.0.1") && !is_in("0.0.0.0/0", "::1"));
        assert!(is_in("10.0.0.1/32", "10.0.0.1") && !is_in("10.0.0.1/32", "10.0.0.2"));
    }
}

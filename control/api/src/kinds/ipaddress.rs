//! `IPAddress` objects: one for each cluster address of a service, named after the address. Who makes it has the address.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::json;

use crate::bootstrap;
use crate::server::ApiServer;
use crate::status::Status;

const GROUP: &str = "networking.k8s.io";
const RESOURCE: &str = "ipaddresses";

/// Makes the object of an address; `false` where there is one already.
pub async fn claim(api: &Arc<ApiServer>, ip: IpAddr, namespace: &str, service: &str) -> Result<bool, Status> {
    let object = object(ip, namespace, service);
    bootstrap::create(api.store.as_ref(), GROUP, RESOURCE, object).await
}

/// The object of a service's address.
pub fn object(ip: IpAddr, namespace: &str, service: &str) -> serde_json::Value {
    let family = if ip.is_ipv6() { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": format!("{GROUP}/v1"),
        "kind": "IPAddress",
        "metadata": {"name": ip.to_string(), "labels": {
            "ipaddress.kubernetes.io/ip-family": family,
            "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
        }},
        "spec": {"parentRef": {"resource": "services", "namespace": namespace, "name": service}},
    })
}

/// Whether nobody has an address.
pub async fn is_free(api: &Arc<ApiServer>, ip: IpAddr) -> Result<bool, Status> {
    let Some(kind) = api.kind(GROUP, "v1", RESOURCE) else { return Ok(true) };
    Ok(api.store.get(&kind.key("", &ip.to_string())).await?.is_none())
}

/// All addresses that somebody has.
pub async fn all(api: &Arc<ApiServer>) -> Result<HashSet<IpAddr>, Status> {
    let Some(kind) = api.kind(GROUP, "v1", RESOURCE) else { return Ok(HashSet::new()) };
    let objects = api.list(&kind, "").await?;
    Ok(objects.iter().filter_map(|object| crate::object::name(object).parse().ok()).collect())
}

/// Takes the object away; one that is gone already is as good. What stays behind when the store fails is given back by the
/// controller of these objects.
pub async fn remove(api: &Arc<ApiServer>, ip: IpAddr) {
    if let Err(error) = bootstrap::delete(api.store.as_ref(), GROUP, RESOURCE, "", &ip.to_string()).await {
        tracing::warn!(%ip, %error, "could not withdraw the address of a service");
    }
}

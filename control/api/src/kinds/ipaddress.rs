//! `IPAddress` objects: one for each cluster address of a service, named after the address.

use std::sync::Arc;

use serde_json::json;

use crate::bootstrap;
use crate::server::ApiServer;

const GROUP: &str = "networking.k8s.io";
const RESOURCE: &str = "ipaddresses";

/// Makes the object; one that is there already is as good.
pub async fn publish(api: &Arc<ApiServer>, ip: &str, namespace: &str, service: &str) {
    let family = if ip.contains(':') { "IPv6" } else { "IPv4" };
    let object = json!({
        "apiVersion": format!("{GROUP}/v1"),
        "kind": "IPAddress",
        "metadata": {"name": ip, "labels": {
            "ipaddress.kubernetes.io/ip-family": family,
            "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
        }},
        "spec": {"parentRef": {"resource": "services", "namespace": namespace, "name": service}},
    });
    if let Err(error) = bootstrap::create(api.store.as_ref(), GROUP, RESOURCE, object).await {
        tracing::warn!(%ip, %error, "could not publish the address of a service");
    }
}

/// Takes the object away; one that is gone already is as good.
pub async fn remove(api: &Arc<ApiServer>, ip: &str) {
    if let Err(error) = bootstrap::delete(api.store.as_ref(), GROUP, RESOURCE, "", ip).await {
        tracing::warn!(%ip, %error, "could not withdraw the address of a service");
    }
}

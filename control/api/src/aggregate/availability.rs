//! Whether the service behind a group version can be asked: the condition `Available` of an APIService.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::backend::{Backend, remote_user};
use super::documents::{self, Documents};
use crate::object;
use crate::outbound;
use crate::server::ApiServer;
use crate::user::UserInfo;

/// Time for a service to answer a check.
const PATIENCE: Duration = Duration::from_secs(5);

/// Status, reason and message of the condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Condition {
    pub(super) fn unknown() -> Self {
        Self { status: "Unknown", reason: "NotChecked", message: String::new() }
    }

    fn passed() -> Self {
        Self { status: "True", reason: "Passed", message: "all checks passed".into() }
    }

    fn failed(reason: &'static str, message: String) -> Self {
        Self { status: "False", reason, message }
    }

    pub(crate) fn is_available(&self) -> bool {
        self.status == "True"
    }

    pub(super) fn value(&self) -> Value {
        json!({"type": "Available", "status": self.status, "reason": self.reason, "message": self.message})
    }
}

/// Looks at the service, its endpoints, and asks it for what it serves.
pub(super) async fn check(api: &Arc<ApiServer>, backend: &Backend) -> (Condition, Option<Documents>) {
    if let Some(failed) = missing(api, backend).await {
        return (failed, None);
    }
    let path = format!("/apis/{}/{}", backend.group, backend.version);
    let mut url = path.clone();
    let asked = async {
        let endpoint = backend.endpoint(api, &path).await.map_err(|status| status.message)?;
        url = format!("https://{}:{}{path}", endpoint.address, endpoint.port);
        let own = UserInfo::new("system:kube-aggregator", &[crate::user::SYSTEM_MASTERS]);
        let headers = remote_user(&own);
        let list = outbound::fetch_json(api, &endpoint, &headers).await?;
        Ok::<_, String>((endpoint, headers, list))
    };
    match tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err("no answer in time".into())) {
        Ok((mut endpoint, headers, list)) => {
            // Documents are a courtesy to clients: a service without them is served all the same.
            let documents = documents::fetch(api, &mut endpoint, &headers, backend, &list);
            let documents = tokio::time::timeout(PATIENCE, documents).await;
            (Condition::passed(), documents.ok())
        }
        Err(why) => {
            let message = format!("failing or missing response from {url}: {why}");
            (Condition::failed("FailedDiscoveryCheck", message), None)
        }
    }
}

/// What is lacking before the service can be asked at all.
async fn missing(api: &Arc<ApiServer>, backend: &Backend) -> Option<Condition> {
    let (namespace, name) = &backend.service;
    let services = api.kind("", "v1", "services")?;
    let service = match api.get(&services, namespace, name).await {
        Ok(Some(service)) => service,
        Ok(None) => {
            return Some(Condition::failed(
                "ServiceNotFound",
                format!("service/{name} in {namespace:?} is not present"),
            ));
        }
        Err(error) => {
            let message = format!("service/{name} in {namespace:?} cannot be checked due to: {}", error.message);
            return Some(Condition::failed("ServiceAccessError", message));
        }
    };
    if object::text(&service, "/spec/type") == "ExternalName" {
        return None;
    }
    let port = backend.port;
    let Some(found) = service["spec"]["ports"].as_array().into_iter().flatten().find(|p| p["port"] == port) else {
        let message = format!("service/{name} in {namespace:?} is not listening on port {port}");
        return Some(Condition::failed("ServicePortError", message));
    };
    let port_name = object::text(found, "/name");
    crate::proxy::endpoint(api, namespace, name, &port.to_string()).await.err().map(|_| {
        let message =
            format!("endpoints for service/{name} in {namespace:?} have no addresses with port name {port_name:?}");
        Condition::failed("MissingEndpoints", message)
    })
}

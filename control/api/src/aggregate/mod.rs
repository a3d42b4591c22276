//! Aggregated APIs: group versions that an APIService hands to a service in the cluster.
//!
//! Requests for them go on to the service, with the user in `X-Remote-*` headers that the front-proxy certificate vouches for.
//! Source: `k8s.io/kube-aggregator`.

mod availability;
mod backend;
mod documents;
mod follow;
mod local;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use serde_json::{Value, json};

use crate::http::{ReqBody, Response, Route, text_response};
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

pub(crate) use backend::Backend;
pub(crate) use documents::{merge_v2, v3_urls};
pub(crate) use follow::start;

/// The group versions that somebody else serves, as they were last checked.
#[derive(Default)]
pub(crate) struct Aggregated {
    backends: RwLock<Arc<Vec<Arc<Backend>>>>,
    generation: AtomicU64,
}

impl Aggregated {
    /// All of them, the groups of highest priority first.
    pub(crate) fn all(&self) -> Arc<Vec<Arc<Backend>>> {
        self.backends.read().clone()
    }

    fn replace(&self, all: Vec<Arc<Backend>>) {
        let mut backends = self.backends.write();
        if **backends != all {
            *backends = Arc::new(all);
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The service of a group version, `None` when this server answers itself.
pub(crate) fn target(api: &ApiServer, group: &str, version: &str) -> Option<Arc<Backend>> {
    let all = api.aggregated.backends.read();
    all.iter().find(|one| one.group == group && one.version == version).cloned()
}

/// The service behind the path of a discovery or OpenAPI document.
pub(crate) fn document_target(api: &ApiServer, route: &Route) -> Option<Arc<Backend>> {
    let path = route.path.trim_end_matches('/');
    let path = path.strip_prefix("/openapi/v3").unwrap_or(path);
    let (group, version) = path.strip_prefix("/apis/")?.split_once('/')?;
    target(api, group, version)
}

/// Raised by every change of what is aggregated.
pub(crate) fn generation(api: &ApiServer) -> u64 {
    api.aggregated.generation.load(Ordering::Relaxed)
}

/// Aggregated group versions.
pub(crate) fn groups(api: &ApiServer) -> Vec<(String, String)> {
    api.aggregated.all().iter().map(|one| (one.group.clone(), one.version.clone())).collect()
}

/// `APIGroupDiscovery` of each aggregated group, as its service last gave it.
pub(crate) fn discovered(api: &ApiServer) -> Vec<Value> {
    let mut groups: Vec<(String, Vec<Value>)> = Vec::new();
    for one in api.aggregated.all().iter() {
        let freshness = if one.condition.is_available() { "Current" } else { "Stale" };
        let version = json!({"version": one.version, "freshness": freshness, "resources": one.documents.resources});
        match groups.iter_mut().find(|(group, _)| *group == one.group) {
            Some((_, versions)) => versions.push(version),
            None => groups.push((one.group.clone(), vec![version])),
        }
    }
    groups
        .into_iter()
        .map(|(group, versions)| json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions}))
        .collect()
}

/// Passes a request on.
pub(crate) async fn pass_on(
    api: &Arc<ApiServer>,
    user: &UserInfo,
    backend: &Backend,
    parts: http::request::Parts,
    body: ReqBody,
) -> Result<Response, Status> {
    if !backend.condition.is_available() {
        return Ok(text_response(503, "service unavailable\n"));
    }
    backend.forward(api, user, parts, body).await
}

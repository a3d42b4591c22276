//! Aggregated APIs: group versions that an APIService hands to a service in the cluster.

use std::sync::Arc;

use serde_json::Value;

use crate::http::{ReqBody, Response};
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// The service behind a group version.
pub(crate) struct Target;

/// The service of a group version, `None` when this server answers itself.
pub(crate) fn target(_api: &ApiServer, _group: &str, _version: &str) -> Option<Target> {
    None
}

/// Raised by every change of what is aggregated.
pub(crate) fn generation(_api: &ApiServer) -> u64 {
    0
}

/// Aggregated group versions.
pub(crate) fn groups(_api: &ApiServer) -> Vec<(String, String)> {
    Vec::new()
}

/// Discovery of aggregated groups, as they last gave it.
pub(crate) fn discovered(_api: &ApiServer) -> Vec<Value> {
    Vec::new()
}

/// Passes a request on.
pub(crate) async fn pass_on(
    _api: &Arc<ApiServer>,
    _user: &UserInfo,
    _target: &Target,
    _parts: http::request::Parts,
    _body: ReqBody,
) -> Result<Response, Status> {
    Err(Status::unavailable("service unavailable"))
}

/// Resources of an aggregated group version.
pub(crate) async fn discovery(
    _api: &Arc<ApiServer>,
    _target: &Target,
    _group: &str,
    _version: &str,
) -> Result<Response, Status> {
    Err(Status::unavailable("service unavailable"))
}

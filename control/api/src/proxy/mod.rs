//! Requests that go on to a kubelet, a pod or a service: log, exec, attach, portforward, proxy.

use std::sync::Arc;

use crate::http::{Query, ReqBody, ResourceRoute, Response};
use crate::kinds::Kind;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// Whether a subresource is passed on.
pub(crate) fn is_streaming(kind: &Kind, subresource: &str) -> bool {
    kind.group.is_empty()
        && match kind.resource.as_str() {
            "pods" => matches!(subresource, "log" | "exec" | "attach" | "portforward" | "proxy"),
            "nodes" | "services" => subresource == "proxy",
            _ => false,
        }
}

/// Passes a request on.
pub(crate) async fn connect(
    _api: &Arc<ApiServer>,
    _user: Arc<UserInfo>,
    _kind: Arc<Kind>,
    _route: ResourceRoute,
    _parts: http::request::Parts,
    _query: Query,
    _body: ReqBody,
) -> Result<Response, Status> {
    Err(Status::unavailable("no connection to the node"))
}

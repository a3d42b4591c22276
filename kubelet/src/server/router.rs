//! Paths and handlers, behind authentication and authorisation.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use http::{StatusCode, header};

use super::auth::{Identity, Tokens};
use super::authorize::{Authorizer, subresources, verb};
use super::state::NodeState;
use super::stats::Gatherer;
use super::{containers, metrics, node_logs, pods, sessions, stats};

/// What handlers share.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) state: Arc<dyn NodeState>,
    pub(super) usage: Gatherer,
    /// `/var/log`
    pub(super) log_folder: PathBuf,
    pub(super) tokens: Tokens,
    pub(super) authorizer: Authorizer,
}

/// All paths.
pub(super) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/healthz/ping", get(|| async { "ok" }))
        .route("/pods", get(pods::pods))
        .route("/pods/", get(pods::pods))
        .route("/runningpods/", get(pods::running))
        .route("/configz", get(pods::configz))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(containers::container_logs))
        .route("/exec/{namespace}/{pod}/{container}", any(sessions::exec))
        .route("/exec/{namespace}/{pod}/{uid}/{container}", any(sessions::exec))
        .route("/attach/{namespace}/{pod}/{container}", any(sessions::attach))
        .route("/attach/{namespace}/{pod}/{uid}/{container}", any(sessions::attach))
        .route("/run/{namespace}/{pod}/{container}", any(sessions::run))
        .route("/portForward/{namespace}/{pod}", any(sessions::port_forward))
        .route("/portForward/{namespace}/{pod}/{uid}", any(sessions::port_forward))
        .route("/stats/summary", get(stats::summary))
        .route("/metrics", get(metrics::own))
        .route("/metrics/resource", get(metrics::resource))
        .route("/metrics/cadvisor", get(metrics::cadvisor))
        .route("/metrics/probes", get(metrics::probes))
        .route("/logs", get(node_logs::root))
        .route("/logs/", get(node_logs::root))
        .route("/logs/{*path}", get(node_logs::file))
        .layer(middleware::from_fn_with_state(node.clone(), admit))
        .with_state(node)
}

/// Who asks, as the connection knows it: a verified certificate, or somebody in this process who is trusted.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    Anonymous,
    Certificate(Identity),
    /// The API server in the same process, which has authorised the request already.
    Trusted,
}

async fn admit(State(node): State<Arc<Node>>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or(Peer::Anonymous);
    let identity = match peer {
        Peer::Trusted => return next.run(request).await,
        Peer::Certificate(identity) => identity,
        Peer::Anonymous => {
            let token = request
                .headers()
                .get(header::AUTHORIZATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|value| value.split_once(' '))
                .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                .map(|(_, token)| token.trim().to_owned());
            let Some(token) = token else { return (StatusCode::UNAUTHORIZED, "Unauthorized\n").into_response() };
            match node.tokens.review(&token).await {
                Ok(Some(identity)) => identity,
                Ok(None) => return (StatusCode::UNAUTHORIZED, "Unauthorized\n").into_response(),
                Err(error) => {
                    tracing::warn!(%error, "cannot review a token");
                    return (StatusCode::UNAUTHORIZED, "Unauthorized\n").into_response();
                }
            }
        }
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match node.authorizer.allows(&identity, &method, &path).await {
        Ok(true) => next.run(request).await,
        Ok(false) => {
            let what = subresources(&path).first().copied().unwrap_or("proxy");
            let message = format!(
                "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{what}])\n",
                identity.username,
                verb(&method)
            );
            (StatusCode::FORBIDDEN, message).into_response()
        }
        Err(error) => {
            let message = format!("Authorization error (user={}): {error}\n", identity.username);
            (StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
        }
    }
}

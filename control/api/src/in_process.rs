//! The request path as a service inside the process: no socket, no TLS, one user.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::header::UPGRADE;
use hyper_util::rt::TokioIo;

use crate::http::{BoxError, ReqBody, ResBody};
use crate::server::{ApiServer, Caller};
use crate::user::UserInfo;

/// Bytes that an upgraded in-process connection buffers in each direction.
const PIPE_BYTES: usize = 64 << 10;

/// Answers requests as one user.
#[derive(Clone)]
pub struct Service {
    api: Arc<ApiServer>,
    user: Arc<UserInfo>,
}

impl Service {
    pub(crate) fn new(api: Arc<ApiServer>, user: Arc<UserInfo>) -> Self {
        Self { api, user }
    }
}

impl tower::Service<http::Request<kube::client::Body>> for Service {
    type Response = http::Response<ResBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<kube::client::Body>) -> Self::Future {
        let (api, caller) = (self.api.clone(), Caller::Local(self.user.clone()));
        if request.headers().contains_key(UPGRADE) {
            return Box::pin(upgraded(api, caller, request));
        }
        Box::pin(async move { Ok(api.respond(caller, request.map(ReqBody::Client)).await) })
    }
}

/// Requests that take the connection over (exec, port-forward) get one: a pipe in memory with HTTP/1.1 at both ends.
async fn upgraded(
    api: Arc<ApiServer>,
    caller: Caller,
    request: http::Request<kube::client::Body>,
) -> Result<http::Response<ResBody>, BoxError> {
    use http_body_util::BodyExt as _;
    let (client, server) = tokio::io::duplex(PIPE_BYTES);
    let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let (api, caller) = (api.clone(), caller.clone());
        async move { Ok::<_, Infallible>(api.respond(caller, request.map(ReqBody::Incoming)).await) }
    });
    tokio::spawn(async move {
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "in-process connection");
        }
    });
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "in-process connection");
        }
    });
    let response = sender.send_request(request).await?;
    Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
}

//! How the API server reaches a node's kubelet.

use std::sync::Arc;

use async_trait::async_trait;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::http::{Response, empty};
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// Where a node that this server cannot connect to opens a connection on which the server asks.
pub const TUNNEL_PATH: &str = "/coracle/v1/tunnel";
/// What is spoken on that connection: HTTP/2 with the server as client, CONNECT to reach an address of the node.
pub const TUNNEL_PROTOCOL: &str = "coracle-tunnel";

/// A byte stream to a kubelet, TLS already done.
pub trait NodeStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> NodeStream for T {}

/// Opens connections to kubelets for logs, exec, attach, port-forward and proxy. HTTP/1.1 is spoken on the stream.
#[async_trait]
pub trait NodeConnector: Send + Sync + 'static {
    /// A fresh connection to the kubelet of `node`.
    async fn connect(&self, node: &str) -> Result<Box<dyn NodeStream>, Status>;

    /// A fresh TCP connection to an address inside the cluster (pod and service proxies, webhooks, aggregated APIs).
    async fn dial(&self, host: &str, port: u16) -> Result<Box<dyn NodeStream>, Status> {
        let stream = tokio::net::TcpStream::connect((host, port))
            .await
            .map_err(|error| Status::unavailable(format!("dial tcp {host}:{port}: {error}")))?;
        Ok(Box::new(stream))
    }

    /// Takes a connection that a node opened at [`TUNNEL_PATH`]. Whoever has no use for it closes it.
    fn accept(&self, _node: String, _stream: Box<dyn NodeStream>) {}
}

/// Answers a node at [`TUNNEL_PATH`] and hands the connection over.
pub(crate) fn open_tunnel(
    api: &Arc<ApiServer>,
    user: &UserInfo,
    parts: http::request::Parts,
) -> Result<Response, Status> {
    let node =
        crate::authz::node::node_of(user).ok_or_else(|| Status::bad_request("only nodes open tunnels"))?.to_owned();
    if parts.headers.get(UPGRADE).map(HeaderValue::as_bytes) != Some(TUNNEL_PROTOCOL.as_bytes()) {
        return Err(Status::bad_request(format!("upgrade to {TUNNEL_PROTOCOL} is required")));
    }
    let taken = hyper::upgrade::on(http::Request::from_parts(parts, ()));
    let nodes = api.config.nodes.clone();
    tokio::spawn(async move {
        match taken.await {
            Ok(stream) => nodes.accept(node, Box::new(TokioIo::new(stream))),
            Err(error) => tracing::debug!(%node, %error, "a tunnel is not opened"),
        }
    });
    let mut response = http::Response::new(empty());
    *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(TUNNEL_PROTOCOL));
    Ok(response)
}

//! How the API server reaches a node's kubelet.

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::status::Status;

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
}

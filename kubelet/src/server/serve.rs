//! The listener: connections, TLS, and the router behind them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use kube::Client;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::auth::{Tokens, of_certificate};
use super::authorize::Authorizer;
use super::router::{Node, Peer, router};
use super::state::NodeState;
use super::stats::Gatherer;
use super::tls;
use crate::certificates::NodeCertificate;

/// Connections at once; exec and port-forward sessions included.
const MAX_CONNECTIONS: usize = 4096;
/// For the TLS handshake and for a request's headers.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the server is told.
#[derive(Clone)]
pub struct ServerConfig {
    /// `metadata.name` of the Node.
    pub node_name: String,
    /// Serving certificate and key.
    pub certificate: Arc<NodeCertificate>,
    /// CA of client certificates, PEM.
    pub client_ca: Option<Vec<u8>>,
    /// Folder shown at `/logs/`: `/var/log`.
    pub log_folder: PathBuf,
}

/// The node's HTTPS API.
#[derive(Clone)]
pub struct NodeServer {
    router: Router,
    tls: TlsAcceptor,
    connections: Arc<Semaphore>,
}

impl NodeServer {
    /// A server for the node behind `state`; tokens and permissions are asked of the API through `client`.
    ///
    /// # Errors
    /// When the CA is malformed.
    pub fn new(config: ServerConfig, client: Client, state: Arc<dyn NodeState>) -> io::Result<Self> {
        let tls = tls::config(config.certificate, config.client_ca.as_deref()).map_err(io::Error::other)?;
        let node = Arc::new(Node {
            name: config.node_name.clone(),
            state,
            usage: Gatherer::default(),
            log_folder: config.log_folder,
            tokens: Tokens::new(client.clone()),
            authorizer: Authorizer::new(client, config.node_name),
        });
        Ok(Self {
            router: router(node),
            tls: TlsAcceptor::from(Arc::new(tls)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        })
    }

    /// Serves connections until dropped.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return Ok(()) };
            let (socket, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                // The client was gone before we looked.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let server = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                if let Err(error) = socket.set_nodelay(true) {
                    tracing::debug!(%error, "cannot set TCP_NODELAY");
                }
                let stream = match tokio::time::timeout(PATIENCE, server.tls.accept(socket)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return tracing::debug!(%from, %error, "TLS handshake failed"),
                    Err(_) => return tracing::debug!(%from, "TLS handshake took too long"),
                };
                let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                let peer = match certificate.and_then(|certificate| of_certificate(certificate)) {
                    Some(identity) => Peer::Certificate(identity),
                    None => Peer::Anonymous,
                };
                server.connection(stream, peer).await;
            });
        }
    }

    /// Serves one connection of somebody who was authorised already: the API server in the same process. Upgraded
    /// sessions go on after this returns.
    pub async fn serve_trusted(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        self.connection(io, Peer::Trusted).await;
    }

    async fn connection(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer) {
        let service = TowerToHyperService::new(self.router.clone().layer(axum::Extension(peer)));
        let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
        builder.http2().timer(TokioTimer::new());
        if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(io), service).await {
            tracing::debug!(%error, "connection ended");
        }
    }
}

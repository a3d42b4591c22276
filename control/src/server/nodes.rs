//! How the API server reaches the nodes: TLS to the port that each node announces, with a certificate that nodes trust;
//! through the tunnel that the node opened where there is one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::server::ApiServer;
use coracle_api::status::Status;
use http::{Method, Request, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Time for a node to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often each end of a tunnel asks whether the other is there, and how long an answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Bytes under way of one stream of a tunnel and of all.
const WINDOW_BYTES: u32 = 1 << 20;
/// Kinds of node addresses in the order in which they are tried (`--kubelet-preferred-address-types`).
const PREFERRED: [&str; 3] = ["InternalIP", "Hostname", "ExternalIP"];

struct Attached {
    api: Weak<ApiServer>,
    tls: TlsConnector,
}

/// The asking end of a tunnel, and a number that tells it from a later one of the same node.
type Tunnel = (u64, SendRequest<Empty<Bytes>>);

/// Connections to nodes. It is part of the server's configuration, so it learns of the server after that has started.
#[derive(Default)]
pub(super) struct Connector {
    attached: OnceLock<Attached>,
    /// Pods are reached through their nodes' tunnels, as this host has no way to them.
    pods_by_tunnel: bool,
    tunnels: Arc<Mutex<HashMap<String, Tunnel>>>,
}

impl Connector {
    pub(super) fn new(pods_by_tunnel: bool) -> Self {
        Self { pods_by_tunnel, ..Self::default() }
    }

    /// Gives the connector its server, whose cache tells where nodes are and whose authority signs their certificates.
    pub(super) fn attach(&self, api: &Arc<ApiServer>) -> anyhow::Result<()> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(api.pki.ca_pem.as_bytes()) {
            roots.add(certificate.context("read the authority's certificate")?).context("trust the authority")?;
        }
        let identity = api.kubelet_client_identity().context("make the certificate that nodes are reached with")?;
        let (chain, key) = identity.rustls().context("read the certificate that nodes are reached with")?;
        let config = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
        let tls = TlsConnector::from(Arc::new(config));
        self.attached.get_or_init(|| Attached { api: Arc::downgrade(api), tls });
        Ok(())
    }

    fn api(&self) -> Result<Arc<ApiServer>, Status> {
        let attached = self.attached.get().ok_or_else(|| Status::unavailable("the server is starting"))?;
        attached.api.upgrade().ok_or_else(|| Status::unavailable("the server is stopping"))
    }

    /// A connection to an address of a node through its tunnel; `None` when there is no tunnel.
    async fn through_tunnel(&self, node: &str, target: SocketAddr) -> Option<Result<Box<dyn NodeStream>, String>> {
        let (_, mut sender) = self.tunnels.lock().get(node).cloned()?;
        let opened = async {
            let mut request = Request::new(Empty::new());
            *request.method_mut() = Method::CONNECT;
            *request.uri_mut() = target.to_string().parse().map_err(|error| format!("{target}: {error}"))?;
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            if response.status() != StatusCode::OK {
                return Err(format!("the node answers {}", response.status()));
            }
            let stream = hyper::upgrade::on(response).await.map_err(|error| error.to_string())?;
            Ok(Box::new(TokioIo::new(stream)) as Box<dyn NodeStream>)
        };
        let late = |_| Err("it took too long".to_owned());
        Some(tokio::time::timeout(CONNECT_TIMEOUT, opened).await.unwrap_or_else(late))
    }

    /// The node that a pod's address belongs to.
    fn node_of(&self, pod: IpAddr) -> Option<String> {
        let mut nodes = self.api().ok()?.informer::<Node>().list();
        let holds = |node: &Arc<Node>| {
            let spec = node.spec.as_ref();
            let ranges = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
            let own = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            ranges.iter().any(|range| range.parse::<IpNet>().is_ok_and(|range| range.contains(&pod)))
                || own.into_iter().any(|address| address.address.parse() == Ok(pod))
        };
        nodes.find(holds).and_then(|node| node.metadata.name.clone())
    }
}

/// Keeps the asking end of a tunnel until the node is gone.
async fn hold(tunnels: Arc<Mutex<HashMap<String, Tunnel>>>, node: String, stream: Box<dyn NodeStream>) {
    let shaken = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .handshake(TokioIo::new(stream))
        .await;
    let (sender, connection) = match shaken {
        Ok(both) => both,
        Err(error) => return tracing::debug!(%node, %error, "a tunnel is not opened"),
    };
    let number = {
        let mut tunnels = tunnels.lock();
        let number = tunnels.get(&node).map_or(0, |(number, _)| number + 1);
        tunnels.insert(node.clone(), (number, sender));
        number
    };
    tracing::info!(%node, "the node is reached through a tunnel");
    if let Err(error) = connection.await {
        tracing::debug!(%node, %error, "the tunnel ended");
    }
    let mut tunnels = tunnels.lock();
    if tunnels.get(&node).is_some_and(|(last, _)| *last == number) {
        tunnels.remove(&node);
    }
}

/// Where a node's own API listens.
fn address(node: &Node) -> Option<(String, u16)> {
    let status = node.status.as_ref()?;
    let port = status.daemon_endpoints.as_ref()?.kubelet_endpoint.as_ref()?.port;
    let addresses = status.addresses.as_deref().unwrap_or_default();
    let preferred = PREFERRED.iter().find_map(|type_| addresses.iter().find(|address| address.type_ == *type_))?;
    Some((preferred.address.clone(), u16::try_from(port).ok()?))
}

#[async_trait::async_trait]
impl NodeConnector for Connector {
    async fn connect(&self, name: &str) -> Result<Box<dyn NodeStream>, Status> {
        let attached = self.attached.get().ok_or_else(|| Status::unavailable("the server is starting"))?;
        let node = self
            .api()?
            .informer::<Node>()
            .get("", name)
            .ok_or_else(|| Status::unavailable(format!("the node {name} is not registered")))?;
        let (host, port) =
            address(&node).ok_or_else(|| Status::unavailable(format!("the node {name} announces no address")))?;
        let failed = |error: &dyn std::fmt::Display| {
            Status::unavailable(format!("dial the kubelet of {name} at {host}:{port}: {error}"))
        };
        let tunnel = match host.parse() {
            Ok(ip) => self.through_tunnel(name, SocketAddr::new(ip, port)).await,
            Err(_) => None,
        };
        let stream: Box<dyn NodeStream> = match tunnel {
            Some(Ok(stream)) => stream,
            // The tunnel may be down for a moment, or on its way out.
            Some(Err(_)) | None => {
                let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect((host.as_str(), port))).await;
                let stream = connected.map_err(|late| failed(&late))?.map_err(|error| failed(&error))?;
                stream.set_nodelay(true).map_err(|error| failed(&error))?;
                Box::new(stream)
            }
        };
        let server = match host.parse::<IpAddr>() {
            Ok(ip) => ServerName::from(ip),
            Err(_) => ServerName::try_from(host.clone()).map_err(|error| failed(&error))?,
        };
        let secured = attached.tls.connect(server, stream).await.map_err(|error| failed(&error))?;
        Ok(Box::new(secured))
    }

    async fn dial(&self, host: &str, port: u16) -> Result<Box<dyn NodeStream>, Status> {
        let failed = |error: &dyn std::fmt::Display| Status::unavailable(format!("dial tcp {host}:{port}: {error}"));
        if self.pods_by_tunnel
            && let Ok(ip) = host.parse()
            && let Some(node) = self.node_of(ip)
            && let Some(opened) = self.through_tunnel(&node, SocketAddr::new(ip, port)).await
        {
            return opened.map_err(|error| failed(&error));
        }
        let stream = TcpStream::connect((host, port)).await.map_err(|error| failed(&error))?;
        Ok(Box::new(stream))
    }

    fn accept(&self, node: String, stream: Box<dyn NodeStream>) {
        tokio::spawn(hold(self.tunnels.clone(), node, stream));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_addresses_come_first() {
        let node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n"},
            "status": {
                "addresses": [{"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "10.0.0.7"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            },
        }))
        .expect("a node");
        assert_eq!(address(&node), Some(("10.0.0.7".into(), 10250)));
    }
}

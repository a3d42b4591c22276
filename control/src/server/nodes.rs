//! How the API server reaches the nodes: TLS to the port that each node announces, with a certificate that nodes trust.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::Context;
use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::server::ApiServer;
use coracle_api::status::Status;
use k8s_openapi::api::core::v1::Node;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Time for a node to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Kinds of node addresses in the order in which they are tried (`--kubelet-preferred-address-types`).
const PREFERRED: [&str; 3] = ["InternalIP", "Hostname", "ExternalIP"];

struct Attached {
    api: Weak<ApiServer>,
    tls: TlsConnector,
}

/// Connections to nodes. It is part of the server's configuration, so it learns of the server after that has started.
#[derive(Default)]
pub(super) struct Connector {
    attached: OnceLock<Attached>,
}

impl Connector {
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
        let api = attached.api.upgrade().ok_or_else(|| Status::unavailable("the server is stopping"))?;
        let node = api
            .informer::<Node>()
            .get("", name)
            .ok_or_else(|| Status::unavailable(format!("the node {name} is not registered")))?;
        let (host, port) =
            address(&node).ok_or_else(|| Status::unavailable(format!("the node {name} announces no address")))?;
        let failed = |error: &dyn std::fmt::Display| {
            Status::unavailable(format!("dial the kubelet of {name} at {host}:{port}: {error}"))
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect((host.as_str(), port))).await;
        let stream = connected.map_err(|late| failed(&late))?.map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        let server = match host.parse::<IpAddr>() {
            Ok(ip) => ServerName::from(ip),
            Err(_) => ServerName::try_from(host.clone()).map_err(|error| failed(&error))?,
        };
        let secured = attached.tls.connect(server, stream).await.map_err(|error| failed(&error))?;
        Ok(Box::new(secured))
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

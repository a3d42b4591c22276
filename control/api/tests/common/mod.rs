//! A server of its own for each test: embedded store in a temporary folder, TLS on loopback.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions};
use hyper_util::rt::TokioIo;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) struct Server {
    pub api: Arc<ApiServer>,
    pub url: String,
    pub kubeconfig: PathBuf,
    _stop: DropGuard,
    _folder: tempfile::TempDir,
}

/// A kubelet that tells which path it was asked for, and echoes what comes over an upgraded connection.
struct EchoNode;

#[async_trait::async_trait]
impl NodeConnector for EchoNode {
    async fn connect(&self, _node: &str) -> Result<Box<dyn NodeStream>, Status> {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|mut request: http::Request<hyper::body::Incoming>| async move {
                let path = request.uri().to_string();
                if !request.headers().contains_key("upgrade") {
                    return Ok::<_, std::convert::Infallible>(http::Response::new(path));
                }
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let stream = TokioIo::new(upgraded.await.expect("upgraded"));
                    let (mut read, mut write) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
                let mut response = http::Response::new(String::new());
                *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
                response.headers_mut().insert("upgrade", http::HeaderValue::from_static("SPDY/3.1"));
                response.headers_mut().insert("connection", http::HeaderValue::from_static("Upgrade"));
                Ok(response)
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(theirs), service);
            let _ = connection.with_upgrades().await;
        });
        Ok(Box::new(ours))
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let store = Embedded::open(folder.path().join("store"), EmbeddedOptions::default()).expect("a store");
        let config = Config {
            tls_dir: folder.path().join("tls"),
            tls_sans: Vec::new(),
            service_cidr: "10.43.0.0/16".into(),
            cluster_cidr: "10.42.0.0/16".into(),
            node_ports: (30000, 32767),
            cluster_domain: "cluster.local".into(),
            dns_ip: Ipv4Addr::new(10, 43, 0, 10).into(),
            advertise: address,
            nodes: Arc::new(EchoNode),
            static_tokens: Vec::new(),
            oidc: Vec::new(),
            // There are no controllers here that would make the service accounts.
            disabled_admission: vec!["ServiceAccount".into()],
        };
        let stop = CancellationToken::new();
        let api = ApiServer::new(config, Arc::new(store), stop.clone()).await.expect("a server");
        let url = format!("https://{address}");
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_admin_kubeconfig(&kubeconfig, &url).expect("a kubeconfig");
        let serving = api.clone();
        tokio::spawn(async move { serving.serve_tls(listener).await });
        Self { api, url, kubeconfig, _stop: stop.drop_guard(), _folder: folder }
    }

    /// A client over TLS with the administrator's certificate.
    pub(crate) async fn client(&self) -> kube::Client {
        self.client_with(|_| {}).await
    }

    pub(crate) async fn client_with(&self, change: impl FnOnce(&mut kube::Config)) -> kube::Client {
        let text = kube::config::Kubeconfig::read_from(&self.kubeconfig).expect("a kubeconfig");
        let mut config = kube::Config::from_custom_kubeconfig(text, &Default::default()).await.expect("a config");
        change(&mut config);
        kube::Client::try_from(config).expect("a client")
    }
}

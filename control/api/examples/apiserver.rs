//! An API server by hand: `cargo run -p coracle-api --example apiserver -- <data folder> [port] [disabled admission plugin…]`. Writes `kubeconfig` there.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions};
use tokio_util::sync::CancellationToken;

struct NoNodes;

#[async_trait::async_trait]
impl NodeConnector for NoNodes {
    async fn connect(&self, node: &str) -> Result<Box<dyn NodeStream>, Status> {
        Err(Status::unavailable(format!("there is no node {node} here")))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let data: PathBuf = arguments.next().ok_or("give a data folder")?.into();
    let port: u16 = arguments.next().map(|port| port.parse()).transpose()?.unwrap_or(6443);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let store = Arc::new(Embedded::open(data.join("store"), EmbeddedOptions::default())?);
    let config = Config {
        tls_dir: data.join("tls"),
        tls_sans: Vec::new(),
        service_cidr: "10.43.0.0/16".into(),
        cluster_cidr: "10.42.0.0/16".into(),
        node_ports: (30000, 32767),
        cluster_domain: "cluster.local".into(),
        dns_ips: vec![Ipv4Addr::new(10, 43, 0, 10).into()],
        advertise: address,
        shared_store: false,
        nodes: Arc::new(NoNodes),
        authn: Default::default(),
        disabled_admission: arguments.collect(),
    };
    let api = ApiServer::new(config, store, CancellationToken::new()).await?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    api.write_admin_kubeconfig(&data.join("kubeconfig"), &format!("https://{}", listener.local_addr()?))?;
    api.serve_tls(listener).await?;
    Ok(())
}

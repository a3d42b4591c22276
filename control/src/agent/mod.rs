//! `coracle agent`: a node of a cluster whose servers are elsewhere.

mod balancer;
mod client;
mod join;
mod tunnel;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use coracle_kubelet::certificates::{Manager, Use};
use http::Uri;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use tokio::net::TcpListener;

use crate::cli::AgentOptions;
use crate::cluster::{self, Cluster};
use crate::process::{self, Parts};
use crate::{host, node};

/// Port of a server whose URL names none.
const SERVER_PORT: u16 = 6443;
/// Pause before a server is asked again that did not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT. Containers keep running; the next start takes them over.
pub(crate) fn run(options: AgentOptions) -> anyhow::Result<()> {
    process::run(async |parts| start(&options, parts).await)
}

async fn start(options: &AgentOptions, parts: &mut Parts) -> anyhow::Result<()> {
    let folder = options.node.folders.data_dir.join("agent");
    host::prepare_folder(&options.node.folders.data_dir, 0o700)?;
    host::prepare_folder(&folder, 0o700)?;
    let name = host::node_name(options.node.node_name.as_deref())?;
    let ips = host::node_ips(&options.node.node_ip, options.bind_address)?;

    let servers = options.server.iter().map(server).collect::<anyhow::Result<Vec<_>>>()?;
    let balancer = balancer::Balancer::new(servers, folder.join("servers"));
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, options.lb_server_port));
    let listener = TcpListener::bind(local).await;
    let listener = listener.with_context(|| format!("listen on {local}: choose another with --lb-server-port"))?;
    let url: Uri = format!("https://{}", listener.local_addr()?).parse()?;
    parts.spawn("way to the servers", balancer.clone().run(listener));

    let own = Manager::open(&name, Use::Client, folder.join("client.pem"));
    let authority = join::join(options, &folder, &url, &own).await?;
    let tls = client::tls(&authority, own.certificate())?;
    let client = client::client(&url, &tls, None)?;
    let cluster = settings(&client).await?;

    let serving = Use::Serving(node::serving_names(&name, &ips));
    let serving = Manager::open(&name, serving, folder.join("serving.pem"));
    let mut reachable: Vec<IpNet> = ips.iter().copied().map(IpNet::from).collect();
    let identity =
        node::Identity { name, ips, client: client.clone(), certificate: serving.certificate(), client_ca: authority };
    for manager in [own, serving] {
        let client = client.clone();
        parts.spawn("node's certificates", async move {
            manager.keep(client).await;
            Ok(())
        });
    }
    let network = node::start(&options.node, options.bind_address, &cluster, identity, parts).await?;
    reachable.extend(&network.config().pod_cidrs);
    let servers = balancer.subscribe();
    parts.spawn("tunnels to the servers", async move {
        tunnel::keep(servers, tls, reachable).await;
        Ok(())
    });
    parts.spawn("list of servers", balancer.follow(client));
    host::notify_ready();
    Ok(())
}

/// `host:port` of a server's URL.
fn server(url: &Uri) -> anyhow::Result<String> {
    match (url.scheme_str(), url.host()) {
        (Some("https") | None, Some(host)) => Ok(format!("{host}:{}", url.port_u16().unwrap_or(SERVER_PORT))),
        _ => bail!("--server {url} is not of the form https://HOST:PORT"),
    }
}

/// The settings of the cluster, as soon as a server tells them.
async fn settings(client: &Client) -> anyhow::Result<Cluster> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), cluster::NAMESPACE);
    let map = join::patiently("read the cluster's settings", || maps.get(cluster::NAME)).await?;
    let text = map.data.and_then(|mut data| data.remove(cluster::MEMBER)).unwrap_or_default();
    serde_json::from_str(&text).context("read the cluster's settings: are server and agent of the same version?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_have_a_host_and_a_port() {
        let parsed = |url: &str| server(&url.parse().expect("a URL")).ok();
        assert_eq!(parsed("https://a.example:7443").as_deref(), Some("a.example:7443"));
        assert_eq!(parsed("https://10.0.0.1").as_deref(), Some("10.0.0.1:6443"));
        assert_eq!(parsed("https://[fd00::1]:6443/").as_deref(), Some("[fd00::1]:6443"));
        assert_eq!(parsed("http://a:1"), None);
    }
}

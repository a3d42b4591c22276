//! This host's node: registration, network, node agent, in the order in which they need each other.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use coracle_kubelet::node::{Facts, NodeAgent};
use coracle_kubelet::server::ServerConfig;
use coracle_kubelet::{Config, Kubelet, Layout};
use coracle_netns::Network;
use ipnet::IpNet;
use tokio_util::sync::CancellationToken;

use super::{Parts, host, spawn};
use crate::cli::{Folders, ServerOptions};

/// Who the node is.
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) ip: IpAddr,
}

/// Where the node's files lie.
pub(crate) fn layout(folders: &Folders) -> Layout {
    let container_logs = folders.pod_log_dir.with_file_name("containers");
    Layout {
        data: folders.data_dir.clone(),
        run: folders.run_dir.clone(),
        pod_logs: folders.pod_log_dir.clone(),
        container_logs,
    }
}

/// Registers the node and starts it; returns when it can run pods.
pub(super) async fn start(
    options: &ServerOptions,
    api: &Arc<ApiServer>,
    identity: Identity,
    parts: &mut Parts,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let layout = layout(&options.folders);
    host::prepare_folder(&layout.run, 0o711)?;
    for folder in [&layout.pod_logs, &layout.container_logs] {
        host::prepare_folder(folder, 0o755)?;
    }
    let defaults = Config::new(identity.name.clone());
    let config = Config {
        static_pod_path: options.pod_manifest_path.clone(),
        max_pods: options.max_pods,
        allowed_unsafe_sysctls: options.allowed_unsafe_sysctls.clone(),
        eviction_hard: if options.eviction_hard.is_empty() {
            defaults.eviction_hard.clone()
        } else {
            options.eviction_hard.clone()
        },
        node_ips: vec![identity.ip],
        layout,
        cgroup_root: options.folders.cgroup_root.clone(),
        port: options.kubelet_port,
        cluster_domain: options.cluster_domain.clone(),
        cluster_dns: vec![options.cluster_dns],
        ..defaults
    };
    let facts = Facts::gather(&config.layout.data).context("look at this host")?;
    let client = api.client(UserInfo::node(&identity.name));
    let agent = NodeAgent::new(Arc::new(config.clone()), client.clone(), facts.clone());
    agent.register().await?;
    let ranges = agent.pod_cidrs().await?;
    let network = network(options, &identity, &ranges).await?;
    let names = network.clone();
    spawn(parts, shutdown, "DNS server", async move { names.serve_dns().await.context("answer the cluster's names") });
    let sans = vec![identity.name.clone(), identity.ip.to_string(), "127.0.0.1".into(), "localhost".into()];
    let certificate = api.node_identity(&identity.name, sans).context("make the node's certificate")?;
    let server = ServerConfig {
        node_name: identity.name.clone(),
        certificate: certificate.cert_pem.into_bytes(),
        key: certificate.key_pem.into_bytes(),
        client_ca: Some(api.pki.ca_pem.clone().into_bytes()),
        log_folder: "/var/log".into(),
    };
    let address = SocketAddr::new(options.bind_address, options.kubelet_port);
    let kubelet =
        Kubelet::new(config, client, network, facts, server, address).await.context("start the node agent")?;
    spawn(parts, shutdown, "node agent", async move {
        kubelet.run().await;
        Ok(())
    });
    tracing::info!(node = %identity.name, "the node runs pods");
    Ok(())
}

fn range(name: &str, text: &str) -> anyhow::Result<Vec<IpNet>> {
    text.split(',')
        .map(|range| range.trim().parse().with_context(|| format!("{name} {range} is no address range")))
        .collect()
}

/// The settings of this host's pod network.
pub(crate) fn network_config(
    options: &ServerOptions,
    name: &str,
    ip: IpAddr,
    ranges: &[String],
) -> anyhow::Result<coracle_netns::Config> {
    Ok(coracle_netns::Config {
        pod_cidrs: range("the node's pod range", &ranges.join(","))?,
        cluster_cidrs: range("--cluster-cidr", &options.cluster_cidr)?,
        service_cidrs: range("--service-cidr", &options.service_cidr)?,
        dns_ips: vec![options.cluster_dns],
        cluster_domain: options.cluster_domain.clone(),
        node_ips: vec![ip],
        ..coracle_netns::Config::new(options.folders.run_dir.clone(), name)
    })
}

async fn network(options: &ServerOptions, identity: &Identity, ranges: &[String]) -> anyhow::Result<Arc<Network>> {
    let config = network_config(options, &identity.name, identity.ip, ranges)?;
    let made = tokio::task::spawn_blocking(move || Network::new(config)).await?;
    made.context("make the pod network of this host (coracle check tells what lacks)")
}

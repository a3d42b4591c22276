//! A host's node: registration, network, node agent, in the order in which they need each other.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use coracle_kubelet::certificates::NodeCertificate;
use coracle_kubelet::config::Threshold;
use coracle_kubelet::images::GcPolicy;
use coracle_kubelet::node::{Facts, NodeAgent};
use coracle_kubelet::server::ServerConfig;
use coracle_kubelet::shutdown::{self, Period};
use coracle_kubelet::{Config, Kubelet, Layout};
use coracle_netns::{CniConfig, Network, WireGuardKey};
use kube::Client;

use crate::cli::{Folders, NodeOptions};
use crate::cluster::{Cluster, NetworkBackend};
use crate::host;
use crate::process::Parts;

/// Who the node is, and how it speaks to the API.
pub(crate) struct Identity {
    pub(crate) name: String,
    /// The preferred first.
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) client: Client,
    /// Of the node's own API.
    pub(crate) certificate: Arc<NodeCertificate>,
    /// Who signs the certificates of its callers, PEM.
    pub(crate) client_ca: String,
}

/// Where the node's files lie.
pub(crate) fn layout(folders: &Folders) -> Layout {
    let container_logs = folders.pod_log_dir.with_file_name("containers");
    Layout {
        data: folders.data_dir.clone(),
        kubelet: folders.kubelet_dir(),
        cdi: folders.cdi_spec_dir.clone(),
        run: folders.run_dir.clone(),
        pod_logs: folders.pod_log_dir.clone(),
        container_logs,
    }
}

/// Names and addresses that the certificate of the node's own API must have.
pub(crate) fn serving_names(name: &str, ips: &[IpAddr]) -> Vec<String> {
    std::iter::once(name.to_owned()).chain(ips.iter().map(IpAddr::to_string)).collect()
}

/// Each soft threshold with its grace period.
fn soft_thresholds(options: &NodeOptions) -> anyhow::Result<Vec<(Threshold, Duration)>> {
    let with_grace = |threshold: &Threshold| {
        let graces = &options.eviction_soft_grace_period;
        let grace = graces.iter().find(|(signal, _)| *signal == threshold.signal);
        let grace = grace.with_context(|| {
            format!("--eviction-soft names {}, for which --eviction-soft-grace-period has no time", threshold.signal)
        })?;
        Ok((threshold.clone(), grace.1))
    };
    options.eviction_soft.iter().map(with_grace).collect()
}

/// When unused images are removed.
fn image_gc(options: &NodeOptions) -> anyhow::Result<GcPolicy> {
    let (high, low) = (options.image_gc_high_threshold, options.image_gc_low_threshold);
    anyhow::ensure!(
        low <= high,
        "--image-gc-low-threshold {low} is above --image-gc-high-threshold {high}: images could never be removed that far"
    );
    Ok(GcPolicy { high_percent: high.into(), low_percent: low.into(), ..GcPolicy::default() })
}

/// How long pods of which priority get when the host goes down.
fn shutdown_periods(options: &NodeOptions) -> anyhow::Result<Vec<Period>> {
    let (all, critical) = (options.shutdown_grace_period, options.shutdown_grace_period_critical_pods);
    anyhow::ensure!(
        critical <= all,
        "--shutdown-grace-period-critical-pods {critical} is a part of --shutdown-grace-period {all}, and cannot be more"
    );
    if options.shutdown_grace_period_by_pod_priority.is_empty() {
        return Ok(shutdown::periods(Duration::from_secs(all), Duration::from_secs(critical)));
    }
    Ok(options.shutdown_grace_period_by_pod_priority.clone())
}

/// The node's key, where hosts talk by WireGuard; it is made with the first start.
async fn wireguard_key(cluster: &Cluster, data: &Path) -> anyhow::Result<Option<WireGuardKey>> {
    if cluster.network_backend != NetworkBackend::Wireguard {
        return Ok(None);
    }
    let path = data.join("wireguard.key");
    let key = tokio::task::spawn_blocking(move || WireGuardKey::open(&path)).await?;
    key.map(Some).context("prepare --network-backend wireguard")
}

/// Registers the node and starts it; returns when it can run pods, with the port of its own API and its pod ranges.
pub(crate) async fn start(
    options: &NodeOptions,
    bind_address: IpAddr,
    cluster: &Cluster,
    identity: Identity,
    parts: &mut Parts,
) -> anyhow::Result<Arc<Network>> {
    let layout = layout(&options.folders);
    host::prepare_folder(&layout.run, 0o711)?;
    for folder in [&layout.pod_logs, &layout.container_logs] {
        host::prepare_folder(folder, 0o755)?;
    }
    let Identity { name, ips, client, certificate, client_ca } = identity;
    let key = wireguard_key(cluster, &options.folders.data_dir).await?;
    let defaults = Config::new(name.clone());
    let config = Config {
        static_pod_path: options.pod_manifest_path.clone(),
        max_pods: options.max_pods,
        allowed_unsafe_sysctls: options.allowed_unsafe_sysctls.clone(),
        eviction_hard: if options.eviction_hard.is_empty() {
            defaults.eviction_hard.clone()
        } else {
            options.eviction_hard.clone()
        },
        eviction_soft: soft_thresholds(options)?,
        image_gc: image_gc(options)?,
        shutdown_periods: shutdown_periods(options)?,
        eviction_max_pod_grace_period: Duration::from_secs(options.eviction_max_pod_grace_period),
        node_ips: ips.clone(),
        node_labels: host::labels(&options.node_label)?,
        wireguard_key: key.map(|key| key.public()),
        register_with_taints: host::taints(&options.node_taint)?,
        layout,
        images: options.registries.load().context("read the configuration of registries")?,
        cgroup_root: options.folders.cgroup_root.clone(),
        port: options.kubelet_port,
        cluster_domain: cluster.cluster_domain.clone(),
        cluster_dns: cluster.cluster_dns.clone(),
        ..defaults
    };
    let facts = Facts::gather(&config.layout.data).context("look at this host")?;
    let agent = NodeAgent::new(Arc::new(config.clone()), client.clone(), facts.clone());
    agent.register().await?;
    let ranges = agent.pod_cidrs().await?;
    let mut network = cluster.network(&options.folders.run_dir, &name, &ips, &ranges, key)?;
    network.proxy_mode = options.proxy_mode.map(Into::into);
    network.node_port_addresses.clone_from(&options.nodeport_addresses);
    network.cni = options
        .cni
        .then(|| CniConfig { conf_dir: options.cni_conf_dir.clone(), bin_dirs: options.cni_bin_dir.clone() });
    let made = tokio::task::spawn_blocking(move || Network::new(network)).await?;
    let network = made.context("make the pod network of this host (coracle check tells what lacks)")?;
    let names = network.clone();
    parts.spawn("DNS server", async move { names.serve_dns().await.context("answer the cluster's names") });
    let server = ServerConfig {
        node_name: name.clone(),
        certificate,
        client_ca: Some(client_ca.into_bytes()),
        log_folder: "/var/log".into(),
    };
    let address = SocketAddr::new(bind_address, options.kubelet_port);
    let kubelet =
        Kubelet::new(config, client, network.clone(), facts, server, address).await.context("start the node agent")?;
    parts.spawn("node agent", async move {
        kubelet.run().await;
        Ok(())
    });
    tracing::info!(node = %name, "the node runs pods");
    Ok(network)
}

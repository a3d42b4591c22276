//! `coracle cleanup`: takes this host's pods and everything around them down.

use std::sync::Arc;

use anyhow::Context;
use coracle_kubelet::Config;

use crate::cli::Folders;
use crate::node::layout;

/// Removes containers, mounts, namespaces, links, rules and cgroups; state and images stay.
pub(crate) fn run(folders: &Folders) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let config =
            Config { layout: layout(folders), cgroup_root: folders.cgroup_root.clone(), ..Config::new("cleanup") };
        let network = coracle_netns::Config {
            dns_ips: Vec::new(),
            ..coracle_netns::Config::new(folders.run_dir.clone(), "cleanup")
        };
        let opened = tokio::task::spawn_blocking(move || coracle_netns::Network::new(network)).await?;
        let network: Arc<_> = opened.context("open the pod network")?;
        coracle_kubelet::cleanup(&config, network).await.context("take the node down")
    })
}

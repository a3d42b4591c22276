//! `coracle cri`: this host's containers and images behind the Container Runtime Interface, without a control plane.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use coracle_kubelet::cri_v1::{Config, Server};
use coracle_kubelet::supervisor::client::Launch;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Folders, Registries};
use crate::host;
use crate::node::layout;

/// Options of `coracle cri`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CriOptions {
    #[command(flatten)]
    folders: Folders,
    /// Socket that clients connect to; `cri.sock` in the run folder if not given
    #[arg(long, value_name = "unix:///PATH")]
    listen: Option<String>,
    /// Addresses of pods, until a kubelet tells others
    #[arg(long, default_value = "10.42.0.0/24", value_name = "CIDR", value_delimiter = ',')]
    pod_cidr: Vec<ipnet::IpNet>,
    /// Address that exec, attach and port-forward listen on; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS:PORT")]
    streaming_address: SocketAddr,
    #[command(flatten)]
    registries: Registries,
}

/// The path of a socket as kubelet and crictl write it.
fn socket_path(url: &str) -> anyhow::Result<PathBuf> {
    let path = PathBuf::from(url.strip_prefix("unix://").unwrap_or(url));
    if !path.is_absolute() {
        bail!("--listen {url} is not of the form unix:///PATH");
    }
    Ok(path)
}

/// Runs until the process is told to end; containers run on.
pub(crate) fn run(options: CriOptions) -> anyhow::Result<()> {
    host::raise_open_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: CriOptions) -> anyhow::Result<()> {
    let layout = layout(&options.folders);
    host::prepare_folder(&layout.run, 0o711)?;
    let socket = match &options.listen {
        Some(url) => socket_path(url)?,
        None => layout.cri_socket(),
    };
    let name = host::node_name(None)?;
    let network = coracle_netns::Config {
        pod_cidrs: options.pod_cidr.clone(),
        cluster_cidrs: options.pod_cidr,
        service_cidrs: Vec::new(),
        dns_ips: Vec::new(),
        ..coracle_netns::Config::new(layout.run.clone(), name)
    };
    let config = Config {
        socket: socket.clone(),
        layout,
        launch: Launch { executable: "/proc/self/exe".into(), arguments: vec!["supervisor".into()] },
        cgroup_root: options.folders.cgroup_root.clone(),
        streaming_address: options.streaming_address,
        network,
        images: options.registries.load().context("read the configuration of registries")?,
    };
    let server = Server::start(config).await.context("start the container runtime")?;
    tracing::info!(socket = %socket.display(), "the container runtime listens");
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        ended = server.run() => ended.context("serve the Container Runtime Interface"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_named_by_url_or_path() {
        for url in ["unix:///run/x.sock", "/run/x.sock"] {
            assert_eq!(socket_path(url).expect("valid"), PathBuf::from("/run/x.sock"));
        }
        assert!(socket_path("tcp://127.0.0.1:1").is_err());
        assert!(socket_path("unix://x.sock").is_err());
    }
}

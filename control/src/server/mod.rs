//! `coracle server`: the control plane and, unless told otherwise, this host's node, assembled in one process.

pub(crate) mod host;
mod leader;
mod nodes;
mod store;

mod node;

pub(crate) use node::layout;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use coracle_api::authn::Settings;
use coracle_api::server::{ApiServer, Config};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cli::ServerOptions;

/// Time that blocking work may take after everything else has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The parts of the server; the first to end ends it.
type Parts = JoinSet<anyhow::Result<()>>;

/// Runs until SIGTERM or SIGINT. Containers keep running; the next start takes them over.
pub(crate) fn run(options: ServerOptions) -> anyhow::Result<()> {
    host::raise_open_files()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
    let result = runtime.block_on(serve(options));
    runtime.shutdown_timeout(STOP_TIMEOUT);
    result
}

async fn serve(options: ServerOptions) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut parts = Parts::new();
    let result = tokio::select! {
        started = start(&options, &mut parts, &shutdown) => started,
        _ = terminate.recv() => Err(anyhow!("stopped before it had started")),
        _ = interrupt.recv() => Err(anyhow!("stopped before it had started")),
    };
    let ended = match result {
        Err(error) => Err(error),
        Ok(()) => tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            Some(part) = parts.join_next() => part.unwrap_or_else(|error| Err(anyhow!("a part of the server ended: {error}"))),
        },
    };
    tracing::info!("stopping; containers keep running");
    shutdown.cancel();
    while parts.join_next().await.is_some() {}
    ended
}

/// Starts every part, in the order in which they need each other.
async fn start(options: &ServerOptions, parts: &mut Parts, shutdown: &CancellationToken) -> anyhow::Result<()> {
    host::prepare_folder(&options.folders.data_dir, 0o700)?;
    let store = store::open(options).await?;
    let listener = listen(options).await?;
    let bound = listener.local_addr().context("ask for the API's address")?;
    let node_ip = options.node_ip.map_or_else(|| host::uplink_address(bound.ip()), Ok)?;
    let node_name = host::node_name(options.node_name.as_deref())?;
    let nodes = Arc::new(nodes::Connector::default());
    let mut tls_sans = options.tls_san.clone();
    tls_sans.extend([node_ip.to_string(), node_name.clone()]);
    let config = Config {
        tls_dir: options.folders.data_dir.join("tls"),
        tls_sans,
        service_cidr: options.service_cidr.clone(),
        cluster_cidr: options.cluster_cidr.clone(),
        node_ports: host::port_range(&options.service_node_port_range)?,
        cluster_domain: options.cluster_domain.clone(),
        dns_ip: options.cluster_dns,
        advertise: SocketAddr::new(node_ip, bound.port()),
        nodes: nodes.clone(),
        authn: Settings::read(options.token_auth_file.as_deref(), options.authentication_config.as_deref())?,
        disabled_admission: options.disable_admission_plugins.clone(),
    };
    let api = ApiServer::new(config, store, shutdown.clone()).await.context("start the API server")?;
    nodes.attach(&api)?;
    let serving = api.clone();
    spawn(parts, shutdown, "API server", async move { serving.serve_tls(listener).await.context("serve the API") });
    let (controllers, scheduler) = (!options.disable_controller_manager, !options.disable_scheduler);
    let leading = api.clone();
    let shared = options.datastore_endpoint.is_some();
    let identity = format!("{node_name}_{}", std::process::id());
    spawn(parts, shutdown, "controllers and scheduler", async move {
        let work = || loops(&leading, controllers, scheduler);
        // Who has a store of its own has no rival.
        if shared {
            leader::lead(&leading, identity, work).await
        } else {
            work().await
        }
        Ok(())
    });
    let local = if bound.ip().is_unspecified() { IpAddr::from([127, 0, 0, 1]) } else { bound.ip() };
    let url = format!("https://{}", SocketAddr::new(local, bound.port()));
    if let Some(folder) = options.write_kubeconfig.parent() {
        host::prepare_folder(folder, 0o755)?;
    }
    let file = options.write_kubeconfig.display();
    api.write_admin_kubeconfig(&options.write_kubeconfig, &url)
        .with_context(|| format!("write the administrator's kubeconfig to {file}"))?;
    tracing::info!(%url, kubeconfig = %file, "the API answers");
    if !options.disable_agent {
        node::start(options, &api, node::Identity { name: node_name, ip: node_ip }, parts, shutdown).await?;
    }
    host::notify_ready();
    Ok(())
}

/// The loops of which a cluster has one each.
async fn loops(api: &Arc<ApiServer>, controllers: bool, scheduler: bool) {
    let mut running = JoinSet::new();
    if controllers {
        running.spawn(coracle_controllers::run(api.clone()));
    }
    if scheduler {
        running.spawn(coracle_scheduler::run(api.clone()));
    }
    if running.is_empty() {
        std::future::pending::<()>().await;
    }
    if let Some(Err(error)) = running.join_next().await {
        tracing::error!(%error, "a loop of the control plane ended");
    }
}

async fn listen(options: &ServerOptions) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(options.bind_address, options.https_listen_port);
    TcpListener::bind(address).await.with_context(|| {
        format!("listen on {address}: choose another with --https-listen-port, or stop what holds the port (ss -ltnp)")
    })
}

/// Runs a part. Its end before shutdown ends the server; shutdown drops it wherever it is.
fn spawn(
    parts: &mut Parts,
    shutdown: &CancellationToken,
    name: &'static str,
    part: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let shutdown = shutdown.clone();
    parts.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            result = part => match result {
                Err(error) => Err(error.context(name)),
                Ok(()) if shutdown.is_cancelled() => Ok(()),
                Ok(()) => Err(anyhow!("the {name} ended by itself")),
            },
        }
    });
}

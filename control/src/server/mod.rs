//! `coracle server`: the control plane and, unless told otherwise, this host's node, assembled in one process.

mod joining;
mod leader;
mod nodes;
mod store;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use coracle_api::authn::Settings;
use coracle_api::server::{ApiServer, Config};
use coracle_api::user::UserInfo;
use coracle_kubelet::certificates::NodeCertificate;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::cli::ServerOptions;
use crate::cluster::Cluster;
use crate::process::{self, Parts};
use crate::{host, node};

/// Runs until SIGTERM or SIGINT. Containers keep running; the next start takes them over.
pub(crate) fn run(options: ServerOptions) -> anyhow::Result<()> {
    process::run(async |parts| start(&options, parts).await)
}

/// Starts every part, in the order in which they need each other.
async fn start(options: &ServerOptions, parts: &mut Parts) -> anyhow::Result<()> {
    let folders = &options.node.folders;
    host::prepare_folder(&folders.data_dir, 0o700)?;
    let store = store::open(options).await?;
    let listener = listen(options).await?;
    let bound = listener.local_addr().context("ask for the API's address")?;
    let node_ips = host::node_ips(&options.node.node_ip, bound.ip())?;
    let node_name = host::node_name(options.node.node_name.as_deref())?;
    // Without a node of its own the server has no way to pods but through the nodes' tunnels.
    let nodes = Arc::new(nodes::Connector::new(options.disable_agent));
    let mut tls_sans = options.tls_san.clone();
    tls_sans.extend(node::serving_names(&node_name, &node_ips));
    let cluster = Cluster {
        cluster_cidr: options.cluster_cidr.clone(),
        service_cidr: options.service_cidr.clone(),
        cluster_dns: host::cluster_dns(&options.cluster_dns, &options.service_cidr)?,
        cluster_domain: options.cluster_domain.clone(),
        network_backend: options.network_backend,
        stub_domains: options.dns_stub_domain.clone(),
    };
    cluster.check()?;
    let config = Config {
        tls_dir: folders.data_dir.join("tls"),
        tls_sans,
        service_cidr: options.service_cidr.clone(),
        cluster_cidr: options.cluster_cidr.clone(),
        node_ports: host::port_range(&options.service_node_port_range)?,
        cluster_domain: options.cluster_domain.clone(),
        dns_ips: cluster.cluster_dns.clone(),
        advertise: SocketAddr::new(node_ips[0], bound.port()),
        shared_store: options.datastore_endpoint.is_some(),
        nodes: nodes.clone(),
        authn: Settings::read(options.token_auth_file.as_deref(), options.authentication_config.as_deref())?,
        disabled_admission: options.disable_admission_plugins.clone(),
    };
    let api = ApiServer::new(config, store, parts.shutdown.clone()).await.context("start the API server")?;
    api.audit(&coracle_api::audit::Settings {
        policy: options.audit_policy_file.clone(),
        log: options.audit_log_path.clone(),
        max_size_mb: options.audit_log_maxsize,
        max_backups: options.audit_log_maxbackup,
        max_age_days: options.audit_log_maxage,
        webhook: options.audit_webhook_config_file.clone(),
        webhook_max_wait: options.audit_webhook_batch_max_wait,
        webhook_backoff: options.audit_webhook_initial_backoff,
    })
    .await?;
    nodes.attach(&api)?;
    let serving = api.clone();
    parts.spawn("API server", async move { serving.serve_tls(listener).await.context("serve the API") });
    let controllers = !options.disable_controller_manager;
    let scheduler = if options.disable_scheduler { None } else { Some(scheduler_config(options)?) };
    let leading = api.clone();
    let shared = api.config.shared_store;
    if shared {
        let servers = api.servers().await?;
        parts.spawn("addresses of the servers", async move {
            servers.keep().await;
            Ok(())
        });
    }
    let identity = format!("{node_name}_{}", std::process::id());
    parts.spawn("controllers and scheduler", async move {
        let work = || loops(&leading, controllers, scheduler.clone());
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
    // Before anybody is told that the API answers: whoever waits for that may come with the token.
    joining::prepare(&api, &cluster, options.token.as_deref()).await.context("prepare for hosts that join")?;
    if let Some(folder) = options.write_kubeconfig.parent() {
        host::prepare_folder(folder, 0o755)?;
    }
    let file = options.write_kubeconfig.display();
    api.write_admin_kubeconfig(&options.write_kubeconfig, &url)
        .with_context(|| format!("write the administrator's kubeconfig to {file}"))?;
    tracing::info!(%url, kubeconfig = %file, "the API answers");
    if !options.disable_agent {
        let names = node::serving_names(&node_name, &node_ips);
        let names = names.into_iter().chain(["127.0.0.1".into(), "localhost".into()]).collect();
        let pair = api.node_identity(&node_name, names).context("make the node's certificate")?;
        let certificate = NodeCertificate::from_pem(pair.cert_pem.as_bytes(), pair.key_pem.as_bytes());
        let identity = node::Identity {
            client: api.client(UserInfo::node(&node_name)),
            name: node_name,
            ips: node_ips,
            certificate: certificate.map_err(anyhow::Error::msg).context("read the node's certificate")?,
            client_ca: api.pki.ca_pem.clone(),
        };
        node::start(&options.node, options.bind_address, &cluster, identity, parts).await?;
    }
    host::notify_ready();
    Ok(())
}

/// The loops of which a cluster has one each.
async fn loops(api: &Arc<ApiServer>, controllers: bool, scheduler: Option<coracle_scheduler::Config>) {
    let mut running = JoinSet::new();
    if controllers {
        running.spawn(coracle_controllers::run(api.clone()));
    }
    if let Some(config) = scheduler {
        running.spawn(coracle_scheduler::run(api.clone(), config));
    }
    if running.is_empty() {
        std::future::pending::<()>().await;
    }
    if let Some(Err(error)) = running.join_next().await {
        tracing::error!(%error, "a loop of the control plane ended");
    }
}

fn scheduler_config(options: &ServerOptions) -> anyhow::Result<coracle_scheduler::Config> {
    let Some(file) = &options.scheduler_config else { return Ok(coracle_scheduler::Config::default()) };
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    coracle_scheduler::Config::parse(&text).with_context(|| format!("settings of the scheduler in {}", file.display()))
}

async fn listen(options: &ServerOptions) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(options.bind_address, options.https_listen_port);
    TcpListener::bind(address).await.with_context(|| {
        format!("listen on {address}: choose another with --https-listen-port, or stop what holds the port (ss -ltnp)")
    })
}

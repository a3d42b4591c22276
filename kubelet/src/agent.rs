//! The node agent put together: supervisor, images, volumes, pod workers, the node's own API, its object in the cluster.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use coracle_netns::Network;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{NodeCondition, Pod, Service};
use kube::runtime::events::EventType;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::cgroups::Hierarchy;
use crate::cri::{ContainerRuntime, RuntimeError};
use crate::csi::Csi;
use crate::devices::Devices;
use crate::dra::Dra;
use crate::events::Events;
use crate::images::ImageStore;
use crate::metrics::Metrics;
use crate::names::PodKey;
use crate::native::Native;
use crate::native::network::{PodNetwork, PodNetworks};
use crate::node::status::condition;
use crate::node::{Facts, Health, NodeAgent};
use crate::pods::{Context, IdRanges, PodManager, PodTable};
use crate::server::{NodeServer, NodeState, ServerConfig};
use crate::supervisor::client::{Client as Supervisor, Launch};
use crate::supervisor::logfile::Limits;
use crate::volumes::{ObjectCache, Volumes, VolumesConfig};
use crate::{Config, cri_v1, network};

/// Pulls at once (`maxParallelImagePulls`).
const MAX_PULLS: usize = 4;

/// What keeps a node from starting.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A folder, file or address of the host.
    #[error("{step}: {source}")]
    Host {
        /// What was done.
        step: String,
        /// The errno.
        source: std::io::Error,
    },
    /// The supervisor of containers.
    #[error("start the supervisor of containers: {0}")]
    Supervisor(#[from] crate::supervisor::client::ClientError),
    /// The image store.
    #[error("open the image store: {0}")]
    Images(#[from] crate::images::ImageError),
    /// What an earlier daemon left.
    #[error("take over the containers that run: {0}")]
    Runtime(#[from] RuntimeError),
}

pub(crate) fn host(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
    let step = step.into();
    move |source| AgentError::Host { step, source }
}

/// The node agent of this host.
pub struct Kubelet {
    node: NodeAgent,
    context: Arc<Context>,
    server: NodeServer,
    listener: TcpListener,
    network: Arc<Network>,
    cri: cri_v1::Server,
}

/// The pods' network as the container verbs ask for it.
pub(crate) struct Networks(pub(crate) Arc<Network>);

#[async_trait]
impl PodNetworks for Networks {
    async fn setup(&self, pod: &PodKey, net: coracle_netns::PodNet) -> crate::cri::Result<PodNetwork> {
        let key =
            coracle_netns::PodKey { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone() };
        self.0.known().await;
        let made = self.0.setup_pod(key, net).await;
        let made = made.map_err(|error| RuntimeError::Network { pod: pod.clone(), message: error.to_string() })?;
        Ok(PodNetwork { namespace: made.netns, ips: made.ips })
    }

    async fn teardown(&self, pod: &PodKey) -> crate::cri::Result<()> {
        self.0.teardown_pod(&pod.uid);
        Ok(())
    }
}

impl Kubelet {
    /// Takes over what an earlier daemon left, listens on `address`, and is ready to run pods.
    ///
    /// # Errors
    /// When the supervisor, the image store, cgroups or the listener cannot be had.
    pub async fn new(
        config: Config,
        client: Client,
        network: Arc<Network>,
        facts: Facts,
        server: ServerConfig,
        address: SocketAddr,
    ) -> Result<Self, AgentError> {
        let listener = TcpListener::bind(address).await.map_err(host(format!(
            "listen on {address} for the node's API (is another kubelet running? choose another with --kubelet-port)"
        )))?;
        let port = listener.local_addr().map_err(host("ask for the node API's address"))?.port();
        let config = Arc::new(Config { port, ..config });
        let layout = config.layout.clone();
        let cgroups = Hierarchy::open(&config.cgroup_root)
            .map_err(host("make the cgroup of all pods (coracle check tells what lacks)"))?;
        let launch = Launch { executable: config.executable.clone(), arguments: config.supervisor_arguments.clone() };
        let supervisor = Supervisor::start(layout.clone(), launch).await?;
        let folder = layout.images();
        let options = config.images.clone();
        let images = tokio::task::spawn_blocking(move || ImageStore::open(&folder, options))
            .await
            .map_err(|error| host("open the image store")(std::io::Error::other(error)))??;
        let limits =
            Limits { max_size_bytes: config.container_log_max_size_bytes, max_files: config.container_log_max_files };
        let networks = Arc::new(Networks(network.clone()));
        let metrics = Arc::new(Metrics::default());
        let (pool, groups) = (images.clone(), cgroups.clone());
        let native = Native::new(layout.clone(), limits, supervisor, pool, networks, groups, metrics.clone())?;
        let id_ranges = IdRanges::open(config.max_pods, &native.list_pod_sandboxes().await?)
            .map_err(host("find ids for pods with hostUsers: false"))?;
        let runtime: Arc<dyn ContainerRuntime> = Arc::new(native);
        crate::volumes::ensure_shared(&layout.kubelet)
            .map_err(|error| host("prepare the folder of pods")(std::io::Error::other(error)))?;
        let news = Arc::new(Notify::new());
        let devices = Devices::open(layout.clone(), news.clone()).map_err(host("read who has which devices"))?;
        let dra =
            Dra::open(&layout, client.clone(), &config.node_name).map_err(host("read which claims are prepared"))?;
        let csi = Csi::new(layout.clone(), client.clone(), &config.node_name, &facts.boot_id, news.clone());
        let allocatable = crate::pods::allocatable(&config, &facts);
        let volumes = Volumes::new(
            VolumesConfig {
                layout,
                images: images.clone(),
                csi: csi.clone(),
                allocatable: Arc::new(move || allocatable.clone()),
            },
            ObjectCache::new(client.clone()),
        );
        let (services, writer) = reflector::store::<Service>();
        let stream = watcher(Api::<Service>::all(client.clone()), watcher::Config::default()).default_backoff();
        tokio::spawn(reflector(writer, stream).for_each(|_| std::future::ready(())));
        let context = Arc::new(Context {
            client: client.clone(),
            runtime,
            images,
            volumes,
            csi,
            devices,
            dra,
            news,
            table: Arc::new(PodTable::default()),
            cgroups,
            facts: facts.clone(),
            events: Events::new(client.clone(), &config.node_name),
            id_ranges,
            pressure: Default::default(),
            services,
            pulls: Semaphore::new(MAX_PULLS),
            image_ids: Default::default(),
            probes: Default::default(),
            shutdown: Default::default(),
            metrics,
            config: config.clone(),
        });
        let parts = cri_v1::Parts {
            verbs: context.runtime.clone(),
            images: context.images.clone(),
            network: cri_v1::Parts::settled(network.clone()),
            layout: config.layout.clone(),
            cgroup_root: config.cgroup_root.clone(),
            resolv_conf: config.resolv_conf.clone(),
        };
        let socket = config.layout.cri_socket();
        let cri = cri_v1::Server::listen(&socket, SocketAddr::from(([127, 0, 0, 1], 0)), parts).await?;
        let server = NodeServer::new(server, client.clone(), Arc::new(State(context.clone())))
            .map_err(host("prepare the node's API"))?;
        Ok(Self { node: NodeAgent::new(config, client, facts), context, server, listener, network, cri })
    }

    /// Runs the node until the future is dropped; containers run on.
    pub async fn run(self) {
        let mut parts = JoinSet::new();
        let (context, client) = (self.context.clone(), self.context.client.clone());
        parts.spawn(network::follow(client, self.network));
        parts.spawn(context.volumes.clone().run());
        let (server, listener) = (self.server, self.listener);
        parts.spawn(async move {
            if let Err(error) = server.serve(listener).await {
                tracing::error!(%error, "the node's API ended");
            }
        });
        if let Some(message) = lacking(&context) {
            context.event_of_node(EventType::Warning, LACKING, message);
        }
        let csi = context.csi.clone();
        parts.spawn(async move {
            csi.announce().await;
            std::future::pending().await
        });
        let registry = context.config.layout.plugins_registry();
        let kinds = vec![
            Arc::new(context.csi.clone()) as _,
            Arc::new(context.devices.clone()) as _,
            Arc::new(context.dra.clone()) as _,
        ];
        let dra = context.dra.clone();
        parts.spawn(async move {
            dra.clean_up().await;
            std::future::pending().await
        });
        parts.spawn(async move {
            match crate::plugins::run(&registry, kinds).await {
                Ok(()) => tracing::error!(folder = %registry.display(), "the folder of plugins is gone: no plugin is found until the next start"),
                Err(error) => tracing::error!(folder = %registry.display(), %error, "plugins are not found any more"),
            }
        });
        let devices = context.devices.clone();
        parts.spawn(async move {
            if let Err(error) = devices.serve().await {
                tracing::error!(%error, "device plugins cannot register");
            }
        });
        let layout = context.config.layout.clone();
        let (devices, dra) = (context.devices.clone(), context.dra.clone());
        let resources = crate::devices::pod_resources::serve(layout, devices, dra, context.table.clone());
        parts.spawn(async move {
            if let Err(error) = resources.await {
                tracing::error!(%error, "nobody is told which pod has which devices");
            }
        });
        parts.spawn(PodManager::new(context.clone()).run());
        parts.spawn(crate::pods::eviction::run(context.clone()));
        parts.spawn(crate::shutdown::run(context.clone()));
        let cri = self.cri;
        parts.spawn(async move {
            if let Err(error) = cri.run().await {
                tracing::error!(%error, "the Container Runtime Interface ended");
            }
        });
        let health = Arc::new(State(context));
        parts.spawn(async move { self.node.run(health).await });
        while let Some(ended) = parts.join_next().await {
            match ended {
                Ok(()) => tracing::error!("a part of the node agent ended"),
                Err(error) if error.is_panic() => tracing::error!(%error, "a part of the node agent failed"),
                Err(_) => {}
            }
        }
    }
}

/// Reason of the condition and event about what the host cannot enforce.
const LACKING: &str = "HostLacksControllers";

fn lacking(context: &Context) -> Option<String> {
    let missing = context.cgroups.missing();
    (!missing.is_empty()).then(|| {
        format!("the host lacks the cgroup v2 controllers {}: their limits are not enforced", missing.join(", "))
    })
}

/// The agent as its API and its object in the cluster see it.
struct State(Arc<Context>);

impl NodeState for State {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.0.table.list().iter().map(|entry| entry.pod.clone()).collect()
    }

    fn runtime(&self) -> Arc<dyn ContainerRuntime> {
        self.0.runtime.clone()
    }

    fn images(&self) -> Option<Arc<ImageStore>> {
        Some(self.0.images.clone())
    }

    fn volumes(&self) -> Option<Volumes> {
        Some(self.0.volumes.clone())
    }

    fn metrics(&self) -> String {
        self.0.metrics.text()
    }

    fn probe_metrics(&self) -> String {
        self.0.probes.text()
    }

    fn configz(&self) -> serde_json::Value {
        let config = &self.0.config;
        let periods = config.shutdown_periods.iter();
        let periods = periods.map(
            |(priority, time)| serde_json::json!({"priority": priority, "shutdownGracePeriodSeconds": time.as_secs()}),
        );
        serde_json::json!({"kubeletconfig": {
            "kind": "KubeletConfiguration", "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "port": config.port, "maxPods": config.max_pods, "clusterDomain": config.cluster_domain,
            "clusterDNS": config.cluster_dns, "cgroupDriver": "cgroupfs", "seccompDefault": config.seccomp_default,
            "containerLogMaxFiles": config.container_log_max_files,
            "containerLogMaxSize": config.container_log_max_size_bytes.to_string(),
            "allowedUnsafeSysctls": config.allowed_unsafe_sysctls, "staticPodPath": config.static_pod_path,
            "shutdownGracePeriodByPodPriority": periods.collect::<Vec<_>>(),
        }})
    }
}

impl Health for State {
    fn conditions(&self) -> Vec<NodeCondition> {
        let mut conditions = self.0.pressure.conditions();
        if let Some(message) = lacking(&self.0) {
            conditions.push(condition("CgroupControllersMissing", "True", LACKING, &message));
        }
        conditions.extend(self.0.shutdown.condition());
        conditions
    }

    fn images(&self) -> Vec<(Vec<String>, i64)> {
        let mut images: Vec<_> = self
            .0
            .images
            .list()
            .unwrap_or_default()
            .iter()
            .map(|image| {
                let names = image.repo_digests.iter().chain(&image.repo_tags).cloned().collect();
                (names, i64::try_from(image.size_bytes).unwrap_or(i64::MAX))
            })
            .collect();
        images.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
        images
    }

    fn volumes_in_use(&self) -> Vec<String> {
        self.0.csi.volumes_in_use().unwrap_or_else(|error| {
            tracing::error!(%error, "the node cannot tell which volumes it has in use");
            Vec::new()
        })
    }

    fn devices(&self) -> Vec<(String, usize, usize)> {
        self.0.devices.amounts()
    }

    fn news(&self) -> Arc<Notify> {
        self.0.news.clone()
    }
}

//! The Container Runtime Interface v1 (`runtime.v1.RuntimeService` and `ImageService`) on a unix socket, for crictl, critest and
//! a kubelet of somebody else.
//!
//! Requests become the verbs of [`crate::cri`] ([`wanted`]), what is known becomes answers ([`seen`]).

pub mod api;

mod events;
mod images;
mod metrics;
mod networks;
mod routes;
mod runtime;
mod sample;
mod seen;
mod stats;
mod streaming;
mod wanted;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_netns::Network;
use tokio::net::{TcpListener, UnixListener};

use crate::agent::{AgentError, host};
use crate::cgroups::Hierarchy;
use crate::cri::ContainerRuntime;
use crate::grpc::{self, Router};
use crate::images::{ImageStore, StoreOptions};
use crate::names::Layout;
use crate::native::Native;
use crate::supervisor::client::{Client as Supervisor, Launch};
use crate::supervisor::logfile::Limits;
use events::Events;
use images::Images;
use networks::{Own, PodNetwork, Settled};
use runtime::Runtime;
use streaming::Streaming;

pub(crate) use metrics::text as metrics_text;
pub(crate) use stats::samples;

/// The client of the interface rotates logs itself and asks for them to be opened anew.
const NO_ROTATION: Limits = Limits { max_size_bytes: u64::MAX, max_files: 2 };

/// What a daemon that serves nothing but this interface is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket.
    pub socket: PathBuf,
    /// Where files lie.
    pub layout: Layout,
    /// How the supervisor of containers is started.
    pub launch: Launch,
    /// The cgroup of pods whose creator names none, relative to the cgroup2 mount.
    pub cgroup_root: PathBuf,
    /// Where exec, attach and port-forward listen; clients must reach it.
    pub streaming_address: SocketAddr,
    /// The pods' network.
    pub network: coracle_netns::Config,
    /// Mirrors, credentials and certificates of registries, and programs that know credentials.
    pub images: StoreOptions,
}

/// The interface, listening.
pub struct Server {
    runtime: Runtime,
    socket: UnixListener,
    streams: TcpListener,
}

/// What the interface is served over.
pub(crate) struct Parts {
    pub(crate) verbs: Arc<dyn ContainerRuntime>,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) network: Arc<dyn PodNetwork>,
    pub(crate) layout: Layout,
    pub(crate) cgroup_root: PathBuf,
    pub(crate) resolv_conf: PathBuf,
}

impl Parts {
    /// The network of a node that has a control plane.
    pub(crate) fn settled(network: Arc<Network>) -> Arc<dyn PodNetwork> {
        Arc::new(Settled(network))
    }
}

impl Server {
    /// A daemon of its own: starts the supervisor, opens the images, makes the network, takes over what an earlier daemon left.
    ///
    /// # Errors
    /// The part that cannot be had.
    pub async fn start(config: Config) -> Result<Self, AgentError> {
        let Config { socket, layout, launch, cgroup_root, streaming_address, network, images: options } = config;
        let cgroups = Hierarchy::open(&cgroup_root)
            .map_err(host("make the cgroup of all pods (coracle check tells what lacks)"))?;
        let folder = layout.images();
        let images = tokio::task::spawn_blocking(move || ImageStore::open(&folder, options))
            .await
            .map_err(|error| host("open the image store")(io::Error::other(error)))??;
        let resolv_conf = network.resolv_conf.clone();
        let network = Own::new(network).await.map_err(|error| {
            host("make the pod network of this host (coracle check tells what lacks)")(io::Error::other(error))
        })?;
        let supervisor = Supervisor::start(layout.clone(), launch).await?;
        let native = Native::new(
            layout.clone(),
            NO_ROTATION,
            supervisor,
            images.clone(),
            network.clone(),
            cgroups,
            Arc::default(),
        )?;
        let parts = Parts { verbs: Arc::new(native), images, network, layout, cgroup_root, resolv_conf };
        Self::listen(&socket, streaming_address, parts).await
    }

    /// Serves what somebody else has made.
    pub(crate) async fn listen(socket: &Path, streaming: SocketAddr, parts: Parts) -> Result<Self, AgentError> {
        let listener = grpc::bind(socket).await.map_err(host(format!("listen at {}", socket.display())))?;
        let (streaming, streams) = Streaming::bind(streaming, parts.verbs.clone())
            .await
            .map_err(host(format!("listen on {streaming} for exec, attach and port-forward")))?;
        let runtime = Runtime {
            events: Events::new(parts.verbs.clone(), parts.images.clone()),
            images: Images { store: parts.images, folder: parts.layout.images() },
            verbs: parts.verbs,
            streaming,
            network: parts.network,
            cgroup_root: parts.cgroup_root,
            resolv_conf: parts.resolv_conf,
            run_dir: parts.layout.run,
        };
        Ok(Self { runtime, socket: listener, streams })
    }

    /// Serves until dropped; containers run on.
    ///
    /// # Errors
    /// When a listener breaks.
    pub async fn run(self) -> io::Result<()> {
        let Self { runtime, socket, streams } = self;
        let router = runtime.images.routes(runtime.routes(Router::default()));
        let (streaming, events) = (runtime.streaming.clone(), runtime.events.clone());
        tokio::try_join!(grpc::serve(socket, router), streaming.serve(streams), async {
            events.follow().await;
            Err(io::Error::other("the supervisor's events have ended"))
        })
        .map(|((), (), ())| ())
    }
}

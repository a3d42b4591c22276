//! The pods' network of a daemon that only serves this interface, whose pod ranges the cluster may tell later.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use coracle_netns::{Config, Network};
use ipnet::IpNet;
use parking_lot::RwLock;

use crate::agent::Networks;
use crate::cri::Result as VerbResult;
use crate::names::PodKey;
use crate::native::network::{PodNetwork as Made, PodNetworks};

/// What this interface asks of the pods' network.
#[async_trait]
pub(crate) trait PodNetwork: Send + Sync + 'static {
    /// What keeps it from working; `None` when nothing does.
    fn trouble(&self) -> Option<String>;
    /// The ranges of pods' addresses.
    fn ranges(&self) -> Vec<IpNet>;
    /// Sets them, or says why not.
    async fn set_ranges(&self, ranges: Vec<IpNet>) -> Result<(), String>;
}

/// A network whose ranges are settled by somebody else.
pub(crate) struct Settled(pub(crate) Arc<Network>);

#[async_trait]
impl PodNetwork for Settled {
    fn trouble(&self) -> Option<String> {
        None
    }

    fn ranges(&self) -> Vec<IpNet> {
        self.0.config().pod_cidrs.clone()
    }

    async fn set_ranges(&self, ranges: Vec<IpNet>) -> Result<(), String> {
        if ranges == self.ranges() {
            return Ok(());
        }
        Err(format!("this node's pods have the ranges {:?}, set by its control plane", self.ranges()))
    }
}

/// A network made by ourselves. Its ranges are kept in a file, so that the next daemon has them.
pub(super) struct Own {
    file: PathBuf,
    network: RwLock<Arc<Network>>,
}

impl Own {
    /// Makes the network, with the ranges told by the cluster earlier if there are such.
    pub(super) async fn new(mut config: Config) -> Result<Arc<Self>, String> {
        let file = config.run_dir.join("pod-cidr");
        if let Ok(text) = fs::read_to_string(&file) {
            let ranges: Result<Vec<IpNet>, _> = text.trim().split(',').map(str::parse).collect();
            let ranges = ranges.map_err(|error| format!("{}: {error}", file.display()))?;
            (config.pod_cidrs, config.cluster_cidrs) = (ranges.clone(), ranges);
        }
        let network = make(config).await?;
        Ok(Arc::new(Self { file, network: RwLock::new(network) }))
    }

    fn current(&self) -> Arc<Network> {
        self.network.read().clone()
    }
}

async fn make(config: Config) -> Result<Arc<Network>, String> {
    let made = tokio::task::spawn_blocking(move || Network::new(config)).await.map_err(|error| error.to_string())?;
    let network = made.map_err(|error| error.to_string())?;
    // There are no Services here: all that is to be known is known.
    network.update(Vec::new()).await.map_err(|error| error.to_string())?;
    Ok(network)
}

#[async_trait]
impl PodNetwork for Own {
    fn trouble(&self) -> Option<String> {
        None
    }

    fn ranges(&self) -> Vec<IpNet> {
        self.current().config().pod_cidrs.clone()
    }

    async fn set_ranges(&self, ranges: Vec<IpNet>) -> Result<(), String> {
        let old = self.current();
        if ranges == old.config().pod_cidrs {
            return Ok(());
        }
        if !old.pods().is_empty() {
            return Err(format!("pods have addresses of {:?}: remove them first", old.config().pod_cidrs));
        }
        let config = Config { pod_cidrs: ranges.clone(), cluster_cidrs: ranges.clone(), ..old.config().clone() };
        let new = tokio::task::spawn_blocking(move || old.destroy().map_err(|error| error.to_string()));
        new.await.map_err(|error| error.to_string())??;
        let text: Vec<_> = ranges.iter().map(ToString::to_string).collect();
        fs::create_dir_all(&config.run_dir)
            .and_then(|()| fs::write(&self.file, text.join(",")))
            .map_err(|error| format!("write {}: {error}", self.file.display()))?;
        *self.network.write() = make(config).await?;
        Ok(())
    }
}

#[async_trait]
impl PodNetworks for Own {
    async fn setup(&self, pod: &PodKey, net: coracle_netns::PodNet) -> VerbResult<Made> {
        Networks(self.current()).setup(pod, net).await
    }

    async fn teardown(&self, pod: &PodKey) -> VerbResult<()> {
        Networks(self.current()).teardown(pod).await
    }
}

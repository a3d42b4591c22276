//! The Container Storage Interface: drivers that registered themselves on this node, and the volumes that they make.
//!
//! What a volume needs to be taken down again is written beside it before anything is asked of its driver ([`record`]), so a
//! daemon that starts anew, at any point, knows what there is.

pub mod api;
mod driver;
mod node_objects;
mod paths;
mod record;
mod volume;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Notify;

pub(crate) use driver::{Driver, Words};
pub(crate) use volume::Wanted;

use crate::names::Layout;
use crate::plugins;
use crate::volumes::VolumeError;
use node_objects::NodeObjects;

/// Drivers on one node (`CSINode.spec.drivers` holds no more in practice; a bound, not a wish).
const MAX_DRIVERS: usize = 128;

/// The drivers of this node. Cheap to clone.
#[derive(Clone)]
pub struct Csi(Arc<Inner>);

struct Inner {
    layout: Layout,
    node: String,
    boot_id: String,
    objects: Option<NodeObjects>,
    drivers: Mutex<BTreeMap<String, Arc<Driver>>>,
    volumes: volume::Locks,
    /// Rung when `status.volumesInUse` may have changed.
    in_use: Arc<Notify>,
}

impl Csi {
    /// The drivers of a node that is known to the API by this name.
    pub fn new(layout: Layout, client: kube::Client, node: &str, boot_id: &str, in_use: Arc<Notify>) -> Self {
        let objects = Some(NodeObjects::new(client, node));
        Self::with(layout, objects, node, boot_id, in_use)
    }

    /// No drivers, for a node that is taken down: what drivers mounted is unmounted without them.
    pub fn without_drivers(layout: Layout) -> Self {
        Self::with(layout, None, "", "", Arc::default())
    }

    fn with(layout: Layout, objects: Option<NodeObjects>, node: &str, boot_id: &str, in_use: Arc<Notify>) -> Self {
        let (node, boot_id) = (node.to_owned(), boot_id.to_owned());
        let (drivers, volumes) = Default::default();
        Self(Arc::new(Inner { layout, node, boot_id, objects, drivers, volumes, in_use }))
    }

    /// Makes the node's CSINode object, which the scheduler and others look for. Tried until it is there.
    pub async fn announce(&self) {
        if let Some(objects) = &self.0.objects {
            objects.announce().await;
        }
    }

    /// A registered driver.
    pub(crate) fn driver(&self, name: &str) -> Result<Arc<Driver>, VolumeError> {
        self.0.drivers.lock().get(name).cloned().ok_or_else(|| VolumeError::NoDriver { driver: name.to_owned() })
    }
}

#[async_trait]
impl plugins::Kind for Csi {
    fn word(&self) -> &'static str {
        "CSIPlugin"
    }

    async fn register(&self, plugin: &plugins::Plugin) -> Result<(), String> {
        let is_v1 = |version: &String| version.trim_start_matches('v').split('.').next() == Some("1");
        if !plugin.versions.iter().any(is_v1) {
            return Err(format!("this node speaks CSI 1, the driver {}", plugin.versions.join(", ")));
        }
        if self.0.drivers.lock().len() >= MAX_DRIVERS {
            return Err(format!("this node takes no more than {MAX_DRIVERS} drivers"));
        }
        let (driver, info) =
            Driver::connect(&plugin.name, &plugin.endpoint).await.map_err(|error| error.to_string())?;
        if info.node_id.is_empty() {
            return Err(format!("driver {} has no name for this node", plugin.name));
        }
        if let Some(objects) = &self.0.objects {
            objects.add(&plugin.name, &info).await.map_err(|error| format!("tell of the driver: {error}"))?;
        }
        self.0.drivers.lock().insert(plugin.name.clone(), Arc::new(driver));
        Ok(())
    }

    async fn forget(&self, name: &str, endpoint: &Path) {
        {
            let mut drivers = self.0.drivers.lock();
            if drivers.get(name).is_none_or(|driver| driver.endpoint != endpoint) {
                return;
            }
            drivers.remove(name);
        }
        if let Some(objects) = &self.0.objects
            && let Err(error) = objects.remove(name).await
        {
            tracing::warn!(driver = name, %error, "the node's objects still name a driver that is gone");
        }
    }
}

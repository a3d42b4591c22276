//! Devices that plugins of the node (device plugins, `v1beta1`) offer: how many there are, who has which, and what a container
//! needs to use its own.
//!
//! A pod gets its devices when it is admitted, and keeps them until it has ended; who has what is written down before the
//! pod's first container is made.

mod allocate;
pub mod api;
mod checkpoint;
mod plugin;
pub mod pod_resources;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};
use parking_lot::Mutex;
use tokio::sync::Notify;

use checkpoint::Entry;
use plugin::Endpoint;

use crate::names::Layout;
use crate::plugins;

/// How long a pod waits for devices that are about to be free.
const RELEASE_PATIENCE: Duration = Duration::from_secs(10);
/// Kinds of devices of one node.
const MAX_RESOURCES: usize = 256;

/// The devices of this node. Cheap to clone.
#[derive(Clone)]
pub struct Devices(Arc<Inner>);

struct Inner {
    layout: Layout,
    state: Mutex<State>,
    /// Pods get their devices one after the other.
    turn: tokio::sync::Mutex<()>,
    /// Rung when a pod gave devices back.
    freed: Notify,
    /// Rung when capacity or allocatable changed.
    news: Arc<Notify>,
}

#[derive(Default)]
struct State {
    resources: BTreeMap<String, Resource>,
    entries: Vec<Entry>,
}

/// All devices of one name, such as `vendor.com/gpu`.
#[derive(Default)]
struct Resource {
    endpoint: Option<Arc<Endpoint>>,
    devices: BTreeMap<String, Device>,
}

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) healthy: bool,
    /// Memory nodes that it is near to.
    pub(crate) numa: Vec<i64>,
}

impl Devices {
    /// The devices that pods have by what an earlier daemon wrote down; their plugins are to register anew.
    ///
    /// # Errors
    /// When what was written down cannot be read.
    pub fn open(layout: Layout, news: Arc<Notify>) -> std::io::Result<Self> {
        std::fs::create_dir_all(layout.device_plugins())?;
        let (entries, known) = checkpoint::load(&layout)?;
        let lost = |ids: BTreeSet<String>| Resource {
            endpoint: None,
            devices: ids.into_iter().map(|id| (id, Device::default())).collect(),
        };
        let resources = known.into_iter().map(|(name, ids)| (name, lost(ids))).collect();
        let state = Mutex::new(State { resources, entries });
        let (turn, freed) = Default::default();
        Ok(Self(Arc::new(Inner { layout, state, turn, freed, news })))
    }

    /// Takes the calls of plugins until dropped.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub async fn serve(&self) -> std::io::Result<()> {
        plugin::serve(self.clone()).await
    }

    /// Name, capacity and allocatable of each kind.
    pub(crate) fn amounts(&self) -> Vec<(String, usize, usize)> {
        let state = self.0.state.lock();
        let healthy = |resource: &Resource| resource.devices.values().filter(|device| device.healthy).count();
        state.resources.iter().map(|(name, all)| (name.clone(), all.devices.len(), healthy(all))).collect()
    }

    /// All devices by name of their kind.
    pub(crate) fn all(&self) -> BTreeMap<String, BTreeMap<String, Device>> {
        let state = self.0.state.lock();
        state.resources.iter().map(|(name, resource)| (name.clone(), resource.devices.clone())).collect()
    }

    /// Which devices a container has, by name of their kind.
    pub(crate) fn of(&self, pod: &str, container: &str) -> Vec<(String, BTreeSet<String>)> {
        let state = self.0.state.lock();
        let own = state.entries.iter().filter(|entry| entry.pod == pod && entry.container == container);
        own.map(|entry| (entry.resource.clone(), entry.devices.clone())).collect()
    }

    /// Gives a pod the devices that its containers ask for, unless it has them. Of init containers that end the devices are
    /// given on to those after them.
    ///
    /// # Errors
    /// What the pod's status is to say.
    pub(crate) async fn admit(&self, pod: &Pod) -> Result<(), String> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let _turn = self.0.turn.lock().await;
        let spec = pod.spec.as_ref();
        let inits = spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).map(|one| (one, true));
        let apps = spec.iter().flat_map(|spec| spec.containers.iter()).map(|one| (one, false));
        let mut reusable: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (container, is_init) in inits.chain(apps) {
            for (resource, count) in self.wanted(container) {
                let spare = reusable.entry(resource.clone()).or_default();
                let given = match self.given(uid, &container.name, &resource) {
                    Some(given) => given,
                    None => {
                        self.wait_for(&resource, count, spare).await;
                        self.allocate(uid, &container.name, &resource, count, spare).await?
                    }
                };
                let ends = is_init && container.restart_policy.as_deref() != Some("Always");
                if ends {
                    spare.extend(given);
                } else {
                    spare.retain(|device| !given.contains(device));
                }
            }
        }
        Ok(())
    }

    /// Waits for a pod that ends to give devices back: without a grace period its object goes before it, and the scheduler
    /// counts them as free already.
    async fn wait_for(&self, resource: &str, count: usize, spare: &BTreeSet<String>) {
        let enough = async {
            while self.free(resource).len() + spare.len() < count {
                self.0.freed.notified().await;
            }
        };
        // Who has too few then is told so.
        let _ = tokio::time::timeout(RELEASE_PATIENCE, enough).await;
    }

    fn given(&self, pod: &str, container: &str, resource: &str) -> Option<BTreeSet<String>> {
        let own = self.of(pod, container).into_iter();
        own.filter(|(name, _)| name == resource).map(|(_, devices)| devices).next()
    }

    /// What of a container's limits are devices of plugins.
    fn wanted(&self, container: &Container) -> Vec<(String, usize)> {
        let state = self.0.state.lock();
        let limits = container.resources.iter().flat_map(|resources| resources.limits.iter().flatten());
        let known = limits.filter(|(name, _)| state.resources.contains_key(*name));
        known
            .filter_map(|(name, count)| Some((name.clone(), count.0.parse().ok().filter(|count| *count > 0)?)))
            .collect()
    }

    /// Takes back what a pod had.
    pub(crate) fn release(&self, pod: &str) {
        self.retain(|held| held != pod);
    }

    /// Takes back what pods had that this node does not know any more.
    pub(crate) fn retain(&self, known: impl Fn(&str) -> bool) {
        let mut state = self.0.state.lock();
        let before = state.entries.len();
        state.entries.retain(|entry| known(&entry.pod));
        if state.entries.len() == before {
            return;
        }
        self.0.freed.notify_one();
        if let Err(error) = checkpoint::save(&self.0.layout, &state) {
            // The next change writes it; until then a new daemon takes the devices back once more.
            tracing::error!(%error, "which devices are free again is not written down");
        }
    }
}

#[async_trait]
impl plugins::Kind for Devices {
    fn word(&self) -> &'static str {
        "DevicePlugin"
    }

    async fn register(&self, plugin: &plugins::Plugin) -> Result<(), String> {
        if !plugin.versions.iter().any(|version| version == plugin::VERSION) {
            return Err(format!("this node speaks {}, the plugin {}", plugin::VERSION, plugin.versions.join(", ")));
        }
        self.take_in(&plugin.name, &plugin.endpoint, None).await
    }

    async fn forget(&self, name: &str, endpoint: &Path) {
        self.lost(name, endpoint);
    }
}

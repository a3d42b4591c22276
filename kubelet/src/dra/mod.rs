//! Devices that pods claim (resource.k8s.io/v1): their drivers prepare them on this node before a pod's first container is
//! made, and take them back after its last has ended.
//!
//! What is prepared is written down before a driver is asked for it, with the pods that use it, so a daemon that starts anew
//! knows what is to be taken back.

pub mod api;
mod slices;
mod state;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;

pub(crate) use state::Prepared;
use state::State;

use crate::names::Layout;
use crate::{grpc, plugins};

/// For a driver to prepare devices or take them back.
const CALL_TIMEOUT: Duration = Duration::from_secs(45);
/// The service and its version, as drivers name them.
const SERVICE: &str = "v1.DRAPlugin";
/// Drivers on one node.
const MAX_DRIVERS: usize = 128;

/// Why a pod has not its devices, or still has them.
#[derive(Debug, thiserror::Error)]
pub enum DraError {
    /// A claim that cannot be used yet, or not by this pod.
    #[error("resource claim {claim}: {reason}")]
    Claim {
        /// Its name.
        claim: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A driver that did not do what it was asked, or is not there.
    #[error("DRA driver {driver}: {reason}")]
    Driver {
        /// Its name.
        driver: String,
        /// What it says.
        reason: String,
    },
    /// What is prepared cannot be written down.
    #[error("write down what is prepared: {0}")]
    State(#[from] std::io::Error),
}

/// The claimed devices of this node. Cheap to clone.
#[derive(Clone)]
pub struct Dra(Arc<Inner>);

struct Inner {
    client: Client,
    node: String,
    drivers: Mutex<BTreeMap<String, Driver>>,
    state: Mutex<State>,
    /// Preparing and taking back take turns: claims may be shared.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Driver {
    endpoint: PathBuf,
    client: grpc::Client,
}

impl Dra {
    /// What an earlier daemon prepared; drivers are to register anew.
    ///
    /// # Errors
    /// When what was written down cannot be read.
    pub fn open(layout: &Layout, client: Client, node: &str) -> std::io::Result<Self> {
        let state = Mutex::new(State::load(layout)?);
        let (drivers, turn) = Default::default();
        Ok(Self(Arc::new(Inner { client, node: node.to_owned(), drivers, state, turn })))
    }

    /// Removes the slices of drivers that do not come back, until dropped.
    pub async fn clean_up(&self) {
        let registered = || self.0.drivers.lock().keys().cloned().collect::<Vec<_>>();
        slices::remove_stale(&self.0.client, &self.0.node, registered).await;
    }

    fn driver(&self, name: &str) -> Result<Driver, DraError> {
        let found = self.0.drivers.lock().get(name).cloned();
        found.ok_or_else(|| DraError::Driver { driver: name.to_owned(), reason: "it is not registered".into() })
    }

    /// Lets drivers prepare all that a pod claims. Idempotent.
    ///
    /// # Errors
    /// The first claim or driver that is not ready; asking again goes on from there.
    pub(crate) async fn prepare(&self, pod: &Pod) -> Result<(), DraError> {
        let names = claims_of(pod);
        if names.is_empty() {
            return Ok(());
        }
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let namespace = pod.namespace().unwrap_or_default();
        let _turn = self.0.turn.lock().await;
        let api: Api<ResourceClaim> = Api::namespaced(self.0.client.clone(), &namespace);
        for (entry, name) in names {
            let wrong = |reason: &str| DraError::Claim { claim: entry.clone(), reason: reason.to_owned() };
            let name = name.ok_or_else(|| wrong("it has not been created yet"))?;
            let found = api.get_opt(&name).await.map_err(|error| wrong(&error.to_string()))?;
            let claim = found.ok_or_else(|| wrong("not found"))?;
            let status = claim.status.as_ref();
            let users = status.and_then(|status| status.reserved_for.as_ref()).into_iter().flatten();
            if !users.into_iter().any(|user| user.uid == uid) {
                return Err(wrong("it is not reserved for this pod"));
            }
            let allocation = status.and_then(|status| status.allocation.as_ref());
            let devices = allocation
                .and_then(|allocation| allocation.devices.as_ref())
                .ok_or_else(|| wrong("it is not allocated"))?;
            let mut drivers: Vec<String> =
                devices.results.iter().flatten().map(|result| result.driver.clone()).collect();
            drivers.sort();
            drivers.dedup();
            self.prepare_claim(uid, &entry, &claim, &drivers).await?;
        }
        Ok(())
    }

    async fn prepare_claim(
        &self,
        pod: &str,
        entry: &str,
        claim: &ResourceClaim,
        drivers: &[String],
    ) -> Result<(), DraError> {
        let wanted = api::Claim {
            namespace: claim.namespace().unwrap_or_default(),
            uid: claim.uid().unwrap_or_default(),
            name: claim.name_any(),
        };
        self.0.state.lock().begin(&wanted, pod, entry, drivers)?;
        for name in drivers {
            if self.0.state.lock().is_ready(&wanted.uid, name) {
                continue;
            }
            let failed = |reason: String| DraError::Driver { driver: name.clone(), reason };
            let request = api::NodePrepareResourcesRequest { claims: vec![wanted.clone()] };
            let method = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources";
            let call = self.driver(name)?.client;
            let answer: api::NodePrepareResourcesResponse = call
                .call(method, request, CALL_TIMEOUT)
                .await
                .map_err(|status| failed(format!("NodePrepareResources: {}", status.message())))?;
            let own = answer.claims.get(&wanted.uid).cloned();
            let own = own.ok_or_else(|| failed(format!("it did not answer for claim {}", wanted.name)))?;
            if !own.error.is_empty() {
                return Err(failed(format!("NodePrepareResources failed for claim {}: {}", wanted.name, own.error)));
            }
            self.0.state.lock().ready(&wanted.uid, name, own.devices)?;
        }
        Ok(())
    }

    /// What a container uses of what its pod claims.
    pub(crate) fn of(&self, pod: &str, container: &Container) -> Vec<Prepared> {
        let claims = container.resources.iter().flat_map(|resources| resources.claims.iter().flatten());
        let state = self.0.state.lock();
        claims.flat_map(|claim| state.devices(pod, &claim.name, claim.request.as_deref())).collect()
    }

    /// UIDs of the pods that use something.
    pub(crate) fn pods(&self) -> Vec<String> {
        self.0.state.lock().pods()
    }

    /// Lets drivers take back what a pod claimed and no other pod of the node uses. Idempotent.
    ///
    /// # Errors
    /// The first driver that does not; asking again goes on from there.
    pub(crate) async fn unprepare(&self, pod: &str) -> Result<(), DraError> {
        if !self.0.state.lock().uses(pod) {
            return Ok(());
        }
        let _turn = self.0.turn.lock().await;
        let last = self.0.state.lock().leave(pod)?;
        for (claim, drivers) in last {
            for name in drivers {
                let failed = |reason: String| DraError::Driver { driver: name.clone(), reason };
                let request = api::NodeUnprepareResourcesRequest { claims: vec![claim.clone()] };
                let method = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources";
                let call = self.driver(&name)?.client;
                let answer: api::NodeUnprepareResourcesResponse = call
                    .call(method, request, CALL_TIMEOUT)
                    .await
                    .map_err(|status| failed(format!("NodeUnprepareResources: {}", status.message())))?;
                let error = answer.claims.get(&claim.uid).map(|own| own.error.clone()).unwrap_or_default();
                if !error.is_empty() {
                    let name = &claim.name;
                    return Err(failed(format!("NodeUnprepareResources failed for claim {name}: {error}")));
                }
            }
            self.0.state.lock().forget(&claim.uid)?;
        }
        Ok(())
    }
}

/// The claims of a pod: its own name of each, and that of the object once there is one.
fn claims_of(pod: &Pod) -> Vec<(String, Option<String>)> {
    let entries = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
    let made = || pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let claim = |entry: &k8s_openapi::api::core::v1::PodResourceClaim| match &entry.resource_claim_name {
        Some(name) => Some((entry.name.clone(), Some(name.clone()))),
        None => match made().find(|made| made.name == entry.name) {
            // A template may turn out to need no claim.
            Some(made) => made.resource_claim_name.clone().map(|name| (entry.name.clone(), Some(name))),
            None => Some((entry.name.clone(), None)),
        },
    };
    entries.filter_map(claim).collect()
}

#[async_trait]
impl plugins::Kind for Dra {
    fn word(&self) -> &'static str {
        "DRAPlugin"
    }

    async fn register(&self, plugin: &plugins::Plugin) -> Result<(), String> {
        if !plugin.versions.iter().any(|version| version == SERVICE) {
            return Err(format!("this node speaks {SERVICE}, the driver {}", plugin.versions.join(", ")));
        }
        let client = grpc::Client::connect(&plugin.endpoint).await.map_err(|status| status.message().to_owned())?;
        let mut drivers = self.0.drivers.lock();
        if drivers.len() >= MAX_DRIVERS && !drivers.contains_key(&plugin.name) {
            return Err(format!("this node takes no more than {MAX_DRIVERS} drivers"));
        }
        drivers.insert(plugin.name.clone(), Driver { endpoint: plugin.endpoint.clone(), client });
        Ok(())
    }

    async fn forget(&self, name: &str, endpoint: &Path) {
        let gone = {
            let mut drivers = self.0.drivers.lock();
            let own = drivers.get(name).is_some_and(|driver| driver.endpoint == endpoint);
            own && drivers.remove(name).is_some()
        };
        if gone {
            let (dra, name) = (self.clone(), name.to_owned());
            tokio::spawn(async move {
                let is_back = || dra.0.drivers.lock().contains_key(&name);
                slices::remove_of(&dra.0.client, &dra.0.node, &name, is_back).await;
            });
        }
    }
}

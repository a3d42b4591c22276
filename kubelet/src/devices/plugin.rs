//! One plugin: its registration, the stream of its devices, its end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use super::{Device, Devices, MAX_RESOURCES, api, checkpoint};
use crate::grpc::{self, Client, Router};

/// The version of the interface.
pub(super) const VERSION: &str = "v1beta1";
/// For a plugin to answer.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the devices of a plugin that is gone still count as the node's (`endpointStopGracePeriod`).
const GONE_GRACE: Duration = Duration::from_secs(300);

/// A plugin that runs.
pub(super) struct Endpoint {
    pub(super) socket: PathBuf,
    pub(super) client: Client,
    pub(super) options: api::DevicePluginOptions,
}

/// Takes registrations.
pub(super) async fn serve(devices: Devices) -> std::io::Result<()> {
    let folder = devices.0.layout.device_plugins();
    let listener = grpc::bind(&folder.join("kubelet.sock")).await?;
    let router = Router::default().unary("/v1beta1.Registration/Register", move |request: api::RegisterRequest| {
        let devices = devices.clone();
        async move {
            if request.version != VERSION {
                return Err(Status::invalid_argument(format!(
                    "this node speaks {VERSION}, the plugin {}",
                    request.version
                )));
            }
            if request.endpoint.is_empty() || request.endpoint.contains('/') {
                return Err(Status::invalid_argument(format!("{:?} is no name of a socket", request.endpoint)));
            }
            let socket = devices.0.layout.device_plugins().join(&request.endpoint);
            // The plugin answers only after this call is over.
            tokio::spawn(async move {
                if let Err(error) = devices.take_in(&request.resource_name, &socket, request.options).await {
                    tracing::warn!(resource = request.resource_name, error, "device plugin is not taken in");
                }
            });
            Ok(api::Empty {})
        }
    });
    grpc::serve(listener, router).await
}

impl Devices {
    /// Connects to a plugin and follows its devices; one that it had before under this name is replaced.
    pub(super) async fn take_in(
        &self,
        resource: &str,
        socket: &Path,
        options: Option<api::DevicePluginOptions>,
    ) -> Result<(), String> {
        let extended = resource.split_once('/').is_some_and(|(domain, name)| !domain.is_empty() && !name.is_empty());
        if !extended || resource.starts_with("kubernetes.io/") {
            return Err(format!("{resource:?} is no name of an extended resource"));
        }
        let failed = |status: Status| status.message().to_owned();
        let client = Client::connect(socket).await.map_err(failed)?;
        let options = match options {
            Some(options) => options,
            None => {
                let method = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
                client.call(method, api::Empty {}, ANSWER_TIMEOUT).await.map_err(failed)?
            }
        };
        let method = "/v1beta1.DevicePlugin/ListAndWatch";
        let mut stream = client.stream::<_, api::ListAndWatchResponse>(method, api::Empty {}).await.map_err(failed)?;
        let endpoint = Arc::new(Endpoint { socket: socket.to_owned(), client, options });
        {
            let mut state = self.0.state.lock();
            if state.resources.len() >= MAX_RESOURCES && !state.resources.contains_key(resource) {
                return Err(format!("this node knows no more than {MAX_RESOURCES} kinds of devices"));
            }
            state.resources.entry(resource.to_owned()).or_default().endpoint = Some(endpoint.clone());
        }
        tracing::info!(resource, socket = %socket.display(), "device plugin is registered");
        let (devices, resource) = (self.clone(), resource.to_owned());
        tokio::spawn(async move {
            while let Ok(Some(answer)) = stream.message().await {
                if !devices.update(&resource, &endpoint, answer.devices) {
                    return;
                }
            }
            devices.gone(&resource, &endpoint);
        });
        Ok(())
    }

    fn is_current(&self, resource: &str, endpoint: &Arc<Endpoint>) -> bool {
        let state = self.0.state.lock();
        let current = state.resources.get(resource).and_then(|resource| resource.endpoint.as_ref());
        current.is_some_and(|current| Arc::ptr_eq(current, endpoint))
    }

    /// Takes the plugin's list; false when another plugin has its place.
    fn update(&self, resource: &str, endpoint: &Arc<Endpoint>, list: Vec<api::Device>) -> bool {
        if !self.is_current(resource, endpoint) {
            return false;
        }
        let device = |device: api::Device| {
            let numa = device.topology.into_iter().flat_map(|topology| topology.nodes).map(|node| node.id).collect();
            (device.id, Device { healthy: device.health == "Healthy", numa })
        };
        let list: BTreeMap<String, Device> = list.into_iter().map(device).collect();
        let mut state = self.0.state.lock();
        if let Some(known) = state.resources.get_mut(resource) {
            known.devices = list;
        }
        if let Err(error) = checkpoint::save(&self.0.layout, &state) {
            tracing::error!(resource, %error, "the devices of a plugin are not written down");
        }
        drop(state);
        self.0.news.notify_one();
        true
    }

    /// The plugin at this socket is gone.
    pub(super) fn lost(&self, resource: &str, socket: &Path) {
        let endpoint = self.0.state.lock().resources.get(resource).and_then(|known| known.endpoint.clone());
        if let Some(endpoint) = endpoint.filter(|endpoint| endpoint.socket == socket) {
            self.gone(resource, &endpoint);
        }
    }

    /// Its devices can be given to nobody any more; after a while they are not the node's.
    fn gone(&self, resource: &str, endpoint: &Arc<Endpoint>) {
        if !self.is_current(resource, endpoint) {
            return;
        }
        tracing::warn!(resource, socket = %endpoint.socket.display(), "device plugin is gone");
        if let Some(known) = self.0.state.lock().resources.get_mut(resource) {
            known.endpoint = None;
            known.devices.values_mut().for_each(|device| device.healthy = false);
        }
        self.0.news.notify_one();
        let (devices, resource) = (self.clone(), resource.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(GONE_GRACE).await;
            let mut state = devices.0.state.lock();
            if let Some(known) = state.resources.get_mut(&resource).filter(|known| known.endpoint.is_none()) {
                known.devices.clear();
                devices.0.news.notify_one();
            }
        });
    }
}

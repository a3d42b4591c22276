//! Takes a node down: every container, mount, network object and cgroup of ours, and the supervisor. What must survive a
//! reboot (images, the cluster's state) stays.

use std::fs;
use std::io;
use std::sync::Arc;

use coracle_netns::Network;

use crate::Config;
use crate::agent::{AgentError, Networks, host};
use crate::cgroups::Hierarchy;
use crate::cri::ContainerRuntime;
use crate::csi::Csi;
use crate::images::{ImageStore, StoreOptions};
use crate::native::Native;
use crate::supervisor::client::{Client as Supervisor, Launch};
use crate::supervisor::logfile::Limits;
use crate::volumes::{Allocatable, ObjectCache, Volumes, VolumesConfig};

/// Ends all pods of this host and removes what they leave behind. The daemon must not run.
///
/// # Errors
/// The first thing that cannot be removed; calling it again goes on from there.
pub async fn cleanup(config: &Config, network: Arc<Network>) -> Result<(), AgentError> {
    let layout = &config.layout;
    let cgroups = Hierarchy::open(&config.cgroup_root).map_err(host("open the cgroup of all pods"))?;
    let launch = Launch { executable: config.executable.clone(), arguments: config.supervisor_arguments.clone() };
    fs::create_dir_all(&layout.run).map_err(host("make the run folder"))?;
    let supervisor = Supervisor::start(layout.clone(), launch).await?;
    let images = ImageStore::open(&layout.images(), StoreOptions::default())?;
    let limits =
        Limits { max_size_bytes: config.container_log_max_size_bytes, max_files: config.container_log_max_files };
    let networks = Arc::new(Networks(network.clone()));
    let native = Native::new(
        layout.clone(),
        limits,
        supervisor.clone(),
        images.clone(),
        networks,
        cgroups.clone(),
        Arc::default(),
    )?;
    for sandbox in native.list_pod_sandboxes().await? {
        native.stop_pod_sandbox(&sandbox.id).await?;
        native.remove_pod_sandbox(&sandbox.id).await?;
    }
    // No volume is set up here, so the API is never asked: any address does.
    let nowhere = kube::Config::new(http::Uri::from_static("https://localhost"));
    let client = kube::Client::try_from(nowhere).map_err(|error| host("prepare a client")(io::Error::other(error)))?;
    let allocatable = Arc::new(|| Allocatable { cpu_millis: 0, memory_bytes: 0, ephemeral_storage_bytes: 0 });
    let csi = Csi::without_drivers(layout.clone());
    let config_of_volumes = VolumesConfig { layout: layout.clone(), images, csi, allocatable };
    let volumes = Volumes::new(config_of_volumes, ObjectCache::new(client));
    let failed = |error: crate::volumes::VolumeError| host("remove the volumes of a pod")(io::Error::other(error));
    for uid in volumes.known_pods().map_err(failed)? {
        volumes.teardown(&uid).await.map_err(failed)?;
        fs::remove_dir_all(layout.pod(&uid)).map_err(host("remove the folder of a pod"))?;
    }
    crate::volumes::unmount_all(&layout.kubelet).map_err(failed)?;
    tokio::task::spawn_blocking(move || network.destroy())
        .await
        .map_err(|error| host("remove the pod network")(io::Error::other(error)))?
        .map_err(|error| host("remove the pod network")(io::Error::other(error)))?;
    supervisor.end().map_err(host("end the supervisor"))?;
    cgroups.remove(&config.cgroup_root).map_err(host("remove the cgroup of all pods"))?;
    match fs::remove_dir_all(&layout.run) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host("remove the run folder")(error)),
        _ => Ok(()),
    }
}

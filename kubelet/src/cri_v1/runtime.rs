//! `RuntimeService`: each call is one method; [`Runtime::routes`] is the table of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tonic::Status;

use super::events::Events;
use super::images::Images;
use super::networks::PodNetwork;
use super::streaming::{Session, Streaming};
use super::{api, seen, wanted};
use crate::cri::{ContainerRuntime, ContainerState, ContainerStatus, NamespaceMode, RuntimeError, SandboxStatus};
use crate::names::{ContainerId, RUNTIME_NAME};
use crate::native::HANDLERS;
use crate::native::namespaces::user_namespaces_work;
use crate::streaming::Request;

/// The version of the interface.
pub(super) const API_VERSION: &str = "v1";
/// The version that clients of the interface are told for its first field, as other runtimes say.
const KUBELET_API_VERSION: &str = "0.1.0";
/// Words of one command.
const MAX_COMMAND_WORDS: usize = 4096;

/// The containers of this node over the interface.
#[derive(Clone)]
pub(super) struct Runtime {
    pub(super) verbs: Arc<dyn ContainerRuntime>,
    pub(super) images: Images,
    pub(super) streaming: Streaming,
    pub(super) events: Events,
    pub(super) network: Arc<dyn PodNetwork>,
    /// The cgroup of pods whose creator names none, relative to the cgroup2 mount.
    pub(super) cgroup_root: PathBuf,
    /// The host's resolver file.
    pub(super) resolv_conf: PathBuf,
    /// Folder of running containers' state, for `Status`.
    pub(super) run_dir: PathBuf,
}

type Result<T> = std::result::Result<T, Status>;

/// An error of the verbs in the codes of gRPC.
pub(super) fn failed(error: RuntimeError) -> Status {
    let text = error.to_string();
    match error {
        RuntimeError::NotFound { .. } => Status::not_found(text),
        RuntimeError::WrongState { .. } => Status::failed_precondition(text),
        RuntimeError::Invalid(_) => Status::invalid_argument(text),
        RuntimeError::DeadlineExceeded { .. } => Status::deadline_exceeded(text),
        RuntimeError::Supervisor(_) => Status::unavailable(text),
        _ => Status::unknown(text),
    }
}

fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

/// Whether an id is the one asked for; clients may shorten it.
pub(super) fn id_fits(filter: &str, id: &ContainerId) -> bool {
    filter.is_empty() || id.as_str().starts_with(filter)
}

/// Whether all wanted labels are there.
pub(super) fn labels_fit(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The one id that begins with `text`.
fn unique<'a>(what: &str, text: &str, ids: impl Iterator<Item = &'a ContainerId>) -> Result<ContainerId> {
    if text.is_empty() {
        return Err(Status::invalid_argument(format!("no {what} is named")));
    }
    let mut found = ids.filter(|id| id.as_str().starts_with(text));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id.clone()),
        (Some(_), Some(_)) => Err(Status::invalid_argument(format!("{what} id {text} is ambiguous"))),
        _ => Err(Status::not_found(format!("{what} {text} not found"))),
    }
}

/// `Ok(None)` instead of an error that says that there is nothing: for calls that are happy then.
fn known<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

impl Runtime {
    pub(super) async fn sandbox(&self, id: &str) -> Result<SandboxStatus> {
        let all = self.verbs.list_pod_sandboxes().await.map_err(failed)?;
        let id = unique("sandbox", id, all.iter().map(|sandbox| &sandbox.id))?;
        self.verbs.pod_sandbox_status(&id).await.map_err(failed)
    }

    pub(super) async fn container(&self, id: &str) -> Result<ContainerStatus> {
        if let Some(full) = ContainerId::parse(id) {
            return self.verbs.container_status(&full).await.map_err(failed);
        }
        let all = self.verbs.list_containers().await.map_err(failed)?;
        let id = unique("container", id, all.iter().map(|container| &container.id))?;
        self.verbs.container_status(&id).await.map_err(failed)
    }

    async fn running(&self, id: &str) -> Result<ContainerStatus> {
        let status = self.container(id).await?;
        if status.state == ContainerState::Running {
            return Ok(status);
        }
        Err(Status::failed_precondition(format!("container {id} is not running: it is {:?}", status.state)))
    }

    // ---- the runtime itself ------------------------------------------------------------------------------------------

    pub(super) async fn version(&self, _: api::VersionRequest) -> Result<api::VersionResponse> {
        Ok(api::VersionResponse {
            version: KUBELET_API_VERSION.into(),
            runtime_name: RUNTIME_NAME.into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: API_VERSION.into(),
        })
    }

    pub(super) async fn status(&self, request: api::StatusRequest) -> Result<api::StatusResponse> {
        let condition = |r#type: &str, trouble: Option<String>| api::RuntimeCondition {
            r#type: r#type.into(),
            status: trouble.is_none(),
            reason: if trouble.is_some() { format!("{type}Failed").replace("Ready", "") } else { String::new() },
            message: trouble.unwrap_or_default(),
        };
        let listed = self.verbs.list_pod_sandboxes().await;
        let conditions = vec![
            condition("RuntimeReady", listed.err().map(|error| error.to_string())),
            condition("NetworkReady", self.network.trouble()),
        ];
        let features =
            api::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: user_namespaces_work() };
        let mut info = BTreeMap::new();
        if request.verbose {
            let config = json!({
                "stateDir": self.run_dir, "imageDir": self.images.folder, "cgroupRoot": self.cgroup_root,
                "podCIDRs": self.network.ranges(),
            });
            info.insert("config".to_owned(), config.to_string());
        }
        Ok(api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions }),
            info,
            runtime_handlers: HANDLERS
                .map(|name| api::RuntimeHandler { name: name.into(), features: Some(features.clone()) })
                .into(),
            features: Some(api::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        })
    }

    pub(super) async fn runtime_config(&self, _: api::RuntimeConfigRequest) -> Result<api::RuntimeConfigResponse> {
        let linux = api::LinuxRuntimeConfiguration { cgroup_driver: api::CgroupDriver::Cgroupfs as i32 };
        Ok(api::RuntimeConfigResponse { linux: Some(linux) })
    }

    pub(super) async fn update_runtime_config(
        &self,
        request: api::UpdateRuntimeConfigRequest,
    ) -> Result<api::UpdateRuntimeConfigResponse> {
        let network = request.runtime_config.and_then(|config| config.network_config).unwrap_or_default();
        if network.pod_cidr.is_empty() {
            return Ok(Default::default());
        }
        let ranges = network.pod_cidr.split(',').map(|range| {
            range.trim().parse().map_err(|_| Status::invalid_argument(format!("pod CIDR {range} is no address range")))
        });
        self.network.set_ranges(ranges.collect::<Result<_>>()?).await.map_err(Status::failed_precondition)?;
        Ok(Default::default())
    }

    pub(super) async fn checkpoint(
        &self,
        _: api::CheckpointContainerRequest,
    ) -> Result<api::CheckpointContainerResponse> {
        Err(Status::unimplemented("checkpoints of containers are not supported"))
    }

    // ---- sandboxes ---------------------------------------------------------------------------------------------------

    pub(super) async fn run_pod_sandbox(
        &self,
        request: api::RunPodSandboxRequest,
    ) -> Result<api::RunPodSandboxResponse> {
        if !HANDLERS.contains(&request.runtime_handler.as_str()) {
            return Err(Status::invalid_argument(format!("no runtime for handler {:?}", request.runtime_handler)));
        }
        let config = request.config.ok_or_else(|| Status::invalid_argument("no configuration of the sandbox"))?;
        let config = wanted::sandbox(config, &request.runtime_handler, &self.cgroup_root, &self.resolv_conf)?;
        if !config.log_directory.as_os_str().is_empty() {
            std::fs::create_dir_all(&config.log_directory)
                .map_err(|error| Status::unknown(format!("create {}: {error}", config.log_directory.display())))?;
        }
        let uid = config.pod.as_ref().map(|pod| pod.uid.clone()).unwrap_or_default();
        let id = ContainerId::derive(&uid, "", config.attempt);
        if known(self.sandbox(id.as_str()).await)?.is_some_and(|sandbox| sandbox.ready) {
            return Err(Status::already_exists(format!("a sandbox of this UID and attempt exists already: {id}")));
        }
        let made = self.verbs.run_pod_sandbox(config).await;
        if made.is_err()
            && let Err(error) = self.verbs.remove_pod_sandbox(&id).await
        {
            tracing::warn!(sandbox = %id, %error, "what is left of a sandbox that failed stays until it is removed");
        }
        let sandbox = made.map_err(failed)?;
        self.events.sandbox(&sandbox, api::ContainerEventType::Created);
        self.events.sandbox(&sandbox, api::ContainerEventType::Started);
        Ok(api::RunPodSandboxResponse { pod_sandbox_id: sandbox.id.to_string() })
    }

    pub(super) async fn stop_pod_sandbox(
        &self,
        request: api::StopPodSandboxRequest,
    ) -> Result<api::StopPodSandboxResponse> {
        let Some(sandbox) = known(self.sandbox(&request.pod_sandbox_id).await)? else { return Ok(Default::default()) };
        self.verbs.stop_pod_sandbox(&sandbox.id).await.map_err(failed)?;
        if sandbox.ready {
            self.events.sandbox(&SandboxStatus { ready: false, ..sandbox }, api::ContainerEventType::Stopped);
        }
        Ok(Default::default())
    }

    pub(super) async fn remove_pod_sandbox(
        &self,
        request: api::RemovePodSandboxRequest,
    ) -> Result<api::RemovePodSandboxResponse> {
        let Some(sandbox) = known(self.sandbox(&request.pod_sandbox_id).await)? else { return Ok(Default::default()) };
        for container in self.members(&sandbox.id).await? {
            self.verbs.remove_container(&container.id).await.map_err(failed)?;
            self.events.container(&container, api::ContainerEventType::Deleted).await;
        }
        self.verbs.remove_pod_sandbox(&sandbox.id).await.map_err(failed)?;
        self.events.sandbox(&SandboxStatus { ready: false, ..sandbox }, api::ContainerEventType::Deleted);
        Ok(Default::default())
    }

    pub(super) async fn members(&self, sandbox: &ContainerId) -> Result<Vec<ContainerStatus>> {
        let mut all = self.verbs.list_containers().await.map_err(failed)?;
        all.retain(|container| container.sandbox == *sandbox);
        Ok(all)
    }

    pub(super) async fn pod_sandbox_status(
        &self,
        request: api::PodSandboxStatusRequest,
    ) -> Result<api::PodSandboxStatusResponse> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        let members = self.members(&sandbox.id).await?;
        let mut info = BTreeMap::new();
        if request.verbose {
            let more = json!({"config": sandbox.config, "networkNamespace": sandbox.network_namespace});
            info.insert("info".to_owned(), more.to_string());
        }
        Ok(api::PodSandboxStatusResponse {
            status: Some(seen::sandbox_status(&sandbox)),
            info,
            containers_statuses: members.iter().map(|c| seen::container_status(c, &self.images.store)).collect(),
            timestamp: crate::supervisor::container::now(),
        })
    }

    pub(super) async fn sandboxes(&self, filter: Option<api::PodSandboxFilter>) -> Result<Vec<api::PodSandbox>> {
        let filter = filter.unwrap_or_default();
        let all = self.verbs.list_pod_sandboxes().await.map_err(failed)?;
        let rows = all.iter().filter(|sandbox| id_fits(&filter.id, &sandbox.id)).map(seen::sandbox);
        Ok(rows
            .filter(|row| filter.state.as_ref().is_none_or(|wanted| wanted.state == row.state))
            .filter(|row| labels_fit(&filter.label_selector, &row.labels))
            .collect())
    }

    pub(super) async fn update_sandbox(
        &self,
        request: api::UpdatePodSandboxResourcesRequest,
    ) -> Result<api::UpdatePodSandboxResourcesResponse> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        let resources = wanted::resources(request.resources.unwrap_or_default())?;
        self.verbs.update_pod_sandbox_resources(&sandbox.id, &resources).await.map_err(failed)?;
        Ok(Default::default())
    }

    // ---- containers --------------------------------------------------------------------------------------------------

    pub(super) async fn create_container(
        &self,
        request: api::CreateContainerRequest,
    ) -> Result<api::CreateContainerResponse> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        if !sandbox.ready {
            return Err(Status::failed_precondition(format!("sandbox {} is not ready", sandbox.id)));
        }
        let config = request.config.ok_or_else(|| Status::invalid_argument("no configuration of the container"))?;
        let name = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        let image = self.stored(&name)?;
        let all = self.verbs.list_containers().await.map_err(failed)?;
        let target = |id: &str| unique("target container", id, all.iter().map(|container| &container.id));
        let mut config = wanted::container(config, image, &sandbox.config, target)?;
        for mount in &mut config.mounts {
            match &mut mount.image {
                Some(image) => image.image_id = self.stored(&image.image_id)?,
                // As Docker did, and every runtime since: a folder of the host that is missing is made.
                None if !mount.host_path.exists() => std::fs::create_dir_all(&mount.host_path).map_err(|error| {
                    Status::unknown(format!("failed to mkdir {}: {error}", mount.host_path.display()))
                })?,
                None => {}
            }
        }
        let uid = sandbox.config.pod.as_ref().map(|pod| pod.uid.as_str()).unwrap_or_default();
        let id = ContainerId::derive(uid, &config.name, config.attempt);
        if all.iter().any(|container| container.id == id) {
            return Err(Status::already_exists(format!("a container of this name and attempt exists already: {id}")));
        }
        let id = self.verbs.create_container(&sandbox.id, config).await.map_err(failed)?;
        self.told(&id, api::ContainerEventType::Created).await;
        Ok(api::CreateContainerResponse { container_id: id.to_string() })
    }

    /// The id of an image that must be there.
    fn stored(&self, name: &str) -> Result<String> {
        match self.images.resolve(name)? {
            Some(image) => Ok(image.id.clone()),
            None => Err(Status::not_found(format!("image {name:?} is not present: pull it first"))),
        }
    }

    async fn told(&self, id: &ContainerId, what: api::ContainerEventType) {
        if let Ok(status) = self.verbs.container_status(id).await {
            self.events.container(&status, what).await;
        }
    }

    pub(super) async fn start_container(
        &self,
        request: api::StartContainerRequest,
    ) -> Result<api::StartContainerResponse> {
        let status = self.container(&request.container_id).await?;
        self.verbs.start_container(&status.id).await.map_err(failed)?;
        self.told(&status.id, api::ContainerEventType::Started).await;
        Ok(Default::default())
    }

    pub(super) async fn stop_container(
        &self,
        request: api::StopContainerRequest,
    ) -> Result<api::StopContainerResponse> {
        let Some(status) = known(self.container(&request.container_id).await)? else { return Ok(Default::default()) };
        self.verbs.stop_container(&status.id, seconds(request.timeout)).await.map_err(failed)?;
        Ok(Default::default())
    }

    pub(super) async fn remove_container(
        &self,
        request: api::RemoveContainerRequest,
    ) -> Result<api::RemoveContainerResponse> {
        let Some(status) = known(self.container(&request.container_id).await)? else { return Ok(Default::default()) };
        self.verbs.remove_container(&status.id).await.map_err(failed)?;
        self.events.container(&status, api::ContainerEventType::Deleted).await;
        Ok(Default::default())
    }

    pub(super) async fn containers(&self, filter: Option<api::ContainerFilter>) -> Result<Vec<api::Container>> {
        let filter = filter.unwrap_or_default();
        let all = self.verbs.list_containers().await.map_err(failed)?;
        let rows = all
            .iter()
            .filter(|c| id_fits(&filter.id, &c.id) && id_fits(&filter.pod_sandbox_id, &c.sandbox))
            .map(|container| seen::container(container, &self.images.store));
        Ok(rows
            .filter(|row| filter.state.as_ref().is_none_or(|wanted| wanted.state == row.state))
            .filter(|row| labels_fit(&filter.label_selector, &row.labels))
            .collect())
    }

    pub(super) async fn container_status(
        &self,
        request: api::ContainerStatusRequest,
    ) -> Result<api::ContainerStatusResponse> {
        let status = self.container(&request.container_id).await?;
        let mut info = BTreeMap::new();
        if request.verbose {
            let more = json!({"sandboxID": status.sandbox, "pid": status.pid, "config": status.config});
            info.insert("info".to_owned(), more.to_string());
        }
        Ok(api::ContainerStatusResponse { status: Some(seen::container_status(&status, &self.images.store)), info })
    }

    pub(super) async fn update_container(
        &self,
        request: api::UpdateContainerResourcesRequest,
    ) -> Result<api::UpdateContainerResourcesResponse> {
        let status = self.container(&request.container_id).await?;
        let resources = wanted::resources(request.linux.unwrap_or_default())?;
        self.verbs.update_container_resources(&status.id, &resources).await.map_err(failed)?;
        Ok(Default::default())
    }

    pub(super) async fn reopen_log(
        &self,
        request: api::ReopenContainerLogRequest,
    ) -> Result<api::ReopenContainerLogResponse> {
        let status = self.running(&request.container_id).await?;
        self.verbs.reopen_container_log(&status.id).await.map_err(failed)?;
        Ok(Default::default())
    }

    // ---- sessions ----------------------------------------------------------------------------------------------------

    pub(super) async fn exec_sync(&self, request: api::ExecSyncRequest) -> Result<api::ExecSyncResponse> {
        check_command(&request.cmd)?;
        let status = self.running(&request.container_id).await?;
        let limit = (request.timeout > 0).then(|| seconds(request.timeout));
        let output = self.verbs.exec_sync(&status.id, &request.cmd, limit).await.map_err(failed)?;
        Ok(api::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.exit_code })
    }

    pub(super) async fn exec(&self, request: api::ExecRequest) -> Result<api::ExecResponse> {
        check_command(&request.cmd)?;
        let wanted = streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let id = self.running(&request.container_id).await?.id;
        let url = self.streaming.url(Session::Exec { id, command: request.cmd, wanted })?;
        Ok(api::ExecResponse { url })
    }

    pub(super) async fn attach(&self, request: api::AttachRequest) -> Result<api::AttachResponse> {
        let mut wanted = streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let status = self.running(&request.container_id).await?;
        // Whether there is a terminal the container says, not the client.
        wanted.tty = status.config.stdio.tty;
        wanted.stderr &= !wanted.tty;
        wanted.stdin &= status.config.stdio.stdin;
        Ok(api::AttachResponse { url: self.streaming.url(Session::Attach { status: Box::new(status), wanted })? })
    }

    pub(super) async fn port_forward(&self, request: api::PortForwardRequest) -> Result<api::PortForwardResponse> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        if !sandbox.ready {
            return Err(Status::failed_precondition(format!("sandbox {} is not ready", sandbox.id)));
        }
        let port = |port: &i32| match u16::try_from(*port) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(Status::invalid_argument(format!("{port} is no port"))),
        };
        let ports = request.port.iter().map(port).collect::<Result<_>>()?;
        let namespace = match (sandbox.config.network, sandbox.network_namespace) {
            (NamespaceMode::Node, _) => None,
            (_, Some(path)) => Some(path),
            (_, None) => return Err(Status::failed_precondition("the sandbox has no network")),
        };
        Ok(api::PortForwardResponse { url: self.streaming.url(Session::PortForward { namespace, ports })? })
    }
}

fn check_command(command: &[String]) -> Result<()> {
    match command.len() {
        0 => Err(Status::invalid_argument("no command is given")),
        length if length > MAX_COMMAND_WORDS => Err(Status::invalid_argument("the command has too many words")),
        _ => Ok(()),
    }
}

fn streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<Request> {
    if tty && stderr {
        return Err(Status::invalid_argument("tty and stderr cannot both be true"));
    }
    if !stdin && !stdout && !stderr {
        return Err(Status::invalid_argument("one of stdin, stdout or stderr must be set"));
    }
    Ok(Request { stdin, stdout, stderr, tty })
}

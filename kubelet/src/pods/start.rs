//! The start of one container: image, environment, mounts, creation, program, postStart hook.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::runtime::events::EventType;
use tokio::sync::watch;

use super::context::Context;
use super::worker::Wanted;
use super::{hooks, resolved};
use crate::cri::{ContainerConfig, ContainerState, Mount, SandboxStatus, StdioMode};
use crate::images::{Image, NoProgress};
use crate::metrics::{Counted, Timed};
use crate::names::{ContainerId, PodKey};
use crate::volumes::{PodVolumes, Volumes, expand, service_environment};

/// Where programs leave their last words, unless told otherwise.
const TERMINATION_PATH: &str = "/dev/termination-log";

/// Why a container was not started.
#[derive(Debug)]
pub(super) enum Failure {
    /// The pod is to end.
    Cancelled,
    /// For this reason.
    Known(Reason),
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self::Known(reason)
    }
}

/// What keeps a container from starting.
#[derive(Debug)]
pub(super) struct Reason {
    /// Reason of the container's state.
    reason: &'static str,
    /// Reason of the event.
    pub(super) event: &'static str,
    message: String,
}

impl Reason {
    fn new(reason: &'static str, event: &'static str, message: impl ToString) -> Self {
        Self { reason, event, message: message.to_string() }
    }

    fn of_image(&self) -> bool {
        matches!(self.reason, "ErrImagePull" | "ErrImageNeverPull" | "InvalidImageName")
    }

    /// Pause before the next try.
    pub(super) fn first_pause(&self) -> Duration {
        if self.reason == "ErrImagePull" { Duration::from_secs(10) } else { Duration::from_secs(1) }
    }

    /// The container's state: pulls that keep failing are said to back off.
    pub(super) fn waiting(&self, container: &Container, repeated: bool) -> (String, String) {
        if self.reason == "ErrImagePull" && repeated {
            let image = container.image.as_deref().unwrap_or_default();
            return (
                "ImagePullBackOff".into(),
                format!("Back-off pulling image \"{image}\": ErrImagePull: {}", self.message),
            );
        }
        (self.reason.into(), self.message.clone())
    }

    pub(super) fn event_text(&self, container: &Container) -> String {
        if self.of_image() {
            return format!(
                "Failed to pull image \"{}\": {}",
                container.image.as_deref().unwrap_or_default(),
                self.message
            );
        }
        format!("Error: {}", self.message)
    }
}

/// The image of a container, pulled as its policy says.
async fn image(context: &Context, pod: &Pod, container: &Container) -> Result<Arc<Image>, Reason> {
    let name = container.image.as_deref().unwrap_or_default();
    let known = context.images.resolve(name).map_err(|error| {
        Reason::new(
            "InvalidImageName",
            "InspectFailed",
            format!("Failed to apply default image tag \"{name}\": {error}"),
        )
    })?;
    // Only a static pod comes without a policy.
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']) && !last.ends_with(":latest"));
    let usual = if tagged { "IfNotPresent" } else { "Always" };
    let policy = container.image_pull_policy.as_deref().unwrap_or(usual);
    match (policy, known) {
        ("Never", None) => {
            return Err(Reason::new(
                "ErrImageNeverPull",
                "ErrImageNeverPull",
                format!("Container image \"{name}\" is not present with pull policy of Never"),
            ));
        }
        ("Never" | "IfNotPresent", Some(image)) => {
            let note = format!("Container image \"{name}\" already present on machine");
            context.event_of(pod, &container.name, EventType::Normal, "Pulled", note);
            return Ok(image);
        }
        _ => {}
    }
    let keyring = context
        .volumes
        .objects()
        .pull_secrets(pod)
        .await
        .map_err(|error| Reason::new("ErrImagePull", "Failed", error))?;
    context.event_of(pod, &container.name, EventType::Normal, "Pulling", format!("Pulling image \"{name}\""));
    let _turn = context.pulls.acquire().await.map_err(|error| Reason::new("ErrImagePull", "Failed", error))?;
    let started = std::time::Instant::now();
    let image = context
        .images
        .pull(name, &keyring, Arc::new(NoProgress))
        .await
        .map_err(|error| Reason::new("ErrImagePull", "Failed", error))?;
    context.metrics.observe(Timed::ImagePull, "", started.elapsed());
    let note = format!(
        "Successfully pulled image \"{name}\" in {:?}. Image size: {} bytes.",
        started.elapsed(),
        image.size_bytes
    );
    context.event_of(pod, &container.name, EventType::Normal, "Pulled", note);
    Ok(image)
}

/// The kind of a container, as metrics call it.
fn kind(pod: &Pod, name: &str) -> &'static str {
    let Some(spec) = &pod.spec else { return "container" };
    if spec.init_containers.iter().flatten().any(|known| known.name == name) {
        "init_container"
    } else if spec.containers.iter().any(|known| known.name == name) {
        "container"
    } else {
        "ephemeral_container"
    }
}

/// A container that is to start.
pub(super) struct Start<'a> {
    pub(super) context: &'a Arc<Context>,
    pub(super) key: &'a PodKey,
    pub(super) pod: &'a Arc<Pod>,
    pub(super) sandbox: &'a SandboxStatus,
    pub(super) volumes: &'a PodVolumes,
    pub(super) container: &'a Container,
}

impl Start<'_> {
    /// Starts the `attempt`-th incarnation. Pulls and hooks, which may take long, are given up when the pod is to end.
    pub(super) async fn run(self, attempt: u32, mut wanted: watch::Receiver<Wanted>) -> Result<(), Failure> {
        let Self { context, key, pod, sandbox, container, .. } = self;
        let name = &container.name;
        let image = tokio::select! {
            image = image(context, pod, container) => image?,
            // An error means that nobody wants the pod any more.
            _ = wanted.wait_for(Wanted::is_ending) => return Err(Failure::Cancelled),
        };
        let misconfigured = |message: String| Reason::new("CreateContainerConfigError", "Failed", message);
        let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
        resolved::forbid_root(pod, container, &user).map_err(misconfigured)?;
        let config = self.config(attempt, &image).await.map_err(misconfigured)?;
        let log = config.log_path.clone();
        let failed = |error: crate::cri::RuntimeError| Reason::new("CreateContainerError", "Failed", error);
        let id = context.runtime.create_container(&sandbox.id, config).await.map_err(failed)?;
        context.event_of(pod, name, EventType::Normal, "Created", format!("Container created: {name}"));
        let layout = &context.config.layout;
        let link = layout.container_log_link(key, name, &id);
        let linked = fs::create_dir_all(&layout.container_logs).and_then(|()| symlink(&log, &link));
        if let Err(error) = linked
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            tracing::warn!(link = %link.display(), %error, "log shippers will not find a log");
        }
        let started = context.runtime.start_container(&id).await;
        started.map_err(|error| Reason::new("RunContainerError", "Failed", error))?;
        context.event_of(pod, name, EventType::Normal, "Started", format!("Container started: {name}"));
        context.metrics.count(Counted::StartedContainers, kind(pod, name));
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(hook) = hook else { return Ok(()) };
        let outcome = tokio::select! {
            outcome = hooks::run(context, hook, container, &id, &sandbox.ips) => outcome,
            _ = wanted.wait_for(Wanted::is_ending) => return Err(Failure::Cancelled),
        };
        let Err(message) = outcome else { return Ok(()) };
        let note = format!("PostStartHook failed: {message}");
        context.event_of(pod, name, EventType::Warning, "FailedPostStartHook", note);
        if let Err(error) = context.runtime.stop_container(&id, Duration::ZERO).await {
            tracing::warn!(pod = %key, %error, "a container whose hook failed is not stopped");
        }
        Err(Reason::new("PostStartHookError", "FailedPostStartHook", message).into())
    }

    async fn config(&self, attempt: u32, image: &Image) -> Result<ContainerConfig, String> {
        let Self { context, key, pod, sandbox, volumes, container } = self;
        let mut seen = Pod::clone(pod);
        let status = seen.status.get_or_insert_default();
        let host_network = seen.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
        let node_ips = &context.config.node_ips;
        let ips = if host_network { node_ips } else { &sandbox.ips };
        status.host_ip = node_ips.first().map(ToString::to_string);
        status.host_ips =
            Some(node_ips.iter().map(|ip| k8s_openapi::api::core::v1::HostIP { ip: ip.to_string() }).collect());
        status.pod_ip = ips.first().map(ToString::to_string);
        status.pod_ips = Some(ips.iter().map(|ip| k8s_openapi::api::core::v1::PodIP { ip: ip.to_string() }).collect());
        let services = context.services.state();
        let links = seen.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
        let services = service_environment(services.iter().map(|service| &**service), &key.namespace, links);
        let own = context.volumes.environment(&seen, container, &services).await.map_err(|error| error.to_string())?;
        let mut environment: Vec<(String, String)> =
            services.into_iter().filter(|(name, _)| !own.iter().any(|(known, _)| known == name)).collect();
        environment.extend(own);
        let mut given = context.devices.prepare(&key.uid, &container.name).await?;
        given.cdi_devices.extend(context.dra.of(&key.uid, container).into_iter().flat_map(|device| device.cdi));
        // What the pod says itself counts more than what plugins say.
        given.environment.retain(|(name, _)| !environment.iter().any(|(known, _)| known == name));
        environment.extend(given.environment);
        let expanded =
            |words: &Option<Vec<String>>| words.iter().flatten().map(|word| expand(word, &environment)).collect();
        let wanted = container.volume_mounts.as_deref().unwrap_or_default();
        let mut mounts = context
            .volumes
            .mounts(pod, volumes, &container.name, wanted, &environment)
            .await
            .map_err(|error| error.to_string())?;
        mounts.extend(given.mounts);
        let blocks = Volumes::devices(volumes, container.volume_devices.as_deref().unwrap_or_default());
        given.devices.extend(blocks.map_err(|error| error.to_string())?);
        let id_mapped = !sandbox.config.id_mappings.is_empty();
        let taken = |path: &str| wanted.iter().any(|mount| mount.mount_path == path);
        if !taken("/etc/hosts") {
            mounts.push(Mount {
                container_path: "/etc/hosts".into(),
                host_path: context.hosts_path(key),
                id_mapped,
                ..Mount::default()
            });
        }
        let last_words = resolved::termination_log(&context.config.layout, &key.uid, &container.name, attempt);
        let path = container.termination_message_path.clone().unwrap_or_else(|| TERMINATION_PATH.into());
        if !taken(&path) {
            let made = last_words.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&last_words, ""));
            made.and_then(|()| fs::set_permissions(&last_words, std::os::unix::fs::PermissionsExt::from_mode(0o666)))
                .map_err(|error| format!("make {}: {error}", last_words.display()))?;
            mounts.push(Mount { container_path: path.into(), host_path: last_words, id_mapped, ..Mount::default() });
        }
        Ok(ContainerConfig {
            name: container.name.clone(),
            attempt,
            image_id: image.id.clone(),
            image: container.image.clone().unwrap_or_default(),
            command: expanded(&container.command),
            args: expanded(&container.args),
            working_dir: container.working_dir.clone().unwrap_or_default(),
            mounts,
            devices: given.devices,
            cdi_devices: given.cdi_devices,
            annotations: given.annotations,
            envs: environment,
            log_path: context.config.layout.container_log(key, &container.name, attempt),
            stdio: StdioMode {
                stdin: container.stdin == Some(true),
                stdin_once: container.stdin_once == Some(true),
                tty: container.tty == Some(true),
            },
            security: resolved::security(&context.config, pod, container)?,
            resources: resolved::resources(pod, container.resources.as_ref(), context.facts.memory_bytes),
            stop_signal: container
                .lifecycle
                .as_ref()
                .and_then(|lifecycle| lifecycle.stop_signal.clone())
                .unwrap_or_default(),
            pid_target: self.target().await?,
            ..ContainerConfig::default()
        })
    }

    /// The running container whose processes an ephemeral container is to see.
    async fn target(&self) -> Result<Option<ContainerId>, String> {
        let Some(name) = resolved::target_of(self.pod, &self.container.name) else { return Ok(None) };
        let all = self.context.runtime.containers_of(&self.key.uid).await.map_err(|error| error.to_string())?;
        let running =
            all.into_iter().find(|status| status.config.name == name && status.state == ContainerState::Running);
        running.map(|status| Some(status.id)).ok_or_else(|| format!("target container {name} does not run"))
    }
}

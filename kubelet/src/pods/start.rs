//! The start of one container: image, environment, mounts, creation, program, postStart hook.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::runtime::events::EventType;

use super::context::Context;
use super::{hooks, resolved};
use crate::cri::{ContainerConfig, Mount, SandboxStatus, StdioMode};
use crate::images::{Image, NoProgress};
use crate::names::PodKey;
use crate::volumes::{PodVolumes, expand, service_environment};

/// Where programs leave their last words, unless told otherwise.
const TERMINATION_PATH: &str = "/dev/termination-log";

/// Why a container was not started.
#[derive(Debug)]
pub(super) struct Failure {
    /// Reason of the container's state.
    reason: &'static str,
    /// Reason of the event.
    pub(super) event: &'static str,
    message: String,
}

impl Failure {
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
async fn image(context: &Context, pod: &Pod, container: &Container) -> Result<Arc<Image>, Failure> {
    let name = container.image.as_deref().unwrap_or_default();
    let known = context.images.resolve(name).map_err(|error| {
        Failure::new(
            "InvalidImageName",
            "InspectFailed",
            format!("Failed to apply default image tag \"{name}\": {error}"),
        )
    })?;
    let policy = container.image_pull_policy.as_deref().unwrap_or("IfNotPresent");
    match (policy, known) {
        ("Never", None) => {
            return Err(Failure::new(
                "ErrImageNeverPull",
                "ErrImageNeverPull",
                format!("Container image \"{name}\" is not present with pull policy of Never"),
            ));
        }
        ("Never" | "IfNotPresent", Some(image)) => {
            let note = format!("Container image \"{name}\" already present on machine");
            context.event_of(pod, &container.name, EventType::Normal, "Pulled", note).await;
            return Ok(image);
        }
        _ => {}
    }
    let keyring = context
        .volumes
        .objects()
        .pull_secrets(pod)
        .await
        .map_err(|error| Failure::new("ErrImagePull", "Failed", error))?;
    context.event_of(pod, &container.name, EventType::Normal, "Pulling", format!("Pulling image \"{name}\"")).await;
    let _turn = context.pulls.acquire().await.map_err(|error| Failure::new("ErrImagePull", "Failed", error))?;
    let started = std::time::Instant::now();
    let image = context
        .images
        .pull(name, &keyring, Arc::new(NoProgress))
        .await
        .map_err(|error| Failure::new("ErrImagePull", "Failed", error))?;
    let note = format!(
        "Successfully pulled image \"{name}\" in {:?}. Image size: {} bytes.",
        started.elapsed(),
        image.size_bytes
    );
    context.event_of(pod, &container.name, EventType::Normal, "Pulled", note).await;
    Ok(image)
}

/// Starts the `attempt`-th incarnation of a container.
pub(super) async fn start(
    context: &Arc<Context>,
    key: &PodKey,
    pod: &Arc<Pod>,
    sandbox: &SandboxStatus,
    volumes: &PodVolumes,
    container: &Container,
    attempt: u32,
) -> Result<(), Failure> {
    let image = image(context, pod, container).await?;
    let misconfigured = |message: String| Failure::new("CreateContainerConfigError", "Failed", message);
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    resolved::forbid_root(pod, container, &user).map_err(misconfigured)?;
    let config =
        config(context, key, pod, sandbox, volumes, container, attempt, &image).await.map_err(misconfigured)?;
    let log = config.log_path.clone();
    let failed = |error: crate::cri::RuntimeError| Failure::new("CreateContainerError", "Failed", error);
    let id = context.runtime.create_container(&sandbox.id, config).await.map_err(failed)?;
    context
        .event_of(pod, &container.name, EventType::Normal, "Created", format!("Container created: {}", container.name))
        .await;
    let layout = &context.config.layout;
    let link = layout.container_log_link(key, &container.name, &id);
    let linked = fs::create_dir_all(&layout.container_logs).and_then(|()| symlink(&log, &link));
    if let Err(error) = linked
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        tracing::warn!(link = %link.display(), %error, "log shippers will not find a log");
    }
    context.runtime.start_container(&id).await.map_err(|error| Failure::new("RunContainerError", "Failed", error))?;
    context
        .event_of(pod, &container.name, EventType::Normal, "Started", format!("Container started: {}", container.name))
        .await;
    if let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref())
        && let Err(message) = hooks::run(context, hook, container, &id, &sandbox.ips).await
    {
        context
            .event_of(
                pod,
                &container.name,
                EventType::Warning,
                "FailedPostStartHook",
                format!("PostStartHook failed: {message}"),
            )
            .await;
        if let Err(error) = context.runtime.stop_container(&id, Duration::ZERO).await {
            tracing::warn!(pod = %key, %error, "a container whose hook failed is not stopped");
        }
        return Err(Failure::new("PostStartHookError", "FailedPostStartHook", message));
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "each is a separate input of one container's configuration")]
async fn config(
    context: &Context,
    key: &PodKey,
    pod: &Arc<Pod>,
    sandbox: &SandboxStatus,
    volumes: &PodVolumes,
    container: &Container,
    attempt: u32,
    image: &Image,
) -> Result<ContainerConfig, String> {
    let mut seen = (**pod).clone();
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
    let expanded =
        |words: &Option<Vec<String>>| words.iter().flatten().map(|word| expand(word, &environment)).collect();
    let wanted = container.volume_mounts.as_deref().unwrap_or_default();
    let mut mounts = context
        .volumes
        .mounts(pod, volumes, &container.name, wanted, &environment)
        .await
        .map_err(|error| error.to_string())?;
    let taken = |path: &str| wanted.iter().any(|mount| mount.mount_path == path);
    if !taken("/etc/hosts") {
        mounts.push(Mount {
            container_path: "/etc/hosts".into(),
            host_path: context.hosts_path(key),
            ..Mount::default()
        });
    }
    let last_words = resolved::termination_log(&context.config.layout, &key.uid, &container.name, attempt);
    let path = container.termination_message_path.clone().unwrap_or_else(|| TERMINATION_PATH.into());
    if !taken(&path) {
        let made = last_words.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&last_words, ""));
        made.and_then(|()| fs::set_permissions(&last_words, std::os::unix::fs::PermissionsExt::from_mode(0o666)))
            .map_err(|error| format!("make {}: {error}", last_words.display()))?;
        mounts.push(Mount { container_path: path.into(), host_path: last_words, ..Mount::default() });
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
        ..ContainerConfig::default()
    })
}

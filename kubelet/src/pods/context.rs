//! What all workers of a node share.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, Service};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::runtime::events::EventType;
use kube::runtime::reflector::Store;
use kube::{Api, Client, Resource};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::eviction::Pressure;
use super::id_ranges::IdRanges;
use super::resolved;
use super::table::PodTable;
use crate::Config;
use crate::cgroups::Hierarchy;
use crate::cri::{ContainerRuntime, ContainerStatus, SandboxConfig, SandboxStatus};
use crate::csi::Csi;
use crate::devices::Devices;
use crate::dra::Dra;
use crate::events::Events;
use crate::images::ImageStore;
use crate::metrics::Metrics;
use crate::names::PodKey;
use crate::node::Facts;
use crate::volumes::{Allocatable, Volumes};

/// Bytes of a termination message (`MaxContainerTerminationMessageLength`).
const TERMINATION_MESSAGE_LIMIT: usize = 4096;
/// Bytes and lines of a log's end that stand in for a missing message (`FallbackToLogsOnError`).
const FALLBACK_LIMIT_BYTES: u64 = 2048;
const FALLBACK_LIMIT_LINES: usize = 80;

pub struct Context {
    pub config: Arc<Config>,
    pub client: Client,
    pub runtime: Arc<dyn ContainerRuntime>,
    pub images: Arc<ImageStore>,
    pub volumes: Volumes,
    pub csi: Csi,
    pub devices: Devices,
    pub dra: Dra,
    /// Rung when the node's status has something new to say.
    pub news: Arc<Notify>,
    pub table: Arc<PodTable>,
    pub cgroups: Hierarchy,
    pub facts: Facts,
    pub events: Events,
    pub id_ranges: IdRanges,
    /// What the host runs short of.
    pub pressure: Pressure,
    pub services: Store<Service>,
    /// Pulls under way (`maxParallelImagePulls`).
    pub pulls: Semaphore,
    /// Digest references by image id, for statuses.
    pub image_ids: Mutex<HashMap<String, String>>,
    pub probes: crate::probes::Counts,
    pub shutdown: crate::shutdown::Shutdown,
    pub metrics: Arc<Metrics>,
}

impl Context {
    /// Publishes an event about a pod, without waiting for the API.
    pub fn event(&self, pod: &Pod, type_: EventType, reason: &str, action: &str, note: String) {
        self.events.publish(pod.object_ref(&()), type_, reason, action, note);
    }

    /// The same about the node.
    pub fn event_of_node(&self, type_: EventType, reason: &str, note: String) {
        let name = Some(self.config.node_name.clone());
        // Events about nodes carry the name in the place of a UID, as a kubelet's do.
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            uid: name.clone(),
            name,
            ..ObjectReference::default()
        };
        self.events.publish(about, type_, reason, reason, note);
    }

    /// The same about one of its containers.
    pub fn event_of(&self, pod: &Pod, container: &str, type_: EventType, reason: &str, note: String) {
        let list = |containers: Option<&Vec<Container>>| {
            containers.is_some_and(|list| list.iter().any(|known| known.name == container))
        };
        let spec = pod.spec.as_ref();
        let field = if list(spec.and_then(|spec| spec.init_containers.as_ref())) {
            "initContainers"
        } else if list(spec.map(|spec| &spec.containers)) {
            "containers"
        } else {
            "ephemeralContainers"
        };
        let about = ObjectReference { field_path: Some(format!("spec.{field}{{{container}}}")), ..pod.object_ref(&()) };
        self.events.publish(about, type_, reason, reason, note);
    }

    /// What pods may use of this node.
    pub fn allocatable(&self) -> Allocatable {
        allocatable(&self.config, &self.facts)
    }

    /// The runtime handler that the pod's RuntimeClass names.
    pub async fn runtime_handler(&self, pod: &Pod) -> Result<String, String> {
        let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref()).unwrap_or_default();
        if class.is_empty() {
            return Ok(String::new());
        }
        let api: Api<RuntimeClass> = Api::all(self.client.clone());
        let found = api.get(class).await.map_err(|error| format!("RuntimeClass {class:?}: {error}"))?;
        Ok(found.handler)
    }

    /// `imageID` of a status: a digest reference of the image, or its id.
    pub fn image_id(&self, id: &str) -> String {
        if let Some(known) = self.image_ids.lock().get(id) {
            return known.clone();
        }
        let image = self.images.resolve(id).ok().flatten();
        let text = image.and_then(|image| image.repo_digests.first().cloned()).unwrap_or_else(|| id.to_owned());
        self.image_ids.lock().insert(id.to_owned(), text.clone());
        text
    }

    /// The configuration of a pod's sandbox.
    ///
    /// # Errors
    /// When no ids are left for the pod's user namespace.
    pub fn sandbox_config(&self, pod: &Pod, attempt: u32, runtime_handler: String) -> Result<SandboxConfig, String> {
        let host = fs::read_to_string(&self.config.resolv_conf).unwrap_or_default();
        let text = resolved::resolv_conf(&self.config, pod, &host);
        let own_users = pod.spec.as_ref().and_then(|spec| spec.host_users) == Some(false);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let id_mappings = if own_users { vec![self.id_ranges.take(uid)?] } else { Vec::new() };
        let usual = resolved::sandbox(&self.config, pod, attempt, text, &self.cgroups);
        Ok(SandboxConfig { runtime_handler, id_mappings, ..usual })
    }

    /// The user namespace of a sandbox that has one of its own.
    pub fn user_namespace(&self, sandbox: &SandboxStatus) -> Option<PathBuf> {
        (!sandbox.config.id_mappings.is_empty()).then(|| self.config.layout.sandbox(&sandbox.id).join("user"))
    }

    /// Where a pod's /etc/hosts lies.
    pub fn hosts_path(&self, key: &PodKey) -> std::path::PathBuf {
        self.config.layout.pod(&key.uid).join("etc-hosts")
    }

    /// Writes a pod's /etc/hosts.
    pub fn write_hosts(&self, pod: &Pod, key: &PodKey, ips: &[IpAddr]) -> io::Result<()> {
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
        let host_file = host_network.then(|| fs::read_to_string("/etc/hosts").unwrap_or_default());
        let name = resolved::hostname(pod, &self.config.cluster_domain);
        let text = resolved::hosts(pod, ips, &name, &self.config.cluster_domain, host_file.as_deref());
        fs::create_dir_all(self.config.layout.pod(&key.uid))?;
        fs::write(self.hosts_path(key), text)
    }

    /// What a container left as its last words.
    pub fn termination_message(&self, key: &PodKey, container: &Container, status: &ContainerStatus) -> String {
        let path = resolved::termination_log(&self.config.layout, &key.uid, &container.name, status.config.attempt);
        let mut text = end_of(&path, TERMINATION_MESSAGE_LIMIT as u64).unwrap_or_default();
        let failed = status.exit.is_some_and(|exit| exit.code != 0);
        if text.is_empty() && failed && container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
        {
            text = last_lines(&status.config.log_path).unwrap_or_default();
        }
        let mut end = text.len().min(TERMINATION_MESSAGE_LIMIT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text
    }

    /// Removes incarnations of a container but the newest two.
    pub async fn forget_old(&self, key: &PodKey, container: &str, newest: u32) {
        let Ok(all) = self.runtime.containers_of(&key.uid).await else { return };
        let old = all.into_iter().filter(|status| {
            status.pod.uid == key.uid && status.config.name == container && status.config.attempt + 1 < newest
        });
        for status in old {
            if let Err(error) = self.runtime.remove_container(&status.id).await {
                tracing::warn!(pod = %key, container, %error, "an old container is not removed");
                continue;
            }
            let path = resolved::termination_log(&self.config.layout, &key.uid, container, status.config.attempt);
            for file in [&path, &status.config.log_path] {
                if let Err(error) = fs::remove_file(file)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::debug!(file = %file.display(), %error, "a file of an old container is not removed");
                }
            }
        }
    }

    /// Removes a pod's folders; its volumes must be gone.
    pub fn remove_files(&self, key: &PodKey) -> io::Result<()> {
        let layout = &self.config.layout;
        for folder in [layout.pod(&key.uid), layout.pod_log_folder(key)] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let suffix = format!("{}_{}_", key.name, key.namespace);
        for link in fs::read_dir(&layout.container_logs).into_iter().flatten().flatten() {
            if link.file_name().to_string_lossy().starts_with(&suffix) && !link.path().exists() {
                fs::remove_file(link.path())?;
            }
        }
        Ok(())
    }
}

/// What pods may use of a node.
pub(crate) fn allocatable(config: &Config, facts: &Facts) -> Allocatable {
    let huge: u64 = facts.huge_pages.iter().map(|(_, bytes)| bytes).sum();
    // In whole KiB, as the node's status says it.
    let memory = facts.memory_bytes.saturating_sub(config.reserved_memory_bytes + huge) / 1024 * 1024;
    Allocatable {
        cpu_millis: facts.cpu_millis.saturating_sub(config.reserved_cpu_millis),
        memory_bytes: memory,
        ephemeral_storage_bytes: facts.disk_bytes / 1024 * 1024,
    }
}

/// The end of a file; a container may have made it as long as it likes.
fn end_of(path: &std::path::Path, limit_bytes: u64) -> io::Result<String> {
    let file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    let start = size.saturating_sub(limit_bytes);
    let mut bytes = vec![0; usize::try_from(size - start).unwrap_or_default()];
    file.read_exact_at(&mut bytes, start)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a log file, without the frame of each.
fn last_lines(path: &std::path::Path) -> io::Result<String> {
    // The frame of a line is at most as long as its shortest usual content twice over.
    let text = end_of(path, 4 * FALLBACK_LIMIT_BYTES)?;
    let mut content = String::new();
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(FALLBACK_LIMIT_LINES)..] {
        let mut fields = line.splitn(4, ' ');
        if let (Some(_), Some(_), Some(tag), Some(text)) = (fields.next(), fields.next(), fields.next(), fields.next())
        {
            content.push_str(text);
            if tag != "P" {
                content.push('\n');
            }
        }
    }
    let mut start = content.len().saturating_sub(usize::try_from(FALLBACK_LIMIT_BYTES).unwrap_or_default());
    while !content.is_char_boundary(start) {
        start += 1;
    }
    Ok(content.split_off(start))
}

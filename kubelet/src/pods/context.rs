//! What all workers of a node share.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, Service};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::reflector::Store;
use kube::{Client, Resource};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::resolved;
use super::table::PodTable;
use crate::Config;
use crate::cgroups::Hierarchy;
use crate::cri::{ContainerRuntime, ContainerStatus, SandboxConfig};
use crate::images::ImageStore;
use crate::names::PodKey;
use crate::node::Facts;
use crate::volumes::Volumes;

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
    pub table: Arc<PodTable>,
    pub cgroups: Hierarchy,
    pub facts: Facts,
    pub recorder: Recorder,
    pub services: Store<Service>,
    /// Pulls under way (`maxParallelImagePulls`).
    pub pulls: Semaphore,
    /// Digest references by image id, for statuses.
    pub image_ids: Mutex<HashMap<String, String>>,
}

impl Context {
    /// Publishes an event about a pod. Events are news, not state: one that cannot be written is logged.
    pub async fn event(&self, pod: &Pod, type_: EventType, reason: &str, action: &str, note: String) {
        self.event_about(pod.object_ref(&()), type_, reason, action, note).await;
    }

    /// The same about one of its containers.
    pub async fn event_of(&self, pod: &Pod, container: &str, type_: EventType, reason: &str, note: String) {
        let about =
            ObjectReference { field_path: Some(format!("spec.containers{{{container}}}")), ..pod.object_ref(&()) };
        self.event_about(about, type_, reason, reason, note).await;
    }

    async fn event_about(&self, about: ObjectReference, type_: EventType, reason: &str, action: &str, note: String) {
        let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, &about).await {
            tracing::debug!(reason, %error, "event not written");
        }
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
    pub fn sandbox_config(&self, pod: &Pod, attempt: u32) -> SandboxConfig {
        let host = fs::read_to_string(&self.config.resolv_conf).unwrap_or_default();
        let text = resolved::resolv_conf(&self.config, pod, &host);
        resolved::sandbox(&self.config, pod, attempt, text, &self.cgroups)
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
        let mut text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
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
        let Ok(all) = self.runtime.list_containers().await else { return };
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
            let dangling = !link.path().exists();
            if dangling && link.file_name().to_string_lossy().starts_with(&suffix) {
                fs::remove_file(link.path())?;
            }
        }
        Ok(())
    }
}

/// The end of a log file, without the frame of each line.
fn last_lines(path: &std::path::Path) -> io::Result<String> {
    let file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    let start = size.saturating_sub(FALLBACK_LIMIT_BYTES);
    let mut bytes = vec![0; usize::try_from(size - start).unwrap_or_default()];
    file.read_exact_at(&mut bytes, start)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    Ok(lines[lines.len().saturating_sub(FALLBACK_LIMIT_LINES)..].join("\n"))
}

//! Usage of containers and sandboxes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tonic::Status;

use super::metrics::{self, Disk, Sample};
use super::runtime::{Runtime, failed, id_fits, labels_fit};
use super::sample::{Cgroup, Memory, Traffic, traffic};
use super::{api, seen};
use crate::cri::{
    ContainerRuntime, ContainerState, ContainerStatus, NamespaceMode, Resources, RuntimeError, SandboxStatus, Stats,
};
use crate::images::{ImageStore, disk_usage};
use crate::names::ContainerId;
use crate::supervisor::container::now;

type Result<T> = std::result::Result<T, Status>;

/// Runs blocking reads of many files.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}

fn some(value: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value })
}

/// The cgroup of a container, as the verbs name it.
fn cgroup_of(sandbox: &SandboxStatus, container: &ContainerStatus) -> Cgroup {
    Cgroup::at(&sandbox.config.cgroup_parent.join(container.id.as_str()))
}

/// Interfaces of a sandbox; none with the host's network.
fn sandbox_traffic(sandbox: &SandboxStatus) -> BTreeMap<String, Traffic> {
    match &sandbox.network_namespace {
        Some(path) if sandbox.config.network != NamespaceMode::Node => traffic(Some(path)).unwrap_or_else(|error| {
            tracing::debug!(sandbox = %sandbox.id, %error, "cannot read the interfaces of a pod");
            BTreeMap::new()
        }),
        _ => BTreeMap::new(),
    }
}

/// Usage as the cgroup counts it, filled up by what its processes say where a controller lacks.
fn complete(mut stats: Stats, cgroup: &Cgroup) -> Stats {
    if stats.memory_usage_bytes.is_none() {
        let memory = cgroup.memory();
        stats.memory_usage_bytes = Some(memory.usage);
        stats.memory_working_set_bytes = Some(memory.working_set);
        stats.memory_rss_bytes = Some(memory.rss);
        stats.page_faults = Some(memory.faults);
        stats.major_page_faults = Some(memory.major_faults);
    }
    stats
}

impl Runtime {
    /// Usage of one container.
    async fn stats_of(&self, sandbox: &SandboxStatus, status: &ContainerStatus) -> Result<api::ContainerStats> {
        let stats = self.verbs.container_stats(&status.id).await.map_err(failed)?;
        let (cgroup, writable) = (cgroup_of(sandbox, status), self.images.store.upper(status.id.as_str()));
        let images = self.images.folder.to_string_lossy().into_owned();
        let status = status.clone();
        blocking(move || {
            let mut stats = complete(stats, &cgroup);
            if stats.writable_layer_bytes.is_none()
                && let Ok((bytes, inodes)) = disk_usage(&writable)
            {
                (stats.writable_layer_bytes, stats.writable_layer_inodes) = (Some(bytes), Some(inodes));
            }
            let mut told = seen::container_stats(&status, &stats, &images);
            if let (Some(cpu), Some(memory)) = (&mut told.cpu, &mut told.memory) {
                (cpu.psi, memory.psi) = (cgroup.pressure("cpu"), cgroup.pressure("memory"));
            }
            told.io = Some(api::IoUsage { timestamp: stats.timestamp, psi: cgroup.pressure("io") });
            told
        })
        .await
    }

    pub(super) async fn container_stats(
        &self,
        request: api::ContainerStatsRequest,
    ) -> Result<api::ContainerStatsResponse> {
        let status = self.container(&request.container_id).await?;
        let sandbox = self.verbs.pod_sandbox_status(&status.sandbox).await.map_err(failed)?;
        Ok(api::ContainerStatsResponse { stats: Some(self.stats_of(&sandbox, &status).await?) })
    }

    pub(super) async fn all_container_stats(
        &self,
        filter: Option<api::ContainerStatsFilter>,
    ) -> Result<Vec<api::ContainerStats>> {
        let filter = filter.unwrap_or_default();
        let mut all = Vec::new();
        for status in self.verbs.list_containers().await.map_err(failed)? {
            let wanted = id_fits(&filter.id, &status.id)
                && id_fits(&filter.pod_sandbox_id, &status.sandbox)
                && labels_fit(&filter.label_selector, &status.config.labels);
            // One that is removed meanwhile is not told of.
            if wanted
                && status.state == ContainerState::Running
                && let Ok(sandbox) = self.verbs.pod_sandbox_status(&status.sandbox).await
                && let Ok(stats) = self.stats_of(&sandbox, &status).await
            {
                all.push(stats);
            }
        }
        Ok(all)
    }

    async fn sandbox_stats(&self, sandbox: &SandboxStatus) -> Result<api::PodSandboxStats> {
        let stats = self.verbs.pod_sandbox_stats(&sandbox.id).await.map_err(failed)?;
        let mut containers = Vec::new();
        for status in self.members(&sandbox.id).await? {
            if status.state == ContainerState::Running {
                containers.push(self.stats_of(sandbox, &status).await?);
            }
        }
        let sandbox = sandbox.clone();
        blocking(move || {
            let cgroup = Cgroup::at(&sandbox.config.cgroup_parent);
            let stats = complete(stats, &cgroup);
            let (mut cpu, mut memory) = seen::usage(&stats, 0);
            (cpu.psi, memory.psi) = (cgroup.pressure("cpu"), cgroup.pressure("memory"));
            let mut interfaces: Vec<_> = sandbox_traffic(&sandbox)
                .into_iter()
                .map(|(name, traffic)| api::NetworkInterfaceUsage {
                    name,
                    rx_bytes: some(traffic.received[0]),
                    rx_errors: some(traffic.received[2]),
                    tx_bytes: some(traffic.sent[0]),
                    tx_errors: some(traffic.sent[2]),
                })
                .collect();
            let first = (!interfaces.is_empty()).then(|| interfaces.remove(0));
            let timestamp = stats.timestamp;
            let processes = stats.pids.unwrap_or_else(|| cgroup.pids().len() as u64);
            let linux = api::LinuxPodSandboxStats {
                cpu: Some(cpu),
                memory: Some(memory),
                network: first.map(|first| api::NetworkUsage { timestamp, default_interface: Some(first), interfaces }),
                process: Some(api::ProcessUsage { timestamp, process_count: some(processes) }),
                containers,
                io: Some(api::IoUsage { timestamp, psi: cgroup.pressure("io") }),
            };
            api::PodSandboxStats { attributes: Some(seen::attributes(&sandbox)), linux: Some(linux) }
        })
        .await
    }

    pub(super) async fn pod_sandbox_stats(
        &self,
        request: api::PodSandboxStatsRequest,
    ) -> Result<api::PodSandboxStatsResponse> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        Ok(api::PodSandboxStatsResponse { stats: Some(self.sandbox_stats(&sandbox).await?) })
    }

    pub(super) async fn all_sandbox_stats(
        &self,
        filter: Option<api::PodSandboxStatsFilter>,
    ) -> Result<Vec<api::PodSandboxStats>> {
        let filter = filter.unwrap_or_default();
        let mut all = Vec::new();
        for sandbox in self.verbs.list_pod_sandboxes().await.map_err(failed)? {
            let wanted = sandbox.ready
                && id_fits(&filter.id, &sandbox.id)
                && labels_fit(&filter.label_selector, &sandbox.config.labels);
            if wanted && let Ok(stats) = self.sandbox_stats(&sandbox).await {
                all.push(stats);
            }
        }
        Ok(all)
    }

    pub(super) async fn metric_descriptors(
        &self,
        _: api::ListMetricDescriptorsRequest,
    ) -> Result<api::ListMetricDescriptorsResponse> {
        Ok(api::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() })
    }

    pub(super) async fn all_metrics(&self) -> Result<Vec<api::PodSandboxMetrics>> {
        let gathered = samples(&self.verbs, Some(self.images.store.clone())).await;
        let made = gathered.map_err(failed)?.into_iter().map(|(sandbox, of_pod, containers)| api::PodSandboxMetrics {
            pod_sandbox_id: sandbox.to_string(),
            metrics: metrics::of(&of_pod),
            container_metrics: containers
                .into_iter()
                .map(|(id, sample)| api::ContainerMetrics {
                    container_id: id.to_string(),
                    metrics: metrics::of(&sample),
                })
                .collect(),
        });
        Ok(made.collect())
    }
}

/// A sandbox with what it and its containers have used.
pub(crate) type PodSamples = (ContainerId, Sample, Vec<(ContainerId, Sample)>);

/// What all ready sandboxes and their running containers have used; `images` hold what containers have written.
pub(crate) async fn samples(
    verbs: &Arc<dyn ContainerRuntime>,
    images: Option<Arc<ImageStore>>,
) -> std::result::Result<Vec<PodSamples>, RuntimeError> {
    let sandboxes = verbs.list_pod_sandboxes().await?;
    let running = |status: &ContainerStatus| status.state == ContainerState::Running;
    let containers: Vec<_> = verbs.list_containers().await?.into_iter().filter(running).collect();
    let read = move || {
        let ready = sandboxes.into_iter().filter(|sandbox| sandbox.ready);
        let of = |sandbox: SandboxStatus| {
            let pod = sandbox.config.pod.clone();
            let (namespace, name) = pod.map(|pod| (pod.namespace, pod.name)).unwrap_or_default();
            let labels = |cgroup: &Path, container: &str, id: &ContainerId, image: &str| {
                let path = Path::new("/").join(cgroup).display().to_string();
                [container.into(), path, image.into(), id.to_string(), namespace.clone(), name.clone()]
            };
            let parent = &sandbox.config.cgroup_parent;
            let of_pod = sample(
                labels(parent, "", &sandbox.id, ""),
                sandbox.created_at,
                Cgroup::at(parent),
                Resources::default(),
                None,
                sandbox_traffic(&sandbox),
            );
            let members = containers.iter().filter(|status| status.sandbox == sandbox.id).map(|status| {
                let cgroup = parent.join(status.id.as_str());
                let written = images.as_ref().and_then(|images| disk(&images.upper(status.id.as_str())));
                let sample = sample(
                    labels(&cgroup, &status.config.name, &status.id, &status.config.image),
                    status.started_at,
                    Cgroup::at(&cgroup),
                    status.config.resources.clone(),
                    written,
                    BTreeMap::new(),
                );
                (status.id.clone(), sample)
            });
            (sandbox.id.clone(), of_pod, members.collect())
        };
        ready.map(of).collect()
    };
    tokio::task::spawn_blocking(read).await.map_err(|error| RuntimeError::Invalid(error.to_string()))
}

fn sample(
    labels: [String; 6],
    started_at: i64,
    cgroup: Cgroup,
    resources: Resources,
    disk: Option<Disk>,
    traffic: BTreeMap<String, Traffic>,
) -> Sample {
    let memory: Memory = cgroup.memory();
    let processes = cgroup.processes();
    Sample { labels, timestamp: now(), started_at, cgroup, memory, processes, resources, disk, traffic }
}

/// What the files at `writable` take, and the file system that they lie on.
fn disk(writable: &Path) -> Option<Disk> {
    let all = nix::sys::statvfs::statvfs(writable).ok()?;
    let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(writable).ok()?);
    Some(Disk {
        device: format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)),
        used_bytes: disk_usage(writable).ok()?.0,
        capacity_bytes: all.blocks() * all.fragment_size(),
        inodes: all.files(),
        inodes_free: all.files_free(),
    })
}

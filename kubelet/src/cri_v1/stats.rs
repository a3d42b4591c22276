//! Usage of containers and sandboxes.

use std::collections::BTreeMap;
use std::path::Path;

use tonic::Status;

use super::metrics::{self, Disk, Sample};
use super::runtime::{Runtime, failed, id_fits, labels_fit};
use super::sample::{Cgroup, Memory, Traffic, traffic};
use super::{api, seen};
use crate::cri::{ContainerState, ContainerStatus, NamespaceMode, Resources, SandboxStatus, Stats};
use crate::images::disk_usage;
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
        let mut all = Vec::new();
        for sandbox in self.verbs.list_pod_sandboxes().await.map_err(failed)? {
            if !sandbox.ready {
                continue;
            }
            let members = self.members(&sandbox.id).await?;
            let (images, folder) = (self.images.store.clone(), self.images.folder.clone());
            let gathered = blocking(move || {
                let pod = sandbox.config.pod.clone();
                let labels = |container: &str, id: &str, image: &str| {
                    let pod = pod.as_ref().map(|pod| (pod.namespace.clone(), pod.name.clone())).unwrap_or_default();
                    [container.into(), id.into(), image.into(), id.into(), pod.0, pod.1]
                };
                let of_pod = sample(
                    labels("", sandbox.id.as_str(), ""),
                    sandbox.created_at,
                    Cgroup::at(&sandbox.config.cgroup_parent),
                    Resources::default(),
                    None,
                    sandbox_traffic(&sandbox),
                );
                let running = members.iter().filter(|status| status.state == ContainerState::Running);
                let containers = running.map(|status| {
                    let writable = images.upper(status.id.as_str());
                    let sample = sample(
                        labels(&status.config.name, status.id.as_str(), &status.config.image),
                        status.started_at,
                        cgroup_of(&sandbox, status),
                        status.config.resources.clone(),
                        disk(&folder, &writable),
                        BTreeMap::new(),
                    );
                    api::ContainerMetrics { container_id: status.id.to_string(), metrics: metrics::of(&sample) }
                });
                api::PodSandboxMetrics {
                    pod_sandbox_id: sandbox.id.to_string(),
                    metrics: metrics::of(&of_pod),
                    container_metrics: containers.collect(),
                }
            });
            all.push(gathered.await?);
        }
        Ok(all)
    }
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

/// The file system of the images at `folder`, and what the files at `writable` take of it.
fn disk(folder: &Path, writable: &Path) -> Option<Disk> {
    let all = nix::sys::statvfs::statvfs(folder).ok()?;
    let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(folder).ok()?);
    Some(Disk {
        device: format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)),
        used_bytes: disk_usage(writable).ok()?.0,
        capacity_bytes: all.blocks() * all.fragment_size(),
        inodes: all.files(),
        inodes_free: all.files_free(),
    })
}

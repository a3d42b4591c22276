//! From what the node knows to the messages of the interface.

use std::collections::BTreeMap;

use super::api;
use crate::cri::{
    ContainerState, ContainerStatus, Mount, NamespaceMode, Propagation, Resources, SandboxConfig, SandboxStatus, Stats,
};
use crate::images::{Image, ImageStore};

/// Exit code of a container whose end nobody saw, as containerd has it.
const UNKNOWN_EXIT_CODE: i32 = 255;

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

fn metadata(config: &SandboxConfig) -> Option<api::PodSandboxMetadata> {
    config.pod.as_ref().map(|pod| api::PodSandboxMetadata {
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        attempt: config.attempt,
    })
}

fn state(sandbox: &SandboxStatus) -> i32 {
    (if sandbox.ready { api::PodSandboxState::Ready } else { api::PodSandboxState::NotReady }) as i32
}

/// A row of `ListPodSandbox`.
pub(super) fn sandbox(sandbox: &SandboxStatus) -> api::PodSandbox {
    api::PodSandbox {
        id: sandbox.id.to_string(),
        metadata: metadata(&sandbox.config),
        state: state(sandbox),
        created_at: sandbox.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.config.runtime_handler.clone(),
    }
}

/// `PodSandboxStatus`.
pub(super) fn sandbox_status(sandbox: &SandboxStatus) -> api::PodSandboxStatus {
    let config = &sandbox.config;
    let mode = |mode: NamespaceMode| {
        (match mode {
            NamespaceMode::Pod => api::NamespaceMode::Pod,
            NamespaceMode::Container => api::NamespaceMode::Container,
            NamespaceMode::Node => api::NamespaceMode::Node,
        }) as i32
    };
    let maps: Vec<_> = config
        .id_mappings
        .iter()
        .map(|map| api::IDMapping { host_id: map.host_id, container_id: map.container_id, length: map.length })
        .collect();
    let user = api::UserNamespace {
        mode: mode(if maps.is_empty() { NamespaceMode::Node } else { NamespaceMode::Pod }),
        uids: maps.clone(),
        gids: maps,
    };
    let options = api::NamespaceOption {
        network: mode(config.network),
        pid: mode(config.pid),
        ipc: mode(config.ipc),
        target_id: String::new(),
        userns_options: Some(user),
    };
    let mut ips = sandbox.ips.iter().map(ToString::to_string);
    api::PodSandboxStatus {
        id: sandbox.id.to_string(),
        metadata: metadata(config),
        state: state(sandbox),
        created_at: sandbox.created_at,
        network: Some(api::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| api::PodIP { ip }).collect(),
        }),
        linux: Some(api::LinuxPodSandboxStatus { namespaces: Some(api::Namespace { options: Some(options) }) }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: config.runtime_handler.clone(),
    }
}

fn container_state(state: ContainerState) -> i32 {
    (match state {
        ContainerState::Created => api::ContainerState::Created,
        ContainerState::Running => api::ContainerState::Running,
        ContainerState::Exited => api::ContainerState::Exited,
        ContainerState::Unknown => api::ContainerState::Unknown,
    }) as i32
}

fn container_metadata(status: &ContainerStatus) -> Option<api::ContainerMetadata> {
    Some(api::ContainerMetadata { name: status.config.name.clone(), attempt: status.config.attempt })
}

/// The image of a container: as asked for, the name with a digest that it was pulled by, and its id.
fn image(status: &ContainerStatus, images: &ImageStore) -> (api::ImageSpec, String, String) {
    let asked = &status.config.image;
    // The image may have been removed since; its id is still known.
    let known = images.resolve(&status.config.image_id).ok().flatten();
    let (id, reference) = match &known {
        Some(image) => (image.id.clone(), image.repo_digests.first().unwrap_or(&image.id).clone()),
        None => (status.config.image_id.clone(), status.config.image_id.clone()),
    };
    let spec = api::ImageSpec {
        image: id.clone(),
        user_specified_image: asked.clone(),
        annotations: BTreeMap::new(),
        runtime_handler: String::new(),
        image_ref: String::new(),
    };
    (spec, reference, id)
}

/// A row of `ListContainers`.
pub(super) fn container(status: &ContainerStatus, images: &ImageStore) -> api::Container {
    let (spec, image_ref, image_id) = image(status, images);
    api::Container {
        id: status.id.to_string(),
        pod_sandbox_id: status.sandbox.to_string(),
        metadata: container_metadata(status),
        image: Some(spec),
        image_ref,
        state: container_state(status.state),
        created_at: status.created_at,
        labels: status.config.labels.clone(),
        annotations: status.config.annotations.clone(),
        image_id,
    }
}

/// `ContainerStatus`.
pub(super) fn container_status(status: &ContainerStatus, images: &ImageStore) -> api::ContainerStatus {
    let (spec, image_ref, image_id) = image(status, images);
    let config = &status.config;
    let (finished_at, exit_code, reason) = match (&status.exit, status.state) {
        (Some(exit), _) if exit.oom_killed => (exit.finished_at, exit.code, "OOMKilled"),
        (Some(exit), ContainerState::Unknown) => (exit.finished_at, UNKNOWN_EXIT_CODE, "Unknown"),
        (Some(exit), _) => (exit.finished_at, exit.code, if exit.code == 0 { "Completed" } else { "Error" }),
        (None, ContainerState::Unknown) => (0, UNKNOWN_EXIT_CODE, "Unknown"),
        (None, _) => (0, 0, ""),
    };
    let user = api::LinuxContainerUser {
        uid: status.user.uid.into(),
        gid: status.user.gid.into(),
        supplemental_groups: status.user.supplemental_groups.iter().map(|group| (*group).into()).collect(),
    };
    api::ContainerStatus {
        id: status.id.to_string(),
        metadata: container_metadata(status),
        state: container_state(status.state),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at,
        exit_code,
        image: Some(spec),
        image_ref,
        reason: reason.into(),
        message: status.message.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: config.mounts.iter().map(mount).collect(),
        log_path: text(&config.log_path),
        resources: Some(api::ContainerResources { linux: Some(resources(&config.resources)) }),
        image_id,
        user: Some(api::ContainerUser { linux: Some(user) }),
        stop_signal: api::signal_of(&config.stop_signal),
    }
}

fn mount(mount: &Mount) -> api::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => api::MountPropagation::Private,
        Propagation::HostToContainer => api::MountPropagation::HostToContainer,
        Propagation::Bidirectional => api::MountPropagation::Bidirectional,
    };
    let image = mount.image.as_ref().map(|image| api::ImageSpec {
        image: image.image_id.clone(),
        user_specified_image: image.image.clone(),
        image_ref: image.image_id.clone(),
        ..api::ImageSpec::default()
    });
    api::Mount {
        container_path: text(&mount.container_path),
        host_path: if image.is_some() { String::new() } else { text(&mount.host_path) },
        readonly: mount.readonly,
        propagation: propagation as i32,
        recursive_read_only: mount.recursive_read_only,
        image_sub_path: mount.image.as_ref().map(|image| text(&image.sub_path)).unwrap_or_default(),
        image,
        ..api::Mount::default()
    }
}

fn resources(resources: &Resources) -> api::LinuxContainerResources {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    api::LinuxContainerResources {
        cpu_period: signed(resources.cpu_period),
        cpu_quota: resources.cpu_quota,
        cpu_shares: signed(resources.cpu_shares),
        memory_limit_in_bytes: resources.memory_limit_in_bytes,
        oom_score_adj: resources.oom_score_adj.into(),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| api::HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone(),
        memory_swap_limit_in_bytes: resources.memory_swap_limit_in_bytes,
    }
}

/// An image of the store.
pub(super) fn stored_image(image: &Image) -> api::Image {
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(uid) => (Some(api::Int64Value { value: uid }), String::new()),
        Err(_) if user.is_empty() => (Some(api::Int64Value { value: 0 }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    api::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

fn some(value: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value })
}

/// CPU and memory of a cgroup.
pub(super) fn usage(stats: &Stats, limit_bytes: i64) -> (api::CpuUsage, api::MemoryUsage) {
    let cpu = api::CpuUsage {
        timestamp: stats.timestamp,
        usage_core_nano_seconds: some(stats.cpu_usage_ns),
        usage_nano_cores: None,
        psi: None,
    };
    let working_set = stats.memory_working_set_bytes;
    let available = u64::try_from(limit_bytes).ok().filter(|limit| *limit > 0).zip(working_set);
    let memory = api::MemoryUsage {
        timestamp: stats.timestamp,
        working_set_bytes: working_set.and_then(some),
        available_bytes: available.and_then(|(limit, used)| some(limit.saturating_sub(used))),
        usage_bytes: stats.memory_usage_bytes.and_then(some),
        rss_bytes: stats.memory_rss_bytes.and_then(some),
        page_faults: stats.page_faults.and_then(some),
        major_page_faults: stats.major_page_faults.and_then(some),
        psi: None,
    };
    (cpu, memory)
}

/// `ContainerStats`.
pub(super) fn container_stats(status: &ContainerStatus, stats: &Stats, images: &str) -> api::ContainerStats {
    let (cpu, memory) = usage(stats, status.config.resources.memory_limit_in_bytes);
    let layer = stats.writable_layer_bytes.map(|bytes| api::FilesystemUsage {
        timestamp: stats.timestamp,
        fs_id: Some(api::FilesystemIdentifier { mountpoint: images.to_owned() }),
        used_bytes: some(bytes),
        inodes_used: stats.writable_layer_inodes.and_then(some),
    });
    api::ContainerStats {
        attributes: Some(api::ContainerAttributes {
            id: status.id.to_string(),
            metadata: container_metadata(status),
            labels: status.config.labels.clone(),
            annotations: status.config.annotations.clone(),
        }),
        cpu: Some(cpu),
        memory: Some(memory),
        writable_layer: layer,
        swap: None,
        io: None,
    }
}

/// `PodSandboxStats.attributes`.
pub(super) fn attributes(sandbox: &SandboxStatus) -> api::PodSandboxAttributes {
    api::PodSandboxAttributes {
        id: sandbox.id.to_string(),
        metadata: metadata(&sandbox.config),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
    }
}

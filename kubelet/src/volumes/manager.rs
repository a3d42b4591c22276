//! The volumes of all pods of the node.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Volume, VolumeDevice, VolumeMount};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::downward::Allocatable;
use super::error::{IoContext, VolumeError};
use super::objects::{ObjectCache, ObjectData, ObjectKey, ObjectKind, ObjectUse};
use super::payload::Payload;
use super::plugin::{Context, plugin_of};
use super::token::Tokens;
use super::{mounts, subpath, writer};
use crate::cri::{Device, Mount, Propagation};
use crate::csi::Csi;
use crate::images::ImageStore;
use crate::names::Layout;

/// What volumes need to know of the node.
#[derive(Clone)]
pub struct VolumesConfig {
    /// Where files lie.
    pub layout: Layout,
    /// For image volumes.
    pub images: Arc<ImageStore>,
    /// For volumes of drivers.
    pub csi: Csi,
    /// What a container without limits may use.
    pub allocatable: Arc<dyn Fn() -> Allocatable + Send + Sync>,
}

impl VolumesConfig {
    pub(super) fn allocatable(&self) -> Allocatable {
        (self.allocatable)()
    }
}

/// A volume that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedVolume {
    /// Where its content is on the node.
    pub path: PathBuf,
    /// Whether containers may only read it.
    pub read_only: bool,
    /// Whether it is a device and no folder.
    pub block: bool,
    /// Whether its owners are those of the pod's user namespace already.
    pub mapped: bool,
}

/// What one volume takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeUsage {
    /// Bytes in use.
    pub used_bytes: u64,
    /// Inodes in use.
    pub inodes_used: u64,
    /// Inodes of the file system.
    pub inodes: u64,
    /// Inodes free for use.
    pub inodes_free: u64,
    /// Size of the file system.
    pub capacity_bytes: u64,
    /// Free for use.
    pub available_bytes: u64,
    /// An emptyDir on the node's disk, which counts against limits of ephemeral storage and `sizeLimit`.
    pub counts_as_ephemeral: bool,
}

/// A pod's volumes by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodVolumes {
    /// All that a container of the pod mounts.
    pub volumes: BTreeMap<String, MountedVolume>,
}

/// The volumes of a node. Cheap to clone.
#[derive(Clone)]
pub struct Volumes(Arc<Manager>);

/// What plugins see of it.
pub(super) struct Manager {
    pub(super) config: VolumesConfig,
    pub(super) objects: ObjectCache,
    pub(super) tokens: Tokens,
    pub(super) pods: Mutex<HashMap<String, Arc<LivePod>>>,
    /// Rung when a refresh time was added.
    pub(super) schedule: Notify,
}

/// A pod whose volumes are kept up to date.
pub(super) struct LivePod {
    pub(super) pod: Mutex<Arc<Pod>>,
    /// Setting up and refreshing take turns.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) volumes: Mutex<BTreeMap<String, LiveVolume>>,
}

/// What a volume waits for.
#[derive(Default)]
pub(super) struct LiveVolume {
    pub(super) uses: Vec<ObjectUse>,
    pub(super) refresh_at: Option<Instant>,
}

impl Volumes {
    /// A node's volumes; [`Volumes::run`] keeps them up to date.
    pub fn new(config: VolumesConfig, objects: ObjectCache) -> Self {
        Self(Arc::new(Manager {
            config,
            objects,
            tokens: Tokens::default(),
            pods: Mutex::default(),
            schedule: Notify::new(),
        }))
    }

    /// Follows ConfigMaps, Secrets, pods' metadata and tokens' lives until dropped.
    pub async fn run(self) {
        super::live::run(self.0).await;
    }

    /// The cache of ConfigMaps and Secrets, also for environments and pull secrets.
    pub fn objects(&self) -> &ObjectCache {
        &self.0.objects
    }

    pub(super) fn layout(&self) -> &crate::names::Layout {
        &self.0.config.layout
    }

    /// What a container without limits may use.
    pub(super) fn allocatable(&self) -> Allocatable {
        self.0.config.allocatable()
    }

    /// Makes every volume that a container of the pod mounts. Idempotent: called again after a failure, after a restart of
    /// the daemon, or when an ephemeral container came. `user` is the user namespace of a pod that has one of its own.
    ///
    /// # Errors
    /// The first volume that cannot be made; those before it stay.
    pub async fn setup(&self, pod: &Arc<Pod>, user: Option<&Path>) -> Result<PodVolumes, VolumeError> {
        let uid = uid_of(pod)?;
        let live = {
            let mut pods = self.0.pods.lock();
            let live = pods.entry(uid.to_owned()).or_insert_with(|| {
                Arc::new(LivePod {
                    pod: Mutex::new(pod.clone()),
                    turn: tokio::sync::Mutex::default(),
                    volumes: Mutex::default(),
                })
            });
            live.clone()
        };
        *live.pod.lock() = pod.clone();
        let _turn = live.turn.lock().await;
        let used = used_volumes(pod);
        let mut result = PodVolumes::default();
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
        for volume in volumes.iter().filter(|volume| used.contains(&volume.name.as_str())) {
            let mounted = self.0.refresh(&live, pod, volume, user).await?;
            result.volumes.insert(volume.name.clone(), mounted);
        }
        Ok(result)
    }

    /// Tells that a pod's object changed; its labels and annotations may be in files.
    pub fn update(&self, pod: &Arc<Pod>) {
        let Some(uid) = pod.metadata.uid.as_deref() else { return };
        let Some(live) = self.0.pods.lock().get(uid).cloned() else { return };
        let old = std::mem::replace(&mut *live.pod.lock(), pod.clone());
        if old.metadata.labels == pod.metadata.labels && old.metadata.annotations == pod.metadata.annotations {
            return;
        }
        let now = Instant::now();
        let follows = |name: &str| {
            let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
            let volume = volumes.iter().find(|volume| volume.name == name);
            volume.is_some_and(|volume| plugin_of(volume).is_ok_and(|plugin| plugin.follows_pod()))
        };
        for (name, volume) in live.volumes.lock().iter_mut() {
            if follows(name) {
                volume.refresh_at = Some(now);
            }
        }
        self.0.schedule.notify_one();
    }

    /// The mounts of one container, sub-paths bound. `environment` is the container's, for subPathExpr.
    ///
    /// # Errors
    /// When a mount names no volume, or a sub-path is refused.
    pub async fn mounts(
        &self,
        pod: &Pod,
        volumes: &PodVolumes,
        container: &str,
        mounts: &[VolumeMount],
        environment: &[(String, String)],
    ) -> Result<Vec<Mount>, VolumeError> {
        let folder = self.0.config.layout.pod(uid_of(pod)?).join("volume-subpaths");
        let own_users = pod.spec.as_ref().and_then(|spec| spec.host_users) == Some(false);
        let mut result = Vec::new();
        for (index, mount) in mounts.iter().enumerate() {
            let invalid = |reason: String| VolumeError::Invalid { volume: mount.name.clone(), reason };
            let volume =
                volumes.volumes.get(&mount.name).ok_or_else(|| invalid("the pod has no such volume".into()))?;
            if volume.block {
                return Err(invalid("it is a block volume, which containers reach as volumeDevices".into()));
            }
            let sub_path = match (&mount.sub_path, &mount.sub_path_expr) {
                (_, Some(expression)) if !expression.is_empty() => {
                    subpath::expand(expression, environment).map_err(invalid)?
                }
                (Some(path), _) => path.clone(),
                (None, _) => String::new(),
            };
            let host_path = if sub_path.is_empty() {
                volume.path.clone()
            } else {
                let target = folder.join(&mount.name).join(container).join(index.to_string());
                let (name, root) = (mount.name.clone(), volume.path.clone());
                blocking(move || subpath::expose(&name, &root, &sub_path, &target)).await?
            };
            let readonly = volume.read_only || mount.read_only.unwrap_or(false);
            // Every kernel that the product supports can do it, so "if possible" is "yes".
            let recursive = matches!(mount.recursive_read_only.as_deref(), Some("IfPossible" | "Enabled"));
            let container_path = PathBuf::from(&mount.mount_path);
            let container_path =
                if container_path.is_absolute() { container_path } else { PathBuf::from("/").join(container_path) };
            result.push(Mount {
                container_path,
                host_path,
                readonly,
                recursive_read_only: readonly && recursive,
                propagation: match mount.mount_propagation.as_deref() {
                    Some("HostToContainer") => Propagation::HostToContainer,
                    Some("Bidirectional") => Propagation::Bidirectional,
                    _ => Propagation::Private,
                },
                id_mapped: own_users && !volume.mapped,
                image: None,
            });
        }
        Ok(result)
    }

    /// The block volumes of one container.
    ///
    /// # Errors
    /// When a device names no volume, or one that is a folder.
    pub fn devices(volumes: &PodVolumes, devices: &[VolumeDevice]) -> Result<Vec<Device>, VolumeError> {
        let device = |wanted: &VolumeDevice| {
            let invalid =
                |reason: &str| VolumeError::Invalid { volume: wanted.name.clone(), reason: reason.to_owned() };
            let volume = volumes.volumes.get(&wanted.name).ok_or_else(|| invalid("the pod has no such volume"))?;
            if !volume.block {
                return Err(invalid("it is no block volume; containers reach it as volumeMounts"));
            }
            let permissions = if volume.read_only { "r" } else { "rwm" }.to_owned();
            let container_path = PathBuf::from(&wanted.device_path);
            Ok(Device { container_path, host_path: volume.path.clone(), permissions })
        };
        devices.iter().map(device).collect()
    }

    /// Takes a pod's volumes away; its containers must be gone. Idempotent.
    ///
    /// # Errors
    /// When something cannot be unmounted or removed. Nothing that is still mounted is ever deleted.
    pub async fn teardown(&self, uid: &str) -> Result<(), VolumeError> {
        let live = self.0.pods.lock().remove(uid);
        if let Some(live) = live {
            // A refresh under way ends first; it finds the pod gone next time.
            let _turn = live.turn.lock().await;
            live.volumes.lock().clear();
        }
        self.0.tokens.forget(uid);
        // Before anything that drivers mounted is touched otherwise.
        let subpaths = self.0.config.layout.pod(uid).join("volume-subpaths");
        blocking(move || if subpaths.exists() { mounts::unmount_all(&subpaths) } else { Ok(()) }).await?;
        self.0.config.csi.unpublish_all(uid).await?;
        let pod = self.0.config.layout.pod(uid);
        blocking(move || {
            for name in ["volume-subpaths", "volumes", "volumeDevices"] {
                let folder = pod.join(name);
                // Most pods have one of these at most, and the table of mounts is long.
                if !folder.exists() {
                    continue;
                }
                mounts::unmount_all(&folder)?;
                if let Some(left) = mounts::below(&folder)?.first() {
                    return Err(std::io::Error::from(nix::errno::Errno::EBUSY)).step("unmount", left);
                }
                match fs::remove_dir_all(&folder) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).step("remove", &folder),
                }
            }
            Ok(())
        })
        .await?;
        let prefix = super::image::snapshot_id(uid, "");
        for snapshot in self.0.config.images.snapshot_names()?.iter().filter(|name| name.starts_with(&prefix)) {
            self.0.config.images.remove_snapshot(snapshot)?;
        }
        Ok(())
    }

    /// How much a pod's volumes take, by name. Volumes with a file system of their own (in memory, NFS) tell its size;
    /// those on the node's disk are walked, and tell the disk's.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub async fn usage(&self, uid: &str) -> Result<BTreeMap<String, VolumeUsage>, VolumeError> {
        let folder = self.0.config.layout.pod(uid).join("volumes");
        let of_drivers = self.0.config.csi.usage(uid).await?;
        let mut usage = blocking(move || {
            let list = |folder: &std::path::Path| -> Result<Vec<PathBuf>, VolumeError> {
                match fs::read_dir(folder) {
                    Ok(entries) => entries.map(|entry| Ok(entry.step("read folder", folder)?.path())).collect(),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
                    Err(error) => Err(error).step("read folder", folder),
                }
            };
            let mut usage = BTreeMap::new();
            for kind in list(&folder)? {
                let on_disk = kind.ends_with("kubernetes.io~empty-dir");
                if kind.ends_with("kubernetes.io~csi") {
                    continue;
                }
                for volume in list(&kind)? {
                    let name = volume.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let disk = nix::sys::statvfs::statvfs(&volume).step("look at file system of", &volume)?;
                    let own = mounts::is_mount_point(&volume)?;
                    let (used_bytes, inodes_used) = if own {
                        ((disk.blocks() - disk.blocks_free()) * disk.fragment_size(), disk.files() - disk.files_free())
                    } else {
                        crate::images::disk_usage(&volume)?
                    };
                    usage.insert(
                        name,
                        VolumeUsage {
                            used_bytes,
                            inodes_used,
                            inodes: disk.files(),
                            inodes_free: disk.files_free(),
                            capacity_bytes: disk.blocks() * disk.fragment_size(),
                            available_bytes: disk.blocks_available() * disk.fragment_size(),
                            counts_as_ephemeral: on_disk && !own,
                        },
                    );
                }
            }
            Ok(usage)
        })
        .await?;
        usage.extend(of_drivers);
        Ok(usage)
    }

    /// UIDs of pods that have a folder on this node: what a restarted daemon must set up again or tear down.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn known_pods(&self) -> Result<Vec<String>, VolumeError> {
        let root = self.0.config.layout.pods();
        let entries = match fs::read_dir(&root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).step("read folder", &root),
        };
        entries.map(|entry| Ok(entry.step("read folder", &root)?.file_name().to_string_lossy().into_owned())).collect()
    }
}

impl Manager {
    /// Makes one volume or brings it up to date. The caller has the pod's turn.
    pub(super) async fn refresh(
        &self,
        live: &LivePod,
        pod: &Arc<Pod>,
        volume: &Volume,
        user: Option<&Path>,
    ) -> Result<MountedVolume, VolumeError> {
        let plugin = plugin_of(volume)?;
        let uid = uid_of(pod)?;
        let context = Context {
            manager: self,
            pod,
            uid,
            namespace: pod.metadata.namespace.as_deref().unwrap_or("default"),
            volume,
            folder: self.config.layout.pod(uid).join("volumes").join(plugin.folder()).join(&volume.name),
            user,
        };
        let ready = plugin.setup(&context).await?;
        let scheduled = ready.refresh_at.is_some();
        live.volumes.lock().insert(volume.name.clone(), LiveVolume { uses: ready.uses, refresh_at: ready.refresh_at });
        if scheduled {
            self.schedule.notify_one();
        }
        Ok(MountedVolume { path: ready.path, read_only: ready.read_only, block: ready.block, mapped: ready.mapped })
    }

    /// An object that a volume is made of. Without it, an optional volume is empty and another one fails.
    pub(super) async fn object(
        &self,
        context: &Context<'_>,
        kind: ObjectKind,
        name: &str,
        optional: bool,
    ) -> Result<(ObjectUse, Option<Arc<ObjectData>>), VolumeError> {
        let key = ObjectKey { kind, namespace: context.namespace.to_owned(), name: name.to_owned() };
        let used = self.objects.watch(&key)?;
        match used.get().await? {
            None if !optional => Err(VolumeError::NotFound { kind: kind.word(), name: name.to_owned() }),
            data => Ok((used, data)),
        }
    }

    /// Writes a volume's files.
    pub(super) async fn write_payload(&self, context: &Context<'_>, payload: Payload) -> Result<(), VolumeError> {
        let (folder, group) = (context.folder.clone(), context.fs_group());
        blocking(move || writer::write(&folder, &payload, group)).await.map(|_changed| ())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| VolumeError::Task(error.to_string()))?
}

/// The UID, which becomes a folder's name.
fn uid_of(pod: &Pod) -> Result<&str, VolumeError> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let fits = !uid.is_empty()
        && uid.len() <= 128
        && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    if fits {
        Ok(uid)
    } else {
        Err(VolumeError::Invalid { volume: String::new(), reason: format!("pod UID {uid:?} cannot name a folder") })
    }
}

/// The volumes that some container mounts or has as a device; others are not made.
fn used_volumes(pod: &Pod) -> Vec<&str> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let containers = || spec.init_containers.iter().flatten().chain(&spec.containers);
    let ephemeral =
        spec.ephemeral_containers.iter().flatten().flat_map(|container| container.volume_mounts.iter().flatten());
    let mounts = containers().flat_map(|container| container.volume_mounts.iter().flatten()).chain(ephemeral);
    let devices = containers().flat_map(|container| container.volume_devices.iter().flatten());
    mounts.map(|mount| mount.name.as_str()).chain(devices.map(|device| device.name.as_str())).collect()
}

//! One volume's way: staged for the node, published for the pod, and back.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::api::{self, Capability};
use super::driver::{Driver, Words, text};
use super::record::{self, Record};
use super::{Csi, paths};
use crate::volumes::error::IoContext as _;
use crate::volumes::{VolumeError, VolumeUsage};

/// Whoever works on a volume holds its lock: pods may share it.
pub(super) type Locks = Mutex<HashMap<(String, String), Weak<tokio::sync::Mutex<()>>>>;

/// A volume as a pod wants it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Name of the persistent volume, or of a pod's own one.
    pub(crate) name: String,
    /// What the pod calls it.
    pub(crate) pod_volume: String,
    pub(crate) driver: String,
    /// `None`: it lives with the pod.
    pub(crate) handle: Option<String>,
    pub(crate) block: bool,
    pub(crate) read_only: bool,
    pub(crate) fs_type: String,
    pub(crate) mount_options: Vec<String>,
    pub(crate) access_modes: Vec<String>,
    /// What the driver is told of the volume, and of the pod if it asks for that.
    pub(crate) context: Words,
    /// What attaching it said; `None` if the driver needs no attaching.
    pub(crate) attached: Option<Words>,
    pub(crate) stage_secrets: Words,
    pub(crate) publish_secrets: Words,
    /// Group that the files are to have.
    pub(crate) group: Option<u32>,
    /// Publish it again although it is: the driver wants to look after it from time to time.
    pub(crate) again: bool,
}

/// A volume that a pod can use.
pub(crate) struct Published {
    /// The folder, or the device.
    pub(crate) path: PathBuf,
    /// Whether this call published it: it was not, or is to be looked after.
    pub(crate) is_new: bool,
    /// Whether the driver gives files their group by itself.
    pub(crate) driver_sets_group: bool,
    pub(super) folder: PathBuf,
    pub(super) record: Record,
    lock: tokio::sync::OwnedMutexGuard<()>,
}

impl Csi {
    async fn lock(&self, record: &Record) -> tokio::sync::OwnedMutexGuard<()> {
        let key = (record.driver_name.clone(), record.volume_handle.clone());
        let lock = {
            let mut locks = self.0.volumes.lock();
            locks.retain(|_, lock| lock.strong_count() > 0);
            let held = locks.get(&key).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(key, Arc::downgrade(&held));
            held
        };
        lock.lock_owned().await
    }

    /// Name of the VolumeAttachment of a volume on this node.
    pub(crate) fn attachment(&self, wanted: &Wanted) -> String {
        paths::attachment(wanted.handle.as_deref().unwrap_or_default(), &wanted.driver, &self.0.node)
    }

    /// Stages and publishes a volume unless that is done. The caller finishes it and calls [`Self::ready`].
    pub(crate) async fn publish(&self, uid: &str, wanted: Wanted) -> Result<Published, VolumeError> {
        let layout = &self.0.layout;
        let handle = wanted.handle.clone().unwrap_or_else(|| paths::inline_handle(uid, &wanted.name));
        let folder = paths::of_pod(layout, uid, &wanted.name, wanted.block);
        let mut record = Record {
            spec_vol_id: wanted.name.clone(),
            volume_handle: handle,
            driver_name: wanted.driver.clone(),
            node_name: self.0.node.clone(),
            attachment_id: if wanted.attached.is_some() { self.attachment(&wanted) } else { String::new() },
            volume_lifecycle_mode: if wanted.handle.is_some() { "Persistent" } else { "Ephemeral" }.into(),
            pod_volume: wanted.pod_volume.clone(),
            block: wanted.block,
            ..Record::default()
        };
        let lock = self.lock(&record).await;
        let path = paths::target(layout, &folder, uid, &record);
        let known = Record::load(&folder)?;
        let ready = known.clone().filter(|known| known.ready_in_boot.as_ref() == Some(&self.0.boot_id));
        if let Some(record) = ready.clone().filter(|_| !wanted.again) {
            // A pod that runs does not wait for a driver that is not back yet.
            return Ok(Published { path, is_new: false, driver_sets_group: false, folder, record, lock });
        }
        let alone = wanted.access_modes == ["ReadWriteOncePod"];
        if alone && record::all(layout)?.iter().any(|(other, held)| other != uid && held.is_same_volume(&record)) {
            return Err(VolumeError::Claim {
                claim: wanted.pod_volume,
                reason: "volume uses the ReadWriteOncePod access mode and is already in use by another pod".into(),
            });
        }
        let is_ready = ready.is_some();
        let driver = self.driver(&wanted.driver)?;
        let driver_sets_group = driver.can(Capability::VolumeMountGroup);
        record.staged = wanted.handle.is_some() && driver.can(Capability::StageUnstageVolume);
        record.ready_in_boot = ready.and_then(|known| known.ready_in_boot);
        if known.is_none() {
            record.save(&folder)?;
            self.0.in_use.notify_one();
        }
        let capability = capability(&driver, &wanted, driver_sets_group);
        let staging = if record.staged { text(&paths::staging(layout, &record)) } else { String::new() };
        let is_staged = || -> Result<bool, VolumeError> {
            let ready = |other: &Record| other.ready_in_boot.as_ref() == Some(&self.0.boot_id);
            Ok(record::all(layout)?.iter().any(|(_, other)| other.is_same_volume(&record) && ready(other)))
        };
        if record.staged && !is_staged()? {
            make(Path::new(&staging))?;
            let request = api::NodeStageVolumeRequest {
                volume_id: record.volume_handle.clone(),
                publish_context: wanted.attached.clone().unwrap_or_default(),
                staging_target_path: staging.clone(),
                volume_capability: Some(capability.clone()),
                secrets: wanted.stage_secrets,
                volume_context: wanted.context.clone(),
            };
            driver.stage(request).await?;
        }
        make(path.parent().unwrap_or(&folder))?;
        let request = api::NodePublishVolumeRequest {
            volume_id: record.volume_handle.clone(),
            publish_context: wanted.attached.unwrap_or_default(),
            staging_target_path: staging,
            target_path: text(&path),
            volume_capability: Some(capability),
            readonly: wanted.read_only,
            secrets: wanted.publish_secrets,
            volume_context: wanted.context,
        };
        driver.publish(request).await?;
        Ok(Published { path, is_new: !is_ready, driver_sets_group, folder, record, lock })
    }

    /// Notes that a volume is as its pod wants it, until the host starts anew.
    pub(crate) fn ready(&self, mut published: Published) -> Result<PathBuf, VolumeError> {
        if published.record.ready_in_boot.is_none() {
            published.record.ready_in_boot = Some(self.0.boot_id.clone());
            published.record.save(&published.folder)?;
        }
        drop(published.lock);
        Ok(published.path)
    }

    /// Tells the driver that a volume has grown, if it wants to know; says whether it did.
    pub(crate) async fn expand(
        &self,
        published: &Published,
        wanted: &Wanted,
        bytes: i64,
        secrets: Words,
    ) -> Result<bool, VolumeError> {
        let driver = self.driver(&wanted.driver)?;
        if !driver.can(Capability::ExpandVolume) {
            return Ok(false);
        }
        let record = &published.record;
        let request = api::NodeExpandVolumeRequest {
            volume_id: record.volume_handle.clone(),
            volume_path: text(&published.path),
            capacity_range: Some(api::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            staging_target_path: if record.staged {
                text(&paths::staging(&self.0.layout, record))
            } else {
                String::new()
            },
            volume_capability: Some(capability(&driver, wanted, driver.can(Capability::VolumeMountGroup))),
            secrets,
        };
        driver.expand(request).await.map(|()| true)
    }

    /// Takes down all that a pod has of drivers. Each step may be repeated: the record of a volume goes last.
    pub(crate) async fn unpublish_all(&self, uid: &str) -> Result<(), VolumeError> {
        for (folder, record) in record::of_pod(&self.0.layout, uid)? {
            self.unpublish(uid, &folder, &record).await?;
            self.0.in_use.notify_one();
        }
        Ok(())
    }

    async fn unpublish(&self, uid: &str, folder: &Path, record: &Record) -> Result<(), VolumeError> {
        let _lock = self.lock(record).await;
        let layout = &self.0.layout;
        let target = paths::target(layout, folder, uid, record);
        let driver = match self.driver(&record.driver_name) {
            Ok(driver) => Some(driver),
            // The node is taken down, maybe its drivers before: what they mounted goes without them.
            Err(_) if self.0.objects.is_none() => None,
            Err(error) => return Err(error),
        };
        match &driver {
            Some(driver) => driver.unpublish(&record.volume_handle, &target).await?,
            None => crate::volumes::unmount_all(&target)?,
        }
        remove_place(&target)?;
        let others = record::all(layout)?;
        let is_shared = others.iter().any(|(pod, other)| pod != uid && other.is_same_volume(record));
        if record.staged && !is_shared {
            let staging = paths::staging(layout, record);
            match &driver {
                Some(driver) => driver.unstage(&record.volume_handle, &staging).await?,
                None => crate::volumes::unmount_all(&staging)?,
            }
            remove_place(&staging)?;
            // Of the volume alone; other volumes have other folders.
            remove_empty(staging.parent().unwrap_or(&staging))?;
        }
        if record.block {
            remove_empty(target.parent().unwrap_or(&target))?;
        }
        Record::remove(folder)
    }

    /// Names of attached volumes that this node may have in use, as `status.volumesInUse` lists them.
    pub(crate) fn volumes_in_use(&self) -> Result<Vec<String>, VolumeError> {
        let mut names: Vec<_> = record::all(&self.0.layout)?
            .into_iter()
            .filter(|(_, record)| !record.attachment_id.is_empty())
            .map(|(_, record)| format!("kubernetes.io/csi/{}^{}", record.driver_name, record.volume_handle))
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// What a pod's volumes take, by what the pod calls them, of drivers that tell.
    pub(crate) async fn usage(&self, uid: &str) -> Result<Vec<(String, VolumeUsage)>, VolumeError> {
        let mut usage = Vec::new();
        for (folder, record) in record::of_pod(&self.0.layout, uid)? {
            let Ok(driver) = self.driver(&record.driver_name) else { continue };
            if !driver.can(Capability::GetVolumeStats) {
                continue;
            }
            let request = api::NodeGetVolumeStatsRequest {
                volume_id: record.volume_handle.clone(),
                volume_path: text(&paths::target(&self.0.layout, &folder, uid, &record)),
                staging_target_path: if record.staged {
                    text(&paths::staging(&self.0.layout, &record))
                } else {
                    String::new()
                },
            };
            // One driver in trouble must not hide the volumes of the others.
            match driver.stats(request).await {
                Ok(stats) => usage.push((record.pod_volume, used(&stats))),
                Err(error) => tracing::debug!(pod = uid, %error, "a driver does not tell how full a volume is"),
            }
        }
        Ok(usage)
    }
}

fn used(stats: &api::NodeGetVolumeStatsResponse) -> VolumeUsage {
    let amount = |number: i64| u64::try_from(number).unwrap_or_default();
    let of = |unit: api::Unit| stats.usage.iter().find(|usage| usage.unit == unit as i32).cloned().unwrap_or_default();
    let (bytes, inodes) = (of(api::Unit::Bytes), of(api::Unit::Inodes));
    VolumeUsage {
        used_bytes: amount(bytes.used),
        inodes_used: amount(inodes.used),
        inodes: amount(inodes.total),
        inodes_free: amount(inodes.available),
        capacity_bytes: amount(bytes.total),
        available_bytes: amount(bytes.available),
        counts_as_ephemeral: false,
    }
}

fn capability(driver: &Driver, wanted: &Wanted, driver_sets_group: bool) -> api::VolumeCapability {
    let mount = || api::MountVolume {
        fs_type: wanted.fs_type.clone(),
        mount_flags: wanted.mount_options.clone(),
        volume_mount_group: wanted.group.filter(|_| driver_sets_group).map(|g| g.to_string()).unwrap_or_default(),
    };
    api::VolumeCapability {
        block: wanted.block.then_some(api::BlockVolume {}),
        mount: (!wanted.block).then(mount),
        access_mode: Some(api::AccessMode { mode: driver.access_mode(&wanted.access_modes) as i32 }),
    }
}

fn make(folder: &Path) -> Result<(), VolumeError> {
    DirBuilder::new().recursive(true).mode(0o750).create(folder).step("create folder", folder)
}

/// Removes where a volume was: an empty folder, or the file that a device was at. What holds anything is left and told.
fn remove_place(path: &Path) -> Result<(), VolumeError> {
    let is_folder = match fs::symlink_metadata(path) {
        Ok(meta) => meta.is_dir(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).step("look at", path),
    };
    if is_folder { fs::remove_dir(path) } else { fs::remove_file(path) }.step("remove the place of a volume", path)
}

/// Removes a folder if nothing is in it.
fn remove_empty(folder: &Path) -> Result<(), VolumeError> {
    match fs::remove_dir(folder) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(error).step("remove", folder)
        }
        _ => Ok(()),
    }
}

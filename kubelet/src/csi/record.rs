//! What is written down of a volume before its driver is asked for it: all that taking it down needs.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::paths;
use crate::names::Layout;
use crate::volumes::VolumeError;
use crate::volumes::error::IoContext as _;

const FILE: &str = "vol_data.json";

/// One volume of one pod; names as a kubelet writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// Name of the persistent volume, or of a pod's own one.
    #[serde(rename = "specVolID")]
    pub(super) spec_vol_id: String,
    pub(super) volume_handle: String,
    pub(super) driver_name: String,
    pub(super) node_name: String,
    /// Name of the VolumeAttachment; empty if the driver needs none.
    #[serde(rename = "attachmentID")]
    pub(super) attachment_id: String,
    /// `Persistent` or `Ephemeral`
    pub(super) volume_lifecycle_mode: String,
    /// What the pod calls it.
    pub(super) pod_volume: String,
    /// Whether it is a device.
    pub(super) block: bool,
    /// Whether the driver stages volumes.
    pub(super) staged: bool,
    /// The boot of the host during which it was published and made ready, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ready_in_boot: Option<String>,
}

impl Record {
    /// What was written in the folder of a volume; a volume without was never asked for.
    pub(super) fn load(folder: &Path) -> Result<Option<Self>, VolumeError> {
        let path = folder.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::other).step("read", &path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).step("read", &path),
        }
    }

    /// Writes it, so that it is there after a crash of the host.
    pub(super) fn save(&self, folder: &Path) -> Result<(), VolumeError> {
        fs::create_dir_all(folder).step("create folder", folder)?;
        let (path, new) = (folder.join(FILE), folder.join(".vol_data.json.new"));
        let text = serde_json::to_vec(self).map_err(io::Error::other).step("encode", &path)?;
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            fs::File::open(folder)?.sync_all()
        };
        write().step("write", &path)
    }

    /// Forgets the volume in this folder.
    pub(super) fn remove(folder: &Path) -> Result<(), VolumeError> {
        let path = folder.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).step("remove", &path),
            _ => {}
        }
        match fs::remove_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).step("remove", folder),
            _ => Ok(()),
        }
    }

    pub(super) fn is_same_volume(&self, other: &Self) -> bool {
        self.driver_name == other.driver_name && self.volume_handle == other.volume_handle
    }
}

/// The volumes of one pod, each with its folder.
pub(super) fn of_pod(layout: &Layout, uid: &str) -> Result<Vec<(PathBuf, Record)>, VolumeError> {
    let mut found = Vec::new();
    for block in [false, true] {
        let parent = paths::of_pod(layout, uid, "", block);
        for folder in list(&parent)? {
            if let Some(record) = Record::load(&folder)? {
                found.push((folder, record));
            }
        }
    }
    Ok(found)
}

/// The volumes of all pods, by pod.
pub(super) fn all(layout: &Layout) -> Result<Vec<(String, Record)>, VolumeError> {
    let mut found = Vec::new();
    for pod in list(&layout.pods())? {
        let uid = pod.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.extend(of_pod(layout, &uid)?.into_iter().map(|(_, record)| (uid.clone(), record)));
    }
    Ok(found)
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry.step("read folder", folder)?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).step("read folder", folder),
    }
}

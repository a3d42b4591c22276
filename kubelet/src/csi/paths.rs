//! Where volumes of drivers lie: as a kubelet lays them out, for drivers take paths apart.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::record::Record;
use crate::names::Layout;

/// The folder of a type of volume that all of CSI's have below a pod's.
pub(super) const FOLDER: &str = "kubernetes.io~csi";

/// Where what is known of a pod's volume is written; a mounted volume is in `mount` beside it.
pub(super) fn of_pod(layout: &Layout, uid: &str, name: &str, block: bool) -> PathBuf {
    layout.pod(uid).join(if block { "volumeDevices" } else { "volumes" }).join(FOLDER).join(name)
}

/// Where a driver publishes a volume of a pod whose folder is `of_pod`.
pub(super) fn target(layout: &Layout, of_pod: &Path, uid: &str, record: &Record) -> PathBuf {
    match record.block {
        true => devices(layout).join("publish").join(&record.spec_vol_id).join(uid),
        false => of_pod.join("mount"),
    }
}

/// Where a driver stages a volume for all pods of the node.
pub(super) fn staging(layout: &Layout, record: &Record) -> PathBuf {
    match record.block {
        true => devices(layout).join("staging").join(&record.spec_vol_id),
        false => {
            let hash = hex::encode(Sha256::digest(&record.volume_handle));
            layout.plugins().join("kubernetes.io/csi").join(&record.driver_name).join(hash).join("globalmount")
        }
    }
}

fn devices(layout: &Layout) -> PathBuf {
    layout.plugins().join("kubernetes.io/csi/volumeDevices")
}

/// The handle of a volume that lives with its pod.
pub(super) fn inline_handle(uid: &str, volume: &str) -> String {
    format!("csi-{}", hex::encode(Sha256::digest(format!("{uid}{volume}"))))
}

/// The name of the VolumeAttachment of a volume on a node.
pub(super) fn attachment(handle: &str, driver: &str, node: &str) -> String {
    format!("csi-{}", hex::encode(Sha256::digest(format!("{handle}{driver}{node}"))))
}

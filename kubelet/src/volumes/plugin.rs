//! What every type of volume can do, and the table of types.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, Volume};

use super::error::VolumeError;
use super::manager::Manager;
use super::objects::ObjectUse;

/// What a plugin works with.
pub(super) struct Context<'a> {
    pub(super) manager: &'a Manager,
    pub(super) pod: &'a Arc<Pod>,
    pub(super) uid: &'a str,
    pub(super) namespace: &'a str,
    pub(super) volume: &'a Volume,
    /// The folder that is this volume's own: `<pod>/volumes/kubernetes.io~<type>/<name>`; not made yet.
    pub(super) folder: PathBuf,
    /// The user namespace of a pod that has one of its own.
    pub(super) user: Option<&'a Path>,
}

impl Context<'_> {
    /// An error that names this volume.
    pub(super) fn invalid(&self, reason: impl Into<String>) -> VolumeError {
        VolumeError::Invalid { volume: self.volume.name.clone(), reason: reason.into() }
    }

    /// `spec.securityContext.fsGroup`
    pub(super) fn fs_group(&self) -> Option<u32> {
        let group = self.pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
        u32::try_from(group).ok()
    }
}

/// A volume that is there.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Where its content is.
    pub(super) path: PathBuf,
    /// Whether containers may only read it, whatever they ask for.
    pub(super) read_only: bool,
    /// Whether it is a device, for `volumeDevices`, and no folder.
    pub(super) block: bool,
    /// Whether its owners are those of the pod's user namespace already; others' mounts are id-mapped.
    pub(super) mapped: bool,
    /// Objects it is made of; when one changes, [`Plugin::setup`] is called again.
    pub(super) uses: Vec<ObjectUse>,
    /// When it must be set up again even if nothing changes (a token's rotation).
    pub(super) refresh_at: Option<tokio::time::Instant>,
}

impl Ready {
    pub(super) fn at(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned(), ..Self::default() }
    }
}

/// One type of volume.
#[async_trait]
pub(super) trait Plugin: Sync {
    /// The folder name below `volumes/`, as a kubelet names it.
    fn folder(&self) -> &'static str;
    /// Makes the volume, or brings it up to date. Idempotent.
    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError>;
    /// Whether the content follows the pod's labels and annotations.
    fn follows_pod(&self) -> bool {
        false
    }
}

/// The type of a volume.
pub(super) fn plugin_of(volume: &Volume) -> Result<&'static dyn Plugin, VolumeError> {
    let table: [(bool, &'static dyn Plugin); 11] = [
        (volume.config_map.is_some(), &super::config_map::ConfigMapVolume),
        (volume.secret.is_some(), &super::secret::SecretVolume),
        (volume.downward_api.is_some(), &super::downward::DownwardVolume),
        (volume.projected.is_some(), &super::projected::ProjectedVolume),
        (volume.empty_dir.is_some(), &super::empty_dir::EmptyDirVolume),
        (volume.host_path.is_some(), &super::host_path::HostPathVolume),
        (volume.image.is_some(), &super::image::ImageVolume),
        (volume.csi.is_some(), &super::csi::CsiVolume),
        (volume.nfs.is_some(), &super::nfs::NfsVolume),
        (volume.persistent_volume_claim.is_some(), &super::claim::ClaimVolume),
        (volume.ephemeral.is_some(), &super::claim::EphemeralVolume),
    ];
    let known = table.into_iter().find_map(|(given, plugin)| given.then_some(plugin));
    if let Some(plugin) = known {
        return Ok(plugin);
    }
    let unsupported = [
        (volume.iscsi.is_some(), "iSCSI is not supported on this node"),
        (volume.fc.is_some(), "Fibre Channel is not supported on this node"),
        (volume.flex_volume.is_some(), "FlexVolume is not supported on this node"),
    ];
    let what = unsupported.into_iter().find_map(|(given, what)| given.then_some(what));
    match what {
        Some(what) => Err(VolumeError::Unsupported { volume: volume.name.clone(), what: what.into() }),
        // The API's default for a volume without a source, and what in-tree cloud disks were: nothing we know.
        None => Err(VolumeError::Unsupported {
            volume: volume.name.clone(),
            what: "its type is not supported on this node".into(),
        }),
    }
}

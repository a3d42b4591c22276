//! `persistentVolumeClaim` and `ephemeral` volumes: from claim to volume to what is behind it.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::Api;

use super::error::{IoContext as _, VolumeError};
use super::host_path;
use super::ownership;
use super::plugin::{Context, Plugin, Ready};
use crate::node::local_volumes;

/// A claim named by the pod.
pub(super) struct ClaimVolume;
/// A claim made for the pod from a template: `<pod>-<volume>`.
pub(super) struct EphemeralVolume;

const CLAIM: &str = "persistentvolumeclaim";

#[async_trait]
impl Plugin for ClaimVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~claim"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.persistent_volume_claim else {
            return Err(context.invalid("it is no claim"));
        };
        let claim = get_claim(context, &source.claim_name).await?;
        setup_claim(context, &claim, source.read_only.unwrap_or(false)).await
    }
}

#[async_trait]
impl Plugin for EphemeralVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~ephemeral"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let name = format!("{}-{}", context.pod.metadata.name.as_deref().unwrap_or_default(), context.volume.name);
        let claim = get_claim(context, &name).await?;
        // A claim of that name that somebody else made is somebody else's data.
        let owned = claim
            .metadata
            .owner_references
            .iter()
            .flatten()
            .any(|owner| owner.controller == Some(true) && Some(&owner.uid) == context.pod.metadata.uid.as_ref());
        if !owned {
            return Err(VolumeError::Claim { claim: name, reason: "it was not created for this pod".into() });
        }
        setup_claim(context, &claim, false).await
    }
}

/// Makes the folder of a local volume that the control plane made on demand. Whoever runs in the pod may write there.
fn make_local(path: &Path) -> Result<(), VolumeError> {
    if path.exists() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(path);
    DirBuilder::new().recursive(true).mode(0o711).create(parent).step("create folder", parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error).step("create folder", path),
        _ => fs::set_permissions(path, fs::Permissions::from_mode(0o777)).step("open to all", path),
    }
}

async fn get_claim(context: &Context<'_>, name: &str) -> Result<PersistentVolumeClaim, VolumeError> {
    let api: Api<PersistentVolumeClaim> = Api::namespaced(context.manager.objects.client().clone(), context.namespace);
    let claim = api.get_opt(name).await.map_err(|error| VolumeError::Api {
        kind: CLAIM,
        name: name.into(),
        reason: error.to_string(),
    })?;
    claim.ok_or_else(|| VolumeError::NotFound { kind: CLAIM, name: name.into() })
}

async fn setup_claim(
    context: &Context<'_>,
    claim: &PersistentVolumeClaim,
    read_only: bool,
) -> Result<Ready, VolumeError> {
    let name = claim.metadata.name.clone().unwrap_or_default();
    let refuse = |reason: &str| VolumeError::Claim { claim: name.clone(), reason: reason.to_owned() };
    if claim.metadata.deletion_timestamp.is_some() {
        return Err(refuse("it is being deleted"));
    }
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
    let (Some("Bound"), Some(volume)) = (phase, volume) else { return Err(refuse("it is not bound")) };
    let api: Api<PersistentVolume> = Api::all(context.manager.objects.client().clone());
    let kind = "persistentvolume";
    let found = api.get_opt(&volume).await.map_err(|error| VolumeError::Api {
        kind,
        name: volume.clone(),
        reason: error.to_string(),
    })?;
    let found = found.ok_or_else(|| VolumeError::NotFound { kind, name: volume.clone() })?;
    let Some(spec) = &found.spec else { return Err(refuse("its volume has no spec")) };
    let block = spec.volume_mode.as_deref() == Some("Block");
    let bound_to = spec.claim_ref.as_ref().and_then(|reference| reference.uid.as_ref());
    if bound_to.is_some() && bound_to != claim.metadata.uid.as_ref() {
        return Err(refuse("its volume is bound to another claim"));
    }
    let checked = |path: &str, kind: &str| {
        host_path::check(Path::new(path), kind).map_err(|error| match error {
            host_path::Refused::Path(reason) => context.invalid(reason),
            host_path::Refused::Volume(error) => error,
        })
    };
    let group = context.fs_group();
    let mut ready = if let Some(csi) = &spec.csi {
        super::csi::persistent(context, claim, &found, csi, read_only).await?
    } else if let Some(local) = spec.local.as_ref().filter(|_| block) {
        checked(&local.path, "BlockDevice")?;
        Ready { block, ..Ready::at(&local.path) }
    } else if let Some(local) = &spec.local {
        if local_volumes::is_ours(&context.manager.config.layout, Path::new(&local.path)) {
            make_local(Path::new(&local.path))?;
        }
        checked(&local.path, "Directory")?;
        if let Some(group) = group.filter(|_| !read_only) {
            ownership::apply(Path::new(&local.path), group, false, ownership::policy(context.pod)).await?;
        }
        Ready::at(&local.path)
    } else if let Some(host) = &spec.host_path {
        checked(&host.path, host.type_.as_deref().unwrap_or_default())?;
        Ready::at(&host.path)
    } else if let Some(nfs) = &spec.nfs {
        let read_only = read_only || nfs.read_only.unwrap_or(false);
        super::nfs::mount(
            &context.folder,
            &nfs.server,
            &nfs.path,
            read_only,
            spec.mount_options.as_deref().unwrap_or_default(),
        )
        .await?;
        Ready { read_only, ..Ready::at(&context.folder) }
    } else {
        let what = format!("persistent volume {volume} is of a type that is not supported on this node");
        return Err(VolumeError::Unsupported { volume: context.volume.name.clone(), what });
    };
    ready.read_only |= read_only;
    Ok(ready)
}

//! `image` volumes: an image's files, read-only (KEP-4639).

use std::sync::Arc;

use async_trait::async_trait;

use super::error::VolumeError;
use super::mounts;
use super::plugin::{Context, Plugin, Ready};
use crate::images::{ImageError, NoProgress};

/// An image as a folder.
pub(super) struct ImageVolume;

#[async_trait]
impl Plugin for ImageVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~image"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let reference =
            context.volume.image.as_ref().and_then(|source| source.reference.as_deref()).unwrap_or_default();
        if reference.is_empty() {
            return Err(context.invalid("image.reference is required"));
        }
        let mounted = Ready { read_only: true, mapped: true, ..Ready::at(&context.folder) };
        if mounts::is_mount_point(&context.folder)? {
            return Ok(mounted);
        }
        let store = &context.manager.config.images;
        let policy = context.volume.image.as_ref().and_then(|source| source.pull_policy.as_deref()).unwrap_or_default();
        let always = policy == "Always"
            || (policy.is_empty() && (reference.ends_with(":latest") || !reference.contains([':', '@'])));
        let known = if always { None } else { store.resolve(reference)? };
        let image = match known {
            Some(image) => image,
            None if policy == "Never" => return Err(ImageError::NotFound { reference: reference.to_owned() }.into()),
            None => {
                let keyring = context.manager.objects.pull_secrets(context.pod).await?;
                store.pull(reference, &keyring, Arc::new(NoProgress)).await?
            }
        };
        // The snapshot keeps the image from being collected; its upper folder stays empty.
        let snapshot = store.snapshot(&snapshot_id(context.uid, &context.volume.name), &image)?;
        mounts::ensure_layers(&context.folder, &snapshot, &context.manager.config.layout.images(), context.user)?;
        Ok(mounted)
    }
}

/// The snapshot's name for a pod's image volume.
pub(super) fn snapshot_id(uid: &str, volume: &str) -> String {
    format!("volume_{uid}_{volume}")
}

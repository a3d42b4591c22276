//! `secret` volumes: like configMap volumes, but in memory, so that no secret is written to a disk.

use async_trait::async_trait;

use super::error::VolumeError;
use super::mounts::ensure_tmpfs;
use super::objects::ObjectKind;
use super::payload::{DEFAULT_MODE, Payload, add_items, mode};
use super::plugin::{Context, Plugin, Ready};

/// A Secret's keys as files.
pub(super) struct SecretVolume;

#[async_trait]
impl Plugin for SecretVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~secret"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.secret else { return Err(context.invalid("it is no secret")) };
        let Some(name) = &source.secret_name else { return Err(context.invalid("secretName is required")) };
        let optional = source.optional.unwrap_or(false);
        let (used, data) = context.manager.object(context, ObjectKind::Secret, name, optional).await?;
        let mut payload = Payload::new();
        let default = mode(source.default_mode, DEFAULT_MODE);
        let items = source.items.as_deref();
        if let Some(data) = data {
            add_items(&mut payload, &data.data, items, default, optional, "secret", &context.volume.name)?;
        }
        ensure_tmpfs(&context.folder, None)?;
        context.manager.write_payload(context, payload).await?;
        Ok(Ready { read_only: true, uses: vec![used], ..Ready::at(&context.folder) })
    }
}

//! `configMap` volumes.

use async_trait::async_trait;

use super::error::VolumeError;
use super::objects::ObjectKind;
use super::payload::{DEFAULT_MODE, Payload, add_items, mode};
use super::plugin::{Context, Plugin, Ready};

/// A ConfigMap's keys as files.
pub(super) struct ConfigMapVolume;

#[async_trait]
impl Plugin for ConfigMapVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~configmap"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.config_map else { return Err(context.invalid("it is no configMap")) };
        let optional = source.optional.unwrap_or(false);
        let (used, data) = context.manager.object(context, ObjectKind::ConfigMap, &source.name, optional).await?;
        let mut payload = Payload::new();
        let default = mode(source.default_mode, DEFAULT_MODE);
        let items = source.items.as_deref();
        if let Some(data) = data {
            add_items(&mut payload, &data.data, items, default, optional, "config", &context.volume.name)?;
        }
        context.manager.write_payload(context, payload).await?;
        Ok(Ready { read_only: true, uses: vec![used], ..Ready::at(&context.folder) })
    }
}

//! `projected` volumes: several sources in one folder.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;

use super::error::VolumeError;
use super::objects::ObjectKind;
use super::payload::{DEFAULT_MODE, FileEntry, Payload, add_items, insert, mode};
use super::plugin::{Context, Plugin, Ready};

/// A token's mode when the volume has a known reader of its own.
const PRIVATE_TOKEN_MODE: u32 = 0o600;

/// Secrets, ConfigMaps, downward API and tokens together.
pub(super) struct ProjectedVolume;

#[async_trait]
impl Plugin for ProjectedVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~projected"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.projected else { return Err(context.invalid("it is not projected")) };
        let volume = context.volume.name.as_str();
        let default = mode(source.default_mode, DEFAULT_MODE);
        let mut payload = Payload::new();
        let mut ready = Ready { read_only: true, ..Ready::at(&context.folder) };
        for projection in source.sources.iter().flatten() {
            if let Some(map) = &projection.config_map {
                let optional = map.optional.unwrap_or(false);
                let (used, data) = context.manager.object(context, ObjectKind::ConfigMap, &map.name, optional).await?;
                if let Some(data) = data {
                    add_items(&mut payload, &data.data, map.items.as_deref(), default, optional, "config", volume)?;
                }
                ready.uses.push(used);
            } else if let Some(secret) = &projection.secret {
                let optional = secret.optional.unwrap_or(false);
                let (used, data) = context.manager.object(context, ObjectKind::Secret, &secret.name, optional).await?;
                if let Some(data) = data {
                    add_items(&mut payload, &data.data, secret.items.as_deref(), default, optional, "secret", volume)?;
                }
                ready.uses.push(used);
            } else if let Some(fields) = &projection.downward_api {
                super::downward::add_files(
                    &mut payload,
                    context,
                    fields.items.as_deref().unwrap_or_default(),
                    default,
                )?;
            } else if let Some(token) = &projection.service_account_token {
                let issued = context.manager.tokens.get(context, token).await?;
                let owner = common_user(context.pod);
                let mode = if owner.is_some() || context.fs_group().is_some() { PRIVATE_TOKEN_MODE } else { default };
                insert(&mut payload, &token.path, FileEntry { bytes: issued.token.into_bytes(), mode, owner }, volume)?;
                ready.refresh_at = Some(ready.refresh_at.map_or(issued.renew_at, |at| at.min(issued.renew_at)));
            } else {
                let what = "a projection other than configMap, secret, downwardAPI and serviceAccountToken".into();
                return Err(VolumeError::Unsupported { volume: volume.to_owned(), what });
            }
        }
        super::mounts::ensure_tmpfs(&context.folder, None)?;
        context.manager.write_payload(context, payload).await?;
        Ok(ready)
    }

    fn follows_pod(&self) -> bool {
        true
    }
}

/// The user that all containers run as, if they agree: the token is then that user's file.
fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .map(|container| container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(first).and_then(|user| u32::try_from(user).ok())
}

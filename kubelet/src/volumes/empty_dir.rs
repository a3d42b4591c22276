//! `emptyDir` volumes: on disk, in memory, or in huge pages.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;

use super::error::{IoContext, VolumeError};
use super::mounts::{ensure_hugetlbfs, ensure_tmpfs};
use super::ownership;
use super::plugin::{Context, Plugin, Ready};
use super::quantity::Quantity;

/// An empty folder that lives as long as the pod.
pub(super) struct EmptyDirVolume;

#[async_trait]
impl Plugin for EmptyDirVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~empty-dir"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.empty_dir else { return Err(context.invalid("it is no emptyDir")) };
        let folder = &context.folder;
        let limit = match &source.size_limit {
            Some(limit) => Some(bytes(&limit.0).map_err(|reason| context.invalid(reason))?).filter(|bytes| *bytes > 0),
            None => None,
        };
        let fresh = match source.medium.as_deref().unwrap_or_default() {
            "" => {
                let fresh = !folder.exists();
                DirBuilder::new().recursive(true).mode(0o755).create(folder).step("create folder", folder)?;
                fresh
            }
            "Memory" => {
                // More than the pod may use of memory makes no sense, and an unlimited one could take half of the host's.
                let size = [limit, memory_limit(context.pod)].into_iter().flatten().min();
                ensure_tmpfs(folder, size)?
            }
            medium => {
                let size = match medium.strip_prefix("HugePages") {
                    Some("") => None,
                    Some(size) => Some(bytes(size.trim_start_matches('-')).map_err(|reason| context.invalid(reason))?),
                    None => return Err(context.invalid(format!("unknown medium {medium:?}"))),
                };
                ensure_hugetlbfs(folder, size)?
            }
        };
        if fresh {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).step("set mode of", folder)?;
        }
        if let Some(group) = context.fs_group() {
            ownership::apply(folder, group, false, ownership::policy(context.pod)).await?;
        }
        Ok(Ready::at(folder))
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let quantity: Quantity = text.parse()?;
    u64::try_from(quantity.ceil()).map_err(|_| format!("{text:?} is not a size"))
}

/// The sum of the containers' memory limits, if every one has a limit.
fn memory_limit(pod: &Pod) -> Option<u64> {
    let limits = pod.spec.as_ref()?.containers.iter().map(|container| {
        let limit = container.resources.as_ref()?.limits.as_ref()?.get("memory")?;
        bytes(&limit.0).ok()
    });
    limits.sum::<Option<u64>>().filter(|sum| *sum > 0)
}

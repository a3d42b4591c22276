//! `nfs` volumes, through the host's mount.nfs.

use std::path::Path;

use async_trait::async_trait;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use tokio::process::Command;

use super::error::{IoContext, VolumeError};
use super::mounts;
use super::plugin::{Context, Plugin, Ready};

/// An export of an NFS server.
pub(super) struct NfsVolume;

#[async_trait]
impl Plugin for NfsVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~nfs"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.nfs else { return Err(context.invalid("it is no nfs")) };
        let read_only = source.read_only.unwrap_or(false);
        mount(&context.folder, &source.server, &source.path, read_only, &[]).await?;
        Ok(Ready { read_only, ..Ready::at(&context.folder) })
    }
}

/// Mounts an export, unless it is mounted.
pub(super) async fn mount(
    folder: &Path,
    server: &str,
    path: &str,
    read_only: bool,
    options: &[String],
) -> Result<(), VolumeError> {
    if mounts::is_mount_point(folder)? {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o750).create(folder).step("create folder", folder)?;
    let mut words: Vec<&str> = options.iter().map(String::as_str).collect();
    if read_only {
        words.push("ro");
    }
    let server =
        if server.contains(':') && !server.starts_with('[') { format!("[{server}]") } else { server.to_owned() };
    let mut command = Command::new("mount");
    command.args(["-t", "nfs"]).kill_on_drop(true);
    if !words.is_empty() {
        command.args(["-o", &words.join(",")]);
    }
    let output =
        command.arg("--").arg(format!("{server}:{path}")).arg(folder).output().await.step("run mount for", folder)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(VolumeError::Helper { program: "mount -t nfs", output: text.trim().chars().take(500).collect() })
}

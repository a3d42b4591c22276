//! Folders of local volumes that the control plane makes on demand. A folder is made when a pod first uses the volume; it is
//! removed when the control plane has put its name on this node's list of removals (an annotation of the Node), and the name
//! is then struck off. Either side may die at any point: the list says what is left to do.

use std::io;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::MANAGER;
use crate::{Config, Layout};

/// Annotation that says in which folder this node keeps such volumes.
pub(super) const FOLDER: &str = "coracle.io/local-volumes";
/// Annotation with the names of the volumes whose folders are to be removed, with commas between.
const REMOVALS: &str = "coracle.io/local-volumes-to-remove";
/// What names of these volumes begin with; nothing else is ever removed.
const PREFIX: &str = "pvc-";
/// Pause after a removal that failed.
const RETRY: std::time::Duration = std::time::Duration::from_secs(10);

/// The folder of a node's local volumes.
pub(crate) fn folder(layout: &Layout) -> PathBuf {
    layout.data.join("local-volumes")
}

/// Whether a name can be that of such a volume: it is one part of a path and has the prefix.
fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Whether a path is the folder of such a volume on this node.
pub(crate) fn is_ours(layout: &Layout, path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    path.parent() == Some(&folder(layout)) && name.is_some_and(is_name)
}

/// Removes what is on the node's list until the future is dropped.
pub(super) async fn keep(config: &Config, client: &Client) {
    let api: Api<Node> = Api::all(client.clone());
    let ours = watcher::Config::default().fields(&format!("metadata.name={}", config.node_name));
    let nodes = watcher(api.clone(), ours).default_backoff().applied_objects();
    futures::pin_mut!(nodes);
    loop {
        match nodes.try_next().await {
            Ok(Some(node)) => {
                while let Err(error) = strike(config, &api, &node).await {
                    tracing::warn!(%error, "a local volume is not removed yet");
                    tokio::time::sleep(RETRY).await;
                }
            }
            Ok(None) => return,
            Err(error) => tracing::debug!(%error, "watching the node again"),
        }
    }
}

/// What went wrong with a removal.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("remove {}: {source}", path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("strike removed volumes off the node's list: {0}")]
    Api(#[from] kube::Error),
}

/// Removes the folders on the list as the node was seen with it, then takes their names off the list as it is now.
async fn strike(config: &Config, api: &Api<Node>, node: &Node) -> Result<(), Failed> {
    let listed = names(node);
    if listed.is_empty() {
        return Ok(());
    }
    for name in listed.iter().filter(|name| is_name(name)) {
        let path = folder(&config.layout).join(name);
        match tokio::fs::remove_dir_all(&path).await {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(Failed::Remove { path, source }),
            _ => tracing::info!(volume = %name, "local volume removed"),
        }
    }
    let now = api.get(&config.node_name).await?;
    let left: Vec<String> = names(&now).into_iter().filter(|name| !listed.contains(name)).collect();
    let value = if left.is_empty() { serde_json::Value::Null } else { left.join(",").into() };
    let patch = json!({"metadata": {"resourceVersion": now.resource_version(), "annotations": {REMOVALS: value}}});
    let parameters = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    match api.patch(&config.node_name, &parameters, &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        // The node changed meanwhile: the change comes over the watch, with the list in it.
        Err(kube::Error::Api(answer)) if answer.code == 409 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn names(node: &Node) -> Vec<String> {
    let list = node.annotations().get(REMOVALS).map(String::as_str).unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_volumes_are_ours() {
        let root = tempfile::tempdir().expect("a folder");
        let layout = Layout::below(root.path());
        let ours = |name: &str| is_ours(&layout, &folder(&layout).join(name));
        assert!(ours("pvc-0f3a"));
        for name in ["other", "pvc-a/b", "..", "pvc-a/..", "pvc-.."] {
            assert!(!ours(name), "{name}");
        }
        assert!(!is_ours(&layout, Path::new("/pvc-a")));
        assert!(!is_name("pvc-../../etc") && !is_name(""));
    }
}

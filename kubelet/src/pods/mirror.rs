//! Static pods: read from a folder of manifests, run whatever the API says, and shown in the API by mirror pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Node, Pod, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::mpsc;

use super::context::Context;

const SOURCE: &str = "kubernetes.io/config.source";
const HASH: &str = "kubernetes.io/config.hash";
const SEEN: &str = "kubernetes.io/config.seen";
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Largest manifest in bytes, and most manifests, that are read.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MAX_MANIFESTS: usize = 500;

/// The hash of a static pod's manifest; `None` for a pod of the API.
pub(super) fn source(pod: &Pod) -> Option<&str> {
    let annotations = pod.annotations();
    (annotations.get(SOURCE)? == "file").then(|| annotations.get(HASH).map(String::as_str)).flatten()
}

/// Whether this object of the API only mirrors a static pod.
pub(super) fn is_mirror(pod: &Pod) -> bool {
    pod.annotations().contains_key(MIRROR)
}

/// Makes sure that the API has the mirror of a static pod; its UID there.
pub(super) async fn ensure(context: &Context, pod: &Pod) -> Result<String, kube::Error> {
    let hash = source(pod).unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let name = pod.name_any();
    if let Some(known) = api.get_opt(&name).await? {
        let current = known.annotations().get(MIRROR).is_some_and(|mirrored| mirrored == hash);
        if current && known.metadata.deletion_timestamp.is_none() {
            return Ok(known.uid().unwrap_or_default());
        }
        remove(&api, &name).await?;
    }
    let node = Api::<Node>::all(context.client.clone()).get(&context.config.node_name).await?;
    let mut mirror = Pod { status: None, ..pod.clone() };
    mirror.metadata.uid = None;
    mirror.metadata.resource_version = None;
    mirror.annotations_mut().insert(MIRROR.into(), hash.into());
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.name_any(),
        uid: node.uid().unwrap_or_default(),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    Ok(api.create(&PostParams::default(), &mirror).await?.uid().unwrap_or_default())
}

/// Removes a mirror pod at once: nothing runs under its UID.
pub(super) async fn remove(api: &Api<Pod>, name: &str) -> Result<(), kube::Error> {
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    match api.delete(name, &now).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

/// Reads the folder now and at each change, in a thread of its own, and sends all pods that it holds.
pub(super) fn follow(folder: PathBuf, node: String) -> io::Result<mpsc::Receiver<Vec<Pod>>> {
    fs::create_dir_all(&folder)?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_CREATE;
    inotify.add_watch(&folder, changes)?;
    let (sender, receiver) = mpsc::channel(1);
    std::thread::Builder::new().name("static-pods".into()).spawn(move || {
        loop {
            match read_all(&folder, &node) {
                Ok(pods) => {
                    if sender.blocking_send(pods).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::error!(folder = %folder.display(), %error, "static pods are not read"),
            }
            if let Err(errno) = inotify.read_events() {
                tracing::error!(folder = %folder.display(), %errno, "changes of static pods are not seen any more");
                return;
            }
        }
    })?;
    Ok(receiver)
}

fn read_all(folder: &Path, node: &str) -> io::Result<Vec<Pod>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.retain(|path| path.is_file() && !path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(b"."));
    paths.sort();
    if paths.len() > MAX_MANIFESTS {
        return Err(io::Error::other(format!("more than {MAX_MANIFESTS} manifests")));
    }
    let mut pods = Vec::new();
    for path in paths {
        // One bad file must not end the pods of the others.
        match read(&path, node) {
            Ok(pod) => pods.push(pod),
            Err(error) => tracing::error!(manifest = %path.display(), %error, "this static pod is left out"),
        }
    }
    Ok(pods)
}

fn read(path: &Path, node: &str) -> io::Result<Pod> {
    let metadata = fs::metadata(path)?;
    if metadata.len() > MAX_MANIFEST_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_MANIFEST_BYTES} bytes")));
    }
    let changed = Timestamp::try_from(metadata.modified()?).map_err(io::Error::other)?;
    parse(&fs::read_to_string(path)?, &path.to_string_lossy(), node, changed)
}

/// A manifest as the pod that a kubelet makes of it.
fn parse(text: &str, path: &str, node: &str, changed: Timestamp) -> io::Result<Pod> {
    use sha2::Digest;
    let object: serde_json::Value = serde_saphyr::from_str(text).map_err(io::Error::other)?;
    if object["kind"] != "Pod" || object["apiVersion"] != "v1" {
        return Err(io::Error::other("it is no v1 Pod"));
    }
    let mut pod: Pod = serde_json::from_value(object).map_err(io::Error::other)?;
    let name = pod.metadata.name.as_ref().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| io::Error::other("metadata.name is missing"))?;
    let mut digest = sha2::Sha256::new();
    for part in [node, path, text] {
        digest.update(part.len().to_le_bytes());
        digest.update(part);
    }
    let hash = hex::encode(&digest.finalize()[..16]);
    pod.metadata.name = Some(format!("{name}-{node}"));
    pod.metadata.namespace.get_or_insert_with(|| "default".into());
    pod.metadata.uid = Some(hash.clone());
    for (key, value) in [(SOURCE, "file".to_owned()), (HASH, hash), (SEEN, changed.to_string())] {
        pod.annotations_mut().insert(key.into(), value);
    }
    let spec = pod.spec.as_mut().ok_or_else(|| io::Error::other("spec is missing"))?;
    spec.node_name = Some(node.into());
    // What the node runs by its own decision is not driven away by taints.
    let all = Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Toleration::default() };
    spec.tolerations.get_or_insert_default().push(all);
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: a, image: b}]}\n";
        let pod = |text: &str| parse(text, "/m/web.yaml", "n1", Timestamp::UNIX_EPOCH);
        let web = pod(text).expect("a pod");
        assert_eq!((web.name_any().as_str(), web.namespace().as_deref()), ("web-n1", Some("default")));
        assert_eq!(web.spec.as_ref().and_then(|spec| spec.node_name.as_deref()), Some("n1"));
        assert_eq!(source(&web), web.metadata.uid.as_deref());
        assert_eq!(pod(text).expect("a pod").uid(), web.uid());
        assert_ne!(pod(&text.replace("image: b", "image: c")).expect("a pod").uid(), web.uid());
        for wrong in ["kind: Pod", "apiVersion: v1\nkind: Secret", "a: [", &text.replace("name: web", "labels: {}")] {
            assert!(pod(wrong).is_err(), "{wrong}");
        }
    }
}

//! Names that several parts must agree on: pods, containers, and where their files lie.
//!
//! Every name is derived from a UID or an id, so that what exists on disk or in the kernel can be found again after a crash.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Annotation of a Node: the public key of its WireGuard link, in base64.
pub(crate) const WIREGUARD_KEY: &str = "coracle.io/wireguard-public-key";

/// What identifies a pod on a node: its UID; namespace and name are for people, log paths and the network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodKey {
    /// `metadata.uid`; for a mirrored static pod the hash of its manifest.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The id of a container or sandbox: 64 hexadecimal digits, as other runtimes use.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContainerId(String);

impl ContainerId {
    /// Digits of an id.
    pub const LENGTH: usize = 64;

    /// The id of the `attempt`-th incarnation of container `name` in the pod `uid`: the same words always give the same
    /// id, so a worker that was killed between asking and noting finds what it made.
    pub fn derive(uid: &str, name: &str, attempt: u32) -> Self {
        use sha2::Digest;
        let mut hash = sha2::Sha256::new();
        for part in [uid.as_bytes(), b"\0", name.as_bytes(), b"\0", &attempt.to_le_bytes()] {
            hash.update(part);
        }
        Self(hex::encode(hash.finalize()))
    }

    /// Reads an id that came from outside; `None` unless it is [`Self::LENGTH`] lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.len() == Self::LENGTH && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        digits.then(|| Self(text.to_owned()))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As a container status shows it: `coracle://<digits>`.
    pub fn url(&self) -> String {
        format!("{RUNTIME_NAME}://{}", self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The runtime's name, as in `containerID: coracle://…` and `containerRuntimeVersion`.
pub const RUNTIME_NAME: &str = "coracle";

/// Where the node's files lie. All paths are absolute.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What survives a reboot: images, local volumes (`/var/lib/coracle`).
    pub data: PathBuf,
    /// Pods' own files, volumes, and the sockets of plugins, where drivers made for a kubelet look for them
    /// (`/var/lib/kubelet`).
    pub kubelet: PathBuf,
    /// Folders of CDI files; of a device in two of them the later one counts.
    pub cdi: Vec<PathBuf>,
    /// What does not: sockets, bundles, namespaces, containers' state (`/run/coracle`), on a tmpfs.
    pub run: PathBuf,
    /// `/var/log/pods`.
    pub pod_logs: PathBuf,
    /// `/var/log/containers`, the folder of links that log shippers watch.
    pub container_logs: PathBuf,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            data: "/var/lib/coracle".into(),
            kubelet: "/var/lib/kubelet".into(),
            cdi: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            run: "/run/coracle".into(),
            pod_logs: "/var/log/pods".into(),
            container_logs: "/var/log/containers".into(),
        }
    }
}

impl Layout {
    /// A layout wholly below `root`, for tests and for several nodes on one machine.
    pub fn below(root: &Path) -> Self {
        Self {
            data: root.join("data"),
            kubelet: root.join("data/kubelet"),
            cdi: vec![root.join("cdi")],
            run: root.join("run"),
            pod_logs: root.join("log/pods"),
            container_logs: root.join("log/containers"),
        }
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// The supervisor's seqpacket socket.
    pub fn supervisor_socket(&self) -> PathBuf {
        self.run.join("supervisor.sock")
    }

    /// The socket of the Container Runtime Interface.
    pub fn cri_socket(&self) -> PathBuf {
        self.run.join("cri.sock")
    }

    /// State of one container: OCI bundle (`config.json`), `state.json`, log journals.
    pub fn container(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(id.as_str())
    }

    /// The folder of all containers' state.
    pub fn containers(&self) -> PathBuf {
        self.run.join("containers")
    }

    /// State of one sandbox: pinned namespaces, `sandbox.json`, `hostname`, `resolv.conf`.
    pub fn sandbox(&self, id: &ContainerId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// The folder of all sandboxes' state.
    pub fn sandboxes(&self) -> PathBuf {
        self.run.join("sandboxes")
    }

    /// The folder of a pod's own files on disk (volumes, `etc-hosts`, termination logs), as a kubelet lays it out.
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// The folder of all pods' own files.
    pub fn pods(&self) -> PathBuf {
        self.kubelet.join("pods")
    }

    /// Where plugins of the node put their sockets to be found.
    pub fn plugins_registry(&self) -> PathBuf {
        self.kubelet.join("plugins_registry")
    }

    /// Plugins' own files, and what CSI drivers stage.
    pub fn plugins(&self) -> PathBuf {
        self.kubelet.join("plugins")
    }

    /// Sockets of device plugins, with the node's own `kubelet.sock` among them.
    pub fn device_plugins(&self) -> PathBuf {
        self.kubelet.join("device-plugins")
    }

    /// The folder of the socket that tells which pod has which devices.
    pub fn pod_resources(&self) -> PathBuf {
        self.kubelet.join("pod-resources")
    }

    /// `/var/log/pods/<namespace>_<name>_<uid>`.
    pub fn pod_log_folder(&self, pod: &PodKey) -> PathBuf {
        self.pod_logs.join(format!("{}_{}_{}", pod.namespace, pod.name, pod.uid))
    }

    /// `/var/log/pods/<namespace>_<name>_<uid>/<container>/<attempt>.log`; rotated files carry `.<timestamp>` behind.
    pub fn container_log(&self, pod: &PodKey, container: &str, attempt: u32) -> PathBuf {
        self.pod_log_folder(pod).join(container).join(format!("{attempt}.log"))
    }

    /// `/var/log/containers/<pod>_<namespace>_<container>-<id>.log`, a link to the newest log file.
    pub fn container_log_link(&self, pod: &PodKey, container: &str, id: &ContainerId) -> PathBuf {
        self.container_logs.join(format!("{}_{}_{}-{}.log", pod.name, pod.namespace, container, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_depend_on_every_part() {
        let id = ContainerId::derive("u", "web", 0);
        assert_eq!(id, ContainerId::derive("u", "web", 0));
        for other in [("v", "web", 0), ("u", "we", 0), ("u", "web", 1), ("uweb", "", 0)] {
            assert_ne!(id, ContainerId::derive(other.0, other.1, other.2));
        }
        assert_eq!(ContainerId::parse(id.as_str()), Some(id));
        assert_eq!(ContainerId::parse("../../etc"), None);
    }

    #[test]
    fn log_paths_are_where_log_shippers_look() {
        let pod = PodKey { uid: "1-2".into(), namespace: "default".into(), name: "web".into() };
        let layout = Layout::default();
        assert_eq!(layout.container_log(&pod, "app", 3), Path::new("/var/log/pods/default_web_1-2/app/3.log"));
    }
}

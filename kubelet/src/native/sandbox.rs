//! A pod's sandbox: namespaces, network, cgroup and the files that its containers share.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::{Native, blocking, namespaces, network};
use crate::cri::{NamespaceMode, Result, RuntimeError, SandboxConfig, SandboxStatus};
use crate::names::{ContainerId, Layout};
use crate::supervisor::container::now;

/// Size of a pod's `/dev/shm`.
const SHM_OPTIONS: &str = "mode=1777,size=67108864";

/// RuntimeClass handlers: the default one, without a name and with.
pub const HANDLERS: [&str; 2] = ["", "corun"];

/// All sandboxes that are on disk.
pub(super) fn read_all(layout: &Layout) -> Result<HashMap<ContainerId, Arc<SandboxStatus>>> {
    let folder = layout.sandboxes();
    fs::create_dir_all(&folder).map_err(RuntimeError::io("create", &folder))?;
    let mut found = HashMap::new();
    for entry in fs::read_dir(&folder).map_err(RuntimeError::io("read", &folder))? {
        let path = entry.map_err(RuntimeError::io("read", &folder))?.path().join("sandbox.json");
        let Ok(bytes) = fs::read(&path) else { continue };
        match serde_json::from_slice::<SandboxStatus>(&bytes) {
            Ok(status) => drop(found.insert(status.id.clone(), Arc::new(status))),
            Err(error) => tracing::error!(path = %path.display(), %error, "unreadable sandbox"),
        }
    }
    Ok(found)
}

fn save(folder: &Path, status: &SandboxStatus) -> Result<()> {
    let (new, path) = (folder.join("sandbox.json.new"), folder.join("sandbox.json"));
    let bytes = serde_json::to_vec(status).map_err(|e| RuntimeError::Invalid(e.to_string()))?;
    fs::write(&new, bytes).map_err(RuntimeError::io("write", &new))?;
    fs::rename(&new, &path).map_err(RuntimeError::io("rename", &new))
}

impl Native {
    pub(super) fn sandbox(&self, id: &ContainerId) -> Result<Arc<SandboxStatus>> {
        let found = self.inner.sandboxes.lock().get(id).cloned();
        found.ok_or_else(|| RuntimeError::NotFound { kind: "sandbox", id: id.clone() })
    }

    pub(super) async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        let pod =
            config.pod.clone().ok_or_else(|| RuntimeError::Invalid("a sandbox needs the pod's metadata".into()))?;
        if !HANDLERS.contains(&config.runtime_handler.as_str()) {
            return Err(RuntimeError::Invalid(format!(
                "failed to get sandbox runtime: no runtime for {:?} is configured (known: {})",
                config.runtime_handler, HANDLERS[1]
            )));
        }
        let mapped = !config.id_mappings.is_empty();
        if mapped && !namespaces::user_namespaces_work() {
            return Err(RuntimeError::Invalid(
                "this host has no user namespaces, which pods with hostUsers: false need: raise user.max_user_namespaces, or boot a kernel with CONFIG_USER_NS".into(),
            ));
        }
        let id = ContainerId::derive(&pod.uid, "", config.attempt);
        if let Ok(known) = self.sandbox(&id)
            && self.as_seen(&known).ready
        {
            return Ok((*known).clone());
        }
        let mut status = SandboxStatus {
            id: id.clone(),
            config,
            ready: false,
            created_at: now(),
            ips: Vec::new(),
            network_namespace: None,
        };
        // Noted first: whatever is made from here on is found and removed after a crash.
        self.note_sandbox(&status)?;
        let files = {
            let (this, status) = (self.clone(), status.clone());
            blocking(move || this.make_files(&status))
        };
        let net = async {
            if status.config.network == NamespaceMode::Node {
                return Ok(None);
            }
            let mut wanted = network::request(&status.config)?;
            wanted.namespace = mapped.then(|| self.inner.layout.sandbox(&id).join("net"));
            self.inner.network.setup(&pod, wanted).await.map(Some)
        };
        let net = if mapped {
            // All namespaces of the pod belong to its user namespace, so that one comes first.
            files.await?;
            self.start_init(&status).await?;
            net.await?
        } else {
            tokio::try_join!(files, net)?.1
        };
        if let Some(net) = net {
            status.ips = net.ips;
            status.network_namespace = Some(net.namespace);
        }
        if !mapped {
            self.start_init(&status).await?;
        }
        status.ready = true;
        self.note_sandbox(&status)?;
        Ok(status)
    }

    /// A sandbox whose first process has ended is none any more.
    pub(super) fn as_seen(&self, status: &SandboxStatus) -> SandboxStatus {
        SandboxStatus { ready: status.ready && self.init_runs(status), ..status.clone() }
    }

    pub(super) fn note_sandbox(&self, status: &SandboxStatus) -> Result<()> {
        let folder = self.inner.layout.sandbox(&status.id);
        fs::create_dir_all(&folder).map_err(RuntimeError::io("create", &folder))?;
        save(&folder, status)?;
        self.inner.sandboxes.lock().insert(status.id.clone(), Arc::new(status.clone()));
        Ok(())
    }

    fn make_files(&self, status: &SandboxStatus) -> Result<()> {
        let folder = self.inner.layout.sandbox(&status.id);
        let config = &status.config;
        self.inner
            .cgroups
            .make(&config.cgroup_parent)
            .and_then(|()| self.inner.cgroups.limit(&config.cgroup_parent, &config.resources))
            .map_err(RuntimeError::io("create cgroup", &config.cgroup_parent))?;
        let root = config.id_mappings.first().map(|map| map.host_id);
        let made = if root.is_some() {
            // What an attempt left that was killed here may belong to another user namespace than what is made now.
            namespaces::unpin(&folder)
        } else {
            let hostname = (config.network != NamespaceMode::Node).then_some(config.hostname.as_str());
            namespaces::pin(&folder, hostname, config.ipc != NamespaceMode::Node)
        };
        made.map_err(RuntimeError::io("make namespaces in", &folder))?;
        for (name, content) in
            [("hostname", format!("{}\n", config.hostname)), ("resolv.conf", config.resolv_conf.clone())]
        {
            let path = folder.join(name);
            let written = fs::write(&path, content).and_then(|()| chown(&path, root, root));
            written.map_err(RuntimeError::io("write", &path))?;
        }
        let shm = folder.join("shm");
        if config.ipc != NamespaceMode::Node && !shm.exists() {
            fs::create_dir(&shm).map_err(RuntimeError::io("create", &shm))?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let root = root.unwrap_or_default();
            let options = format!("{SHM_OPTIONS},uid={root},gid={root}");
            mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(options.as_str()))
                .map_err(|e| RuntimeError::io("mount", &shm)(e.into()))?;
        }
        Ok(())
    }

    pub(super) async fn stop_sandbox(&self, id: &ContainerId) -> Result<()> {
        let Ok(status) = self.sandbox(id) else { return Ok(()) };
        let members: Vec<_> = self.members(id);
        for container in members {
            self.stop(&container, Duration::ZERO).await?;
        }
        self.remove_init(&status).await?;
        if let Some(pod) = status.config.pod.as_ref().filter(|_| status.config.network != NamespaceMode::Node) {
            self.inner.network.teardown(pod).await?;
        }
        let stopped = SandboxStatus { ready: false, network_namespace: None, ..(*status).clone() };
        self.note_sandbox(&stopped)
    }

    pub(super) async fn remove_sandbox(&self, id: &ContainerId) -> Result<()> {
        let Ok(status) = self.sandbox(id) else { return Ok(()) };
        for container in self.members(id) {
            self.remove(&container).await?;
        }
        if status.ready {
            self.stop_sandbox(id).await?;
        }
        self.remove_init(&status).await?;
        let this = self.clone();
        let status_ = status.clone();
        blocking(move || {
            let folder = this.inner.layout.sandbox(&status_.id);
            namespaces::unpin(&folder).map_err(RuntimeError::io("unmount below", &folder))?;
            let shm = folder.join("shm");
            namespaces::unmount(&shm).map_err(RuntimeError::io("unmount", &shm))?;
            let cgroup = &status_.config.cgroup_parent;
            this.inner.cgroups.remove(cgroup).map_err(RuntimeError::io("remove cgroup", cgroup))?;
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(RuntimeError::io("remove", &folder)(error))
                }
                _ => Ok(()),
            }
        })
        .await?;
        self.inner.sandboxes.lock().remove(id);
        Ok(())
    }
}

//! The first process of a pod whose containers share a PID namespace (`shareProcessNamespace`): it reaps what they leave behind.
//! A pod with a user namespace of its own has one too, for a moment: it is made in that namespace and its others, which belong
//! to it thereby, and are pinned then. It is a container of the supervisor's like any other, only that nobody above the sandbox
//! knows of it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use super::{Native, blocking, namespaces, refused, spec};
use crate::cri::{NamespaceMode, Result, RuntimeError, SandboxStatus, StdioMode};
use crate::names::ContainerId;
use crate::supervisor::protocol::Create;

/// User and group of the process, as of Kubernetes' pause image.
const NOBODY: u32 = 65535;
/// `oom_score_adj` of what a whole pod depends on.
const OOM_SCORE: i32 = -998;

fn id(sandbox: &SandboxStatus) -> Option<ContainerId> {
    let config = &sandbox.config;
    let pod = config.pod.as_ref().filter(|_| config.pid == NamespaceMode::Pod || !config.id_mappings.is_empty())?;
    // No container's name has a dot.
    Some(ContainerId::derive(&pod.uid, ".init", sandbox.config.attempt))
}

impl Native {
    /// Whether the sandbox's first process runs, if it needs one.
    pub(super) fn init_runs(&self, sandbox: &SandboxStatus) -> bool {
        let id = id(sandbox).filter(|_| sandbox.config.pid == NamespaceMode::Pod);
        id.is_none_or(|id| self.inner.supervisor.report(&id).is_some_and(|report| report.exit.is_none()))
    }

    /// Starts it if the pod has one, and pins in the sandbox's folder the namespaces that were made with it.
    pub(super) async fn start_init(&self, sandbox: &SandboxStatus) -> Result<()> {
        let Some(id) = id(sandbox) else { return Ok(()) };
        let running = |this: &Self| this.inner.supervisor.report(&id).filter(|report| report.exit.is_none());
        if running(self).is_none_or(|report| report.started_at == 0) {
            self.remove_init(sandbox).await?;
            let (this, status, new) = (self.clone(), sandbox.clone(), id.clone());
            let create = blocking(move || this.prepare_init(new, &status)).await?;
            self.inner.supervisor.create(create).await.map_err(refused(&id, "new"))?;
            self.inner.supervisor.start_container(&id).await.map_err(refused(&id, "created"))?;
        }
        let report = running(self)
            .ok_or_else(|| RuntimeError::Start("the first process of the pod's PID namespace ended at once".into()))?;
        let folder = self.inner.layout.sandbox(&sandbox.id);
        let names: Vec<&str> = made(sandbox).into_iter().map(|(_, name)| name).collect();
        namespaces::pin_of(report.pid, &folder, &names).map_err(RuntimeError::io("pin namespaces in", &folder))?;
        if sandbox.config.pid == NamespaceMode::Pod { Ok(()) } else { self.remove_init(sandbox).await }
    }

    /// Ends it, and with it whatever else is in its namespace.
    pub(super) async fn remove_init(&self, sandbox: &SandboxStatus) -> Result<()> {
        let Some(id) = id(sandbox) else { return Ok(()) };
        if self.inner.supervisor.report(&id).is_none() {
            return Ok(());
        }
        self.kill(&id).await?;
        self.inner.supervisor.forget(&id).await.map_err(refused(&id, "ended"))
    }

    fn prepare_init(&self, id: ContainerId, sandbox: &SandboxStatus) -> Result<Create> {
        let root = self.inner.layout.data.join("pause");
        write_program(&root).map_err(RuntimeError::io("write the program of", &root))?;
        let folder = self.inner.layout.sandbox(&sandbox.id);
        let config = &sandbox.config;
        let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
        namespaces.extend(made(sandbox).into_iter().map(|(kind, _)| json!({"type": kind})));
        if let Some(path) = &sandbox.network_namespace {
            namespaces.push(json!({"type": "network", "path": path}));
        }
        for (kind, mode) in [("ipc", config.ipc), ("uts", config.network)] {
            if mode != NamespaceMode::Node && config.id_mappings.is_empty() {
                namespaces.push(json!({"type": kind, "path": folder.join(kind)}));
            }
        }
        let ids = spec::id_mappings(config);
        let own_host_name = !config.id_mappings.is_empty() && config.network != NamespaceMode::Node;
        let cgroup = Path::new("/").join(&config.cgroup_parent).join(id.as_str());
        let none: [&str; 0] = [];
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": NOBODY, "gid": NOBODY}, "args": ["/pause"], "env": none, "cwd": "/",
                "capabilities": {"bounding": none, "effective": none, "permitted": none, "inheritable": none, "ambient": none},
                "noNewPrivileges": true, "oomScoreAdj": OOM_SCORE.max(super::spec::least_oom_score()),
            },
            "root": {"path": root, "readonly": true},
            "mounts": [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]}],
            "linux": {"namespaces": namespaces, "cgroupsPath": cgroup},
        });
        if !config.id_mappings.is_empty() {
            (spec["linux"]["uidMappings"], spec["linux"]["gidMappings"]) = (ids.clone(), ids);
        }
        if own_host_name {
            spec["hostname"] = json!(config.hostname);
        }
        let bundle = self.inner.layout.container(&id);
        fs::create_dir_all(&bundle).map_err(RuntimeError::io("create", &bundle))?;
        let path = bundle.join("config.json");
        let bytes = serde_json::to_vec(&spec).map_err(|e| RuntimeError::Invalid(e.to_string()))?;
        fs::write(&path, bytes).map_err(RuntimeError::io("write", &path))?;
        Ok(Create {
            log_path: bundle.join("output"),
            id,
            bundle,
            log_limits: self.inner.log_limits,
            stdio: StdioMode::default(),
            cgroup,
        })
    }
}

/// Kinds of the namespaces that are made for a sandbox with its first process, and their names in procfs: a PID namespace, and
/// all of the pod's where a user namespace shall own them.
fn made(sandbox: &SandboxStatus) -> Vec<(&'static str, &'static str)> {
    let config = &sandbox.config;
    let mapped = !config.id_mappings.is_empty();
    let own_network = mapped && config.network != NamespaceMode::Node;
    let wanted = [
        (mapped, ("user", "user")),
        (own_network, ("network", "net")),
        (own_network, ("uts", "uts")),
        (mapped && config.ipc != NamespaceMode::Node, ("ipc", "ipc")),
        (config.pid == NamespaceMode::Pod, ("pid", "pid")),
    ];
    wanted.into_iter().filter_map(|(wanted, names)| wanted.then_some(names)).collect()
}

/// The root file system of all such processes: one program, and a place for devices.
fn write_program(root: &Path) -> io::Result<()> {
    fs::create_dir_all(root.join("dev"))?;
    let path = root.join("pause");
    if path.exists() {
        return Ok(());
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    let new = tempfile::Builder::new().prefix("pause-").tempfile_in(root)?;
    fs::write(&new, coracle_sys::pause::program())?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o555))?;
    // Closed before it can be executed: a file open for writing cannot be (ETXTBSY).
    new.into_temp_path().persist(&path)?;
    Ok(())
}

//! Containers: root file system, specification, and the way through the supervisor.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::spec::{self, ImageDefaults, Input, PodPaths};
use super::{Native, blocking, idmap, namespaces, refused, user};
use crate::cri::{
    ContainerConfig, ContainerStatus, ContainerUser, ImageMount, NamespaceMode, Resources, Result, RuntimeError,
    SandboxStatus, SecurityProfile,
};
use crate::images::{Image, Snapshot};
use crate::names::{ContainerId, Layout, PodKey};
use crate::supervisor::protocol::{Create, Event, Report};

/// How long a killed process may take to vanish before that is an error: it sits in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of mount options that the kernel takes.
const MOUNT_OPTIONS_LIMIT: usize = 4095;

/// What is kept of a container beside the supervisor's report: `container.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox: ContainerId,
    /// Its pod.
    pub pod: PodKey,
    /// What it was asked for with.
    pub config: ContainerConfig,
    /// Its cgroup, relative to the cgroup2 mount.
    pub cgroup: PathBuf,
    /// The signal that asks it to end.
    pub stop_signal: i32,
    /// Who its first process runs as.
    #[serde(default)]
    pub user: ContainerUser,
}

/// All containers that are on disk.
pub(super) fn read_all(layout: &Layout) -> Result<HashMap<ContainerId, Arc<Record>>> {
    let folder = layout.containers();
    let mut found = HashMap::new();
    for entry in fs::read_dir(&folder).map_err(RuntimeError::io("read", &folder))? {
        let path = entry.map_err(RuntimeError::io("read", &folder))?.path().join("container.json");
        let Ok(bytes) = fs::read(&path) else { continue };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) => drop(found.insert(record.id.clone(), Arc::new(record))),
            Err(error) => tracing::error!(path = %path.display(), %error, "unreadable container"),
        }
    }
    Ok(found)
}

impl Native {
    pub(super) fn record(&self, id: &ContainerId) -> Result<Arc<Record>> {
        let found = self.inner.containers.lock().get(id).cloned();
        found.ok_or_else(|| RuntimeError::NotFound { kind: "container", id: id.clone() })
    }

    pub(super) fn members(&self, sandbox: &ContainerId) -> Vec<ContainerId> {
        let containers = self.inner.containers.lock();
        containers.values().filter(|record| record.sandbox == *sandbox).map(|record| record.id.clone()).collect()
    }

    /// The containers of one pod, or all.
    pub(super) fn statuses(&self, uid: Option<&str>) -> Vec<ContainerStatus> {
        let wanted = |record: &&Arc<Record>| uid.is_none_or(|uid| record.pod.uid == uid);
        let records: Vec<_> = self.inner.containers.lock().values().filter(wanted).cloned().collect();
        records
            .iter()
            .filter_map(|record| Some(status_of(record, &self.inner.supervisor.report(&record.id)?)))
            .collect()
    }

    pub(super) fn status(&self, id: &ContainerId) -> Option<ContainerStatus> {
        Some(status_of(&*self.record(id).ok()?, &self.inner.supervisor.report(id)?))
    }

    pub(super) async fn create(&self, sandbox: &ContainerId, config: ContainerConfig) -> Result<ContainerId> {
        let sandbox = self.sandbox(sandbox)?;
        let pod = sandbox.config.pod.clone().ok_or_else(|| RuntimeError::Invalid("sandbox without a pod".into()))?;
        let id = ContainerId::derive(&pod.uid, &config.name, config.attempt);
        if self.inner.supervisor.report(&id).is_some() {
            return Ok(id);
        }
        let this = self.clone();
        let new_id = id.clone();
        let prepared = blocking(move || this.prepare(new_id, pod, &sandbox, config)).await;
        let created = match prepared {
            Ok((record, create)) => {
                self.inner.containers.lock().insert(id.clone(), record);
                self.inner.supervisor.create(create).await.map(drop).map_err(refused(&id, "new"))
            }
            Err(error) => Err(error),
        };
        match created {
            Ok(()) => Ok(id),
            Err(error) => {
                self.inner.containers.lock().remove(&id);
                if let Err(second) = self.remove_files(&id).await {
                    tracing::warn!(container = %id, error = %second, "files of a failed container stay");
                }
                Err(error)
            }
        }
    }

    fn prepare(
        &self,
        id: ContainerId,
        pod: PodKey,
        sandbox: &SandboxStatus,
        mut config: ContainerConfig,
    ) -> Result<(Arc<Record>, Create)> {
        let folder = self.inner.layout.container(&id);
        let image = self
            .inner
            .images
            .resolve(&config.image_id)
            .map_err(|e| RuntimeError::Invalid(e.to_string()))?
            .ok_or_else(|| RuntimeError::Invalid(format!("image {} is not present", config.image)))?;
        let rootfs = folder.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(RuntimeError::io("create", &rootfs))?;
        let user = self.user_namespace(sandbox);
        let root = sandbox.config.id_mappings.first().map(|map| map.host_id);
        self.mount_root(&id, &image, &rootfs, user.as_deref().zip(root))?;
        for (index, mount) in config.mounts.iter_mut().enumerate() {
            if let Some(source) = &mount.image {
                mount.host_path = self.mount_image(&id, index, source, user.as_deref())?;
                // Its layers are, where there is need.
                mount.id_mapped = false;
            }
        }
        let (defaults, image_user, image_stop) = image_defaults(&image);
        let user_of_process = user::resolve(&rootfs, &config.security, &image_user)?;
        let cgroup = Path::new("/").join(&sandbox.config.cgroup_parent).join(id.as_str());
        let mut spec = spec::build(&Input {
            sandbox: &sandbox.config,
            container: &config,
            image: &defaults,
            user: &user_of_process,
            rootfs: &rootfs,
            paths: &self.pod_paths(sandbox, &config)?,
            cgroup: &cgroup,
            controllers: self.inner.cgroups.controllers(),
            seccomp: seccomp(&config)?,
            host_devices: if config.security.privileged { host_devices()? } else { Vec::new() },
            least_oom_score: spec::least_oom_score(),
        })?;
        super::cdi::apply(&mut spec, &self.inner.layout.cdi, &config.cdi_devices)
            .map_err(|error| RuntimeError::Invalid(error.to_string()))?;
        let stop_signal = [&config.stop_signal, &image_stop]
            .into_iter()
            .find(|s| !s.is_empty())
            .map_or(Some(Signal::SIGTERM as i32), |s| signal_number(s));
        let record = Record {
            stop_signal: stop_signal.ok_or_else(|| RuntimeError::Invalid("unknown stop signal".into()))?,
            id: id.clone(),
            sandbox: sandbox.id.clone(),
            pod,
            cgroup: cgroup.clone(),
            config,
            user: ContainerUser {
                uid: user_of_process.uid,
                gid: user_of_process.gid,
                supplemental_groups: user_of_process.groups.clone(),
            },
        };
        for (name, value) in
            [("config.json", serde_json::to_vec(&spec)), ("container.json", serde_json::to_vec(&record))]
        {
            let path = folder.join(name);
            let bytes = value.map_err(|e| RuntimeError::Invalid(e.to_string()))?;
            fs::write(&path, bytes).map_err(RuntimeError::io("write", &path))?;
        }
        let create = Create {
            id,
            bundle: folder,
            log_path: record.config.log_path.clone(),
            log_limits: self.inner.log_limits,
            stdio: record.config.stdio,
            cgroup,
        };
        Ok((Arc::new(record), create))
    }

    /// Mounts an image read-only beside the container's root and returns what of it is wanted.
    fn mount_image(&self, id: &ContainerId, index: usize, source: &ImageMount, user: Option<&Path>) -> Result<PathBuf> {
        let invalid = |error: crate::images::ImageError| RuntimeError::Invalid(error.to_string());
        let missing = || RuntimeError::Invalid(format!("image {} of a mount is not present", source.image));
        let image = self.inner.images.resolve(&source.image_id).map_err(invalid)?.ok_or_else(missing)?;
        // The snapshot keeps the image from being collected; its upper folder stays empty.
        let name = index.to_string();
        let snapshot = self.inner.images.snapshot(&image_snapshot(id, &name), &image).map_err(invalid)?;
        let target = self.inner.layout.container(id).join("images").join(name);
        fs::create_dir_all(&target).map_err(RuntimeError::io("create", &target))?;
        crate::volumes::ensure_layers(&target, &snapshot, &self.inner.layout.images(), user)
            .map_err(|e| RuntimeError::Invalid(e.to_string()))?;
        if source.sub_path.as_os_str().is_empty() {
            return Ok(target);
        }
        let inside = source.sub_path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let path = target.join(&source.sub_path);
        // A link in the image could lead anywhere on the host.
        match fs::canonicalize(&path) {
            Ok(real) if inside && real.starts_with(&target) => Ok(real),
            _ => Err(RuntimeError::Invalid(format!(
                "the image {} has no {} inside",
                source.image,
                source.sub_path.display()
            ))),
        }
    }

    /// The user namespace that a sandbox has of its own.
    fn user_namespace(&self, sandbox: &SandboxStatus) -> Option<PathBuf> {
        (!sandbox.config.id_mappings.is_empty()).then(|| self.inner.layout.sandbox(&sandbox.id).join("user"))
    }

    /// `user` is the user namespace of the pod's own, with the id that its root has outside.
    fn mount_root(&self, id: &ContainerId, image: &Image, rootfs: &Path, user: Option<(&Path, u32)>) -> Result<()> {
        // Left by an attempt that was killed here: seen through and made again.
        namespaces::unmount(rootfs).map_err(RuntimeError::io("unmount", rootfs))?;
        let images = &self.inner.images;
        let snapshot = images.remove_snapshot(id.as_str()).and_then(|()| images.snapshot(id.as_str(), image));
        let snapshot = snapshot.map_err(|e| RuntimeError::Invalid(e.to_string()))?;
        let overlay = |snapshot: &Snapshot| {
            // A container's own files do not outlive the host's boot, so nothing has to reach the disk. Otherwise each unmount
            // would write out all that waits in the whole file system below, the cluster's state included.
            let options = format!("{},volatile", snapshot.mount_options());
            if options.len() > MOUNT_OPTIONS_LIMIT {
                let layers = snapshot.lowerdirs.len();
                return Err(io::Error::other(format!("image has too many layers ({layers}) for one overlay mount")));
            }
            Ok(mount(Some("overlay"), rootfs, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?)
        };
        let mounted = match user {
            None => overlay(&snapshot),
            Some((user, root)) => {
                let aside = self.inner.layout.container(id).join("layers");
                // The root folder is the upper layer's, which belongs to the one whom the image names.
                let owned = snapshot.lowerdirs.first().map_or(Ok(()), |top| {
                    let of = fs::metadata(top)?;
                    chown(&snapshot.upper, root.checked_add(of.uid()), root.checked_add(of.gid()))
                });
                owned.and_then(|()| idmap::with_layers(&self.inner.layout.images(), &snapshot, user, &aside, overlay))
            }
        };
        mounted.map_err(RuntimeError::io("mount overlay at", rootfs))
    }

    fn pod_paths(&self, sandbox: &SandboxStatus, config: &ContainerConfig) -> Result<PodPaths> {
        let folder = self.inner.layout.sandbox(&sandbox.id);
        let own = |mode: NamespaceMode, name: &str| (mode != NamespaceMode::Node).then(|| folder.join(name));
        let pid = match &config.pid_target {
            Some(target) => {
                let report = self.inner.supervisor.report(target);
                let pid = report.filter(|r| r.exit.is_none()).map(|r| r.pid);
                let pid =
                    pid.ok_or_else(|| RuntimeError::Invalid(format!("target container {target} does not run")))?;
                Some(PathBuf::from(format!("/proc/{pid}/ns/pid")))
            }
            None if spec::pid_mode(&sandbox.config, config) == NamespaceMode::Pod => Some(folder.join("pid")),
            None => None,
        };
        Ok(PodPaths {
            user: self.user_namespace(sandbox),
            network: sandbox.network_namespace.clone(),
            ipc: own(sandbox.config.ipc, "ipc"),
            uts: own(sandbox.config.network, "uts"),
            pid,
            shm: own(sandbox.config.ipc, "shm"),
            hostname: folder.join("hostname"),
            resolv_conf: Some(folder.join("resolv.conf")),
        })
    }

    /// Becomes ready when the container has ended; to be made before the signal that is to end it.
    fn ended(&self, id: &ContainerId) -> impl Future<Output = ()> + use<> {
        let (this, id, mut events) = (self.clone(), id.clone(), self.inner.supervisor.events());
        async move {
            let running = || this.inner.supervisor.report(&id).is_some_and(|report| report.exit.is_none());
            while running() {
                match events.recv().await {
                    Ok(Event::Exited(ended, _)) if ended == id => return,
                    Err(broadcast::error::RecvError::Closed) => return,
                    _ => {}
                }
            }
        }
    }

    /// Kills every process of a container and waits until the first one is gone.
    pub(super) async fn kill(&self, id: &ContainerId) -> Result<()> {
        let ended = self.ended(id);
        match self.inner.supervisor.kill(id, Signal::SIGKILL as i32, true).await.map_err(refused(id, "running")) {
            Err(error) if !matches!(error, RuntimeError::NotFound { .. }) => return Err(error),
            _ => {}
        }
        tokio::time::timeout(KILL_TIMEOUT, ended).await.map_err(|_| {
            RuntimeError::Supervisor(format!(
                "container {id} does not end although it was killed; its process waits in the kernel"
            ))
        })
    }

    pub(super) async fn stop(&self, id: &ContainerId, timeout: Duration) -> Result<()> {
        let Ok(record) = self.record(id) else { return Ok(()) };
        if self.inner.supervisor.report(id).is_none_or(|report| report.exit.is_some()) {
            return Ok(());
        }
        if !timeout.is_zero() {
            let ended = self.ended(id);
            match self.inner.supervisor.kill(id, record.stop_signal, false).await.map_err(refused(id, "running")) {
                Err(error) if !matches!(error, RuntimeError::NotFound { .. }) => return Err(error),
                _ => {}
            }
            if tokio::time::timeout(timeout, ended).await.is_ok() {
                return Ok(());
            }
        }
        self.kill(id).await
    }

    /// Notes limits that were changed while the container runs.
    pub(super) fn note_resources(&self, record: &Record, resources: &Resources) -> Result<()> {
        let mut changed = record.clone();
        changed.config.resources = resources.clone();
        let folder = self.inner.layout.container(&record.id);
        let (new, path) = (folder.join("container.json.new"), folder.join("container.json"));
        let bytes = serde_json::to_vec(&changed).map_err(|e| RuntimeError::Invalid(e.to_string()))?;
        fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path)).map_err(RuntimeError::io("write", &path))?;
        self.inner.containers.lock().insert(record.id.clone(), Arc::new(changed));
        Ok(())
    }

    pub(super) async fn remove(&self, id: &ContainerId) -> Result<()> {
        self.stop(id, Duration::ZERO).await?;
        self.remove_files(id).await
    }

    async fn remove_files(&self, id: &ContainerId) -> Result<()> {
        let this = self.clone();
        let target = id.clone();
        let images = blocking(move || {
            let folder = this.inner.layout.container(&target);
            for path in [vec![folder.join("rootfs")], image_mounts(&folder)].concat() {
                namespaces::unmount(&path).map_err(RuntimeError::io("unmount", &path))?;
            }
            Ok(image_mounts(&folder))
        });
        let images = images.await?;
        self.inner.supervisor.forget(id).await.map_err(refused(id, "ended"))?;
        self.inner.containers.lock().remove(id);
        let this = self.clone();
        let target = id.clone();
        blocking(move || {
            let names = images.iter().filter_map(|path| Some(image_snapshot(&target, path.file_name()?.to_str()?)));
            names
                .chain([target.to_string()])
                .try_for_each(|name| this.inner.images.remove_snapshot(&name))
                .map_err(|e| RuntimeError::Invalid(e.to_string()))
        })
        .await
    }
}

/// Where images are mounted for a container.
fn image_mounts(container: &Path) -> Vec<PathBuf> {
    // No such folder: no such mounts.
    let entries = fs::read_dir(container.join("images")).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// The name in the image store of what such a mount holds.
fn image_snapshot(container: &ContainerId, mount: &str) -> String {
    format!("{container}-{mount}")
}

fn status_of(record: &Record, report: &Report) -> ContainerStatus {
    ContainerStatus {
        id: record.id.clone(),
        sandbox: record.sandbox.clone(),
        pod: record.pod.clone(),
        config: record.config.clone(),
        state: report.state,
        pid: report.exit.is_none().then_some(report.pid),
        created_at: report.created_at,
        started_at: report.started_at,
        exit: report.exit,
        message: String::new(),
        user: record.user.clone(),
    }
}

/// What the image says about running it, its user and its stop signal.
fn image_defaults(image: &Image) -> (ImageDefaults, String, String) {
    let Some(config) = image.config.config() else { return Default::default() };
    let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let word = |word: &Option<String>| word.clone().unwrap_or_default();
    let defaults = ImageDefaults {
        entrypoint: list(config.entrypoint()),
        cmd: list(config.cmd()),
        env: list(config.env()),
        working_dir: word(config.working_dir()),
    };
    (defaults, word(config.user()), word(config.stop_signal()))
}

/// The filter of a container as OCI JSON; `None` for none.
fn seccomp(config: &ContainerConfig) -> Result<Option<serde_json::Value>> {
    if config.security.privileged {
        return Ok(None);
    }
    match &config.security.seccomp {
        SecurityProfile::Unconfined => Ok(None),
        SecurityProfile::RuntimeDefault => {
            let capabilities = spec::capabilities(config).iter().filter_map(|c| c.parse().ok()).collect();
            let profile = coracle_runtime::seccomp::default_profile(&capabilities);
            serde_json::to_value(profile).map(Some).map_err(|e| RuntimeError::Invalid(e.to_string()))
        }
        SecurityProfile::Localhost(path) => {
            let text = fs::read(path).map_err(RuntimeError::io("read seccomp profile", path))?;
            serde_json::from_slice(&text)
                .map(Some)
                .map_err(|e| RuntimeError::Invalid(format!("seccomp profile {path}: {e}")))
        }
    }
}

/// The device files of the host, for a privileged container; terminals and what belongs to mounts below `/dev` left out.
fn host_devices() -> Result<Vec<PathBuf>> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/dev")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(RuntimeError::io("read", &folder))? {
            let entry = entry.map_err(RuntimeError::io("read", &folder))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(RuntimeError::io("read", &folder))?);
            let skipped = [
                "pts", "shm", "mqueue", "fd", "lxc", "lxd-fuse", "console", "ptmx", "tty", "null", "zero", "full",
                "random", "urandom",
            ];
            if folder == Path::new("/dev") && entry.file_name().to_str().is_some_and(|name| skipped.contains(&name)) {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_char_device() || kind.is_block_device() {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// The number of a signal's name (`SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`).
pub(crate) fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = name.to_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Some(offset) = full.strip_prefix("SIGRTMIN") {
        // 34 is what programs see as the first real-time signal.
        return if offset.is_empty() { Some(34) } else { Some(34 + offset.strip_prefix('+')?.parse::<i32>().ok()?) };
    }
    if let Some(offset) = full.strip_prefix("SIGRTMAX") {
        return if offset.is_empty() { Some(64) } else { Some(64 - offset.strip_prefix('-')?.parse::<i32>().ok()?) };
    }
    let full = match full.as_str() {
        "SIGCLD" => "SIGCHLD",
        "SIGPOLL" => "SIGIO",
        "SIGIOT" => "SIGABRT",
        other => other,
    };
    Signal::from_str(full).ok().map(|signal| signal as i32)
}

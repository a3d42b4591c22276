//! Control groups, version 2: making, limiting, measuring, freezing, killing, removing.

mod limits;
mod stats;

use crate::device;
use crate::error::{Error, Result};
use coracle_sys::{bpf, path};
pub use limits::{Setting, settings};
use nix::poll::PollFlags;
use oci_spec::runtime::LinuxResources;
pub use stats::{Pressure, Stats};
use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where distributions mount version 2; the second place is that of a host with both versions.
const MOUNT_POINTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// How long killed processes may take to leave a cgroup.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);
/// How long the kernel may take to freeze.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Controllers that containers are given where the host has them.
const CONTROLLERS: [&str; 7] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma"];
/// Deeper trees of cgroups below a container are not taken down.
const MAX_DEPTH: u32 = 64;

/// A cgroup, held open.
#[derive(Debug)]
pub struct Cgroup {
    folder: OwnedFd,
    /// On the host.
    path: PathBuf,
    /// Below the mount point, beginning with a slash.
    name: PathBuf,
    /// Whether it was made when this was.
    new: bool,
}

/// Where version 2 is mounted.
pub fn mount_point() -> Result<&'static Path> {
    MOUNT_POINTS
        .into_iter()
        .map(Path::new)
        .find(|point| {
            let Ok(name) = crate::plan::c_path("cgroup", point) else { return false };
            path::open(&name, libc::O_PATH)
                .and_then(|folder| path::filesystem_magic(folder.as_fd()))
                .is_ok_and(|magic| magic == path::CGROUP2_SUPER_MAGIC)
        })
        .ok_or_else(|| {
            Error::unsupported("cgroups", "no cgroup2 file system is mounted at /sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1, or mount one there")
        })
}

impl Cgroup {
    /// Makes the cgroup `name` (from the top of the hierarchy) with its parents, and hands the host's controllers down to
    /// it. One that exists is opened.
    pub fn create(name: &Path) -> Result<Self> {
        let top = mount_point()?;
        let mut path = top.to_path_buf();
        let mut parts = name.components().filter_map(|part| match part {
            std::path::Component::Normal(part) => Some(part),
            _ => None,
        });
        if name.components().any(|part| matches!(part, std::path::Component::ParentDir))
            || parts.clone().next().is_none()
        {
            return Err(Error::config("linux.cgroupsPath", format!("{} is not a path of a cgroup", name.display())));
        }
        let new = parts.try_fold(false, |_, part| {
            delegate(&path)?;
            path.push(part);
            match std::fs::create_dir(&path) {
                Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
                Err(source) => Err(Error::Cgroup { action: "create", path: path.clone(), source }),
                Ok(()) => Ok(true),
            }
        })?;
        Ok(Self { new, ..Self::open_below(top, name)? })
    }

    /// Opens an existing cgroup.
    pub fn open(name: &Path) -> Result<Self> {
        Self::open_below(mount_point()?, name)
    }

    fn open_below(top: &Path, name: &Path) -> Result<Self> {
        let below = name.strip_prefix("/").unwrap_or(name);
        let path = top.join(below);
        let error = |source| Error::Cgroup { action: "open", path: path.clone(), source };
        let folder = std::fs::File::open(&path).map_err(error)?;
        Ok(Self { folder: folder.into(), name: Path::new("/").join(below), path, new: false })
    }

    /// Refuses one in which somebody else has processes, or in which none would run.
    pub fn check_free(&self) -> Result<()> {
        if self.new {
            return Ok(());
        }
        let reason = if !self.processes()?.is_empty() {
            "container's cgroup is not empty: choose another linux.cgroupsPath"
        } else if self.is_frozen()? {
            "container's cgroup unexpectedly frozen: thaw it or choose another linux.cgroupsPath"
        } else {
            return Ok(());
        };
        Err(Error::Cgroup { action: "use", path: self.path.clone(), source: std::io::Error::other(reason) })
    }

    /// That of a process.
    pub fn of_process(pid: i32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let name = text.lines().find_map(|line| line.strip_prefix("0::"));
        Self::open(Path::new(name.ok_or_else(|| Error::config(path.display().to_string(), "names no cgroup"))?))
    }

    /// Its folder on the host.
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// Its name from the top of the hierarchy.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// A descriptor of its folder, for `clone3`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Applies limits and device rules. The device rules that every container has hold also without resources.
    pub fn apply(&self, resources: Option<&LinuxResources>) -> Result<()> {
        if let Some(resources) = resources {
            self.set(resources)?;
        }
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        self.limit_devices(&device::rules(rules)?)
    }

    /// Writes the limits that the resources name, and nothing else; also for a running container.
    pub fn set(&self, resources: &LinuxResources) -> Result<()> {
        let settings = settings(resources, |file| self.path.join(file).exists())?;
        if settings.is_empty() {
            return Ok(());
        }
        let available = self.read("cgroup.controllers")?;
        for setting in &settings {
            let file = self.path.join(&setting.file);
            let known = setting.controller == "cgroup"
                || available.split_whitespace().any(|controller| controller == setting.controller);
            if !known || !file.exists() {
                if setting.optional || setting.is_default() {
                    continue;
                }
                return Err(Error::Controller {
                    controller: setting.controller.clone(),
                    advice: advice(&setting.controller, known),
                    file,
                });
            }
            if setting.check_usage
                && self
                    .number("memory.current")
                    .is_some_and(|now| setting.value.parse().is_ok_and(|new: u64| new < now))
            {
                return Err(Error::config("linux.resources.memory.limit", "is less than what the container uses now"));
            }
            self.write(&setting.file, &setting.value)?;
        }
        Ok(())
    }

    /// Gives the cgroup and the files that the kernel lists for it to a user, who may then make cgroups below it.
    pub fn give_to(&self, uid: u32) -> Result<()> {
        /// What the kernel names where it lists nothing (cgroups(7)).
        const DELEGATED: &str = "cgroup.procs cgroup.subtree_control cgroup.threads";
        let listed = std::fs::read_to_string("/sys/kernel/cgroup/delegate").unwrap_or_else(|_| DELEGATED.into());
        for file in std::iter::once("").chain(listed.split_whitespace()) {
            let path = self.path.join(file);
            match std::os::unix::fs::chown(&path, Some(uid), None) {
                // The list holds files of every controller, the cgroup those of the ones that it has.
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
                other => other.map_err(|source| Error::Cgroup { action: "give away", path, source })?,
            }
        }
        Ok(())
    }

    /// Replaces the device rules.
    pub fn limit_devices(&self, rules: &[device::Rule]) -> Result<()> {
        let error = |errno: coracle_sys::Errno| Error::Cgroup {
            action: "set the device rules of",
            path: self.path.clone(),
            source: errno.into(),
        };
        let Some(program) = device::compile(rules) else { return Ok(()) };
        let program = bpf::load_device_program(&program).map_err(error)?;
        bpf::attach_device_program(self.as_fd(), program.as_fd(), None).map_err(error)
    }

    /// Exchanges the device rules of a running container.
    pub fn replace_devices(&self, rules: &[device::Rule]) -> Result<()> {
        let error = |errno: coracle_sys::Errno| Error::Cgroup {
            action: "set the device rules of",
            path: self.path.clone(),
            source: errno.into(),
        };
        let old = bpf::attached_device_programs(self.as_fd()).map_err(error)?;
        // The new one is in force before an old one goes: at no moment is a device open that both refuse.
        self.limit_devices(rules)?;
        old.iter().try_for_each(|program| bpf::detach_device_program(self.as_fd(), program.as_fd()).map_err(error))
    }

    /// Kills all processes in it and below. One that is gone has none: systemd removes its own when they are empty.
    pub fn kill(&self) -> Result<()> {
        match self.write("cgroup.kill", "1") {
            Err(Error::Cgroup { source, .. }) if is_gone(&source) => Ok(()),
            other => other,
        }
    }

    /// Freezes or thaws and waits until that is done.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let wanted = if frozen { "1" } else { "0" };
        self.await_event("frozen", wanted, FREEZE_LIMIT, "freeze or thaw")
    }

    /// Whether it was told to freeze.
    pub fn is_frozen(&self) -> Result<bool> {
        Ok(self.read("cgroup.freeze")?.trim() == "1")
    }

    /// Ids of all processes in it and below.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        collect_processes(&self.path, 0, &mut found)?;
        found.sort_unstable();
        Ok(found)
    }

    /// Usage figures.
    pub fn stats(&self) -> Stats {
        Stats::read(&self.path)
    }

    /// How often processes in it were killed for want of memory; `None` without the memory controller.
    pub fn oom_kills(&self) -> Option<u64> {
        stats::flat(&self.path.join("memory.events")).get("oom_kill").copied()
    }

    /// Kills what is left in it and removes it, through systemd where a unit of systemd's has it.
    pub fn take_down(&self, unit: Option<&str>) -> Result<()> {
        // Most are empty by now.
        if unit.is_none() && std::fs::remove_dir(&self.path).is_ok() {
            return Ok(());
        }
        if !self.processes()?.is_empty() {
            self.kill()?;
        }
        if let Some(unit) = unit {
            crate::systemd::stop(unit)?;
        }
        self.remove()
    }

    /// Waits until it has no processes and removes it with all below.
    pub fn remove(&self) -> Result<()> {
        match remove_tree(&self.path, 0) {
            Err(source) if source.raw_os_error() == Some(libc::EBUSY) => {
                self.await_event("populated", "0", EMPTY_LIMIT, "empty")?;
                remove_tree(&self.path, 0)
            }
            other => other,
        }
        .map_err(|source| Error::Cgroup { action: "remove", path: self.path.clone(), source })
    }

    /// Reads a file of it.
    pub fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        std::fs::read_to_string(&path).map_err(|source| Error::Cgroup { action: "read", path, source })
    }

    fn number(&self, file: &str) -> Option<u64> {
        std::fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    /// Writes a file of it.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        write(&path, value).map_err(|source| Error::Cgroup { action: "write", path, source })
    }

    fn await_event(&self, key: &str, wanted: &str, limit: Duration, action: &'static str) -> Result<()> {
        let path = self.path.join("cgroup.events");
        let error = |source| Error::Cgroup { action, path: path.clone(), source };
        let mut file = std::fs::File::open(&path).map_err(error)?;
        loop {
            let mut text = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(error)?;
            if text.lines().any(|line| line.split_once(' ') == Some((key, wanted))) {
                return Ok(());
            }
            if !crate::wait_for(file.as_fd(), PollFlags::POLLPRI, Some(limit)).map_err(error)? {
                return Err(error(std::io::Error::from(std::io::ErrorKind::TimedOut)));
            }
        }
    }
}

/// Whether a file could not be used because its cgroup was removed.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn write(path: &Path, value: &str) -> std::io::Result<()> {
    std::fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn advice(controller: &str, known: bool) -> String {
    if known {
        return "this kernel does not have that file".into();
    }
    format!(
        "enable {controller} in cgroup.subtree_control of the parents (a host that mounts it as a version 1 hierarchy must boot with cgroup_no_v1={controller})"
    )
}

/// Hands all controllers that a cgroup has down to its children, as far as that is possible. What a limit then lacks is
/// reported when it is set.
fn delegate(parent: &Path) -> Result<()> {
    let read = |file: &str| std::fs::read_to_string(parent.join(file)).unwrap_or_default();
    let (available, given) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    for controller in CONTROLLERS {
        let has = |list: &str| list.split_whitespace().any(|listed| listed == controller);
        if has(&available) && !has(&given) {
            // Refused for a cgroup with processes of its own, and for a controller in use elsewhere; each by itself.
            let _ = write(&parent.join("cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
    Ok(())
}

fn collect_processes(folder: &Path, depth: u32, found: &mut Vec<i32>) -> Result<()> {
    let error = |path: &Path, source| Error::Cgroup { action: "read", path: path.to_path_buf(), source };
    let file = folder.join("cgroup.procs");
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        // Removed meanwhile: nothing is in it.
        Err(source) if is_gone(&source) => return Ok(()),
        Err(source) => return Err(error(&file, source)),
    };
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in children(folder, depth).map_err(|source| error(folder, source))? {
        collect_processes(&child, depth + 1, found)?;
    }
    Ok(())
}

fn children(folder: &Path, depth: u32) -> std::io::Result<Vec<PathBuf>> {
    if depth >= MAX_DEPTH {
        return Err(std::io::Error::from_raw_os_error(libc::ELOOP));
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_tree(folder: &Path, depth: u32) -> std::io::Result<()> {
    // Most have no children, and the kernel says so by refusing.
    match std::fs::remove_dir(folder) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            for child in children(folder, depth)? {
                remove_tree(&child, depth + 1)?;
            }
            match std::fs::remove_dir(folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether resources hold nothing that a file of the cgroup would have to take.
pub fn only_devices(resources: &LinuxResources) -> bool {
    settings(resources, |_| true).is_ok_and(|settings| settings.is_empty())
}

/// The numbers of a file like `memory.stat`.
pub fn flat_file(path: &Path) -> BTreeMap<String, u64> {
    stats::flat(path)
}

//! The tree of pods' cgroups: `<root>/[burstable/|besteffort/]pod<uid>`, as a kubelet with the cgroupfs driver lays it out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cri::Resources;
use crate::native::spec::Controllers;

/// `status.qosClass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Every container's limits equal its requests.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl Qos {
    /// As the API spells it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// Controllers that pods' limits need; what lacks is told as a node condition.
pub const WANTED: [&str; 5] = ["cpu", "cpuset", "memory", "pids", "io"];

/// The hierarchy of this host.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    mount: PathBuf,
    root: PathBuf,
    available: Vec<String>,
}

impl Hierarchy {
    /// Finds the cgroup2 mount and what it offers, and makes the root of pods' cgroups (`root`, relative to the mount).
    ///
    /// # Errors
    /// When there is no cgroup2 mount or the root cannot be made.
    pub fn open(root: &Path) -> io::Result<Self> {
        let mount = super::mount_point().to_owned();
        let offered = fs::read_to_string(mount.join("cgroup.controllers"))?;
        let this =
            Self { mount, root: root.to_owned(), available: offered.split_whitespace().map(str::to_owned).collect() };
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            this.make(&this.qos(qos))?;
        }
        // Pods without requests get what the others leave (kubelet's qosContainerManager).
        this.write(&this.qos(Qos::BestEffort), "cpu.weight", "1")?;
        Ok(this)
    }

    /// One that nothing is made in.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        Self { mount: PathBuf::new(), root: PathBuf::new(), available: Vec::new() }
    }

    /// The controllers that pods' limits need and this host has not.
    pub fn missing(&self) -> Vec<&'static str> {
        WANTED.into_iter().filter(|name| !self.has(name)).collect()
    }

    /// What containers can be limited by.
    pub fn controllers(&self) -> Controllers {
        Controllers {
            cpu: self.has("cpu"),
            memory: self.has("memory"),
            pids: self.has("pids"),
            hugetlb: self.has("hugetlb"),
            cpuset: self.has("cpuset"),
        }
    }

    fn has(&self, controller: &str) -> bool {
        self.available.iter().any(|name| name == controller)
    }

    /// The cgroup of a class, relative to the mount.
    fn qos(&self, qos: Qos) -> PathBuf {
        match qos {
            Qos::Guaranteed => self.root.clone(),
            Qos::Burstable => self.root.join("burstable"),
            Qos::BestEffort => self.root.join("besteffort"),
        }
    }

    /// The cgroup of a pod, relative to the mount.
    pub fn pod(&self, uid: &str, qos: Qos) -> PathBuf {
        self.qos(qos).join(format!("pod{uid}"))
    }

    /// Makes a cgroup and its ancestors, each handing the wanted controllers down.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn make(&self, path: &Path) -> io::Result<()> {
        let mut folder = self.mount.clone();
        let enable: String =
            WANTED.iter().chain(&["hugetlb"]).filter(|c| self.has(c)).map(|c| format!("+{c} ")).collect();
        for part in path.components() {
            if !enable.is_empty() {
                fs::write(folder.join("cgroup.subtree_control"), enable.trim_end())?;
            }
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        if !enable.is_empty() {
            fs::write(folder.join("cgroup.subtree_control"), enable.trim_end())?;
        }
        Ok(())
    }

    /// Sets limits, as far as the host has the controllers.
    ///
    /// # Errors
    /// When a file that exists refuses the value.
    pub fn limit(&self, path: &Path, resources: &Resources) -> io::Result<()> {
        if resources.cpu_shares > 0 {
            self.write(path, "cpu.weight", &weight(resources.cpu_shares).to_string())?;
        }
        if resources.cpu_quota != 0 {
            let quota = if resources.cpu_quota > 0 { resources.cpu_quota.to_string() } else { "max".into() };
            self.write(path, "cpu.max", &format!("{quota} {}", resources.cpu_period.max(1000)))?;
        }
        if resources.memory_limit_in_bytes != 0 {
            let limit = resources.memory_limit_in_bytes;
            self.write(path, "memory.max", &if limit > 0 { limit.to_string() } else { "max".into() })?;
        }
        let (memory, swap) = (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes);
        if swap != 0 && self.mount.join(path).join("memory.swap.max").exists() {
            let limit = if swap > 0 { (swap - memory.max(0)).max(0).to_string() } else { "max".into() };
            self.write(path, "memory.swap.max", &limit)?;
        }
        for (file, list) in [("cpuset.cpus", &resources.cpuset_cpus), ("cpuset.mems", &resources.cpuset_mems)] {
            if !list.is_empty() {
                self.write(path, file, list)?;
            }
        }
        for (file, value) in &resources.unified {
            self.write(path, file, value)?;
        }
        Ok(())
    }

    /// Removes a cgroup with those below it; processes in it are killed first. Nothing happens if there is none.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let folder = self.mount.join(path);
        match fs::write(folder.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        remove_tree(&folder)
    }

    fn write(&self, path: &Path, file: &str, value: &str) -> io::Result<()> {
        let controller = file.split('.').next().unwrap_or_default();
        if !self.has(controller) {
            return Ok(());
        }
        let target = self.mount.join(path).join(file);
        fs::write(&target, value)
            .map_err(|e| io::Error::new(e.kind(), format!("write {value:?} to {}: {e}", target.display())))
    }
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `cpu.weight` (1..=10000) of cgroup v1 shares (2..=262144), by the kubelet's formula.
pub fn weight(shares: u64) -> u64 {
    (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142 + 1
}

/// Shares of a CPU request in thousandths, by the kubelet's formula.
pub fn shares(milli_cpu: u64) -> u64 {
    (milli_cpu * 1024 / 1000).clamp(2, 262_144)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_become_weights() {
        assert_eq!([shares(0), shares(1), shares(100), shares(1000)], [2, 2, 102, 1024]);
        assert_eq!([weight(2), weight(1024), weight(262_144)], [1, 39, 10_000]);
    }
}

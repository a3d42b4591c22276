//! Intel RDT (`linux.intelRdt`): a share of caches and memory bandwidth, and the monitoring of it, by groups of the resctrl
//! file system. The file system is the host's to mount; nothing here does it.

use crate::error::{Error, Result};
use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the host mounts it.
const MOUNT_POINT: &str = "/sys/fs/resctrl";
/// `RDTGROUP_SUPER_MAGIC`.
const MAGIC: i64 = 0x0765_5821;

/// The groups of a container, as they are remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// Of its class of service.
    pub folder: PathBuf,
    /// Whether the class was made for this container alone, and goes with it.
    pub own: bool,
    /// Of its monitoring.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<PathBuf>,
}

/// What the container asks for, checked.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    class: Option<String>,
    /// In the order in which they are written.
    lines: Vec<String>,
    monitored: bool,
}

impl Wanted {
    pub(crate) fn compile(rdt: &LinuxIntelRdt) -> Result<Self> {
        let class = rdt.clos_id().clone().filter(|class| !class.is_empty());
        if class.as_deref().is_some_and(|class| class != "/" && (class.contains('/') || [".", ".."].contains(&class))) {
            return Err(Error::config("linux.intelRdt.closID", format!("{class:?} is not the name of a class")));
        }
        let mut lines = Vec::new();
        let schemata = rdt.schemata().iter().flatten().map(|line| ("schemata", Some(line.as_str()), ""));
        let all = [
            ("l3CacheSchema", rdt.l3_cache_schema().as_deref(), ""),
            ("memBwSchema", rdt.mem_bw_schema().as_deref(), "MB:"),
        ];
        for (field, line, start) in all.into_iter().chain(schemata) {
            let Some(line) = line.filter(|line| !line.is_empty()) else { continue };
            if line.contains('\n') || !line.starts_with(start) {
                return Err(Error::config(
                    format!("linux.intelRdt.{field}"),
                    format!("{line:?} is not one line that begins with {start:?}"),
                ));
            }
            lines.push(line.to_string());
        }
        mounted()?;
        Ok(Self { class, lines, monitored: rdt.enable_monitoring().unwrap_or(false) })
    }
}

/// The file system, if the host has mounted it.
fn mounted() -> Result<PathBuf> {
    // Tests have a tree of their own, for few machines have the real one.
    if cfg!(debug_assertions)
        && let Some(tree) = std::env::var_os("CORUN_RESCTRL")
    {
        return Ok(tree.into());
    }
    let path = Path::new(MOUNT_POINT);
    let name = crate::plan::c_path("linux.intelRdt", path)?;
    let magic = coracle_sys::path::open(&name, libc::O_PATH).and_then(|folder| {
        use std::os::fd::AsFd;
        coracle_sys::path::filesystem_magic(folder.as_fd())
    });
    if magic == Ok(MAGIC) {
        return Ok(path.to_path_buf());
    }
    Err(Error::unsupported(
        "linux.intelRdt",
        format!(
            "no resctrl file system is mounted: mount -t resctrl resctrl {MOUNT_POINT} (it needs a processor with RDT)"
        ),
    ))
}

/// The values of a schemata file: line by line, and within a line by cache.
fn values(text: &str) -> BTreeMap<(&str, &str), &str> {
    let lines = text.lines().filter_map(|line| line.trim().split_once(':'));
    lines
        .flat_map(|(resource, values)| {
            values.split(';').filter_map(move |value| {
                let (cache, value) = value.split_once('=')?;
                // The kernel fills masks up with zeroes.
                let bare = value.trim().trim_start_matches('0');
                Some(((resource.trim(), cache.trim()), if bare.is_empty() { "0" } else { bare }))
            })
        })
        .collect()
}

impl Group {
    /// Makes or finds the groups of a container.
    pub(crate) fn create(wanted: &Wanted, id: &str) -> Result<Self> {
        let root = mounted()?;
        let folder = match wanted.class.as_deref() {
            Some("/") => root,
            name => root.join(name.unwrap_or(id)),
        };
        let mut group = Self { folder, own: false, monitor: None };
        // A class that nothing is said of must be there already.
        let may_make = wanted.class.is_none() || !wanted.lines.is_empty();
        let made = may_make
            && match std::fs::create_dir(&group.folder) {
                Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => false,
                other => {
                    other.map_err(|source| Error::Write { path: group.folder.clone(), source })?;
                    true
                }
            };
        group.own = made && wanted.class.is_none();
        let filled = group.fill(wanted, made, id);
        if filled.is_err() && made {
            // Nobody else can be in a class that did not exist before.
            std::fs::remove_dir(&group.folder).map_err(|source| Error::Write { path: group.folder.clone(), source })?;
        }
        filled.map(|()| group)
    }

    fn fill(&mut self, wanted: &Wanted, made: bool, id: &str) -> Result<()> {
        if !self.folder.is_dir() {
            let class = self.folder.display();
            return Err(Error::config(
                "linux.intelRdt.closID",
                format!("there is no class {class}, nor schemata for a new one"),
            ));
        }
        if made {
            wanted.lines.iter().try_for_each(|line| self.limit(line))?;
        } else if !wanted.lines.is_empty() {
            let path = self.folder.join("schemata");
            let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
            let (known, lines) = (values(&text), wanted.lines.join("\n"));
            if let Some(((resource, cache), _)) =
                values(&lines).iter().find(|(key, value)| known.get(*key) != Some(*value))
            {
                let class = self.folder.display();
                return Err(Error::config(
                    "linux.intelRdt.closID",
                    format!("class {class} exists, and has another value of {resource} for cache {cache}"),
                ));
            }
        }
        if wanted.monitored {
            let monitor = self.folder.join("mon_groups").join(id);
            std::fs::create_dir(&monitor).map_err(|source| Error::Write { path: monitor.clone(), source })?;
            self.monitor = Some(monitor);
        }
        Ok(())
    }

    /// Sets one line of the class's schemata.
    pub fn limit(&self, line: &str) -> Result<()> {
        let path = self.folder.join("schemata");
        std::fs::write(&path, format!("{line}\n")).map_err(|source| Error::Write { path, source })
    }

    /// Takes a process in; its children follow.
    pub fn take(&self, pid: i32) -> Result<()> {
        for folder in std::iter::once(&self.folder).chain(&self.monitor) {
            let path = folder.join("tasks");
            std::fs::write(&path, pid.to_string()).map_err(|source| Error::Write { path, source })?;
        }
        Ok(())
    }

    /// Removes what was made for the container.
    pub fn remove(&self) -> Result<()> {
        for path in self.monitor.iter().chain(self.own.then_some(&self.folder)) {
            match std::fs::remove_dir(path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Write { path: path.clone(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lines of the class's schemata, and what monitoring counts: cache or node to file to number.
    pub fn usage(&self) -> (Vec<String>, BTreeMap<String, BTreeMap<String, u64>>) {
        let schemata = std::fs::read_to_string(self.folder.join("schemata")).unwrap_or_default();
        let folders = |path: &Path| -> Vec<PathBuf> {
            std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
        };
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let counted = self.monitor.iter().flat_map(|monitor| folders(&monitor.join("mon_data"))).map(|domain| {
            let number = |file: PathBuf| Some((name(&file), std::fs::read_to_string(&file).ok()?.trim().parse().ok()?));
            (name(&domain), folders(&domain).into_iter().filter_map(number).collect())
        });
        (schemata.lines().map(|line| line.trim().to_string()).collect(), counted.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_as_the_kernel_means_them() {
        let known = values("    L3:0=0f0;1=1ff\n    MB:0=20;1=100\n");
        for (wanted, same) in [("L3:0=f0", true), ("L3:1=1ff;0=0f0", true), ("MB:1=10", false), ("L2:0=f", false)] {
            assert_eq!(values(wanted).iter().all(|(key, value)| known.get(key) == Some(value)), same, "{wanted}");
        }
    }
}

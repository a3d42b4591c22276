//! What the `corun` command remembers of a container between two calls: one folder each, below a root folder.
//!
//! `state.json` is written whole and renamed into place; `config.json` is the specification as it was at creation, for
//! later changes to the bundle must have no effect; `start.sock` exists while the container waits to be started.

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::hooks::StateTemplate;
use crate::resctrl;
use crate::spec;
use coracle_sys::process;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "state.json";
const CONFIG_FILE: &str = "config.json";
const START_SOCKET: &str = "start.sock";
/// An id becomes a file name and part of a cgroup's name.
const MAX_ID_BYTES: usize = 255;

/// The remembered facts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    /// Start of the process in clock ticks after boot, which tells it from a later one of the same id.
    pub pid_start: u64,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    pub owner: String,
    /// Name of the cgroup from the top of the hierarchy; empty for a container of an unprivileged user without one.
    pub cgroup: PathBuf,
    /// The unit of systemd that the cgroup belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Its groups of Intel RDT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<resctrl::Group>,
    /// The mount that the root lay on, where the container's mounts are stacked upon it on the host itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounted_over: Option<u64>,
    #[serde(default)]
    pub annotations: HashMap<String, String>,
}

/// How a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// A container's folder.
#[derive(Clone, Debug)]
pub struct Folder {
    pub path: PathBuf,
    pub id: String,
}

/// Whether an id is one: letters, digits and `_ + - .`, not only dots.
pub fn check_id(id: &str) -> Result<()> {
    let valid = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte))
        && !id.bytes().all(|byte| byte == b'.');
    if valid {
        Ok(())
    } else {
        Err(Error::config("container id", format!("{id:?} is not letters, digits and _+-. only")))
    }
}

impl Folder {
    /// The folder of a container, whether it exists or not.
    pub fn of(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Ok(Self { path: root.join(id), id: id.to_string() })
    }

    /// Makes the folder; its existence reserves the id.
    pub fn create(&self, config: &[u8]) -> Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        let error = |path: &Path, source| Error::Write { path: path.to_path_buf(), source };
        let made = builder.mode(0o711).create(&self.path).or_else(|first| {
            if first.kind() != std::io::ErrorKind::NotFound {
                return Err(first);
            }
            // The first container after boot finds no root folder.
            builder.recursive(true).create(self.path.parent().unwrap_or(Path::new("/")))?;
            builder.recursive(false).create(&self.path)
        });
        match made {
            Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists(self.id.clone()));
            }
            other => other.map_err(|source| error(&self.path, source))?,
        }
        let file = self.path.join(CONFIG_FILE);
        std::fs::write(&file, config).map_err(|source| error(&file, source))
    }

    pub fn save(&self, state: &State) -> Result<()> {
        let (file, new) = (self.path.join(STATE_FILE), self.path.join("state.json.new"));
        let bytes = serde_json::to_vec(state).map_err(|source| Error::Json { path: file.clone(), source })?;
        std::fs::write(&new, bytes)
            .and_then(|()| std::fs::rename(&new, &file))
            .map_err(|source| Error::Write { path: file, source })
    }

    pub fn load(&self) -> Result<State> {
        let file = self.path.join(STATE_FILE);
        match spec::read_bounded(&file) {
            Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::NoContainer(self.id.clone()))
            }
            other => spec::parse(&file, &other?),
        }
    }

    pub fn load_spec(&self) -> Result<Spec> {
        let file = self.path.join(CONFIG_FILE);
        // What was left out at the creation was told then.
        Ok(spec::parse_leniently(&file, &spec::read_bounded(&file)?)?.0)
    }

    /// The specification as the JSON that it was given in.
    pub fn load_json(&self) -> Result<serde_json::Value> {
        let file = self.path.join(CONFIG_FILE);
        spec::parse(&file, &spec::read_bounded(&file)?)
    }

    /// Replaces the specification: later commands go by what was changed since the creation.
    pub fn save_json(&self, document: &serde_json::Value) -> Result<()> {
        let (file, new) = (self.path.join(CONFIG_FILE), self.path.join("config.json.new"));
        std::fs::write(&new, document.to_string())
            .and_then(|()| std::fs::rename(&new, &file))
            .map_err(|source| Error::Write { path: file, source })
    }

    pub fn start_socket(&self) -> PathBuf {
        self.path.join(START_SOCKET)
    }

    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Write { path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    /// Ids of all containers below a root folder.
    pub fn list(root: &Path) -> Result<Vec<Self>> {
        let entries = match std::fs::read_dir(root) {
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| Error::Read { path: root.to_path_buf(), source })?,
        };
        let mut found: Vec<Self> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|id| Self::of(root, &id).ok())
            .collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }
}

/// The start time of a process and whether it is a zombie.
pub fn process_start(pid: i32) -> Option<(u64, bool)> {
    const START_FIELD: usize = 19;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything; the fields begin behind the last one.
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    Some((fields.nth(START_FIELD - 1)?.parse().ok()?, matches!(state, "Z" | "X")))
}

impl State {
    /// A descriptor of the first process, if it still runs.
    pub fn pidfd(&self) -> Option<OwnedFd> {
        let pidfd = process::pidfd_open(self.pid).ok()?;
        // Read after the descriptor is held: from here on the id cannot be given to another process unnoticed.
        let (start, zombie) = process_start(self.pid)?;
        (start == self.pid_start && !zombie).then_some(pidfd)
    }

    pub fn status(&self, folder: &Folder) -> Status {
        if self.pid == 0 {
            return Status::Creating;
        }
        if self.pidfd().is_none() {
            return Status::Stopped;
        }
        if folder.start_socket().exists() {
            return Status::Created;
        }
        let frozen = self.cgroup().is_some_and(|cgroup| cgroup.is_frozen().unwrap_or(false));
        if frozen { Status::Paused } else { Status::Running }
    }

    /// Its cgroup, if it has one and that still exists.
    pub fn cgroup(&self) -> Option<Cgroup> {
        if self.cgroup.as_os_str().is_empty() { None } else { Cgroup::open(&self.cgroup).ok() }
    }

    /// The same for those who cannot do without.
    pub fn need_cgroup(&self) -> Result<Cgroup> {
        if self.cgroup.as_os_str().is_empty() {
            return Err(Error::unsupported("this", "the container has no cgroup: its user may not make one"));
        }
        Cgroup::open(&self.cgroup)
    }

    /// Takes away what a container has on the host beside its cgroup: mounts, where it has no mount namespace, and groups of
    /// Intel RDT.
    pub fn clear(&self) -> Result<()> {
        self.mounted_over.map_or(Ok(()), |below| unmount_above(&self.rootfs, below))?;
        self.resctrl.as_ref().map_or(Ok(()), resctrl::Group::remove)
    }

    pub fn template(&self) -> StateTemplate {
        StateTemplate {
            version: self.oci_version.clone(),
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            annotations: self.annotations.clone(),
        }
    }
}

/// The id of the mount that a path leads to.
pub fn mount_id(path: &Path) -> Result<u64> {
    let name = crate::plan::c_path("root.path", path)?;
    coracle_sys::path::mount_id(&name).map_err(|errno| Error::Read { path: path.to_path_buf(), source: errno.into() })
}

/// Detaches all that was mounted over a folder since it lay on the mount `below`.
pub fn unmount_above(path: &Path, below: u64) -> Result<()> {
    let name = crate::plan::c_path("root.path", path)?;
    if mount_id(path)? == below {
        return Ok(());
    }
    coracle_sys::mount::detach(&name).map_err(|errno| Error::Write { path: path.to_path_buf(), source: errno.into() })
}

/// Now, as RFC 3339 in UTC with nanoseconds.
pub fn now() -> String {
    const DAY_S: u64 = 86_400;
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / DAY_S, since.as_secs() % DAY_S);
    // Days to a date in the proleptic Gregorian calendar, counted in eras of 400 years from 1 March of year 0.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

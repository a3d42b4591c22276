//! Which namespaces are new, which are joined, which stay those of the caller.

use super::{c_path, c_string, id_maps};
use crate::error::{Error, Result};
use coracle_sys::process::CLONE_NEWTIME;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use std::ffi::CString;

/// What becomes of the user namespace.
#[derive(Clone, Debug)]
pub(crate) enum UserNamespace {
    /// The caller's.
    Shared,
    /// A new one with these maps.
    New { uid_map: String, gid_map: String },
    /// That of this path.
    Joined(CString),
}

/// A namespace to join: its file and its `CLONE_NEW*` flag.
#[derive(Clone, Debug)]
pub(crate) struct Join {
    pub path: CString,
    pub flag: i32,
}

#[derive(Clone, Debug)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW*` of the new ones.
    pub new: u64,
    /// Those to join, but for user and time, in the order in which they are entered; the mount namespace last.
    pub joined: Vec<Join>,
    pub user: UserNamespace,
    pub uid_mappings: Vec<LinuxIdMapping>,
    pub gid_mappings: Vec<LinuxIdMapping>,
    /// What `timens_offsets` takes.
    pub time_offsets: Option<CString>,
    /// A time namespace to join.
    pub joined_time: Option<CString>,
}

fn flag(kind: LinuxNamespaceType) -> u64 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS as u64,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP as u64,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS as u64,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC as u64,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER as u64,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID as u64,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET as u64,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

impl Namespaces {
    pub(crate) fn compile(linux: &Linux) -> Result<Self> {
        let mut seen = 0;
        let mut namespaces = Self {
            new: 0,
            joined: Vec::new(),
            user: UserNamespace::Shared,
            uid_mappings: linux.uid_mappings().clone().unwrap_or_default(),
            gid_mappings: linux.gid_mappings().clone().unwrap_or_default(),
            time_offsets: None,
            joined_time: None,
        };
        for wanted in linux.namespaces().iter().flatten() {
            let flag = flag(wanted.typ());
            if seen & flag != 0 {
                return Err(Error::config("linux.namespaces", format!("{} is listed twice", wanted.typ())));
            }
            seen |= flag;
            let path = wanted.path().as_ref().filter(|path| !path.as_os_str().is_empty());
            let Some(path) = path else {
                if wanted.typ() == LinuxNamespaceType::User {
                    let (uid_map, gid_map) = id_maps(linux)?;
                    namespaces.user = UserNamespace::New { uid_map, gid_map };
                }
                namespaces.new |= flag;
                continue;
            };
            if !path.is_absolute() {
                return Err(Error::config("linux.namespaces.path", format!("{} is not absolute", path.display())));
            }
            let path = c_path("linux.namespaces.path", path)?;
            match wanted.typ() {
                LinuxNamespaceType::User => namespaces.user = UserNamespace::Joined(path),
                LinuxNamespaceType::Time => namespaces.joined_time = Some(path),
                _ => namespaces.joined.push(Join { path, flag: flag as i32 }),
            }
        }
        // Once inside another mount namespace, the other files could no longer be found there; they are opened before,
        // but the order keeps every step valid by itself.
        namespaces.joined.sort_by_key(|join| join.flag == libc::CLONE_NEWNS);
        let maps = !namespaces.uid_mappings.is_empty() || !namespaces.gid_mappings.is_empty();
        if maps && matches!(namespaces.user, UserNamespace::Shared) {
            return Err(Error::config("linux.uidMappings", "goes with a user namespace only"));
        }
        let offsets = linux.time_offsets().clone().unwrap_or_default();
        if !offsets.is_empty() {
            if namespaces.new & CLONE_NEWTIME == 0 {
                return Err(Error::config("linux.timeOffsets", "needs a new time namespace"));
            }
            let mut text = String::new();
            for (clock, offset) in &offsets {
                if !["monotonic", "boottime"].contains(&clock.as_str()) {
                    return Err(Error::config("linux.timeOffsets", format!("{clock:?} is not monotonic or boottime")));
                }
                let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
                text.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
            }
            namespaces.time_offsets = Some(c_string("linux.timeOffsets", &text)?);
        }
        Ok(namespaces)
    }

    /// Whether the container has this one apart from the caller (new or joined).
    pub(crate) fn has_own(&self, flag: i32) -> bool {
        self.new & flag as u64 != 0
            || self.joined.iter().any(|join| join.flag == flag)
            || (flag == libc::CLONE_NEWUSER && !matches!(self.user, UserNamespace::Shared))
    }

    /// Whether the program lives in a user namespace.
    pub(crate) fn has_user(&self) -> bool {
        !matches!(self.user, UserNamespace::Shared)
    }

    /// Flags of all namespaces that are not the caller's.
    pub(crate) fn own_flags(&self) -> u64 {
        let joined = self.joined.iter().fold(0, |flags, join| flags | join.flag as u64);
        let user = if self.has_user() { libc::CLONE_NEWUSER as u64 } else { 0 };
        let time = if self.joined_time.is_some() { CLONE_NEWTIME } else { 0 };
        self.new | joined | user | time
    }
}

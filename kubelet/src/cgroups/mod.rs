//! The cgroup v2 hierarchy of this host: where it is mounted and which controllers it offers.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where cgroup2 is mounted: `/sys/fs/cgroup` on a host of pure v2, `/sys/fs/cgroup/unified` on a hybrid one.
pub fn mount_point() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        // The last mount on a path is the one that shows.
        let found = mounts.lines().rev().find_map(|line| {
            let mut fields = line.split(' ');
            let (path, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        });
        found.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup"))
    })
}

pub mod hierarchy;
pub mod usage;

pub use hierarchy::{Hierarchy, Qos};

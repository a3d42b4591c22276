//! What a cgroup has used, from its files.

use std::fs;
use std::path::Path;

use crate::cri::Stats;

/// Reads the usage of the cgroup at `path` (relative to the cgroup2 mount). Fields of absent controllers stay `None`.
pub fn read(path: &Path) -> Stats {
    let folder = super::mount_point().join(path.strip_prefix("/").unwrap_or(path));
    let text = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
    let field = |file: &str, name: &str| {
        let content = text(file)?;
        content.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
    };
    let usage = number("memory.current");
    let inactive = field("memory.stat", "inactive_file");
    Stats {
        timestamp: crate::supervisor::container::now(),
        cpu_usage_ns: field("cpu.stat", "usage_usec").unwrap_or(0) * 1000,
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.map(|usage| usage.saturating_sub(inactive.unwrap_or(0))),
        memory_rss_bytes: field("memory.stat", "anon"),
        page_faults: field("memory.stat", "pgfault"),
        major_page_faults: field("memory.stat", "pgmajfault"),
        pids: number("pids.current"),
        writable_layer_bytes: None,
        writable_layer_inodes: None,
    }
}

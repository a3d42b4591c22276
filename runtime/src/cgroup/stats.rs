//! Usage figures of a cgroup. A file that is missing (no controller) leaves its figures out.

use std::collections::BTreeMap;
use std::path::Path;

/// Stalls, from the kernel's pressure files. Percentages over 10, 60, 300 seconds and the total in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    pub some: [f64; 3],
    pub some_total_us: u64,
    pub full: [f64; 3],
    pub full_total_us: u64,
}

/// What a cgroup uses.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// `cpu.stat`: `usage_usec`, `user_usec`, `system_usec`, `nr_periods`, `nr_throttled`, …
    pub cpu: BTreeMap<String, u64>,
    /// Bytes now, at most so far, and the limit; `None` where there is no such file or no limit.
    pub memory_current: Option<u64>,
    pub memory_peak: Option<u64>,
    pub memory_max: Option<u64>,
    pub swap_current: Option<u64>,
    pub swap_max: Option<u64>,
    /// `memory.stat`.
    pub memory: BTreeMap<String, u64>,
    /// `memory.events`: `oom`, `oom_kill`, `max`, …
    pub memory_events: BTreeMap<String, u64>,
    pub pids_current: Option<u64>,
    pub pids_max: Option<u64>,
    /// `io.stat`: device ("8:0") to key to number.
    pub io: BTreeMap<String, BTreeMap<String, u64>>,
    /// Page size to (now, failures).
    pub hugetlb: BTreeMap<String, (u64, u64)>,
    pub cpu_pressure: Option<Pressure>,
    pub memory_pressure: Option<Pressure>,
    pub io_pressure: Option<Pressure>,
}

/// Lines of "key number".
pub(super) fn flat(path: &Path) -> BTreeMap<String, u64> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_string(), value.trim().parse().ok()?))
        })
        .collect()
}

fn pressure(path: &Path) -> Option<Pressure> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut found = Pressure::default();
    for line in text.lines() {
        let mut parts = line.split_whitespace();
        let full = parts.next()? == "full";
        let mut averages = [0.0; 3];
        let mut total = 0;
        for part in parts {
            let (key, value) = part.split_once('=')?;
            match key {
                "avg10" => averages[0] = value.parse().ok()?,
                "avg60" => averages[1] = value.parse().ok()?,
                "avg300" => averages[2] = value.parse().ok()?,
                _ => total = value.parse().ok()?,
            }
        }
        if full {
            (found.full, found.full_total_us) = (averages, total);
        } else {
            (found.some, found.some_total_us) = (averages, total);
        }
    }
    Some(found)
}

impl Stats {
    pub(super) fn read(folder: &Path) -> Self {
        let number = |file: &str| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok();
        let io = std::fs::read_to_string(folder.join("io.stat"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let (device, rest) = line.split_once(' ')?;
                let keys = rest
                    .split_whitespace()
                    .filter_map(|part| part.split_once('='))
                    .filter_map(|(key, value)| Some((key.to_string(), value.parse().ok()?)))
                    .collect();
                Some((device.to_string(), keys))
            })
            .collect();
        Self {
            cpu: flat(&folder.join("cpu.stat")),
            memory_current: number("memory.current"),
            memory_peak: number("memory.peak"),
            memory_max: number("memory.max"),
            swap_current: number("memory.swap.current"),
            swap_max: number("memory.swap.max"),
            memory: flat(&folder.join("memory.stat")),
            memory_events: flat(&folder.join("memory.events")),
            pids_current: number("pids.current"),
            pids_max: number("pids.max"),
            io,
            hugetlb: hugetlb(folder),
            cpu_pressure: pressure(&folder.join("cpu.pressure")),
            memory_pressure: pressure(&folder.join("memory.pressure")),
            io_pressure: pressure(&folder.join("io.pressure")),
        }
    }
}

fn hugetlb(folder: &Path) -> BTreeMap<String, (u64, u64)> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeMap::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            if size.contains('.') {
                return None;
            }
            let current = std::fs::read_to_string(folder.join(&name)).ok()?.trim().parse().ok()?;
            let failures = flat(&folder.join(format!("hugetlb.{size}.events"))).get("max").copied().unwrap_or(0);
            Some((size.to_string(), (current, failures)))
        })
        .collect()
}

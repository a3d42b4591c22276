//! What this host is: kernel, processors, memory, disk. Read once; none of it changes while the agent runs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;

use crate::Config;

/// Facts of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Processors in thousandths.
    pub cpu_millis: u64,
    /// `MemTotal` in bytes.
    pub memory_bytes: u64,
    /// Size in bytes of the file system that holds the node's data.
    pub disk_bytes: u64,
    /// Free huge page pools: size of a page in bytes, bytes in all.
    pub huge_pages: Vec<(u64, u64)>,
    /// Release of the kernel.
    pub kernel: String,
    /// `PRETTY_NAME` of os-release(5).
    pub os_image: String,
    /// `amd64`, `arm64`.
    pub architecture: &'static str,
    /// Of machine-id(5), the DMI product and this boot.
    pub machine_id: String,
    /// See `machine_id`.
    pub system_uuid: String,
    /// See `machine_id`.
    pub boot_id: String,
    /// Bytes of swap.
    pub swap_bytes: u64,
    /// Name of the host.
    pub hostname: String,
}

fn line(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// A field of `/proc/meminfo` in bytes.
fn meminfo(text: &str, field: &str) -> u64 {
    let kibibytes = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}

impl Facts {
    /// Looks at the host. `data` is where the node's data lies or will lie.
    pub fn gather(data: &Path) -> io::Result<Self> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let existing = data.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        let disk = statvfs(existing)?;
        let name = uname()?;
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux");
        let machine_id = line("/etc/machine-id");
        Ok(Self {
            cpu_millis: std::thread::available_parallelism()?.get() as u64 * 1000,
            memory_bytes: meminfo(&memory, "MemTotal"),
            disk_bytes: disk.blocks() * disk.fragment_size(),
            huge_pages: huge_pages(),
            kernel: name.release().to_string_lossy().into_owned(),
            os_image: pretty.trim_matches('"').to_owned(),
            architecture: architecture(),
            system_uuid: Some(line("/sys/class/dmi/id/product_uuid"))
                .filter(|id| !id.is_empty())
                .unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            swap_bytes: meminfo(&memory, "SwapTotal"),
            hostname: name.nodename().to_string_lossy().to_lowercase(),
        })
    }

    /// The labels that every node has, and those of the settings.
    pub fn labels(&self, config: &Config) -> BTreeMap<String, String> {
        let mut labels: BTreeMap<String, String> = [
            ("kubernetes.io/hostname", config.node_name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", self.architecture),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", self.architecture),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        labels.extend(config.node_labels.clone());
        labels
    }
}

/// The name that container images and Kubernetes use for this build's architecture.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn huge_pages() -> Vec<(u64, u64)> {
    let pools = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let mut sizes: Vec<_> = pools
        .filter_map(|pool| {
            let name = pool.file_name();
            let size = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()? * 1024;
            let count: u64 = fs::read_to_string(pool.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
            Some((size, size * count))
        })
        .collect();
    sizes.sort_unstable();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_processors_memory_and_disk() {
        let facts = Facts::gather(Path::new("/does/not/exist/yet")).expect("facts");
        assert!(facts.cpu_millis >= 1000 && facts.memory_bytes > 1 << 20 && facts.disk_bytes > 0);
        assert!(!facts.kernel.is_empty() && !facts.boot_id.is_empty());
    }

    #[test]
    fn fields_of_meminfo_are_whole_words() {
        let text = "MemTotal:       16 kB\nMemTotalX:      1 kB\nSwapTotal:       0 kB\n";
        assert_eq!((meminfo(text, "MemTotal"), meminfo(text, "SwapTotal"), meminfo(text, "None")), (16384, 0, 0));
    }
}

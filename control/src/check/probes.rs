//! The looks at the host, one function each; none changes anything.

use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::{Finding, Grade};
use crate::cli::CheckOptions;

/// The oldest kernel the product is tried on.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Below this much room, images do not fit and the store may stop taking writes.
const LEAST_FREE_BYTES: u64 = 1 << 30;
/// Controllers of cgroup v2 that limits and statistics of pods need.
const CONTROLLERS: &[(&str, &str)] = &[
    ("cpu", "CPU requests and limits are not enforced"),
    ("memory", "memory requests and limits are not enforced, nor does eviction by memory see pods"),
    ("pids", "a fork bomb in a pod is not stopped"),
    ("io", "I/O limits are not enforced"),
    ("cpuset", "CPU pinning is not available"),
    ("hugetlb", "huge pages cannot be limited"),
];

pub(super) fn all(options: &CheckOptions) -> Vec<Finding> {
    let mut findings = vec![root(), kernel(), cgroup_mount()];
    findings.extend(cgroup_controllers());
    findings.extend([
        io_uring(),
        filesystem(
            "overlayfs",
            "overlay",
            Grade::Missing,
            "containers have no root file system; load the module overlay",
        ),
        seccomp(),
        user_namespaces(),
        capabilities(),
    ]);
    findings.extend(coracle_netns::check().into_iter().map(|network| match network.result {
        Ok(()) => Finding::ok(network.what, "works"),
        Err(error) => {
            let grade = if network.required { Grade::Missing } else { Grade::Limited };
            Finding::lack(network.what, grade, error.to_string(), network.costs)
        }
    }));
    findings.push(room(&options.folders.data_dir));
    findings
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::lack("user", Grade::Missing, "not root", "namespaces, mounts and cgroups need root; run it with sudo")
    }
}

fn kernel() -> Finding {
    let release = match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => {
            return Finding::lack(
                "kernel",
                Grade::Missing,
                format!("uname: {error}"),
                "the kernel's version is unknown",
            );
        }
    };
    if version(&release).is_some_and(|version| version >= OLDEST_KERNEL) {
        Finding::ok("kernel", release)
    } else {
        let (major, minor) = OLDEST_KERNEL;
        Finding::lack("kernel", Grade::Missing, release, format!("{major}.{minor} or newer is needed"))
    }
}

/// Major and minor of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Mount point of cgroup v2, from `/proc/self/mounts`.
fn cgroup2() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (_, target, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| target.to_owned())
    })
}

fn cgroup_mount() -> Finding {
    match cgroup2() {
        Some(target) if target == "/sys/fs/cgroup" => Finding::ok("cgroup v2", target),
        Some(target) => Finding::lack(
            "cgroup v2",
            Grade::Limited,
            format!("at {target}, beside cgroup v1"),
            "controllers held by v1 enforce nothing; boot with systemd.unified_cgroup_hierarchy=1",
        ),
        None => Finding::lack(
            "cgroup v2",
            Grade::Missing,
            "not mounted",
            "containers cannot be grouped; mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn cgroup_controllers() -> Vec<Finding> {
    let Some(mount) = cgroup2() else { return Vec::new() };
    let present = fs::read_to_string(Path::new(&mount).join("cgroup.controllers")).unwrap_or_default();
    CONTROLLERS
        .iter()
        .map(|(name, cost)| {
            if present.split_whitespace().any(|word| word == *name) {
                Finding::ok("controller", *name)
            } else {
                Finding::lack("controller", Grade::Limited, format!("no {name}"), *cost)
            }
        })
        .collect()
}

fn io_uring() -> Finding {
    match coracle_kubelet::supervisor::probe() {
        Ok(()) => Finding::ok("io_uring", "all operations the supervisor needs"),
        Err(error) => Finding::lack(
            "io_uring",
            Grade::Missing,
            error.to_string(),
            "the supervisor of containers cannot run; set kernel.io_uring_disabled to 0",
        ),
    }
}

fn filesystem(subject: &'static str, name: &str, grade: Grade, cost: &str) -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let module = || Path::new("/sys/module").join(name).exists();
    if known.lines().any(|line| line.split_whitespace().last() == Some(name)) || module() {
        Finding::ok(subject, "known to the kernel")
    } else {
        Finding::lack(subject, grade, "unknown to the kernel", cost)
    }
}

fn seccomp() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("user_notif") => Finding::ok("seccomp", actions.trim()),
        _ => {
            Finding::lack("seccomp", Grade::Missing, "no filters", "containers would run without their default filter")
        }
    }
}

fn user_namespaces() -> Finding {
    let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    match limit.trim().parse::<u64>() {
        Ok(limit) if limit > 0 => Finding::ok("user namespaces", format!("up to {limit}")),
        _ => Finding::lack(
            "user namespaces",
            Grade::Limited,
            "none",
            "pods with hostUsers: false cannot run; set user.max_user_namespaces",
        ),
    }
}

/// Capabilities without which something a pod may ask for fails, by their number (capabilities(7)).
const CAPABILITIES: &[(u8, &str, Grade, &str)] = &[
    (21, "CAP_SYS_ADMIN", Grade::Missing, "no namespace or mount can be made"),
    (12, "CAP_NET_ADMIN", Grade::Missing, "no pod network can be made"),
    (24, "CAP_SYS_RESOURCE", Grade::Limited, "hard rlimits cannot be raised nor OOM scores lowered"),
    (27, "CAP_MKNOD", Grade::Limited, "device nodes of images and containers cannot be made"),
];

fn capabilities() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default();
    let lacking: Vec<_> = CAPABILITIES.iter().filter(|(number, ..)| effective & (1 << number) == 0).collect();
    let Some(grade) = lacking.iter().map(|(_, _, grade, _)| *grade).max() else {
        return Finding::ok("capabilities", "all that are needed");
    };
    let names: Vec<_> = lacking.iter().map(|(_, name, ..)| *name).collect();
    let costs: Vec<_> = lacking.iter().map(|(_, _, _, cost)| *cost).collect();
    Finding::lack("capabilities", grade, format!("no {}", names.join(", ")), costs.join("; "))
}

fn room(data_dir: &Path) -> Finding {
    let existing = data_dir.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    match statvfs(existing) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let seen = format!("{} MiB free under {}", free >> 20, existing.display());
            if free >= LEAST_FREE_BYTES {
                Finding::ok("data folder", seen)
            } else {
                Finding::lack("data folder", Grade::Limited, seen, "images may not fit; choose another --data-dir")
            }
        }
        Err(error) => Finding::lack(
            "data folder",
            Grade::Missing,
            format!("{}: {error}", existing.display()),
            "state cannot be kept; choose another --data-dir",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(version("5.10"), Some((5, 10)));
        assert_eq!(version("linux"), None);
        assert!(version("5.15.0").is_some_and(|version| version < OLDEST_KERNEL));
    }
}

//! Bundles as `runc spec` writes them, rlimits apart (an unprivileged root may not raise them), around one small root.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

/// Applets of the one program in the root.
const APPLETS: [&str; 2] = ["dd", "sleep"];

/// Makes the root that all bundles in this folder share.
pub(super) fn root(folder: &Path) -> anyhow::Result<PathBuf> {
    let root = folder.join("rootfs");
    for name in ["bin", "dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(name)).context("make a root file system")?;
    }
    let busybox = coracle_testkit::need("busybox", "busybox-static");
    std::fs::copy(&busybox, root.join("bin/true")).with_context(|| format!("copy {}", busybox.display()))?;
    for applet in APPLETS {
        std::os::unix::fs::symlink("true", root.join("bin").join(applet)).context("link an applet")?;
    }
    Ok(root)
}

/// Makes a bundle that runs a command.
pub(super) fn bundle(
    folder: &Path,
    name: &str,
    arguments: &[&str],
    seccomp: Option<&Value>,
) -> anyhow::Result<PathBuf> {
    let bundle = folder.join(name);
    std::fs::create_dir(&bundle).context("make a bundle")?;
    std::fs::write(bundle.join("config.json"), config(&folder.join("rootfs"), arguments, seccomp).to_string())
        .context("write config.json")?;
    Ok(bundle)
}

fn config(root: &Path, arguments: &[&str], seccomp: Option<&Value>) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": source, "options": options});
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
    let mut config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true,
        },
        "root": {"path": root, "readonly": true},
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": namespaces,
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    if let Some(profile) = seccomp {
        config["linux"]["seccomp"] = profile.clone();
    }
    config
}

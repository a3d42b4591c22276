//! Reading specifications, and the one that a container has by default.

use crate::error::{Error, Result};
use oci_spec::runtime::{Linux, Mount, Process, Root, Spec};
use serde_json::{Value, json};
use std::path::Path;

/// A longer configuration is refused.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const EVERYDAY_BYTES: usize = 16 << 10;

/// Reads a file whole, up to a bound.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let error = |source| Error::Read { path: path.to_path_buf(), source };
    // Room for an everyday configuration: two calls read it.
    let mut bytes = Vec::with_capacity(EVERYDAY_BYTES);
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes))
        .map_err(error)?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(Error::config(path.display().to_string(), format!("is longer than {MAX_CONFIG_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Reads JSON from bytes that came from a file.
pub fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|source| Error::Json { path: path.to_path_buf(), source })
}

/// Reads a specification or a process from JSON, and puts right what the types that it is read into have otherwise than
/// the specification. Capabilities that nobody knows are left out, as the specification wants it; they are handed back to
/// be told.
pub fn parse_leniently<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<(T, Vec<String>)> {
    let error = match parse(path, bytes) {
        Ok(value) => return Ok((value, Vec::new())),
        Err(error) => error,
    };
    let mut document: Value = parse(path, bytes)?;
    let process = if document.get("process").is_some() { &mut document["process"] } else { &mut document };
    let Some(process) = process.as_object_mut() else { return Err(error) };
    let mut unknown = Vec::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let known = name.as_str().is_none_or(|name| crate::capability::number(name).is_some());
            if !known {
                unknown.extend(name.as_str().map(String::from));
            }
            known
        });
    }
    process.entry("user").or_insert_with(|| json!({"uid": 0, "gid": 0}));
    if let Some(priority) = process.get_mut("ioPriority").and_then(Value::as_object_mut) {
        priority.entry("priority").or_insert_with(|| 0.into());
    }
    let flags =
        process.get_mut("scheduler").and_then(|scheduler| scheduler.get_mut("flags")).and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
    let value = serde_json::from_value(document).map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
    unknown.sort();
    unknown.dedup();
    Ok((value, unknown))
}

/// The capabilities of a container by default: those that programs of an image expect, as container engines give them.
pub const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Parts of procfs and sysfs that tell of the host or act on it.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Parts of procfs that may be read, but not written.
pub const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn from_json<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).expect("a constant of the right shape")
}

/// Mounts of a container by default; the cgroup file system is read-only.
pub fn default_mounts() -> Vec<Mount> {
    from_json(serde_json::json!([
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
         "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
         "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
    ]))
}

/// A process that runs `arguments` as root with these capabilities.
pub fn process(arguments: &[&str], capabilities: &[&str]) -> Process {
    from_json(serde_json::json!({
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true,
    }))
}

/// The Linux part by default: new pid, net, ipc, uts, mount and cgroup namespaces, all devices refused but the usual.
pub fn default_linux() -> Linux {
    from_json(serde_json::json!({
        "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        "namespaces": [
            {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
        ],
        "maskedPaths": MASKED_PATHS,
        "readonlyPaths": READONLY_PATHS,
    }))
}

/// The specification of a container by default, without a seccomp profile, its root in `rootfs`. Callers change what
/// they need through its setters.
pub fn default_container() -> Spec {
    let mut spec = Spec::default();
    let mut root = Root::default();
    root.set_path("rootfs".into());
    root.set_readonly(Some(false));
    spec.set_version("1.3.0".into());
    spec.set_process(Some(process(&["sh"], &DEFAULT_CAPABILITIES)));
    spec.set_root(Some(root));
    spec.set_mounts(Some(default_mounts()));
    spec.set_hostname(None);
    spec.set_linux(Some(default_linux()));
    spec
}

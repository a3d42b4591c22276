//! From a CRI container configuration to an OCI runtime specification.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use coracle_runtime::capability;
use coracle_runtime::spec::{DEFAULT_CAPABILITIES, MASKED_PATHS, READONLY_PATHS};
use serde_json::{Map, Value, json};

use super::user::User;
use crate::cri::{
    ContainerConfig, IdMapping, NamespaceMode, Propagation, Resources, RuntimeError, SandboxConfig, SecurityProfile,
};

/// `PATH` of a process whose image sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an image says about running it.
#[derive(Clone, Debug, Default)]
pub struct ImageDefaults {
    /// Entry point.
    pub entrypoint: Vec<String>,
    /// Arguments.
    pub cmd: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub working_dir: String,
}

/// Where a pod's pinned namespaces and files are.
#[derive(Clone, Debug, Default)]
pub struct PodPaths {
    /// User namespace; `None`: the node's.
    pub user: Option<PathBuf>,
    /// Network namespace; `None`: the node's.
    pub network: Option<PathBuf>,
    /// IPC namespace; `None`: the node's.
    pub ipc: Option<PathBuf>,
    /// UTS namespace; `None`: the node's.
    pub uts: Option<PathBuf>,
    /// PID namespace to join; `None`: the node's or one of its own.
    pub pid: Option<PathBuf>,
    /// The pod's `/dev/shm`; `None`: the node's.
    pub shm: Option<PathBuf>,
    /// File of the host name.
    pub hostname: PathBuf,
    /// The resolver's file; `None`: the image's own stays.
    pub resolv_conf: Option<PathBuf>,
}

/// What the cgroup hierarchy of this host can limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Controllers {
    /// cpu
    pub cpu: bool,
    /// memory
    pub memory: bool,
    /// pids
    pub pids: bool,
    /// hugetlb
    pub hugetlb: bool,
    /// cpuset
    pub cpuset: bool,
}

/// Everything that goes into the specification.
pub struct Input<'a> {
    /// The sandbox.
    pub sandbox: &'a SandboxConfig,
    /// The container.
    pub container: &'a ContainerConfig,
    /// The image.
    pub image: &'a ImageDefaults,
    /// Who it runs as.
    pub user: &'a User,
    /// Its root file system.
    pub rootfs: &'a Path,
    /// The pod's files.
    pub paths: &'a PodPaths,
    /// Its cgroup.
    pub cgroup: &'a Path,
    /// What can be limited.
    pub controllers: Controllers,
    /// The text of a `Localhost` seccomp profile, or of the default one; `None`: no filter.
    pub seccomp: Option<Value>,
    /// Devices of the host for a privileged container.
    pub host_devices: Vec<PathBuf>,
    /// The lowest `oom_score_adj` that this host lets us set.
    pub least_oom_score: i32,
}

/// Builds `config.json`.
///
/// # Errors
/// When the container has no program to run.
pub fn build(input: &Input<'_>) -> Result<Value, RuntimeError> {
    let Input { sandbox, container, user, .. } = input;
    let security = &container.security;
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    let mut namespace = |kind: &str, mode: NamespaceMode, path: Option<&PathBuf>| match (mode, path) {
        (NamespaceMode::Node, _) => {}
        (NamespaceMode::Container, None) => namespaces.push(json!({"type": kind})),
        (_, Some(path)) => namespaces.push(json!({"type": kind, "path": path})),
        (NamespaceMode::Pod, None) => {}
    };
    namespace("network", sandbox.network, input.paths.network.as_ref());
    namespace("ipc", sandbox.ipc, input.paths.ipc.as_ref());
    namespace(
        "uts",
        if input.paths.uts.is_some() { NamespaceMode::Pod } else { NamespaceMode::Node },
        input.paths.uts.as_ref(),
    );
    namespace("pid", pid_mode(sandbox, container), input.paths.pid.as_ref());
    if let Some(path) = &input.paths.user {
        namespaces.push(json!({"type": "user", "path": path}));
    }

    let capabilities = capabilities(container);
    // A process of another user than root starts without effective capabilities, as with execve(2) of a plain program.
    let effective: &[String] = if user.uid == 0 { &capabilities } else { &[] };
    let mut process = json!({
        "terminal": container.stdio.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": arguments(container, input.image)?,
        "env": environment(input),
        "cwd": first(&[&container.working_dir, &input.image.working_dir]).unwrap_or("/"),
        "capabilities": {
            "bounding": capabilities, "effective": effective, "permitted": effective, "inheritable": [], "ambient": [],
        },
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": container.resources.oom_score_adj.max(input.least_oom_score),
    });
    if let (SecurityProfile::Localhost(name), Some(process)) = (&security.apparmor, process.as_object_mut()) {
        process.insert("apparmorProfile".into(), json!(name));
    }
    let masks = |given: &Option<Vec<String>>, usual: &[&str]| match given {
        _ if security.privileged || security.unmasked_proc => Vec::new(),
        Some(paths) => paths.clone(),
        None => usual.iter().map(|path| (*path).to_owned()).collect(),
    };
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": input.cgroup,
        "resources": resources(&container.resources, input.controllers),
        "maskedPaths": masks(&security.masked_paths, &MASKED_PATHS),
        "readonlyPaths": masks(&security.readonly_paths, &READONLY_PATHS),
        "sysctl": sandbox.sysctls,
        "devices": [],
    });
    if input.paths.user.is_some() {
        // Mounts of the container take theirs from here.
        let ids = id_mappings(sandbox);
        (linux["uidMappings"], linux["gidMappings"]) = (ids.clone(), ids);
    }
    let propagation =
        if container.mounts.iter().any(|m| m.propagation == Propagation::Bidirectional) { "shared" } else { "slave" };
    linux["rootfsPropagation"] = json!(propagation);
    linux["resources"]["devices"] = device_rules(container);
    linux["devices"] = devices(input);
    if let Some(seccomp) = &input.seccomp {
        linux["seccomp"] = seccomp.clone();
    }
    Ok(json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": input.rootfs, "readonly": security.readonly_rootfs},
        "mounts": mounts(input),
        "linux": linux,
        "annotations": container.annotations,
    }))
}

/// The ids of a sandbox's user namespace.
pub fn id_mappings(sandbox: &SandboxConfig) -> Value {
    let range = |map: &IdMapping| json!({"containerID": map.container_id, "hostID": map.host_id, "size": map.length});
    sandbox.id_mappings.iter().map(range).collect()
}

/// The PID namespace of a container: its own wish, or what its sandbox says.
pub fn pid_mode(sandbox: &SandboxConfig, container: &ContainerConfig) -> NamespaceMode {
    match (&container.pid_target, container.pid_own) {
        (Some(_), _) => NamespaceMode::Pod,
        (None, true) => NamespaceMode::Container,
        (None, false) => sandbox.pid,
    }
}

/// The lowest `oom_score_adj` that we may set: our own, unless we hold `CAP_SYS_RESOURCE` (`proc_pid_oom_score_adj(5)`). In a
/// container with less than all rights pods are then protected less, as with other runtimes, instead of not started at all.
pub fn least_oom_score() -> i32 {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    const LEAST: i32 = -1000;
    if coracle_sys::identity::permitted().is_ok_and(|held| held & CAP_SYS_RESOURCE != 0) {
        return LEAST;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok();
    own.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn first<'a>(words: &[&'a str]) -> Option<&'a str> {
    words.iter().copied().find(|word| !word.is_empty())
}

/// The command line: the pod's command replaces the image's entry point and arguments, its args only the arguments.
fn arguments(container: &ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, RuntimeError> {
    let line = match (container.command.is_empty(), container.args.is_empty()) {
        (false, _) => [&container.command[..], &container.args].concat(),
        (true, false) => [&image.entrypoint[..], &container.args].concat(),
        (true, true) => [&image.entrypoint[..], &image.cmd].concat(),
    };
    if line.is_empty() {
        return Err(RuntimeError::Invalid(format!("no command specified for image {}", container.image)));
    }
    Ok(line)
}

/// The environment: the image's, then the pod's; of one name the last counts.
fn environment(input: &Input<'_>) -> Vec<String> {
    let mut list: Vec<(String, String)> = Vec::new();
    let mut at: BTreeMap<String, usize> = BTreeMap::new();
    let mut set = |name: &str, value: &str| match at.get(name) {
        Some(&index) => list[index].1 = value.to_owned(),
        None => {
            at.insert(name.to_owned(), list.len());
            list.push((name.to_owned(), value.to_owned()));
        }
    };
    set("PATH", DEFAULT_PATH);
    if !input.sandbox.hostname.is_empty() {
        set("HOSTNAME", &input.sandbox.hostname);
    }
    if input.container.stdio.tty {
        set("TERM", "xterm");
    }
    for entry in &input.image.env {
        if let Some((name, value)) = entry.split_once('=') {
            set(name, value);
        }
    }
    for (name, value) in &input.container.envs {
        set(name, value);
    }
    set_default(&mut list, "HOME", &input.user.home);
    list.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn set_default(list: &mut Vec<(String, String)>, name: &str, value: &str) {
    if !list.iter().any(|(n, _)| n == name) {
        list.push((name.to_owned(), value.to_owned()));
    }
}

/// The capabilities with their `CAP_` names: defaults, plus added, minus dropped, in the order of the kernel.
pub fn capabilities(container: &ContainerConfig) -> Vec<String> {
    let security = &container.security;
    let named = |list: &[String]| -> Vec<String> {
        list.iter().map(|c| format!("CAP_{}", c.to_uppercase().trim_start_matches("CAP_"))).collect()
    };
    let (add, drop) = (named(&security.add_capabilities), named(&security.drop_capabilities));
    let all = |list: &[String]| list.iter().any(|c| c == "CAP_ALL");
    capability::names()
        .filter(|name| {
            if security.privileged {
                return true;
            }
            // ALL in one list is overruled by a name in the other, as containerd does.
            if all(&drop) {
                return add.contains(name) && !drop.contains(name);
            }
            if all(&add) {
                return !drop.contains(name);
            }
            (DEFAULT_CAPABILITIES.contains(&name.as_str()) || add.contains(name)) && !drop.contains(name)
        })
        .collect()
}

/// `linux.resources` with only what this host can limit; the node says elsewhere what it cannot.
pub fn resources(wanted: &Resources, can: Controllers) -> Value {
    let mut out = Map::new();
    if can.cpu {
        let mut cpu = Map::new();
        if wanted.cpu_shares > 0 {
            cpu.insert("shares".into(), json!(wanted.cpu_shares));
        }
        if wanted.cpu_quota > 0 {
            cpu.insert("quota".into(), json!(wanted.cpu_quota));
            cpu.insert("period".into(), json!(wanted.cpu_period));
        }
        out.insert("cpu".into(), cpu.into());
    }
    if can.cpuset {
        for (name, list) in [("cpus", &wanted.cpuset_cpus), ("mems", &wanted.cpuset_mems)] {
            if !list.is_empty()
                && let Some(cpu) = out.entry("cpu").or_insert_with(|| json!({})).as_object_mut()
            {
                cpu.insert(name.into(), json!(list));
            }
        }
    }
    if can.memory && wanted.memory_limit_in_bytes > 0 {
        let mut memory = json!({"limit": wanted.memory_limit_in_bytes});
        if wanted.memory_swap_limit_in_bytes != 0 {
            memory["swap"] = json!(wanted.memory_swap_limit_in_bytes);
        }
        out.insert("memory".into(), memory);
    }
    let unified: Map<String, Value> = wanted
        .unified
        .iter()
        .filter(|(file, _)| match file.split('.').next() {
            Some("memory") => can.memory,
            Some("cpu") => can.cpu,
            Some("pids") => can.pids,
            _ => true,
        })
        .map(|(file, value)| (file.clone(), json!(value)))
        .collect();
    if !unified.is_empty() {
        out.insert("unified".into(), unified.into());
    }
    if can.hugetlb && !wanted.hugepage_limits.is_empty() {
        let limits: Vec<_> =
            wanted.hugepage_limits.iter().map(|(size, limit)| json!({"pageSize": size, "limit": limit})).collect();
        out.insert("hugepageLimits".into(), json!(limits));
    }
    out.into()
}

fn device_rules(container: &ContainerConfig) -> Value {
    if container.security.privileged {
        return json!([{"allow": true, "access": "rwm"}]);
    }
    let allow = |kind: &str, major: Option<i64>, minor: Option<i64>, access: &str| {
        let mut rule = json!({"allow": true, "type": kind, "access": access});
        if let Some(major) = major {
            rule["major"] = json!(major);
        }
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rule
    };
    let mut rules =
        vec![json!({"allow": false, "access": "rwm"}), allow("c", None, None, "m"), allow("b", None, None, "m")];
    // null, zero, full, random, urandom, tty; ptmx and pts.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
        rules.push(allow("c", Some(major), Some(minor), "rwm"));
    }
    rules.push(allow("c", Some(136), None, "rwm"));
    for device in &container.devices {
        if let Some((kind, major, minor)) = device_numbers(&device.host_path) {
            rules.push(allow(kind, Some(major), Some(minor), &device.permissions));
        }
    }
    json!(rules)
}

fn devices(input: &Input<'_>) -> Value {
    let given = input.container.devices.iter().map(|d| (d.container_path.clone(), d.host_path.clone()));
    let host = input.host_devices.iter().map(|path| (path.clone(), path.clone()));
    let list: Vec<Value> = given
        .chain(host)
        .filter_map(|(path, host)| {
            let (kind, major, minor) = device_numbers(&host)?;
            let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&host).ok()?) & 0o7777;
            Some(json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode}))
        })
        .collect();
    json!(list)
}

pub(super) fn device_numbers(path: &Path) -> Option<(&'static str, i64, i64)> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = std::fs::metadata(path).ok()?;
    let kind = match metadata.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return None,
    };
    let device = metadata.rdev();
    let number = |n: u64| i64::try_from(n).ok();
    Some((kind, number(nix::sys::stat::major(device))?, number(nix::sys::stat::minor(device))?))
}

fn mounts(input: &Input<'_>) -> Value {
    let Input { container, sandbox, paths, .. } = input;
    let privileged = container.security.privileged;
    let access = if privileged { "rw" } else { "ro" };
    let special = |path: &str, kind: &str, options: &[&str]| json!({"destination": path, "type": kind, "source": kind, "options": options});
    let bind = |path: &str, source: &Path, options: &[&str]| {
        let options = [&["rbind"], options].concat();
        json!({"destination": path, "type": "bind", "source": source, "options": options})
    };
    let mut list = vec![
        special("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        special("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        special("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        special("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ];
    match sandbox.network {
        // sysfs shows the network namespace of its mounter, which must own it.
        NamespaceMode::Node if !input.sandbox.id_mappings.is_empty() => {
            list.push(bind("/sys", Path::new("/sys"), &["nosuid", "noexec", "nodev", access]))
        }
        _ => list.push(special("/sys", "sysfs", &["nosuid", "noexec", "nodev", access])),
    }
    list.push(special("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]));
    list.push(bind("/dev/shm", paths.shm.as_deref().unwrap_or(Path::new("/dev/shm")), &["rw"]));
    if sandbox.network != NamespaceMode::Node {
        list.push(bind(
            "/etc/hostname",
            &paths.hostname,
            &[if container.security.readonly_rootfs { "ro" } else { "rw" }],
        ));
    }
    if let Some(resolv) = &paths.resolv_conf {
        list.push(bind("/etc/resolv.conf", resolv, &[if container.security.readonly_rootfs { "ro" } else { "rw" }]));
    }
    let destination = |mount: &Value| mount["destination"].as_str().map(PathBuf::from);
    list.retain(|default| {
        !container.mounts.iter().any(|m| destination(default).as_deref() == Some(m.container_path.as_path()))
    });
    let mut own: Vec<_> = container.mounts.iter().collect();
    // A mount below another comes after it; equals keep their order.
    own.sort_by_key(|m| m.container_path.components().count());
    for mount in own {
        let mut options = vec![match (mount.readonly, mount.recursive_read_only) {
            (_, true) => "rro",
            (true, false) => "ro",
            (false, false) => "rw",
        }];
        options.push(match mount.propagation {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        });
        if mount.id_mapped {
            options.push("ridmap");
        }
        list.push(bind(&mount.container_path.to_string_lossy(), &mount.host_path, &options));
    }
    json!(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Mount;

    fn names(container: &ContainerConfig) -> Vec<String> {
        capabilities(container).iter().map(|c| c.trim_start_matches("CAP_").to_owned()).collect()
    }

    #[test]
    fn capabilities_are_added_and_dropped_like_containerd() {
        let with = |add: &[&str], drop: &[&str]| {
            let mut container = ContainerConfig::default();
            container.security.add_capabilities = add.iter().map(|s| (*s).to_owned()).collect();
            container.security.drop_capabilities = drop.iter().map(|s| (*s).to_owned()).collect();
            names(&container)
        };
        assert_eq!(with(&[], &[]).len(), 14);
        assert_eq!(with(&["NET_BIND_SERVICE"], &["ALL"]), ["NET_BIND_SERVICE"]);
        assert!(with(&["SYS_TIME"], &["KILL"]).contains(&"SYS_TIME".to_owned()));
        assert!(!with(&["SYS_TIME"], &["KILL"]).contains(&"KILL".to_owned()));
        assert_eq!(with(&["ALL"], &["MKNOD"]).len(), 40);
    }

    #[test]
    fn the_pods_command_replaces_the_images() {
        let image =
            ImageDefaults { entrypoint: vec!["/entry".into()], cmd: vec!["a".into()], ..ImageDefaults::default() };
        let line = |command: &[&str], args: &[&str]| {
            let container = ContainerConfig {
                command: command.iter().map(|s| (*s).to_owned()).collect(),
                args: args.iter().map(|s| (*s).to_owned()).collect(),
                ..ContainerConfig::default()
            };
            arguments(&container, &image).expect("arguments").join(" ")
        };
        // The table of kubernetes.io, "Define a Command and Arguments for a Container".
        assert_eq!(line(&[], &[]), "/entry a");
        assert_eq!(line(&["/c"], &[]), "/c");
        assert_eq!(line(&[], &["x"]), "/entry x");
        assert_eq!(line(&["/c"], &["x"]), "/c x");
    }

    #[test]
    fn what_the_pod_mounts_replaces_the_default_and_deeper_mounts_come_later() {
        let mount = |path: &str| Mount { container_path: path.into(), host_path: "/h".into(), ..Mount::default() };
        let container = ContainerConfig {
            command: vec!["/c".into()],
            mounts: vec![mount("/a/b"), mount("/dev/shm"), mount("/a")],
            ..ContainerConfig::default()
        };
        let spec = build(&Input {
            sandbox: &SandboxConfig::default(),
            container: &container,
            image: &ImageDefaults::default(),
            user: &User::default(),
            rootfs: Path::new("/r"),
            paths: &PodPaths::default(),
            cgroup: Path::new("/kubepods/x"),
            controllers: Controllers::default(),
            seccomp: None,
            host_devices: Vec::new(),
            least_oom_score: -1000,
        })
        .expect("spec");
        let places: Vec<_> =
            spec["mounts"].as_array().expect("list").iter().map(|m| m["destination"].as_str().expect("text")).collect();
        assert_eq!(places.iter().filter(|p| **p == "/dev/shm").count(), 1);
        let at = |path: &str| places.iter().position(|p| *p == path).expect("there");
        assert!(at("/a") < at("/a/b"));
        serde_json::from_value::<oci_spec::runtime::Spec>(spec).expect("a specification");
    }
}

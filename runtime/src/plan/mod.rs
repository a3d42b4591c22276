//! The plan of a container: its specification checked and turned into the exact steps of its first process, with every
//! string already in the form in which the kernel takes it, so that nothing is allocated after the clone.

mod mounts;
mod namespaces;
mod process;

use crate::device;
use crate::error::{Error, Result};
use crate::idmap;
use crate::net_device::NetDevice;
use crate::resctrl;
pub(crate) use mounts::{IdMap, MountStep, Source, option_names as mount_option_names};
pub(crate) use namespaces::{Namespaces, UserNamespace};
use oci_spec::runtime::{Hooks, LinuxResources, Process, Spec};
pub(crate) use process::{HOME_BYTES, ProcessPlan};
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A specification with more mounts than this is refused.
const MAX_MOUNTS: usize = 4096;

/// How the first process, once it is set up, learns that it shall start the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// It does not wait at all.
    Open,
    /// By a message of the process that made it ([`crate::Init::start`]).
    Parent,
    /// By whoever connects to the listening socket given to [`crate::spawn::spawn_gated`].
    Listener,
}

/// What does not stand in the specification.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the container; also of its session keyring.
    pub id: String,
    /// Move the root instead of pivoting (for a host that runs from an initramfs).
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Descriptors from 3 on that the program inherits.
    pub preserve_fds: u32,
    /// Whether the program's terminal leaves line ends as they are, for a caller that copies to another terminal.
    pub plain_line_ends: bool,
    pub gate: Gate,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            id: String::new(),
            no_pivot: false,
            no_new_keyring: false,
            preserve_fds: 0,
            plain_line_ends: false,
            gate: Gate::Parent,
        }
    }
}

/// A device node to make.
#[derive(Clone, Debug)]
pub(crate) struct DeviceStep {
    /// Absolute path within the container, and the two parts of it.
    pub path: CString,
    pub folder: CString,
    pub name: CString,
    /// `S_IF*` bits.
    pub kind: u32,
    pub number: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl DeviceStep {
    fn new(path: &Path, kind: u32, number: u64) -> Result<Self> {
        const DEFAULT_MODE: u32 = 0o666;
        let path = container_path("linux.devices.path", path)?;
        let bytes = path.as_bytes();
        let slash = bytes.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let part =
            |bytes: &[u8]| CString::new(bytes).map_err(|_| Error::config("linux.devices.path", "has a null byte"));
        let (folder, name) = (part(&bytes[..slash.max(1)])?, part(&bytes[slash + 1..])?);
        if name.is_empty() {
            return Err(Error::config("linux.devices.path", "is the root itself"));
        }
        Ok(Self { path, folder, name, kind, number, mode: DEFAULT_MODE, uid: 0, gid: 0 })
    }
}

/// A kernel setting of one of the container's namespaces.
#[derive(Clone, Debug)]
pub(crate) struct Sysctl {
    /// Relative to procfs.
    pub path: CString,
    pub value: CString,
}

/// A compiled specification.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) options: Options,
    pub(crate) bundle: PathBuf,
    pub(crate) namespaces: Namespaces,
    pub(crate) root: CString,
    pub(crate) root_readonly: bool,
    /// `MS_SLAVE`, `MS_PRIVATE`, … for the mounts of the new namespace and, at the end, for the container's root.
    pub(crate) root_propagation: (u64, bool),
    pub(crate) mounts: Vec<MountStep>,
    pub(crate) devices: Vec<DeviceStep>,
    /// Whether `/dev` is the container's own, to be filled with nodes and links.
    pub(crate) own_dev: bool,
    pub(crate) masked: Vec<CString>,
    pub(crate) readonly: Vec<CString>,
    pub(crate) sysctls: Vec<Sysctl>,
    pub(crate) net_devices: Vec<NetDevice>,
    pub(crate) hostname: Option<CString>,
    pub(crate) domainname: Option<CString>,
    pub(crate) process: ProcessPlan,
    pub(crate) hooks: Hooks,
    pub(crate) resources: Option<LinuxResources>,
    pub(crate) resctrl: Option<resctrl::Wanted>,
    pub(crate) cgroups_path: Option<PathBuf>,
    pub(crate) annotations: std::collections::HashMap<String, String>,
    pub(crate) spec_version: String,
}

impl Plan {
    /// Checks a specification and turns it into steps.
    ///
    /// `bundle` is the folder to which relative paths (root, bind sources) belong.
    pub fn compile(spec: &Spec, bundle: &Path, options: &Options) -> Result<Self> {
        version(spec.version())?;
        let linux = spec.linux().clone().unwrap_or_default_empty();
        let process = spec.process().as_ref().ok_or_else(|| Error::config("process", "is missing"))?;
        let root = spec.root().as_ref().ok_or_else(|| Error::config("root", "is missing"))?;
        let root_path = bundle.join(root.path());
        let namespaces = Namespaces::compile(&linux)?;
        let root_propagation = mounts::root_propagation(linux.rootfs_propagation().as_deref())?;
        let wanted_mounts = spec.mounts().as_deref().unwrap_or_default();
        if wanted_mounts.len() > MAX_MOUNTS {
            return Err(Error::config(
                "mounts",
                format!("{} are too many, the most is {MAX_MOUNTS}", wanted_mounts.len()),
            ));
        }
        if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) && !process::selinux_enabled() {
            return Err(Error::unsupported("linux.mountLabel", "SELinux is not enabled on this host"));
        }
        let mounts = wanted_mounts
            .iter()
            .map(|mount| MountStep::compile(mount, (bundle, &root_path), root_propagation, &namespaces))
            .collect::<Result<Vec<_>>>()?;
        let own_dev = !mounts.iter().any(|mount| mount.target.as_c_str() == c"/dev" && mount.is_bind());
        let set = |value: &Option<String>, field: &str, needed: i32| match value.as_deref() {
            None | Some("") => Ok(None),
            Some(_) if !namespaces.has_own(needed) => {
                Err(Error::config(field, "needs a UTS namespace of the container's own"))
            }
            Some(value) => c_string(field, value).map(Some),
        };
        let plan = Self {
            options: options.clone(),
            bundle: bundle.to_path_buf(),
            root: c_path("root.path", &root_path)?,
            root_readonly: root.readonly().unwrap_or(false),
            root_propagation,
            devices: devices(&linux, own_dev)?,
            own_dev,
            mounts,
            masked: paths("linux.maskedPaths", linux.masked_paths().as_deref())?,
            readonly: paths("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
            sysctls: sysctls(&linux, &namespaces)?,
            net_devices: net_devices(&linux, &namespaces)?,
            hostname: set(spec.hostname(), "hostname", libc::CLONE_NEWUTS)?,
            domainname: set(spec.domainname(), "domainname", libc::CLONE_NEWUTS)?,
            process: ProcessPlan::compile(process, &linux, options)?,
            hooks: spec.hooks().clone().unwrap_or_default(),
            resources: linux.resources().clone(),
            resctrl: linux.intel_rdt().as_ref().map(resctrl::Wanted::compile).transpose()?,
            cgroups_path: linux.cgroups_path().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            spec_version: spec.version().clone(),
            namespaces,
        };
        check_hooks(&plan.hooks)?;
        let hides = !plan.masked.is_empty() || !plan.readonly.is_empty();
        if hides && !plan.mounts_apart() {
            return Err(Error::config(
                "linux.maskedPaths, linux.readonlyPaths",
                "need a mount namespace: without one they would hide the host's files from the host",
            ));
        }
        Ok(plan)
    }

    /// Whether the container has mounts of its own. One without a mount namespace mounts on the host, below its root.
    pub fn mounts_apart(&self) -> bool {
        self.namespaces.has_own(libc::CLONE_NEWNS)
    }

    /// Gives the cgroup to the container's root, where the specification's rule says so: a user namespace and a cgroup
    /// namespace of its own and cgroups mounted for writing.
    pub fn delegate(&self, cgroup: &crate::Cgroup) -> Result<()> {
        let writable = self.mounts.iter().any(|mount| {
            let attributes = mount.attributes.set | mount.recursive_attributes.set;
            mount.is_filesystem(b"cgroup2") && attributes & coracle_sys::mount::MOUNT_ATTR_RDONLY == 0
        });
        if !writable || self.namespaces.new & libc::CLONE_NEWCGROUP as u64 == 0 {
            return Ok(());
        }
        let root = match &self.namespaces.user {
            UserNamespace::Shared => None,
            _ => self.namespaces.uid_mappings.iter().find(|mapping| mapping.container_id() == 0),
        };
        root.map_or(Ok(()), |mapping| cgroup.give_to(mapping.host_id()))
    }

    /// Whether the new process may open what is mounted only with the caller's rights and in the caller's namespace.
    pub(crate) fn opens_before_clone(&self) -> bool {
        self.namespaces.has_user() || self.namespaces.joined.iter().any(|join| join.flag == libc::CLONE_NEWNS)
    }

    /// Resources that the container's cgroup gets.
    pub fn resources(&self) -> Option<&LinuxResources> {
        self.resources.as_ref()
    }

    /// Makes the groups of Intel RDT that the container asks for; to be given to [`crate::spawn_gated`].
    pub fn create_resctrl_group(&self) -> Result<Option<resctrl::Group>> {
        self.resctrl.as_ref().map(|wanted| resctrl::Group::create(wanted, &self.options.id)).transpose()
    }

    /// Where the specification wants the cgroup.
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.cgroups_path.as_deref()
    }

    /// `CLONE_NEW*` of the namespaces that are not the caller's.
    pub fn namespace_flags(&self) -> u64 {
        self.namespaces.own_flags()
    }

    /// The specification's hooks.
    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Whether the program starts without a word of the caller's.
    pub fn starts_by_itself(&self) -> bool {
        self.options.gate == Gate::Open
    }

    /// Whether the program gets a terminal.
    pub fn has_terminal(&self) -> bool {
        self.process.terminal.is_some()
    }

    pub(crate) fn compile_process(
        process: &Process,
        spec: &Spec,
        options: &Options,
    ) -> Result<(ProcessPlan, Namespaces)> {
        let linux = spec.linux().clone().unwrap_or_default_empty();
        Ok((ProcessPlan::compile(process, &linux, options)?, Namespaces::compile(&linux)?))
    }
}

/// `Linux::default()` is a specification of its own; an absent section is an empty one.
trait EmptyLinux {
    fn unwrap_or_default_empty(self) -> oci_spec::runtime::Linux;
}

impl EmptyLinux for Option<oci_spec::runtime::Linux> {
    fn unwrap_or_default_empty(self) -> oci_spec::runtime::Linux {
        self.unwrap_or_else(|| serde_json::from_str("{}").expect("all fields are optional"))
    }
}

fn version(version: &str) -> Result<()> {
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let parts: Vec<Option<u32>> = core.split('.').map(|part| part.parse().ok()).collect();
    match parts[..] {
        [Some(1), Some(_), Some(_)] => Ok(()),
        _ => Err(Error::config("ociVersion", format!("{version:?} is not a version 1.x.y"))),
    }
}

/// A string without an inner null byte.
pub(crate) fn c_string(field: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::config(field, "contains a null byte"))
}

pub(crate) fn c_path(field: &str, path: &Path) -> Result<CString> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= libc::PATH_MAX as usize {
        return Err(Error::config(field, "is longer than a path may be"));
    }
    CString::new(bytes).map_err(|_| Error::config(field, "contains a null byte"))
}

/// An absolute path within the container, `.` and `..` resolved by their names alone.
pub(crate) fn container_path(field: &str, path: &Path) -> Result<CString> {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    c_path(field, &clean)
}

fn paths(field: &str, paths: Option<&[String]>) -> Result<Vec<CString>> {
    let mut found: Vec<CString> = Vec::new();
    for path in paths.unwrap_or_default() {
        if !path.starts_with('/') {
            return Err(Error::config(field, format!("{path:?} is not absolute")));
        }
        let path = container_path(field, Path::new(path))?;
        if !found.contains(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

fn devices(linux: &oci_spec::runtime::Linux, own_dev: bool) -> Result<Vec<DeviceStep>> {
    const DEFAULT_MODE: u32 = 0o666;
    let listed = linux.devices().as_deref().unwrap_or_default();
    let mut steps = Vec::new();
    if !own_dev {
        return Ok(steps);
    }
    for device in listed {
        let (kind, number) = device::node(device)?;
        if !device.path().is_absolute() {
            return Err(Error::config("linux.devices.path", format!("{} is not absolute", device.path().display())));
        }
        steps.push(DeviceStep {
            mode: device.file_mode().unwrap_or(DEFAULT_MODE) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
            ..DeviceStep::new(device.path(), kind, number)?
        });
    }
    for (name, major, minor) in device::DEFAULT_NODES {
        let step = DeviceStep::new(&Path::new("/dev").join(name), libc::S_IFCHR, libc::makedev(major, minor))?;
        if !steps.iter().any(|other| other.path == step.path) {
            steps.push(step);
        }
    }
    Ok(steps)
}

/// Kernel settings that belong to a namespace, by prefix, with the namespace each needs.
const NAMESPACED_SYSCTLS: [(&str, i32); 12] = [
    ("kernel/msgmax", libc::CLONE_NEWIPC),
    ("kernel/msgmnb", libc::CLONE_NEWIPC),
    ("kernel/msgmni", libc::CLONE_NEWIPC),
    ("kernel/sem", libc::CLONE_NEWIPC),
    ("kernel/shmall", libc::CLONE_NEWIPC),
    ("kernel/shmmax", libc::CLONE_NEWIPC),
    ("kernel/shmmni", libc::CLONE_NEWIPC),
    ("kernel/shm_rmid_forced", libc::CLONE_NEWIPC),
    ("fs/mqueue/", libc::CLONE_NEWIPC),
    ("net/", libc::CLONE_NEWNET),
    ("kernel/domainname", libc::CLONE_NEWUTS),
    ("kernel/hostname", libc::CLONE_NEWUTS),
];

fn sysctls(linux: &oci_spec::runtime::Linux, namespaces: &Namespaces) -> Result<Vec<Sysctl>> {
    let mut steps = Vec::new();
    for (key, value) in linux.sysctl().iter().flatten() {
        let field = format!("linux.sysctl.{key}");
        let path = sysctl_path(key);
        if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(Error::config(field, "is not a kernel setting"));
        }
        let known = NAMESPACED_SYSCTLS
            .iter()
            .find(|(prefix, _)| if prefix.ends_with('/') { path.starts_with(prefix) } else { path == *prefix });
        match known {
            Some((_, namespace)) if namespaces.has_own(*namespace) => {}
            Some(_) => {
                return Err(Error::config(field, "belongs to a namespace that the container shares with the host"));
            }
            // Anything below user/ counts in the user namespace.
            None if path.starts_with("user/") && namespaces.has_own(libc::CLONE_NEWUSER) => {}
            None => {
                return Err(Error::config(field, "is not in a separate kernel namespace: it would change the host"));
            }
        }
        steps.push(Sysctl { path: c_string(&field, &format!("sys/{path}"))?, value: c_string(&field, value)? });
    }
    steps.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(steps)
}

/// `a.b/c.d` as sysctl(8) reads it: whichever separator comes first separates, the other one is part of a name.
fn sysctl_path(key: &str) -> String {
    match (key.find('.'), key.find('/')) {
        (Some(dot), slash) if slash.is_none_or(|slash| dot < slash) => key
            .chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => key.to_string(),
    }
}

/// Interfaces to move, in the order of their names.
fn net_devices(linux: &oci_spec::runtime::Linux, namespaces: &Namespaces) -> Result<Vec<NetDevice>> {
    let mut devices = linux
        .net_devices()
        .iter()
        .flatten()
        .map(|(name, device)| NetDevice::new(name, device.name().as_deref()))
        .collect::<Result<Vec<_>>>()?;
    if !devices.is_empty() && !namespaces.has_own(libc::CLONE_NEWNET) {
        return Err(Error::config("linux.netDevices", "needs a network namespace of the container's own"));
    }
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = devices.windows(2).find(|pair| pair[0].new_name == pair[1].new_name) {
        let name = pair[0].new_name.to_string_lossy().into_owned();
        return Err(Error::config("linux.netDevices", format!("two interfaces would be called {name}")));
    }
    Ok(devices)
}

fn check_hooks(hooks: &Hooks) -> Result<()> {
    let all = [
        hooks.prestart(),
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    for hook in all.into_iter().flatten().flatten() {
        if !hook.path().is_absolute() {
            return Err(Error::config("hooks.path", format!("{} is not absolute", hook.path().display())));
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return Err(Error::config("hooks.timeout", "must be more than 0 seconds"));
        }
    }
    Ok(())
}

/// The id maps as the kernel takes them.
pub(crate) fn id_maps(linux: &oci_spec::runtime::Linux) -> Result<(String, String)> {
    let text = |field, maps: &Option<Vec<_>>| idmap::text(field, maps.as_deref().unwrap_or_default());
    Ok((text("linux.uidMappings", linux.uid_mappings())?, text("linux.gidMappings", linux.gid_mappings())?))
}

/// The path below a container's root, for `openat2`: without the leading slash, `.` for the root itself.
pub(crate) fn below_root(path: &CStr) -> &CStr {
    let bytes = path.to_bytes_with_nul();
    match bytes {
        [b'/', 0] => c".",
        [b'/', ..] => CStr::from_bytes_with_nul(&bytes[1..]).unwrap_or(path),
        _ => path,
    }
}

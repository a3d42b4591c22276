//! From the messages of the interface to the node's own verbs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use tonic::Status;

use super::api;
use crate::cri::{
    ContainerConfig, Device, IdMapping, Mount, NamespaceMode, PortMapping, Propagation, Resources, SandboxConfig,
    SecurityContext, SecurityProfile, StdioMode,
};
use crate::names::{ContainerId, PodKey};

type Result<T> = std::result::Result<T, Status>;

/// The prefix that older clients put before a profile's file or name.
const LOCALHOST_PREFIX: &str = "localhost/";
/// Where a container writes whose pod has no folder of logs.
const NO_LOG: &str = "/dev/null";

fn invalid(message: impl Into<String>) -> Status {
    Status::invalid_argument(message)
}

fn mode(value: i32, what: &str) -> Result<NamespaceMode> {
    match api::NamespaceMode::try_from(value) {
        Ok(api::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(api::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(api::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(api::NamespaceMode::Target) | Err(_) => {
            Err(invalid(format!("{what} namespace mode {value} is not supported here")))
        }
    }
}

/// `RunPodSandboxRequest.config`. `cgroup_root` is where pods go whose creator names no cgroup; `host_resolv` is the host's
/// resolver file, for those without a DNS configuration.
pub(super) fn sandbox(
    config: api::PodSandboxConfig,
    runtime_handler: &str,
    cgroup_root: &Path,
    host_resolv: &Path,
) -> Result<SandboxConfig> {
    let metadata = config.metadata.ok_or_else(|| invalid("the sandbox has no metadata"))?;
    if metadata.name.is_empty() || metadata.uid.is_empty() {
        return Err(invalid("the sandbox's metadata needs a name and a UID"));
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let namespaces = security.namespace_options.unwrap_or_default();
    let network = mode(namespaces.network, "network")?;
    let ipc = mode(namespaces.ipc, "IPC")?;
    for (what, mode) in [("network", network), ("IPC", ipc)] {
        if mode == NamespaceMode::Container {
            return Err(invalid(format!("{what} namespace of each container is not supported: POD or NODE")));
        }
    }
    let id = ContainerId::derive(&metadata.uid, "", metadata.attempt);
    Ok(SandboxConfig {
        pod: Some(PodKey { uid: metadata.uid, namespace: metadata.namespace, name: metadata.name }),
        attempt: metadata.attempt,
        hostname: hostname(config.hostname, network)?,
        log_directory: config.log_directory.into(),
        resolv_conf: resolv_conf(config.dns_config, host_resolv)?,
        port_mappings: config.port_mappings.into_iter().map(port_mapping).collect::<Result<_>>()?,
        labels: config.labels,
        annotations: config.annotations,
        // One level of our own below the pod's cgroup: that one belongs to whoever made it.
        cgroup_parent: cgroup(&linux.cgroup_parent, cgroup_root)?.join(id.as_str()),
        sysctls: linux.sysctls,
        network,
        pid: mode(namespaces.pid, "PID")?,
        ipc,
        id_mappings: user_namespace(namespaces.userns_options)?,
        runtime_handler: runtime_handler.to_owned(),
        resources: resources(linux.resources.unwrap_or_default())?,
    })
}

fn hostname(given: String, network: NamespaceMode) -> Result<String> {
    if !given.is_empty() || network == NamespaceMode::Node {
        return Ok(given);
    }
    let host = nix::unistd::gethostname().map_err(|errno| Status::internal(format!("the host's name: {errno}")))?;
    Ok(host.to_string_lossy().into_owned())
}

fn resolv_conf(dns: Option<api::DNSConfig>, host: &Path) -> Result<String> {
    let Some(dns) = dns else {
        return match std::fs::read_to_string(host) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            other => other.map_err(|error| Status::internal(format!("read {}: {error}", host.display()))),
        };
    };
    let mut text = String::new();
    for (word, list) in [("search", &dns.searches), ("options", &dns.options)] {
        if !list.is_empty() {
            text += &format!("{word} {}\n", list.join(" "));
        }
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    Ok(text)
}

fn port_mapping(mapping: api::PortMapping) -> Result<PortMapping> {
    let port = |number: i32| u16::try_from(number).map_err(|_| invalid(format!("{number} is no port")));
    let protocol = match api::Protocol::try_from(mapping.protocol) {
        Ok(api::Protocol::Tcp) => "TCP",
        Ok(api::Protocol::Udp) => "UDP",
        Ok(api::Protocol::Sctp) => "SCTP",
        Err(_) => return Err(invalid(format!("unknown protocol {} of a port mapping", mapping.protocol))),
    };
    let host_ip: Option<IpAddr> = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format!("{text} is no address")))?),
    };
    Ok(PortMapping {
        protocol: protocol.into(),
        container_port: port(mapping.container_port)?,
        host_port: port(mapping.host_port)?,
        host_ip,
    })
}

/// The pod's cgroup, relative to the cgroup2 mount.
fn cgroup(parent: &str, root: &Path) -> Result<PathBuf> {
    if parent.is_empty() {
        return Ok(root.to_owned());
    }
    let relative = Path::new(parent.trim_start_matches('/'));
    if relative.components().any(|part| !matches!(part, Component::Normal(_))) || relative.as_os_str().is_empty() {
        return Err(invalid(format!("cgroup parent {parent} is not a path without dots")));
    }
    Ok(relative.to_owned())
}

fn user_namespace(options: Option<api::UserNamespace>) -> Result<Vec<IdMapping>> {
    let Some(options) = options else { return Ok(Vec::new()) };
    match mode(options.mode, "user")? {
        NamespaceMode::Node => Ok(Vec::new()),
        NamespaceMode::Container => Err(invalid("a user namespace of each container is not supported: POD or NODE")),
        NamespaceMode::Pod => {
            if options.uids.is_empty() && options.gids.is_empty() {
                return Ok(Vec::new());
            }
            let [map] = options.uids.as_slice() else {
                return Err(invalid("a user namespace needs exactly one mapping of UIDs"));
            };
            if options.gids != options.uids {
                return Err(invalid("the mappings of UIDs and GIDs of a user namespace must be the same"));
            }
            if map.container_id != 0 || map.length == 0 {
                return Err(invalid("the mapping of a user namespace must begin at ID 0 inside"));
            }
            Ok(vec![IdMapping { container_id: map.container_id, host_id: map.host_id, length: map.length }])
        }
    }
}

/// `CreateContainerRequest.config` in a sandbox. The image has been resolved to its id already.
pub(super) fn container(
    config: api::ContainerConfig,
    image_id: String,
    sandbox: &SandboxConfig,
    target: impl FnOnce(&str) -> Result<ContainerId>,
) -> Result<ContainerConfig> {
    let metadata = config.metadata.ok_or_else(|| invalid("the container has no metadata"))?;
    if metadata.name.is_empty() {
        return Err(invalid("the container's metadata needs a name"));
    }
    let image = config.image.unwrap_or_default();
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let namespaces = context.namespace_options.clone();
    let (pid_target, pid_own) = match namespaces {
        Some(options) if options.pid == api::NamespaceMode::Target as i32 => (Some(target(&options.target_id)?), false),
        Some(options) => (None, options.pid == api::NamespaceMode::Container as i32),
        None => (None, false),
    };
    let log_path = match (sandbox.log_directory.as_os_str().is_empty(), config.log_path.is_empty()) {
        (false, false) => sandbox.log_directory.join(&config.log_path),
        _ => NO_LOG.into(),
    };
    let text = |bytes: Vec<u8>, name: &str| {
        String::from_utf8(bytes).map_err(|_| invalid(format!("the value of environment variable {name} is not UTF-8")))
    };
    Ok(ContainerConfig {
        name: metadata.name,
        attempt: metadata.attempt,
        image_id,
        image: [image.user_specified_image, image.image].into_iter().find(|name| !name.is_empty()).unwrap_or_default(),
        command: config.command,
        args: config.args,
        cdi_devices: config.cdi_devices.into_iter().map(|device| device.name).collect(),
        working_dir: config.working_dir,
        envs: config
            .envs
            .into_iter()
            .map(|env| Ok((env.key.clone(), text(env.value, &env.key)?)))
            .collect::<Result<_>>()?,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_>>()?,
        devices: config
            .devices
            .into_iter()
            .map(|device| Device {
                container_path: device.container_path.into(),
                host_path: device.host_path.into(),
                permissions: device.permissions,
            })
            .collect(),
        labels: config.labels,
        annotations: config.annotations,
        log_path,
        stdio: StdioMode { stdin: config.stdin, stdin_once: config.stdin_once, tty: config.tty },
        security: security(context)?,
        resources: resources(linux.resources.unwrap_or_default())?,
        stop_signal: api::signal_word(config.stop_signal)
            .ok_or_else(|| invalid(format!("unknown stop signal {}", config.stop_signal)))?,
        pid_target,
        pid_own,
    })
}

/// One mount; that of an image has its name in place of its id yet.
fn mount(mount: api::Mount) -> Result<Mount> {
    let propagation = match api::MountPropagation::try_from(mount.propagation) {
        Ok(api::MountPropagation::Private) => Propagation::Private,
        Ok(api::MountPropagation::HostToContainer) => Propagation::HostToContainer,
        Ok(api::MountPropagation::Bidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(invalid(format!("unknown mount propagation {}", mount.propagation))),
    };
    let path = &mount.container_path;
    if path.is_empty() {
        return Err(invalid("a mount has no path inside the container"));
    }
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        return Err(invalid(format!("mount {path}: recursive read-only needs readonly and private propagation")));
    }
    let image = mount.image.filter(|image| !image.image.is_empty());
    if image.is_some() && !mount.readonly {
        return Err(invalid(format!("mount {path}: an image can only be mounted read-only")));
    }
    if image.is_none() && mount.host_path.is_empty() {
        return Err(invalid(format!("mount {path} has no path on the host")));
    }
    Ok(Mount {
        container_path: absolute(path),
        host_path: mount.host_path.into(),
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        id_mapped: !mount.uid_mappings.is_empty(),
        image: image.map(|image| crate::cri::ImageMount {
            image_id: image.image.clone(),
            image: [image.user_specified_image, image.image].into_iter().find(|n| !n.is_empty()).unwrap_or_default(),
            sub_path: mount.image_sub_path.into(),
        }),
    })
}

fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

fn id(value: i64, what: &str) -> Result<u32> {
    u32::try_from(value).map_err(|_| invalid(format!("{what} {value} is no ID")))
}

fn security(context: api::LinuxContainerSecurityContext) -> Result<SecurityContext> {
    let capabilities = context.capabilities.unwrap_or_default();
    if !capabilities.add_ambient_capabilities.is_empty() {
        return Err(Status::unimplemented("ambient capabilities are not supported"));
    }
    if context.run_as_group.is_some() && context.run_as_user.is_none() && context.run_as_username.is_empty() {
        return Err(invalid("user group is specified without user: run_as_group needs run_as_user"));
    }
    let apparmor = profile(context.apparmor, &context.apparmor_profile, SecurityProfile::RuntimeDefault)?;
    if matches!(apparmor, SecurityProfile::Localhost(_)) && !has_apparmor() {
        return Err(Status::failed_precondition("AppArmor is not enabled on this host"));
    }
    Ok(SecurityContext {
        run_as_user: context.run_as_user.map(|user| id(user.value, "run_as_user")).transpose()?,
        run_as_username: context.run_as_username,
        run_as_group: context.run_as_group.map(|group| id(group.value, "run_as_group")).transpose()?,
        supplemental_groups: context
            .supplemental_groups
            .iter()
            .map(|group| id(*group, "supplemental group"))
            .collect::<Result<_>>()?,
        supplemental_groups_strict: context.supplemental_groups_policy == api::SupplementalGroupsPolicy::Strict as i32,
        privileged: context.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        seccomp: profile(context.seccomp, &context.seccomp_profile_path, SecurityProfile::Unconfined)?,
        apparmor,
        unmasked_proc: false,
        masked_paths: Some(context.masked_paths),
        readonly_paths: Some(context.readonly_paths),
    })
}

fn has_apparmor() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.first() == Some(&b'Y'))
}

/// A profile, or the deprecated field of it in words, or what holds where nothing is said.
fn profile(given: Option<api::SecurityProfile>, words: &str, otherwise: SecurityProfile) -> Result<SecurityProfile> {
    let Some(given) = given else {
        return match words {
            "" => Ok(otherwise),
            "runtime/default" | "docker/default" => Ok(SecurityProfile::RuntimeDefault),
            "unconfined" => Ok(SecurityProfile::Unconfined),
            other => match other.strip_prefix(LOCALHOST_PREFIX) {
                Some(name) => Ok(SecurityProfile::Localhost(name.to_owned())),
                None => Err(invalid(format!("unknown security profile {other}"))),
            },
        };
    };
    match api::ProfileType::try_from(given.profile_type) {
        Ok(api::ProfileType::RuntimeDefault) => Ok(SecurityProfile::RuntimeDefault),
        Ok(api::ProfileType::Unconfined) => Ok(SecurityProfile::Unconfined),
        Ok(api::ProfileType::Localhost) if given.localhost_ref.is_empty() => {
            Err(invalid("a localhost profile needs localhost_ref"))
        }
        Ok(api::ProfileType::Localhost) => {
            let name = given.localhost_ref.strip_prefix(LOCALHOST_PREFIX).unwrap_or(&given.localhost_ref);
            Ok(SecurityProfile::Localhost(name.to_owned()))
        }
        Err(_) => Err(invalid(format!("unknown type {} of a security profile", given.profile_type))),
    }
}

/// `LinuxContainerResources`.
pub(super) fn resources(given: api::LinuxContainerResources) -> Result<Resources> {
    let positive = |value: i64, what: &str| {
        u64::try_from(value).map_err(|_| invalid(format!("{what} {value} must not be negative")))
    };
    Ok(Resources {
        cpu_shares: positive(given.cpu_shares, "cpu_shares")?,
        cpu_quota: given.cpu_quota,
        cpu_period: positive(given.cpu_period, "cpu_period")?,
        memory_limit_in_bytes: given.memory_limit_in_bytes,
        oom_score_adj: i32::try_from(given.oom_score_adj)
            .map_err(|_| invalid(format!("oom_score_adj {} is out of range", given.oom_score_adj)))?,
        unified: given.unified,
        hugepage_limits: given
            .hugepage_limits
            .into_iter()
            .map(|limit| (limit.page_size, limit.limit))
            .collect::<BTreeMap<_, _>>(),
        memory_swap_limit_in_bytes: given.memory_swap_limit_in_bytes,
        cpuset_cpus: given.cpuset_cpus,
        cpuset_mems: given.cpuset_mems,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(linux: api::LinuxPodSandboxConfig) -> Result<SandboxConfig> {
        let metadata = api::PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 1 };
        let config = api::PodSandboxConfig {
            metadata: Some(metadata),
            hostname: "h".into(),
            dns_config: Some(api::DNSConfig {
                servers: vec!["10.0.0.1".into()],
                searches: vec!["a".into(), "b".into()],
                options: vec!["ndots:5".into()],
            }),
            linux: Some(linux),
            ..Default::default()
        };
        sandbox(config, "", Path::new("kubepods"), Path::new("/nonexistent"))
    }

    fn namespaces(options: api::NamespaceOption) -> api::LinuxPodSandboxConfig {
        let context = api::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        api::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() }
    }

    #[test]
    fn a_pod_goes_below_the_cgroup_that_its_creator_names() {
        let made = pod(api::LinuxPodSandboxConfig { cgroup_parent: "/kubepods/pod1".into(), ..Default::default() });
        let made = made.expect("valid");
        let id = ContainerId::derive("u", "", 1);
        assert_eq!(made.cgroup_parent, Path::new("kubepods/pod1").join(id.as_str()));
        assert_eq!(made.resolv_conf, "search a b\noptions ndots:5\nnameserver 10.0.0.1\n");
        for bad in ["../x", "/a/../../b", "/"] {
            let parent = api::LinuxPodSandboxConfig { cgroup_parent: bad.into(), ..Default::default() };
            assert!(pod(parent).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_user_namespace_has_one_mapping_that_begins_at_zero() {
        let map = |container_id, host_id| api::IDMapping { container_id, host_id, length: 65536 };
        let with = |mode: api::NamespaceMode, maps: &[api::IDMapping]| {
            let user = api::UserNamespace { mode: mode as i32, uids: maps.to_vec(), gids: maps.to_vec() };
            pod(namespaces(api::NamespaceOption { userns_options: Some(user), ..Default::default() }))
        };
        let good = with(api::NamespaceMode::Pod, &[map(0, 1000)]).expect("valid");
        assert_eq!(good.id_mappings, [IdMapping { container_id: 0, host_id: 1000, length: 65536 }]);
        assert!(with(api::NamespaceMode::Node, &[]).expect("valid").id_mappings.is_empty());
        assert!(with(api::NamespaceMode::Pod, &[map(0, 1000), map(0, 2000)]).is_err());
        assert!(with(api::NamespaceMode::Pod, &[map(1, 1000)]).is_err());
        assert!(with(api::NamespaceMode::Container, &[]).is_err());
        assert!(with(api::NamespaceMode::Target, &[]).is_err());
    }

    #[test]
    fn mounts_that_contradict_themselves_are_refused() {
        let good = api::Mount {
            container_path: "/c".into(),
            host_path: "/h".into(),
            readonly: true,
            recursive_read_only: true,
            ..Default::default()
        };
        assert!(mount(good.clone()).is_ok());
        assert!(mount(api::Mount { readonly: false, ..good.clone() }).is_err());
        assert!(mount(api::Mount { propagation: 1, ..good.clone() }).is_err());
        assert!(mount(api::Mount { propagation: 9, recursive_read_only: false, ..good.clone() }).is_err());
        assert!(mount(api::Mount { host_path: String::new(), ..good.clone() }).is_err());
        let image = Some(api::ImageSpec { image: "i".into(), ..Default::default() });
        let image = api::Mount { image, recursive_read_only: false, ..good };
        assert!(mount(image.clone()).is_ok());
        assert!(mount(api::Mount { readonly: false, ..image }).is_err());
    }

    #[test]
    fn profiles_are_read_from_both_fields() {
        let given = |kind: api::ProfileType, name: &str| {
            Some(api::SecurityProfile { profile_type: kind as i32, localhost_ref: name.into() })
        };
        let read = |given, words: &str| profile(given, words, SecurityProfile::Unconfined).ok();
        assert_eq!(read(None, ""), Some(SecurityProfile::Unconfined));
        assert_eq!(read(None, "runtime/default"), Some(SecurityProfile::RuntimeDefault));
        assert_eq!(read(None, "localhost//p.json"), Some(SecurityProfile::Localhost("/p.json".into())));
        assert_eq!(read(None, "p.json"), None);
        assert_eq!(
            read(given(api::ProfileType::RuntimeDefault, ""), "unconfined"),
            Some(SecurityProfile::RuntimeDefault)
        );
        assert_eq!(read(given(api::ProfileType::Localhost, ""), ""), None);
        assert_eq!(read(given(api::ProfileType::Localhost, "/p"), ""), Some(SecurityProfile::Localhost("/p".into())));
    }
}

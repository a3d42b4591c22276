//! From a pod's specification to the configurations of its sandbox and containers: functions from values to values.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec, ResourceRequirements, SeccompProfile};
use kube::ResourceExt;

use super::amounts::{amount, limited, requested};
use crate::cgroups::hierarchy::{Hierarchy, Qos, shares};
use crate::cri::{NamespaceMode, PortMapping, Resources, SandboxConfig, SecurityContext, SecurityProfile};
use crate::names::PodKey;
use crate::volumes::Quantity;
use crate::{Config, Layout};

/// Period of CPU quotas in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// `oom_score_adj` of a container of a guaranteed pod, and of one without requests.
const OOM_GUARANTEED: i32 = -997;
const OOM_BEST_EFFORT: i32 = 1000;

/// The pod's identity.
pub(crate) fn key(pod: &Pod) -> PodKey {
    PodKey { uid: pod.uid().unwrap_or_default(), namespace: pod.namespace().unwrap_or_default(), name: pod.name_any() }
}

/// An ephemeral container as a container.
pub(crate) fn ephemeral(source: &EphemeralContainer) -> Container {
    let json = serde_json::to_value(source).unwrap_or_default();
    // An ephemeral container has the fields of a container and one more, which is not read here.
    serde_json::from_value(json).unwrap_or_default()
}

/// The container whose processes an ephemeral container sees (`targetContainerName`).
pub(crate) fn target_of(pod: &Pod, name: &str) -> Option<String> {
    let mut all = pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    all.find(|container| container.name == name)?.target_container_name.clone().filter(|target| !target.is_empty())
}

/// Whether an init container runs on beside the others.
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn whole(quantity: Quantity) -> i64 {
    i64::try_from(quantity.ceil()).unwrap_or(i64::MAX)
}

fn millis(quantity: Quantity) -> u64 {
    u64::try_from(quantity.milli()).unwrap_or_default()
}

/// `status.qosClass`: as the API has set it, or computed the same way.
pub(crate) fn qos(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    let Some(spec) = &pod.spec else { return Qos::BestEffort };
    let mut any = false;
    let mut all = true;
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let resources = container.resources.clone().unwrap_or_default();
        for name in ["cpu", "memory"] {
            let limit = amount(resources.limits.as_ref(), name).map(Quantity::milli);
            let request = amount(resources.requests.as_ref(), name).map(Quantity::milli).or(limit);
            any |= limit.is_some() || request.is_some();
            all &= limit.is_some() && limit == request;
        }
    }
    match (any, all) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// What a container may use.
pub(crate) fn resources(pod: &Pod, requirements: Option<&ResourceRequirements>, node_memory_bytes: u64) -> Resources {
    let empty = ResourceRequirements::default();
    let requirements = requirements.unwrap_or(&empty);
    let (limits, requests) = (requirements.limits.as_ref(), requirements.requests.as_ref());
    let cpu_limit = amount(limits, "cpu").map(millis);
    let cpu_request = amount(requests, "cpu").map(millis).or(cpu_limit).unwrap_or_default();
    let memory_limit = amount(limits, "memory").map(whole).filter(|limit| *limit > 0);
    let memory_request = amount(requests, "memory").map(whole).or(memory_limit).unwrap_or_default();
    let hugepages = limits.into_iter().flatten().filter_map(|(name, amount)| {
        let size = name.strip_prefix("hugepages-")?;
        Some((size.to_owned(), u64::try_from(whole(amount.0.parse().ok()?)).ok()?))
    });
    let oom_score_adj = match qos(pod) {
        Qos::Guaranteed => OOM_GUARANTEED,
        Qos::BestEffort => OOM_BEST_EFFORT,
        Qos::Burstable => {
            let share = 1000 * i128::from(memory_request) / i128::from(node_memory_bytes.max(1));
            i32::try_from((1000 - share).clamp(3, 999)).unwrap_or(999)
        }
    };
    Resources {
        cpu_shares: shares(cpu_request),
        cpu_quota: quota(cpu_limit),
        cpu_period: CPU_PERIOD_US,
        memory_limit_in_bytes: memory_limit.unwrap_or(-1),
        oom_score_adj,
        // A container ends as a whole when it runs out of memory, as with a kubelet on cgroup v2.
        unified: BTreeMap::from([("memory.oom.group".to_owned(), "1".to_owned())]),
        hugepage_limits: hugepages.collect(),
        ..Resources::default()
    }
}

/// Microseconds of CPU in a period; 1 ms at least, which is what the kernel takes. No limit: -1.
fn quota(limit_millis: Option<u64>) -> i64 {
    let limit = limit_millis.filter(|limit| *limit > 0);
    limit.map_or(-1, |limit| i64::try_from((limit * CPU_PERIOD_US / 1000).max(1000)).unwrap_or(i64::MAX))
}

/// What a pod's containers may use together.
pub(crate) fn pod_resources(pod: &Pod) -> Resources {
    let number = |value: i128| u64::try_from(value).unwrap_or_default();
    let memory = limited(pod, "memory").map(|milli| i64::try_from(milli / 1000).unwrap_or(i64::MAX));
    Resources {
        cpu_shares: shares(number(requested(pod, "cpu"))),
        cpu_quota: quota(limited(pod, "cpu").map(number)),
        cpu_period: CPU_PERIOD_US,
        memory_limit_in_bytes: memory.unwrap_or(-1),
        ..Resources::default()
    }
}

/// The looser of two limits each.
pub(crate) fn wider(one: &Resources, other: &Resources) -> Resources {
    // -1 and 0 stand for no limit.
    let looser = |a: i64, b: i64| if a <= 0 || b <= 0 { -1 } else { a.max(b) };
    Resources {
        cpu_quota: looser(one.cpu_quota, other.cpu_quota),
        memory_limit_in_bytes: looser(one.memory_limit_in_bytes, other.memory_limit_in_bytes),
        ..other.clone()
    }
}

/// A pod's sandbox.
pub(crate) fn sandbox(
    config: &Config,
    pod: &Pod,
    attempt: u32,
    resolv_conf: String,
    cgroups: &Hierarchy,
) -> SandboxConfig {
    let key = key(pod);
    let spec = pod.spec.clone().unwrap_or_default();
    let host_network = spec.host_network == Some(true);
    let mode = |host: Option<bool>, otherwise| if host == Some(true) { NamespaceMode::Node } else { otherwise };
    let shared_pid =
        if spec.share_process_namespace == Some(true) { NamespaceMode::Pod } else { NamespaceMode::Container };
    let sysctls = spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
    SandboxConfig {
        attempt,
        hostname: if host_network { String::new() } else { hostname(pod, &config.cluster_domain) },
        log_directory: config.layout.pod_log_folder(&key),
        resolv_conf,
        port_mappings: if host_network { Vec::new() } else { port_mappings(&spec) },
        labels: pod.labels().clone(),
        annotations: pod.annotations().clone(),
        cgroup_parent: cgroups.pod(&key.uid, qos(pod)),
        sysctls: sysctls.map(|sysctl| (sysctl.name.clone(), sysctl.value.clone())).collect(),
        network: mode(spec.host_network, NamespaceMode::Pod),
        pid: mode(spec.host_pid, shared_pid),
        ipc: mode(spec.host_ipc, NamespaceMode::Pod),
        id_mappings: Vec::new(),
        runtime_handler: String::new(),
        resources: pod_resources(pod),
        pod: Some(key),
    }
}

/// The host name inside: `spec.hostname` or the pod's name, cut to what the kernel takes; the full name where asked for.
pub(crate) fn hostname(pod: &Pod, domain: &str) -> String {
    const KERNEL_LIMIT: usize = 63;
    let spec = pod.spec.clone().unwrap_or_default();
    if let Some(name) = spec.hostname_override.filter(|name| !name.is_empty()) {
        return name;
    }
    let mut name = spec.hostname.filter(|name| !name.is_empty()).unwrap_or_else(|| pod.name_any());
    name.truncate(KERNEL_LIMIT);
    let name = name.trim_end_matches(['-', '.']).to_owned();
    match spec.subdomain.filter(|subdomain| !subdomain.is_empty()) {
        Some(subdomain) if spec.set_hostname_as_fqdn == Some(true) => {
            format!("{name}.{subdomain}.{}.svc.{domain}", pod.namespace().unwrap_or_default())
        }
        _ => name,
    }
}

fn port_mappings(spec: &PodSpec) -> Vec<PortMapping> {
    let sidecars = spec.init_containers.iter().flatten().filter(|container| is_sidecar(container));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(PortMapping {
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                container_port: u16::try_from(port.container_port).ok()?,
                host_port: u16::try_from(port.host_port?).ok().filter(|port| *port != 0)?,
                host_ip: port.host_ip.as_ref().and_then(|ip| ip.parse().ok()),
            })
        })
        .collect()
}

/// The text of a pod's resolv.conf. `host` is the node's own.
pub(crate) fn resolv_conf(config: &Config, pod: &Pod, host: &str) -> String {
    const MAX_NAMESERVERS: usize = 3;
    let spec = pod.spec.clone().unwrap_or_default();
    let mut policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    if policy == "ClusterFirst" && spec.host_network == Some(true) {
        policy = "Default";
    }
    if policy.starts_with("ClusterFirst") && config.cluster_dns.is_empty() {
        policy = "Default";
    }
    let words = |keyword: &str| -> Vec<String> {
        let lines = host
            .lines()
            .filter_map(|line| line.trim().strip_prefix(keyword))
            .filter(|rest| rest.starts_with([' ', '\t']));
        lines.flat_map(|rest| rest.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    let (mut servers, mut searches, mut options) = match policy {
        "Default" => (words("nameserver"), words("search"), words("options")),
        "None" => (Vec::new(), Vec::new(), Vec::new()),
        _ => {
            let (namespace, domain) = (pod.namespace().unwrap_or_default(), &config.cluster_domain);
            let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
            searches.extend(words("search"));
            (config.cluster_dns.iter().map(IpAddr::to_string).collect(), searches, vec!["ndots:5".to_owned()])
        }
    };
    let own = spec.dns_config.unwrap_or_default();
    for server in own.nameservers.into_iter().flatten().filter(|server| !servers.contains(server)).collect::<Vec<_>>() {
        servers.push(server);
    }
    for search in own.searches.into_iter().flatten().filter(|search| !searches.contains(search)).collect::<Vec<_>>() {
        searches.push(search);
    }
    for option in own.options.into_iter().flatten() {
        let Some(name) = option.name else { continue };
        options.retain(|held| held.split(':').next() != Some(&name));
        options.push(
            option.value.filter(|value| !value.is_empty()).map_or(name.clone(), |value| format!("{name}:{value}")),
        );
    }
    let mut text = String::new();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for server in servers.iter().take(MAX_NAMESERVERS) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

/// The text of a pod's /etc/hosts.
pub(crate) fn hosts(pod: &Pod, ips: &[IpAddr], hostname: &str, domain: &str, host_file: Option<&str>) -> String {
    let spec = pod.spec.clone().unwrap_or_default();
    let mut text = match host_file {
        Some(host) => format!("# Kubernetes-managed hosts file (host network).\n{host}"),
        None => {
            let mut text = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
                            fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
                .to_owned();
            let namespace = pod.namespace().unwrap_or_default();
            let full = spec.subdomain.as_ref().filter(|subdomain| !subdomain.is_empty());
            let short = hostname.split('.').next().unwrap_or(hostname);
            for ip in ips {
                match full {
                    Some(subdomain) => {
                        text.push_str(&format!("{ip}\t{short}.{subdomain}.{namespace}.svc.{domain}\t{short}\n"))
                    }
                    None => text.push_str(&format!("{ip}\t{hostname}\n")),
                }
            }
            text
        }
    };
    let aliases = spec.host_aliases.unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.unwrap_or_default().join("\t")));
        }
    }
    text
}

fn profile(config: &Config, seccomp: Option<&SeccompProfile>) -> SecurityProfile {
    let default_on = config.seccomp_default;
    match seccomp.map(|profile| (profile.type_.as_str(), profile.localhost_profile.clone())) {
        Some(("RuntimeDefault", _)) => SecurityProfile::RuntimeDefault,
        // Below the node's folder of profiles, as with a kubelet.
        Some(("Localhost", Some(file))) => {
            let path = config.layout.data.join("seccomp").join(file);
            SecurityProfile::Localhost(path.to_string_lossy().into_owned())
        }
        Some(_) => SecurityProfile::Unconfined,
        None if default_on => SecurityProfile::RuntimeDefault,
        None => SecurityProfile::Unconfined,
    }
}

/// A container's security context: its own fields before those of the pod.
pub(crate) fn security(config: &Config, pod: &Pod, container: &Container) -> Result<SecurityContext, String> {
    let spec = pod.spec.clone().unwrap_or_default();
    let of_pod = spec.security_context.unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let id = |value: i64| u32::try_from(value).map_err(|_| format!("{value} is no user or group ID"));
    let privileged = own.privileged == Some(true);
    let mut groups: Vec<u32> =
        of_pod.supplemental_groups.iter().flatten().map(|group| id(*group)).collect::<Result<_, _>>()?;
    if let Some(group) = of_pod.fs_group {
        groups.push(id(group)?);
    }
    let capabilities = own.capabilities.unwrap_or_default();
    let seccomp = own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref());
    let apparmor = own.app_armor_profile.as_ref().or(of_pod.app_armor_profile.as_ref());
    Ok(SecurityContext {
        run_as_user: own.run_as_user.or(of_pod.run_as_user).map(id).transpose()?,
        run_as_username: String::new(),
        run_as_group: own.run_as_group.or(of_pod.run_as_group).map(id).transpose()?,
        supplemental_groups: groups,
        supplemental_groups_strict: of_pod.supplemental_groups_policy.as_deref() == Some("Strict"),
        privileged,
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        seccomp: if privileged { SecurityProfile::Unconfined } else { profile(config, seccomp) },
        apparmor: match apparmor.map(|profile| (profile.type_.as_str(), profile.localhost_profile.clone())) {
            Some(("Localhost", Some(name))) => SecurityProfile::Localhost(name),
            Some(("Unconfined", _)) => SecurityProfile::Unconfined,
            _ => SecurityProfile::RuntimeDefault,
        },
        unmasked_proc: own.proc_mount.as_deref() == Some("Unmasked"),
        masked_paths: None,
        readonly_paths: None,
    })
}

/// Whether `runAsNonRoot` forbids to start as this user; the words of a kubelet.
pub(crate) fn forbid_root(pod: &Pod, container: &Container, image_user: &str) -> Result<(), String> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.clone()).unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    if own.run_as_non_root.or(of_pod.run_as_non_root) != Some(true) {
        return Ok(());
    }
    let name = &container.name;
    match own.run_as_user.or(of_pod.run_as_user) {
        Some(0) => Err(format!(
            "container's runAsUser breaks non-root policy (pod: \"{}\", container: {name})",
            pod.name_any()
        )),
        Some(_) => Ok(()),
        None => {
            let user = image_user.split(':').next().unwrap_or_default();
            match user.parse::<u32>() {
                Ok(0) => Err(format!(
                    "container has runAsNonRoot and image will run as root (pod: \"{}\", container: {name})",
                    pod.name_any()
                )),
                Ok(_) => Ok(()),
                Err(_) if user.is_empty() => Err(format!(
                    "container has runAsNonRoot and image will run as root (pod: \"{}\", container: {name})",
                    pod.name_any()
                )),
                Err(_) => Err(format!(
                    "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: \"{}\", container: {name})",
                    pod.name_any()
                )),
            }
        }
    }
}

/// Where a container's termination message lies on the node.
pub(crate) fn termination_log(layout: &Layout, uid: &str, container: &str, attempt: u32) -> std::path::PathBuf {
    layout.pod(uid).join("containers").join(container).join(attempt.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop", "uid": "u"}, "spec": spec}))
            .expect("a pod")
    }

    #[test]
    fn names_are_resolved_in_the_cluster_first() {
        let config = Config::new("n");
        let host = "nameserver 192.0.2.1\nsearch example.org\noptions edns0\n";
        let text = resolv_conf(&config, &pod(json!({"containers": []})), host);
        assert_eq!(
            text,
            "search shop.svc.cluster.local svc.cluster.local cluster.local example.org\nnameserver 10.43.0.10\noptions ndots:5\n"
        );
        let own = json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.9"], "options": [{"name": "ndots", "value": "2"}]}});
        assert_eq!(resolv_conf(&config, &pod(own), host), "nameserver 192.0.2.9\noptions ndots:2\n");
        let default = json!({"containers": [], "dnsPolicy": "Default"});
        assert!(resolv_conf(&config, &pod(default), host).contains("nameserver 192.0.2.1"));
    }

    #[test]
    fn classes_follow_requests_and_limits() {
        let with = |resources| pod(json!({"containers": [{"name": "a", "resources": resources}]}));
        assert_eq!(qos(&with(json!({}))), Qos::BestEffort);
        assert_eq!(qos(&with(json!({"requests": {"cpu": "1"}}))), Qos::Burstable);
        assert_eq!(qos(&with(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))), Qos::Guaranteed);
        assert_eq!(
            qos(&with(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}))),
            Qos::Burstable
        );
    }

    #[test]
    fn limits_become_quota_and_score() {
        let guaranteed =
            pod(json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "250m", "memory": "64Mi"}}}]}));
        let requirements = guaranteed.spec.as_ref().and_then(|spec| spec.containers[0].resources.clone());
        let limits = resources(&guaranteed, requirements.as_ref(), 1 << 30);
        assert_eq!(
            (limits.cpu_quota, limits.memory_limit_in_bytes, limits.oom_score_adj),
            (25_000, 64 << 20, OOM_GUARANTEED)
        );
    }

    #[test]
    fn root_is_refused_where_it_must_not_be() {
        let strict = pod(json!({"containers": [{"name": "a"}], "securityContext": {"runAsNonRoot": true}}));
        let container = strict.spec.as_ref().map(|spec| spec.containers[0].clone()).expect("a container");
        assert!(forbid_root(&strict, &container, "").is_err());
        assert!(forbid_root(&strict, &container, "nobody").expect_err("a name").contains("non-numeric"));
        assert!(forbid_root(&strict, &container, "1000:1000").is_ok());
    }
}

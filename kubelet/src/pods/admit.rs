//! The node's last word on a pod before it starts: what it cannot run as asked for fails at once, with the reasons of a kubelet.

use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::amounts::requested;
use super::table::PodEntry;
use crate::Config;
use crate::volumes::Allocatable;

/// Sysctls that are namespaced and hurt nobody else (kubernetes.io, "Using sysctls in a Kubernetes Cluster").
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Why a pod is refused: `status.reason` and `status.message`.
pub(super) type Refusal = (String, String);

/// Decides about a pod that nothing runs of yet; `others` are the node's pods that have not ended.
pub(super) fn admit(
    config: &Config,
    allocatable: &Allocatable,
    others: &[Arc<PodEntry>],
    pod: &Pod,
) -> Result<(), Refusal> {
    let spec = pod.spec.clone().unwrap_or_default();
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS";
        return Err(("PodOSNotSupported".into(), message.into()));
    }
    sysctls(config, &spec)?;
    apparmor(&spec, Path::new("/sys/kernel/security/apparmor").exists())?;
    fits(allocatable, others, config.max_pods, pod)?;
    ports(&spec, others)
}

fn sysctls(config: &Config, spec: &PodSpec) -> Result<(), Refusal> {
    let wanted = spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
    for sysctl in wanted {
        let name = sysctl.name.replace('/', ".");
        let allowed = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *pattern == name,
        };
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !config.allowed_unsafe_sysctls.iter().any(allowed) {
            return Err(("SysctlForbidden".into(), format!("forbidden sysctl: \"{}\" not allowlisted", sysctl.name)));
        }
        let of_host = if name.starts_with("net.") { spec.host_network } else { spec.host_ipc };
        if of_host == Some(true) {
            let which = if name.starts_with("net.") { "host network" } else { "host ipc" };
            let message = format!("forbidden sysctl: \"{}\" not allowed with {which} enabled", sysctl.name);
            return Err(("SysctlForbidden".into(), message));
        }
    }
    Ok(())
}

fn apparmor(spec: &PodSpec, enabled: bool) -> Result<(), Refusal> {
    let of_pod = spec.security_context.iter().filter_map(|context| context.app_armor_profile.as_ref());
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let own = all.filter_map(|container| container.security_context.as_ref()?.app_armor_profile.as_ref());
    if !enabled && of_pod.chain(own).any(|profile| profile.type_ != "Unconfined") {
        let message = "Cannot enforce AppArmor: AppArmor is not enabled on the host";
        return Err(("AppArmor".into(), message.into()));
    }
    Ok(())
}

/// What a node can give and what it has given of each resource, in thousandths, against what is asked for.
pub(super) fn lacking(
    allocatable: &Allocatable,
    others: &[Arc<PodEntry>],
    pod: &Pod,
) -> Option<(&'static str, i128, i128, i128)> {
    let of = [
        ("cpu", i128::from(allocatable.cpu_millis)),
        ("memory", i128::from(allocatable.memory_bytes) * 1000),
        ("ephemeral-storage", i128::from(allocatable.ephemeral_storage_bytes) * 1000),
    ];
    of.into_iter().find_map(|(name, capacity)| {
        let wanted = requested(pod, name);
        let used: i128 = others.iter().map(|entry| requested(&entry.pod, name)).sum();
        // CPU is told in thousandths, everything else in units.
        let unit = if name == "cpu" { 1 } else { 1000 };
        (wanted > 0 && used + wanted > capacity).then_some((name, wanted / unit, used / unit, capacity / unit))
    })
}

fn fits(allocatable: &Allocatable, others: &[Arc<PodEntry>], max_pods: u32, pod: &Pod) -> Result<(), Refusal> {
    let short = |name: &str, wanted: i128, used: i128, capacity: i128| {
        let message = format!(
            "Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}"
        );
        Err((format!("OutOf{name}"), message))
    };
    let running = i128::try_from(others.len()).unwrap_or(i128::MAX);
    if running >= i128::from(max_pods) {
        return short("pods", 1, running, max_pods.into());
    }
    match lacking(allocatable, others, pod) {
        Some((name, wanted, used, capacity)) => short(name, wanted, used, capacity),
        None => Ok(()),
    }
}

/// Host ports: protocol, address, port.
fn host_ports(spec: &PodSpec) -> Vec<(String, String, i32)> {
    let ports = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|port| *port > 0)?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some((port.protocol.clone().unwrap_or_else(|| "TCP".into()), ip, number))
        })
        .collect()
}

fn ports(spec: &PodSpec, others: &[Arc<PodEntry>]) -> Result<(), Refusal> {
    let wanted = host_ports(spec);
    let any = |ip: &str| ip == "0.0.0.0";
    let taken = others.iter().filter_map(|entry| entry.spec()).flat_map(host_ports);
    for (protocol, ip, port) in taken {
        if wanted.iter().any(|(p, i, n)| *p == protocol && *n == port && (*i == ip || any(i) || any(&ip))) {
            let message =
                "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports".into();
            return Err(("NodePorts".into(), message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(spec: serde_json::Value, other: serde_json::Value) -> String {
        let pod = |name: &str, spec| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": name, "uid": name}, "spec": spec})).expect("a pod")
        };
        let other = pod("other", other);
        let entry = PodEntry {
            key: super::super::resolved::key(&other),
            pod: Arc::new(other),
            sandbox: None,
            containers: Vec::new(),
        };
        let config = Config { allowed_unsafe_sysctls: vec!["kernel.msg*".into()], ..Config::new("n") };
        let allocatable = Allocatable { cpu_millis: 1000, memory_bytes: 1 << 30, ephemeral_storage_bytes: 1 << 30 };
        admit(&config, &allocatable, &[Arc::new(entry)], &pod("p", spec)).err().unwrap_or_default().0
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        let plain = || json!({"containers": [{"name": "a"}]});
        let sysctl =
            |name: &str| json!({"containers": [], "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        let cpu = |cpu: &str| json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}}}]});
        let port =
            |port: u16| json!({"containers": [{"name": "a", "ports": [{"containerPort": 1, "hostPort": port}]}]});
        for (spec, other, reason) in [
            (plain(), plain(), ""),
            (sysctl("kernel.shm_rmid_forced"), plain(), ""),
            (sysctl("kernel/msgmax"), plain(), ""),
            (sysctl("kernel.sem"), plain(), "SysctlForbidden"),
            (cpu("600m"), cpu("400m"), ""),
            (cpu("600m"), cpu("401m"), "OutOfcpu"),
            (port(80), port(81), ""),
            (port(80), port(80), "NodePorts"),
            (json!({"containers": [], "os": {"name": "windows"}}), plain(), "PodOSNotSupported"),
        ] {
            assert_eq!(refusal(spec.clone(), other), reason, "{spec}");
        }
        let profile = json!({"containers": [], "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}});
        let spec: PodSpec = serde_json::from_value(profile).expect("a specification");
        assert_eq!(apparmor(&spec, false).expect_err("refused").0, "AppArmor");
        assert!(apparmor(&spec, true).is_ok());
    }
}

//! Settings of one node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::images::{GcPolicy, StoreOptions};
use crate::names::Layout;

/// Below what a resource of the host counts as short: `memory.available<100Mi`, `nodefs.available<5%` (`evictionHard`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Threshold {
    /// What is measured.
    pub signal: String,
    value: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Amount(u64),
    Percent(u64),
}

impl Threshold {
    /// The threshold as an amount, of a resource of this capacity.
    pub fn of(&self, capacity: u64) -> u64 {
        match self.value {
            Value::Amount(amount) => amount,
            Value::Percent(percent) => capacity / 100 * percent,
        }
    }
}

impl std::str::FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const SIGNALS: [&str; 4] = ["memory.available", "nodefs.available", "nodefs.inodesFree", "pid.available"];
        let (signal, value) =
            text.split_once('<').ok_or_else(|| format!("{text:?} is not of the form signal<value"))?;
        if !SIGNALS.contains(&signal) {
            return Err(format!("{signal:?} is no eviction signal of this node (known: {})", SIGNALS.join(", ")));
        }
        let wrong = || format!("{value:?} is neither a quantity nor a percentage");
        let value = match value.strip_suffix('%') {
            Some(percent) => Value::Percent(percent.parse().ok().filter(|percent| *percent <= 100).ok_or_else(wrong)?),
            None => {
                let amount: crate::volumes::Quantity = value.parse().map_err(|_| wrong())?;
                Value::Amount(u64::try_from(amount.ceil()).map_err(|_| wrong())?)
            }
        };
        Ok(Self { signal: signal.to_owned(), value })
    }
}

/// What the node agent is told at start. Field names follow the kubelet's configuration where one exists.
#[derive(Clone, Debug)]
pub struct Config {
    /// `metadata.name` of the Node.
    pub node_name: String,
    /// Addresses of the node, preferred first; `status.addresses` and `hostIPs`.
    pub node_ips: Vec<IpAddr>,
    /// Labels set on the Node at registration besides the usual ones.
    pub node_labels: BTreeMap<String, String>,
    /// The public key of the node's WireGuard link, if it has one: the other nodes read it from the Node.
    pub wireguard_key: Option<[u8; 32]>,
    /// Taints set on the Node at registration: `key=value:effect` taken apart.
    pub register_with_taints: Vec<(String, String, String)>,
    /// Where files lie.
    pub layout: Layout,
    /// Mirrors, credentials and certificates of registries, and programs that know credentials.
    pub images: StoreOptions,
    /// When images that nobody uses are removed.
    pub image_gc: GcPolicy,
    /// Folder of static pod manifests, if any.
    pub static_pod_path: Option<PathBuf>,
    /// The executable that is started again as the supervisor, with [`Self::supervisor_arguments`].
    pub executable: PathBuf,
    /// Arguments before the supervisor's own: `["supervisor"]` in the product.
    pub supervisor_arguments: Vec<String>,
    /// The root cgroup of all pods, relative to the cgroup2 mount: `kubepods`.
    pub cgroup_root: PathBuf,
    /// Port of the node's HTTPS API; `status.daemonEndpoints`.
    pub port: u16,
    /// `clusterDomain` of pods' resolv.conf.
    pub cluster_domain: String,
    /// `clusterDNS` of pods' resolv.conf.
    pub cluster_dns: Vec<IpAddr>,
    /// The resolver configuration that `dnsPolicy: Default` copies.
    pub resolv_conf: PathBuf,
    /// Most pods at once; `capacity.pods`.
    pub max_pods: u32,
    /// Bytes of one log file before it is rotated.
    pub container_log_max_size_bytes: u64,
    /// Log files kept of one container, the current one included; at least 2.
    pub container_log_max_files: u32,
    /// `kubeReserved` + `systemReserved` of memory in bytes, subtracted from allocatable.
    pub reserved_memory_bytes: u64,
    /// The same of CPU, in thousandths.
    pub reserved_cpu_millis: u64,
    /// Sysctls that pods may set besides the safe ones; `*` at the end matches a prefix.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Whether pods get the runtime's default seccomp profile when they name none.
    pub seccomp_default: bool,
    /// What the host must keep free, or pods are evicted.
    pub eviction_hard: Vec<Threshold>,
    /// What it should keep free: after so long a time pods are evicted (`evictionSoft`, `evictionSoftGracePeriod`).
    pub eviction_soft: Vec<(Threshold, Duration)>,
    /// Most time that a pod gets to end when a soft threshold evicts it (`evictionMaxPodGracePeriod`).
    pub eviction_max_pod_grace_period: Duration,
    /// How often the Lease is renewed.
    pub lease_renew_interval: Duration,
    /// How often an unchanged node status is written all the same.
    pub node_status_report_interval: Duration,
    /// Time that pods get when the host goes down, by priority; none: the host does not wait
    /// (`shutdownGracePeriodByPodPriority`).
    pub shutdown_periods: Vec<crate::shutdown::Period>,
}

impl Config {
    /// The product's defaults for a node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            node_ips: Vec::new(),
            node_labels: BTreeMap::new(),
            wireguard_key: None,
            register_with_taints: Vec::new(),
            layout: Layout::default(),
            images: StoreOptions::default(),
            image_gc: GcPolicy::default(),
            static_pod_path: None,
            executable: "/proc/self/exe".into(),
            supervisor_arguments: vec!["supervisor".into()],
            cgroup_root: "kubepods".into(),
            port: 10250,
            cluster_domain: "cluster.local".into(),
            cluster_dns: vec![IpAddr::from([10, 43, 0, 10])],
            resolv_conf: "/etc/resolv.conf".into(),
            max_pods: 500,
            container_log_max_size_bytes: 10 << 20,
            container_log_max_files: 5,
            reserved_memory_bytes: 0,
            reserved_cpu_millis: 0,
            allowed_unsafe_sysctls: Vec::new(),
            seccomp_default: true,
            eviction_hard: vec![
                Threshold { signal: "memory.available".into(), value: Value::Amount(100 << 20) },
                // What pods need does not grow with the disk, so these are no tenths of it as with a kubelet.
                Threshold { signal: "nodefs.available".into(), value: Value::Amount(1 << 30) },
                Threshold { signal: "nodefs.inodesFree".into(), value: Value::Percent(1) },
            ],
            eviction_soft: Vec::new(),
            eviction_max_pod_grace_period: Duration::ZERO,
            lease_renew_interval: Duration::from_secs(10),
            node_status_report_interval: Duration::from_secs(300),
            shutdown_periods: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_amounts_or_parts() {
        let of = |text: &str, capacity| text.parse::<Threshold>().map(|threshold| threshold.of(capacity));
        assert_eq!(of("memory.available<100Mi", 0), Ok(100 << 20));
        assert_eq!(of("nodefs.available<10%", 1000), Ok(100));
        for wrong in ["memory.available", "memory.free<1", "nodefs.available<101%", "nodefs.available<-1"] {
            assert!(of(wrong, 1).is_err(), "{wrong}");
        }
    }
}

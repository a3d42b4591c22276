//! Usage of node, pods and containers: gathered once, shown as `/stats/summary` and as metrics.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use k8s_openapi::api::core::v1::{Pod, Volume};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::containers::Refused;
use super::router::Node;
use crate::cri::{ContainerState, ContainerStatus, Stats};
use crate::names::PodKey;
use crate::volumes::VolumeUsage;

/// Requests within this time share one round of reading: scrapers come in pairs.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// CPU use as a rate is reckoned over at least so long a time.
const RATE_OVER: Duration = Duration::from_secs(5);

/// One container's usage.
pub(super) struct ContainerUsage {
    pub(super) status: ContainerStatus,
    pub(super) stats: Stats,
    pub(super) nano_cores: u64,
}

/// One pod's usage.
pub(super) struct PodUsage {
    pub(super) key: PodKey,
    pub(super) stats: Stats,
    pub(super) nano_cores: u64,
    pub(super) started_at: i64,
    pub(super) containers: Vec<ContainerUsage>,
}

/// The node's own.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeUsage {
    pub(super) timestamp: i64,
    pub(super) cpu_ns: u64,
    pub(super) nano_cores: u64,
    pub(super) cores: u64,
    pub(super) memory_total: u64,
    pub(super) memory_available: u64,
    pub(super) memory_working_set: u64,
    pub(super) memory_usage: u64,
    pub(super) memory_rss: u64,
    pub(super) started_at: i64,
    /// Interface, received and sent bytes, received and sent errors.
    pub(super) interfaces: Vec<(String, [u64; 4])>,
}

/// Everything at one moment.
pub(super) struct Usage {
    pub(super) node: NodeUsage,
    pub(super) pods: Vec<PodUsage>,
    /// Containers whose cgroup could not be read.
    pub(super) failed: u64,
}

/// Gathers usage and remembers what rates need.
#[derive(Default)]
pub(super) struct Gatherer(tokio::sync::Mutex<Memory>);

#[derive(Default)]
struct Memory {
    latest: Option<(Instant, Arc<Usage>)>,
    /// CPU counters by name: time, counter, and the rate known then.
    counters: BTreeMap<String, (i64, u64, u64)>,
}

impl Gatherer {
    pub(super) async fn usage(&self, node: &Node) -> Result<Arc<Usage>, Refused> {
        let mut memory = self.0.lock().await;
        if let Some((at, usage)) = &memory.latest
            && at.elapsed() < SHARED_FOR
        {
            return Ok(usage.clone());
        }
        let before = std::mem::take(&mut memory.counters);
        let mut rates = Rates { before, after: BTreeMap::new() };
        let usage = Arc::new(gather(node, &mut rates).await?);
        memory.counters = rates.after;
        memory.latest = Some((Instant::now(), usage.clone()));
        Ok(usage)
    }
}

struct Rates {
    before: BTreeMap<String, (i64, u64, u64)>,
    after: BTreeMap<String, (i64, u64, u64)>,
}

impl Rates {
    /// Nanocores since the counter was last looked at; a too short time keeps the old rate.
    fn rate(&mut self, name: String, time: i64, counter: u64) -> u64 {
        let known = self.before.get(&name).copied();
        let entry = match known {
            Some((then, old, rate))
                if time - then < i64::try_from(RATE_OVER.as_nanos()).unwrap_or(i64::MAX) && rate > 0 =>
            {
                (then, old, rate)
            }
            Some((then, old, _)) if time > then && counter >= old => {
                let rate = u128::from(counter - old) * 1_000_000_000 / u128::from((time - then).unsigned_abs());
                (time, counter, u64::try_from(rate).unwrap_or(u64::MAX))
            }
            _ => (time, counter, 0),
        };
        let rate = entry.2;
        self.after.insert(name, entry);
        rate
    }
}

async fn gather(node: &Node, rates: &mut Rates) -> Result<Usage, Refused> {
    let runtime = node.state.runtime();
    let mut failed = 0;
    let mut pods = BTreeMap::new();
    for sandbox in runtime.list_pod_sandboxes().await.map_err(Refused::internal)? {
        let Some(key) = sandbox.config.pod.clone().filter(|_| sandbox.ready) else { continue };
        let stats = runtime.pod_sandbox_stats(&sandbox.id).await.unwrap_or_else(|error| {
            tracing::debug!(pod = %key, %error, "cannot read usage of pod");
            failed += 1;
            Stats::default()
        });
        let nano_cores = rates.rate(format!("pod {}", key.uid), stats.timestamp, stats.cpu_usage_ns);
        let usage =
            PodUsage { key: key.clone(), stats, nano_cores, started_at: sandbox.created_at, containers: Vec::new() };
        pods.insert(key.uid, usage);
    }
    for status in runtime.list_containers().await.map_err(Refused::internal)? {
        if status.state != ContainerState::Running {
            continue;
        }
        let Some(pod) = pods.get_mut(&status.pod.uid) else { continue };
        match runtime.container_stats(&status.id).await {
            Ok(stats) => {
                let nano_cores = rates.rate(format!("container {}", status.id), stats.timestamp, stats.cpu_usage_ns);
                pod.containers.push(ContainerUsage { status, stats, nano_cores });
            }
            Err(error) => {
                tracing::debug!(container = %status.id, %error, "cannot read usage of container");
                failed += 1;
            }
        }
    }
    let mut usage =
        tokio::task::spawn_blocking(node_usage).await.map_err(Refused::internal)?.map_err(Refused::internal)?;
    usage.nano_cores = rates.rate("node".into(), usage.timestamp, usage.cpu_ns);
    Ok(Usage { node: usage, pods: pods.into_values().collect(), failed })
}

/// Reads /proc: `proc(5)`.
fn node_usage() -> std::io::Result<NodeUsage> {
    let mut usage = NodeUsage { timestamp: now_ns(), ..NodeUsage::default() };
    let stat = fs::read_to_string("/proc/stat")?;
    // One hundredth of a second: USER_HZ, which is fixed for user space.
    const TICK_NS: u64 = 10_000_000;
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        match fields.next() {
            Some("cpu") => {
                let ticks: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
                // user nice system (idle iowait) irq softirq steal
                let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| ticks.get(*index)).sum();
                usage.cpu_ns = busy * TICK_NS;
            }
            Some(name) if name.starts_with("cpu") => usage.cores += 1,
            Some("btime") => {
                let seconds: i64 = fields.next().and_then(|field| field.parse().ok()).unwrap_or(0);
                usage.started_at = seconds.saturating_mul(1_000_000_000);
            }
            _ => {}
        }
    }
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> u64 {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    usage.memory_total = field("MemTotal");
    usage.memory_usage = usage.memory_total.saturating_sub(field("MemFree"));
    usage.memory_working_set = usage.memory_usage.saturating_sub(field("Inactive(file)"));
    usage.memory_available = usage.memory_total.saturating_sub(usage.memory_working_set);
    usage.memory_rss = field("AnonPages");
    for line in fs::read_to_string("/proc/net/dev")?.lines().skip(2) {
        let Some((name, rest)) = line.split_once(':') else { continue };
        let counters: Vec<u64> = rest.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        let name = name.trim();
        if name != "lo" && !name.starts_with("veth") && counters.len() >= 11 {
            usage.interfaces.push((name.to_owned(), [counters[0], counters[8], counters[2], counters[10]]));
        }
    }
    Ok(usage)
}

fn now_ns() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Unix nanoseconds as the API writes times.
fn time(ns: i64) -> Value {
    match jiff::Timestamp::from_nanosecond(i128::from(ns)) {
        Ok(time) => Value::String(time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        Err(_) => Value::Null,
    }
}

fn cpu(stats: &Stats, nano_cores: u64) -> Value {
    json!({ "time": time(stats.timestamp), "usageNanoCores": nano_cores, "usageCoreNanoSeconds": stats.cpu_usage_ns })
}

fn memory(stats: &Stats) -> Value {
    let mut memory = json!({ "time": time(stats.timestamp) });
    let fields = [
        ("usageBytes", stats.memory_usage_bytes),
        ("workingSetBytes", stats.memory_working_set_bytes),
        ("rssBytes", stats.memory_rss_bytes),
        ("pageFaults", stats.page_faults),
        ("majorPageFaults", stats.major_page_faults),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            memory[name] = value.into();
        }
    }
    memory
}

/// `GET /stats/summary`: `k8s.io/kubelet/pkg/apis/stats/v1alpha1.Summary`.
pub(super) async fn summary(State(node): State<Arc<Node>>) -> Result<Json<Value>, Refused> {
    let usage = node.usage.usage(&node).await?;
    let host = &usage.node;
    let interfaces: Vec<Value> = host
        .interfaces
        .iter()
        .map(|(name, [rx, tx, rx_errors, tx_errors])| {
            json!({ "name": name, "rxBytes": rx, "rxErrors": rx_errors, "txBytes": tx, "txErrors": tx_errors })
        })
        .collect();
    let mut network = json!({ "time": time(host.timestamp), "interfaces": interfaces });
    if let Some(first) = interfaces.first() {
        for (key, value) in first.as_object().into_iter().flatten() {
            network[key] = value.clone();
        }
    }
    let file_system = |usage: &crate::images::Usage| {
        json!({
            "time": time(host.timestamp),
            "availableBytes": usage.available_bytes,
            "capacityBytes": usage.capacity_bytes,
            "usedBytes": usage.capacity_bytes.saturating_sub(usage.available_bytes),
            "inodesFree": usage.inodes_free,
            "inodes": usage.inodes,
            "inodesUsed": usage.inodes.saturating_sub(usage.inodes_free),
        })
    };
    let mut summary = json!({
        "node": {
            "nodeName": node.name,
            "startTime": time(host.started_at),
            "cpu": { "time": time(host.timestamp), "usageNanoCores": host.nano_cores, "usageCoreNanoSeconds": host.cpu_ns },
            "memory": {
                "time": time(host.timestamp),
                "availableBytes": host.memory_available,
                "usageBytes": host.memory_usage,
                "workingSetBytes": host.memory_working_set,
                "rssBytes": host.memory_rss,
            },
            "network": network,
        },
        "pods": usage.pods.iter().map(pod_summary).collect::<Vec<_>>(),
    });
    if let Some(volumes) = node.state.volumes() {
        for (pod, entry) in usage.pods.iter().zip(summary["pods"].as_array_mut().into_iter().flatten()) {
            let known = volumes.usage(&pod.key.uid).await.unwrap_or_else(|error| {
                tracing::debug!(pod = %pod.key, %error, "cannot read usage of volumes");
                BTreeMap::new()
            });
            let layers =
                pod.containers.iter().filter_map(|container| container.stats.writable_layer_bytes).sum::<u64>();
            let ephemeral =
                known.values().filter(|volume| volume.counts_as_ephemeral).map(|volume| volume.used_bytes).sum::<u64>();
            entry["ephemeral-storage"] = json!({ "time": time(host.timestamp), "usedBytes": layers + ephemeral });
            let claims = claims_of(&node.state.pods(), &pod.key);
            entry["volume"] = known
                .into_iter()
                .map(|(name, volume)| {
                    let mut entry = json!({
                        "time": time(host.timestamp),
                        "name": name,
                        "usedBytes": volume.used_bytes,
                        "inodesUsed": volume.inodes_used,
                        "inodes": volume.inodes,
                        "inodesFree": volume.inodes_free,
                        "capacityBytes": volume.capacity_bytes,
                        "availableBytes": volume.available_bytes,
                    });
                    if let Some(claim) = claims.get(&name) {
                        entry["pvcRef"] = json!({ "name": claim, "namespace": pod.key.namespace });
                    }
                    entry
                })
                .collect();
        }
    }
    if let Some(images) = node.state.images() {
        let disk = images.usage().await.map_err(Refused::internal)?;
        summary["node"]["fs"] = file_system(&disk);
        let mut image_fs = file_system(&disk);
        image_fs["usedBytes"] = disk.used_bytes.into();
        image_fs["inodesUsed"] = disk.inodes_used.into();
        summary["node"]["runtime"] = json!({ "imageFs": image_fs.clone(), "containerFs": image_fs });
    }
    Ok(Json(summary))
}

/// What the volumes of claims take: namespace, name and usage of each.
pub(super) async fn claims(node: &Node) -> Vec<(String, String, VolumeUsage)> {
    let (Some(volumes), pods) = (node.state.volumes(), node.state.pods()) else { return Vec::new() };
    let mut found = BTreeMap::new();
    for pod in &pods {
        let meta = &pod.metadata;
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let key = PodKey { uid: text(&meta.uid), namespace: text(&meta.namespace), name: text(&meta.name) };
        let claims = claims_of(std::slice::from_ref(pod), &key);
        if claims.is_empty() {
            continue;
        }
        for (name, usage) in volumes.usage(&key.uid).await.unwrap_or_default() {
            if let Some(claim) = claims.get(&name) {
                // Pods may share one.
                found.insert((key.namespace.clone(), claim.clone()), usage);
            }
        }
    }
    found.into_iter().map(|((namespace, claim), usage)| (namespace, claim, usage)).collect()
}

/// The claims behind a pod's volumes, by name of the volume.
fn claims_of(pods: &[Arc<Pod>], key: &PodKey) -> BTreeMap<String, String> {
    let pod = pods.iter().find(|pod| pod.metadata.uid.as_ref() == Some(&key.uid));
    let volumes = pod.and_then(|pod| pod.spec.as_ref()?.volumes.as_ref()).into_iter().flatten();
    let claim = |volume: &Volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => Some(source.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", key.name, volume.name)),
        (None, None) => None,
    };
    volumes.filter_map(|volume| Some((volume.name.clone(), claim(volume)?))).collect()
}

fn pod_summary(pod: &PodUsage) -> Value {
    let containers: Vec<Value> = pod
        .containers
        .iter()
        .map(|container| {
            let mut entry = json!({
                "name": container.status.config.name,
                "startTime": time(container.status.started_at),
                "cpu": cpu(&container.stats, container.nano_cores),
                "memory": memory(&container.stats),
            });
            if let Some(bytes) = container.stats.writable_layer_bytes {
                entry["rootfs"] = json!({
                    "time": time(container.stats.timestamp),
                    "usedBytes": bytes,
                    "inodesUsed": container.stats.writable_layer_inodes,
                });
            }
            entry
        })
        .collect();
    let mut entry = json!({
        "podRef": { "name": pod.key.name, "namespace": pod.key.namespace, "uid": pod.key.uid },
        "startTime": time(pod.started_at),
        "containers": containers,
        "cpu": cpu(&pod.stats, pod.nano_cores),
        "memory": memory(&pod.stats),
    });
    if let Some(pids) = pod.stats.pids {
        entry["process_stats"] = json!({ "process_count": pids });
    }
    entry
}

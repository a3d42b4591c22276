//! Node-pressure eviction: before the host runs out of memory, disk or processes, pods go that use more than they asked for;
//! and pods that fill more disk than their limits allow. Source: kubernetes.io, "Node-pressure Eviction".

use std::collections::HashMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{NodeCondition, Pod};
use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::amounts::{amount, limited, requested};
use super::context::Context;
use super::status;
use super::table::{PodEntry, Verdict};
use crate::config::Threshold;
use crate::images::GcPolicy;
use crate::metrics::Counted;
use crate::node::status::condition;
use crate::volumes::Quantity;

/// `housekeeping-interval`: how often the host is looked at.
const INTERVAL: Duration = Duration::from_secs(10);
/// `eviction-pressure-transition-period`: how long a condition outlives its cause, so that pods do not come straight back.
const TRANSITION: Duration = Duration::from_secs(300);
/// How often images are collected when nothing presses.
const IMAGE_GC_INTERVAL: Duration = Duration::from_secs(300);
/// Pods of this priority are evicted last of all, and static ones of it never (`system-critical`).
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// What runs short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Memory,
    Disk,
    Inodes,
    Processes,
}

/// Name of a signal as thresholds name it, what it is of, the resource's name for people, the node's condition with its reasons.
const SIGNALS: [(&str, Resource, &str, [&str; 3]); 4] = [
    (
        "memory.available",
        Resource::Memory,
        "memory",
        ["MemoryPressure", "KubeletHasInsufficientMemory", "kubelet has insufficient memory available"],
    ),
    (
        "nodefs.available",
        Resource::Disk,
        "ephemeral-storage",
        ["DiskPressure", "KubeletHasDiskPressure", "kubelet has disk pressure"],
    ),
    (
        "nodefs.inodesFree",
        Resource::Inodes,
        "inodes",
        ["DiskPressure", "KubeletHasDiskPressure", "kubelet has disk pressure"],
    ),
    (
        "pid.available",
        Resource::Processes,
        "pids",
        ["PIDPressure", "KubeletHasInsufficientPID", "kubelet has insufficient PID available"],
    ),
];

/// What is left of a resource, and how much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Level {
    available: u64,
    capacity: u64,
}

/// What a pod uses of a resource and asked for, for the order of eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Use {
    uid: String,
    used: u64,
    requested: u64,
    priority: i32,
}

/// What presses the node; shared with its status.
#[derive(Default)]
pub struct Pressure {
    /// When each signal last pressed.
    pressed: Mutex<[Option<Instant>; SIGNALS.len()]>,
    /// Since when soft thresholds have been reached, by signal.
    soft: Mutex<HashMap<String, Instant>>,
}

impl Pressure {
    /// Conditions that stand in for the usual ones.
    pub(crate) fn conditions(&self) -> Vec<NodeCondition> {
        let pressed = *self.pressed.lock();
        let held = pressed.iter().zip(SIGNALS).filter(|(since, _)| since.is_some_and(|at| at.elapsed() < TRANSITION));
        held.map(|(_, (.., [type_, reason, message]))| condition(type_, "True", reason, message)).collect()
    }

    /// Of the soft thresholds that are reached now those that have been for their grace period.
    fn lasting(&self, mut reached: Vec<Hit>, soft: &[(Threshold, Duration)], now: Instant) -> Vec<Hit> {
        let mut since = self.soft.lock();
        since.retain(|signal, _| reached.iter().any(|(_, threshold)| threshold.signal == *signal));
        reached.retain(|(_, threshold)| {
            let since = *since.entry(threshold.signal.clone()).or_insert(now);
            soft.iter().any(|(known, grace)| known == threshold && now - since >= *grace)
        });
        reached
    }
}

/// A threshold that is reached, with the index of its signal.
type Hit = (usize, Threshold);

fn reached<'a>(levels: &[Level; SIGNALS.len()], thresholds: impl Iterator<Item = &'a Threshold>) -> Vec<Hit> {
    let index = |threshold: &Threshold| SIGNALS.iter().position(|(name, ..)| *name == threshold.signal);
    let hits = thresholds.filter_map(|threshold| Some((index(threshold)?, threshold.clone())));
    hits.filter(|(index, threshold)| levels[*index].available < threshold.of(levels[*index].capacity)).collect()
}

/// Looks at the host for ever.
pub async fn run(context: Arc<Context>) {
    let mut collected = Instant::now();
    loop {
        if let Err(error) = look(&context).await {
            tracing::warn!(%error, "the host's memory and disk cannot be looked at");
        }
        if collected.elapsed() >= IMAGE_GC_INTERVAL {
            collected = Instant::now();
            collect_images(&context, context.config.image_gc).await;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn collect_images(context: &Context, policy: GcPolicy) {
    match context.images.collect_garbage(policy).await {
        Ok(removed) if removed.deleted.is_empty() => {}
        Ok(removed) => tracing::info!(images = removed.deleted.len(), bytes = removed.freed_bytes, "images collected"),
        Err(error) => tracing::warn!(%error, "images are not collected"),
    }
}

async fn look(context: &Context) -> io::Result<()> {
    let config = &context.config;
    let all = |levels: &[Level; SIGNALS.len()]| {
        let soft = config.eviction_soft.iter().map(|(threshold, _)| threshold);
        (reached(levels, config.eviction_hard.iter()), reached(levels, soft))
    };
    let mut levels = levels(context)?;
    let (mut hard, mut soft) = all(&levels);
    let of_disk = |(index, _): &Hit| matches!(SIGNALS[*index].1, Resource::Disk | Resource::Inodes);
    if hard.iter().chain(&soft).any(of_disk) {
        // Images that nobody uses go before any pod.
        collect_images(context, GcPolicy { high_percent: 0, low_percent: 0, ..config.image_gc }).await;
        levels = self::levels(context)?;
        (hard, soft) = all(&levels);
    }
    for (index, _) in hard.iter().chain(&soft) {
        context.pressure.pressed.lock()[*index] = Some(Instant::now());
    }
    over_their_limits(context).await;
    let lasting = context.pressure.lasting(soft, &config.eviction_soft, Instant::now());
    let most = if hard.is_empty() { config.eviction_max_pod_grace_period } else { Duration::ZERO };
    let Some((index, threshold)) = hard.into_iter().chain(lasting).next() else { return Ok(()) };
    let (_, resource, name, _) = SIGNALS[index];
    let running: Vec<_> = context.table.list().into_iter().filter(|entry| evictable(&entry.pod)).collect();
    let mut uses = Vec::new();
    for entry in &running {
        uses.push(used(context, entry, resource).await);
    }
    // One at a time: what it frees is seen the next time.
    if let Some(victim) = rank(uses).into_iter().next() {
        let level = levels[index];
        let message = format!(
            "The node was low on resource: {name}. Threshold quantity: {}, available: {}. It was using {}, request is {}, has larger consumption of {name}. ",
            threshold.of(level.capacity),
            level.available,
            victim.used,
            victim.requested
        );
        tracing::warn!(pod = victim.uid, message, "evicting a pod");
        let own = context.table.by_uid(&victim.uid).map(|entry| super::stop::grace(&entry.pod)).unwrap_or_default();
        context.metrics.count(Counted::Evictions, SIGNALS[index].0);
        context.table.fail(&victim.uid, Verdict { reason: "Evicted".into(), message, grace: Some(own.min(most)) });
    }
    Ok(())
}

fn evictable(pod: &Pod) -> bool {
    let fixed = super::mirror::source(pod).is_some();
    !status::is_final(pod)
        && pod.metadata.deletion_timestamp.is_none()
        && !(fixed && priority(pod) >= CRITICAL_PRIORITY)
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default()
}

/// Who goes first: those above their requests, then by priority, then by how far they are above.
fn rank(mut uses: Vec<Use>) -> Vec<Use> {
    uses.sort_by_key(|one| {
        let above = one.used.saturating_sub(one.requested);
        (above == 0, one.priority, std::cmp::Reverse(above))
    });
    uses
}

async fn used(context: &Context, entry: &PodEntry, resource: Resource) -> Use {
    let whole = |name: &str| u64::try_from(requested(&entry.pod, name) / 1000).unwrap_or_default();
    let stats = match &entry.sandbox {
        Some(sandbox) => context.runtime.pod_sandbox_stats(sandbox).await.unwrap_or_default(),
        None => Default::default(),
    };
    let (used, requested) = match resource {
        Resource::Memory => (stats.memory_working_set_bytes.unwrap_or_default(), whole("memory")),
        Resource::Processes => (stats.pids.unwrap_or_default(), 0),
        Resource::Disk => (disk(context, entry).await.0, whole("ephemeral-storage")),
        Resource::Inodes => (disk(context, entry).await.1, 0),
    };
    Use { uid: entry.key.uid.clone(), used, requested, priority: priority(&entry.pod) }
}

/// Bytes and inodes that a pod takes of the node's disk: writable layers, logs, emptyDirs.
async fn disk(context: &Context, entry: &PodEntry) -> (u64, u64) {
    let mut folders = vec![context.config.layout.pod_log_folder(&entry.key)];
    folders.extend(entry.containers.iter().map(|container| context.images.upper(container.id.as_str())));
    let walked = tokio::task::spawn_blocking(move || {
        let sizes = folders.iter().filter_map(|folder| crate::images::disk_usage(folder).ok());
        sizes.fold((0, 0), |(bytes, inodes), (more, files)| (bytes + more, inodes + files))
    });
    let (mut bytes, mut inodes) = walked.await.unwrap_or_default();
    let volumes = context.volumes.usage(&entry.key.uid).await.unwrap_or_default();
    for volume in volumes.values().filter(|volume| volume.counts_as_ephemeral) {
        bytes += volume.used_bytes;
        inodes += volume.inodes_used;
    }
    (bytes, inodes)
}

/// Evicts pods that fill an emptyDir beyond its size, or more disk than their containers' limits allow together.
async fn over_their_limits(context: &Context) {
    for entry in context.table.list().into_iter().filter(|entry| evictable(&entry.pod)) {
        if let Some(message) = over(context, &entry).await {
            context
                .table
                .fail(&entry.key.uid, Verdict { reason: "Evicted".into(), message, grace: Some(Duration::ZERO) });
        }
    }
}

async fn over(context: &Context, entry: &PodEntry) -> Option<String> {
    let spec = entry.spec()?;
    let sized = spec.volumes.iter().flatten().filter_map(|volume| {
        let source = volume.empty_dir.as_ref()?;
        let disk = source.medium.as_deref().unwrap_or_default().is_empty();
        Some((volume.name.as_str(), source.size_limit.as_ref().filter(|_| disk)?.0.clone()))
    });
    let sized: Vec<_> = sized.collect();
    if !sized.is_empty() {
        let usage = context.volumes.usage(&entry.key.uid).await.ok()?;
        for (name, limit) in sized {
            let bytes = limit.parse::<Quantity>().map(Quantity::ceil).unwrap_or_default();
            let used = usage.get(name).map_or(0, |usage| usage.used_bytes);
            if bytes > 0 && i128::from(used) > bytes {
                return Some(format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{limit}\". "));
            }
        }
    }
    let any = spec.containers.iter().any(|container| {
        let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        amount(limits, "ephemeral-storage").is_some()
    });
    if !any {
        return None;
    }
    for container in &spec.containers {
        let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        let Some(limit) = amount(limits, "ephemeral-storage").map(Quantity::ceil) else { continue };
        let folders = entry.containers.iter().filter(|one| one.name == container.name);
        let folders: Vec<_> = folders.map(|one| context.images.upper(one.id.as_str())).collect();
        let logs = context.config.layout.pod_log_folder(&entry.key).join(&container.name);
        let walked = tokio::task::spawn_blocking(move || {
            let all = folders.iter().chain([&logs]);
            all.filter_map(|folder| crate::images::disk_usage(folder).ok()).map(|(bytes, _)| bytes).sum::<u64>()
        });
        if i128::from(walked.await.unwrap_or_default()) > limit {
            return Some(format!(
                "Container {} exceeded its local ephemeral storage limit \"{limit}\". ",
                container.name
            ));
        }
    }
    let limit = limited(&entry.pod, "ephemeral-storage")? / 1000;
    (i128::from(disk(context, entry).await.0) > limit)
        .then(|| format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "))
}

/// What the host has left, in the order of [`SIGNALS`].
fn levels(context: &Context) -> io::Result<[Level; 4]> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() * 1024
    };
    let disk = statvfs(&context.config.layout.data)?;
    let limit: u64 = fs::read_to_string("/proc/sys/kernel/pid_max")?.trim().parse().map_err(io::Error::other)?;
    // "0.00 0.01 0.05 running/all last".
    let load = fs::read_to_string("/proc/loadavg")?;
    let tasks = load.split_whitespace().nth(3).and_then(|field| field.split_once('/')?.1.parse::<u64>().ok());
    Ok([
        Level { available: field("MemAvailable"), capacity: field("MemTotal") },
        Level {
            available: disk.blocks_available() * disk.fragment_size(),
            capacity: disk.blocks() * disk.fragment_size(),
        },
        // A file system without a table of inodes (btrfs) says 0 of 0.
        Level { available: if disk.files() == 0 { u64::MAX } else { disk.files_available() }, capacity: disk.files() },
        Level { available: limit.saturating_sub(tasks.unwrap_or_default()), capacity: limit },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_uses_more_than_asked_goes_first_then_the_less_important() {
        let one = |uid: &str, used, requested, priority| Use { uid: uid.into(), used, requested, priority };
        let order = rank(vec![
            one("within", 90, 100, 0),
            one("important", 300, 100, 10),
            one("little above", 110, 100, 0),
            one("far above", 200, 100, 0),
        ]);
        let order: Vec<_> = order.iter().map(|one| one.uid.as_str()).collect();
        assert_eq!(order, ["far above", "little above", "important", "within"]);
    }

    #[test]
    fn a_soft_threshold_counts_once_it_has_lasted() {
        let threshold: Threshold = "memory.available<100".parse().expect("a threshold");
        let soft = [(threshold, Duration::from_secs(60))];
        let (pressure, start) = (Pressure::default(), Instant::now());
        let lasts = |second: u64, available: u64| {
            let level = Level { available, capacity: 1000 };
            let hits = reached(&[level; SIGNALS.len()], soft.iter().map(|(threshold, _)| threshold));
            !pressure.lasting(hits, &soft, start + Duration::from_secs(second)).is_empty()
        };
        let seen = [(0, 50), (59, 50), (60, 200), (61, 50), (120, 50), (121, 50)];
        assert_eq!(seen.map(|(second, available)| lasts(second, available)), [false, false, false, false, false, true]);
    }

    #[test]
    fn a_condition_shows_while_a_signal_presses() {
        let pressure = Pressure::default();
        assert!(pressure.conditions().is_empty());
        pressure.pressed.lock()[1] = Some(Instant::now());
        let conditions = pressure.conditions();
        assert_eq!((conditions[0].type_.as_str(), conditions[0].status.as_str()), ("DiskPressure", "True"));
    }
}

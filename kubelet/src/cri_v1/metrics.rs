//! The metrics that cAdvisor has for containers, under its names: for `ListPodSandboxMetrics` and for `/metrics/cadvisor`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::LazyLock;

use super::api;
use super::sample::{Cgroup, Memory, Processes, Traffic};
use crate::cri::Resources;

/// Labels of every metric.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];
const NS_PER_S: u64 = 1_000_000_000;

/// Everything that the metrics of one container or pod are made of.
pub(crate) struct Sample {
    /// Values of [`LABELS`].
    pub(super) labels: [String; 6],
    pub(super) timestamp: i64,
    pub(super) started_at: i64,
    pub(super) cgroup: Cgroup,
    pub(super) memory: Memory,
    pub(super) processes: Processes,
    pub(super) resources: Resources,
    pub(super) disk: Option<Disk>,
    pub(super) traffic: BTreeMap<String, Traffic>,
}

/// The file system that a container writes to, and how much of it is the container's.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    pub(super) device: String,
    pub(super) used_bytes: u64,
    pub(super) capacity_bytes: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

/// Values with those of the metric's further labels.
type Values = Vec<(Vec<String>, f64)>;

/// One metric.
struct Row {
    name: &'static str,
    help: &'static str,
    kind: api::MetricType,
    labels: &'static [&'static str],
    values: Box<dyn Fn(&Sample) -> Values + Send + Sync>,
}

fn one(value: impl Fn(&Sample) -> u64 + Send + Sync + 'static) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| vec![(Vec::new(), value(sample) as f64)])
}

fn cpu_stat(key: &'static str, divisor: f64) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| {
        let count = sample.cgroup.keys("cpu.stat").get(key).copied().unwrap_or(0);
        vec![(Vec::new(), count as f64 / divisor)]
    })
}

fn disk(value: fn(&Disk) -> u64) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| sample.disk.iter().map(|disk| (vec![disk.device.clone()], value(disk) as f64)).collect())
}

fn network(value: fn(&Traffic) -> u64) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| sample.traffic.iter().map(|(name, t)| (vec![name.clone()], value(t) as f64)).collect())
}

fn io(key: &'static str) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| {
        let devices = sample.cgroup.io();
        devices.into_iter().filter_map(|(device, counters)| Some((vec![device], *counters.get(key)? as f64))).collect()
    })
}

fn block_io(sample: &Sample) -> Values {
    let devices = sample.cgroup.io().into_iter();
    let rows = devices.flat_map(|(device, counters)| {
        let (major, minor) = device.split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap_or_default();
        [("Read", "rbytes"), ("Write", "wbytes")].into_iter().filter_map(move |(operation, key)| {
            Some((vec![device.clone(), major.clone(), minor.clone(), operation.to_owned()], *counters.get(key)? as f64))
        })
    });
    rows.collect()
}

fn failures(sample: &Sample) -> Values {
    ["container", "hierarchy"]
        .into_iter()
        .flat_map(|scope| {
            [("pgfault", sample.memory.faults), ("pgmajfault", sample.memory.major_faults)]
                .map(|(kind, count)| (vec![kind.to_owned(), scope.to_owned()], count as f64))
        })
        .collect()
}

/// Seconds of pressure; none where the kernel keeps no account of it.
fn pressure(of: &'static str, full: bool) -> Box<dyn Fn(&Sample) -> Values + Send + Sync> {
    Box::new(move |sample| {
        let psi = sample.cgroup.pressure(of);
        let data = psi.and_then(|psi| if full { psi.full } else { psi.some });
        data.map(|data| (Vec::new(), seconds(data.total))).into_iter().collect()
    })
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / NS_PER_S as f64
}

fn positive(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

static ROWS: LazyLock<Vec<Row>> = LazyLock::new(|| {
    use api::MetricType::{Counter, Gauge};
    let row = |name, help, kind, labels, values| Row { name, help, kind, labels, values };
    vec![
        row(
            "container_blkio_device_usage_total",
            "Bytes moved to and from block devices",
            Counter,
            &["device", "major", "minor", "operation"],
            Box::new(block_io),
        ),
        row(
            "container_cpu_cfs_periods_total",
            "Periods of CPU limits that have passed",
            Counter,
            &[],
            cpu_stat("nr_periods", 1.0),
        ),
        row(
            "container_cpu_cfs_throttled_periods_total",
            "Periods in which it was held back",
            Counter,
            &[],
            cpu_stat("nr_throttled", 1.0),
        ),
        row(
            "container_cpu_cfs_throttled_seconds_total",
            "Seconds for which it was held back",
            Counter,
            &[],
            cpu_stat("throttled_usec", 1e6),
        ),
        row(
            "container_cpu_system_seconds_total",
            "CPU seconds in the kernel",
            Counter,
            &[],
            cpu_stat("system_usec", 1e6),
        ),
        row(
            "container_cpu_usage_seconds_total",
            "CPU seconds",
            Counter,
            &["cpu"],
            Box::new(|sample| vec![(vec!["total".into()], seconds(sample.cgroup.cpu()[0]))]),
        ),
        row("container_cpu_user_seconds_total", "CPU seconds in user space", Counter, &[], cpu_stat("user_usec", 1e6)),
        row("container_file_descriptors", "Open file descriptors", Gauge, &[], one(|s| s.processes.descriptors)),
        row("container_fs_inodes_free", "Free inodes of the file system", Gauge, &["device"], disk(|d| d.inodes_free)),
        row("container_fs_inodes_total", "Inodes of the file system", Gauge, &["device"], disk(|d| d.inodes)),
        row("container_fs_limit_bytes", "Bytes of the file system", Gauge, &["device"], disk(|d| d.capacity_bytes)),
        row("container_fs_usage_bytes", "Bytes of the writable layer", Gauge, &["device"], disk(|d| d.used_bytes)),
        row("container_fs_reads_bytes_total", "Bytes read", Counter, &["device"], io("rbytes")),
        row("container_fs_reads_total", "Reads", Counter, &["device"], io("rios")),
        row("container_fs_writes_bytes_total", "Bytes written", Counter, &["device"], io("wbytes")),
        row("container_fs_writes_total", "Writes", Counter, &["device"], io("wios")),
        row(
            "container_hugetlb_usage_bytes",
            "Bytes of huge pages",
            Gauge,
            &["pagesize"],
            Box::new(|s| s.cgroup.huge_pages().into_iter().map(|(size, bytes)| (vec![size], bytes as f64)).collect()),
        ),
        row(
            "container_last_seen",
            "When it was last seen, Unix seconds",
            Gauge,
            &[],
            one(|s| positive(s.timestamp) / NS_PER_S),
        ),
        row("container_memory_cache", "Bytes of page cache", Gauge, &[], one(|s| s.memory.cache)),
        row(
            "container_memory_failcnt",
            "How often the memory limit was hit",
            Counter,
            &[],
            one(|s| s.memory.limit_hits),
        ),
        row("container_memory_failures_total", "Page faults", Counter, &["failure_type", "scope"], Box::new(failures)),
        row("container_memory_kernel_usage", "Bytes of the kernel for it", Gauge, &[], one(|s| s.memory.kernel)),
        row("container_memory_mapped_file", "Bytes of mapped files", Gauge, &[], one(|s| s.memory.mapped)),
        row("container_memory_max_usage_bytes", "Most bytes at one time", Gauge, &[], one(|s| s.memory.peak)),
        row("container_memory_rss", "Bytes of anonymous memory", Gauge, &[], one(|s| s.memory.rss)),
        row("container_memory_swap", "Bytes swapped out", Gauge, &[], one(|s| s.memory.swap)),
        row("container_memory_usage_bytes", "Bytes of memory, all kinds", Gauge, &[], one(|s| s.memory.usage)),
        row(
            "container_memory_working_set_bytes",
            "Bytes that cannot be reclaimed at once",
            Gauge,
            &[],
            one(|s| s.memory.working_set),
        ),
        row(
            "container_network_receive_bytes_total",
            "Bytes received",
            Counter,
            &["interface"],
            network(|t| t.received[0]),
        ),
        row(
            "container_network_receive_packets_total",
            "Packets received",
            Counter,
            &["interface"],
            network(|t| t.received[1]),
        ),
        row(
            "container_network_receive_errors_total",
            "Errors of receiving",
            Counter,
            &["interface"],
            network(|t| t.received[2]),
        ),
        row(
            "container_network_receive_packets_dropped_total",
            "Received packets dropped",
            Counter,
            &["interface"],
            network(|t| t.received[3]),
        ),
        row("container_network_transmit_bytes_total", "Bytes sent", Counter, &["interface"], network(|t| t.sent[0])),
        row(
            "container_network_transmit_packets_total",
            "Packets sent",
            Counter,
            &["interface"],
            network(|t| t.sent[1]),
        ),
        row(
            "container_network_transmit_errors_total",
            "Errors of sending",
            Counter,
            &["interface"],
            network(|t| t.sent[2]),
        ),
        row(
            "container_network_transmit_packets_dropped_total",
            "Packets dropped instead of sent",
            Counter,
            &["interface"],
            network(|t| t.sent[3]),
        ),
        row(
            "container_oom_events_total",
            "Processes killed for want of memory",
            Counter,
            &[],
            one(|s| s.memory.oom_kills),
        ),
        row(
            "container_pressure_cpu_stalled_seconds_total",
            "Seconds in which no task got a CPU",
            Counter,
            &[],
            pressure("cpu", true),
        ),
        row(
            "container_pressure_cpu_waiting_seconds_total",
            "Seconds in which some task got no CPU",
            Counter,
            &[],
            pressure("cpu", false),
        ),
        row(
            "container_pressure_io_stalled_seconds_total",
            "Seconds in which all tasks waited for IO",
            Counter,
            &[],
            pressure("io", true),
        ),
        row(
            "container_pressure_io_waiting_seconds_total",
            "Seconds in which some task waited for IO",
            Counter,
            &[],
            pressure("io", false),
        ),
        row(
            "container_pressure_memory_stalled_seconds_total",
            "Seconds in which all tasks waited for memory",
            Counter,
            &[],
            pressure("memory", true),
        ),
        row(
            "container_pressure_memory_waiting_seconds_total",
            "Seconds in which some task waited for memory",
            Counter,
            &[],
            pressure("memory", false),
        ),
        row("container_processes", "Processes", Gauge, &[], one(|s| s.processes.count)),
        row("container_sockets", "Open sockets", Gauge, &[], one(|s| s.processes.sockets)),
        row(
            "container_spec_cpu_period",
            "Period of its CPU limit, microseconds",
            Gauge,
            &[],
            one(|s| s.resources.cpu_period),
        ),
        row(
            "container_spec_cpu_quota",
            "CPU limit in a period, microseconds",
            Gauge,
            &[],
            one(|s| positive(s.resources.cpu_quota)),
        ),
        row("container_spec_cpu_shares", "CPU share", Gauge, &[], one(|s| s.resources.cpu_shares)),
        row(
            "container_spec_memory_limit_bytes",
            "Memory limit; 0: none",
            Gauge,
            &[],
            one(|s| positive(s.resources.memory_limit_in_bytes)),
        ),
        row(
            "container_spec_memory_reservation_limit_bytes",
            "Memory that is protected; 0: none",
            Gauge,
            &[],
            one(|s| s.resources.unified.get("memory.low").and_then(|v| v.parse().ok()).unwrap_or(0)),
        ),
        row(
            "container_spec_memory_swap_limit_bytes",
            "Limit of memory and swap; 0: none",
            Gauge,
            &[],
            one(|s| positive(s.resources.memory_swap_limit_in_bytes)),
        ),
        row(
            "container_start_time_seconds",
            "When it started, Unix seconds",
            Gauge,
            &[],
            one(|s| positive(s.started_at) / NS_PER_S),
        ),
        row("container_threads", "Threads", Gauge, &[], one(|s| s.processes.threads)),
        row("container_threads_max", "Most threads allowed", Gauge, &[], one(|s| s.processes.threads_max)),
        row(
            "container_ulimits_soft",
            "Soft limits of its first process",
            Gauge,
            &["ulimit"],
            Box::new(|s| {
                let limit = s.processes.open_files_soft;
                limit.map(|n| (vec!["max_open_files".into()], n as f64)).into_iter().collect()
            }),
        ),
    ]
});

/// What there is.
pub(super) fn descriptors() -> Vec<api::MetricDescriptor> {
    ROWS.iter()
        .map(|row| api::MetricDescriptor {
            name: row.name.into(),
            help: row.help.into(),
            label_keys: LABELS.iter().chain(row.labels).map(|label| (*label).to_owned()).collect(),
        })
        .collect()
}

/// All metrics of one container or pod.
pub(super) fn of(sample: &Sample) -> Vec<api::Metric> {
    ROWS.iter()
        .flat_map(|row| {
            (row.values)(sample).into_iter().map(|(labels, value)| api::Metric {
                name: row.name.into(),
                timestamp: sample.timestamp,
                metric_type: row.kind as i32,
                label_values: sample.labels.iter().cloned().chain(labels).collect(),
                value: Some(api::UInt64Value { value: value as u64 }),
            })
        })
        .collect()
}

/// The metrics of many containers and pods in Prometheus' text form.
pub(crate) fn text(samples: &[Sample]) -> String {
    let mut text = String::new();
    for row in ROWS.iter() {
        let kind = if row.kind == api::MetricType::Counter { "counter" } else { "gauge" };
        // Writing to a String cannot fail.
        let _written = writeln!(text, "# HELP {} {}\n# TYPE {} {kind}", row.name, row.help, row.name);
        for sample in samples {
            for (more, value) in (row.values)(sample) {
                let keys = LABELS.iter().chain(row.labels).copied();
                let pairs: Vec<_> = keys.zip(sample.labels.iter().chain(&more).map(String::as_str)).collect();
                let labels = crate::server::metrics::labels(&pairs);
                let _written = writeln!(text, "{}{labels} {value} {}", row.name, sample.timestamp / 1_000_000);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_as_many_labels_as_its_descriptor_has_keys() {
        let sample = Sample {
            labels: Default::default(),
            timestamp: 5 * 1_000_000_000,
            started_at: 0,
            cgroup: Cgroup::at("/".as_ref()),
            memory: Memory { rss: 7, ..Memory::default() },
            processes: Processes { open_files_soft: Some(1024), ..Processes::default() },
            resources: Resources::default(),
            disk: Some(Disk::default()),
            traffic: [("eth0".to_owned(), Traffic { received: [1, 2, 3, 4], sent: [5, 6, 7, 8] })].into(),
        };
        let keys: BTreeMap<_, _> = descriptors().into_iter().map(|d| (d.name, d.label_keys.len())).collect();
        assert_eq!(keys.len(), ROWS.len(), "a name stands twice");
        let metrics = of(&sample);
        for metric in &metrics {
            assert_eq!(keys[&metric.name], metric.label_values.len(), "{}", metric.name);
        }
        let value = |name: &str| metrics.iter().find(|m| m.name == name).and_then(|m| m.value.clone()).map(|v| v.value);
        assert_eq!(value("container_memory_rss"), Some(7));
        assert_eq!(value("container_last_seen"), Some(5));
        assert_eq!(value("container_network_transmit_packets_total"), Some(6));
        let labels = r#"container="",id="",image="",name="",namespace="",pod="",interface="eth0""#;
        let line = format!("\ncontainer_network_receive_bytes_total{{{labels}}} 1 5000\n");
        assert!(text(&[sample]).contains(&line), "{line}");
    }
}

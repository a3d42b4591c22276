//! Metrics in Prometheus' text form: the node agent's own, resources, and what cAdvisor would show.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;

use super::containers::Refused;
use super::router::Node;
use super::stats::Usage;
use crate::volumes::VolumeUsage;

/// One family of samples.
struct Family<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
    samples: Vec<(String, f64, i64)>,
}

/// `text/plain; version=0.0.4`
fn answer(text: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// Labels in braces; values are escaped.
pub(crate) fn labels(pairs: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = pairs
        .iter()
        .map(|(name, value)| {
            format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
        })
        .collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn render(families: &[Family<'_>]) -> String {
    let mut text = String::new();
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        // Writing to a String cannot fail.
        let _written = writeln!(text, "# HELP {} {}\n# TYPE {} {}", family.name, family.help, family.name, family.kind);
        for (labels, value, milliseconds) in &family.samples {
            let _written = if *milliseconds > 0 {
                writeln!(text, "{}{labels} {value} {milliseconds}", family.name)
            } else {
                writeln!(text, "{}{labels} {value}", family.name)
            };
        }
    }
    text
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn millis(ns: i64) -> i64 {
    ns / 1_000_000
}

/// `GET /metrics`
pub(super) async fn own(State(node): State<Arc<Node>>) -> Result<Response, Refused> {
    let usage = node.usage.usage(&node).await?;
    let running: usize = usage.pods.iter().map(|pod| pod.containers.len()).sum();
    let count = |value: usize| vec![(String::new(), value as f64, 0)];
    let mut families = vec![
        Family {
            name: "kubelet_running_pods",
            kind: "gauge",
            help: "Number of pods that have a running pod sandbox",
            samples: count(usage.pods.len()),
        },
        Family {
            name: "kubelet_running_containers",
            kind: "gauge",
            help: "Number of containers currently running",
            samples: vec![(labels(&[("container_state", "running")]), running as f64, 0)],
        },
        Family {
            name: "kubelet_node_name",
            kind: "gauge",
            help: "The node's name. The count is always 1.",
            samples: vec![(labels(&[("node", &node.name)]), 1.0, 0)],
        },
    ];
    families.extend(process());
    families.extend(volume_families(&super::stats::claims(&node).await));
    Ok(answer(render(&families) + &node.state.metrics()))
}

/// How full the volumes of claims are.
fn volume_families(claims: &[(String, String, VolumeUsage)]) -> Vec<Family<'static>> {
    type Amount = fn(&VolumeUsage) -> u64;
    let rows: [(&str, &str, Amount); 6] = [
        ("kubelet_volume_stats_capacity_bytes", "Capacity in bytes of the volume", |usage| usage.capacity_bytes),
        ("kubelet_volume_stats_available_bytes", "Number of available bytes in the volume", |usage| {
            usage.available_bytes
        }),
        ("kubelet_volume_stats_used_bytes", "Number of used bytes in the volume", |usage| usage.used_bytes),
        ("kubelet_volume_stats_inodes", "Maximum number of inodes in the volume", |usage| usage.inodes),
        ("kubelet_volume_stats_inodes_free", "Number of free inodes in the volume", |usage| usage.inodes_free),
        ("kubelet_volume_stats_inodes_used", "Number of used inodes in the volume", |usage| usage.inodes_used),
    ];
    let family = |(name, help, amount): (&'static str, &'static str, Amount)| Family {
        name,
        kind: "gauge",
        help,
        samples: claims
            .iter()
            .map(|(namespace, claim, usage)| {
                (labels(&[("namespace", namespace), ("persistentvolumeclaim", claim)]), amount(usage) as f64, 0)
            })
            .collect(),
    };
    rows.map(family).into()
}

/// The usual figures of this process, where /proc tells them.
fn process() -> Vec<Family<'static>> {
    /// Bytes of a page on the machines that the product supports.
    const PAGE_BYTES: f64 = 4096.0;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident: Option<f64> = statm.split_whitespace().nth(1).and_then(|field| field.parse().ok());
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold blanks; utime and stime are the 12th and 13th of the rest, in hundredths of a second.
    let ticks: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse().ok())
        .collect();
    let sample = |value: f64| vec![(String::new(), value, 0)];
    vec![
        Family {
            name: "process_resident_memory_bytes",
            kind: "gauge",
            help: "Resident memory size in bytes.",
            samples: resident.map(|pages| sample(pages * PAGE_BYTES)).unwrap_or_default(),
        },
        Family {
            name: "process_open_fds",
            kind: "gauge",
            help: "Number of open file descriptors.",
            samples: std::fs::read_dir("/proc/self/fd").map(|all| sample(all.count() as f64)).unwrap_or_default(),
        },
        Family {
            name: "process_cpu_seconds_total",
            kind: "counter",
            help: "Total user and system CPU time spent in seconds.",
            samples: if ticks.len() == 2 { sample((ticks[0] + ticks[1]) / 100.0) } else { Vec::new() },
        },
    ]
}

/// `GET /metrics/resource`
pub(super) async fn resource(State(node): State<Arc<Node>>) -> Result<Response, Refused> {
    let usage = node.usage.usage(&node).await?;
    Ok(answer(render(&resource_families(&usage))))
}

fn resource_families(usage: &Usage) -> Vec<Family<'static>> {
    let host = &usage.node;
    let at = millis(host.timestamp);
    let family = |name, kind, help| Family { name, kind, help, samples: Vec::new() };
    let mut container_cpu = family(
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
    );
    let mut container_memory =
        family("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes");
    let mut container_start =
        family("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds");
    let mut pod_cpu =
        family("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds");
    let mut pod_memory = family("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
    for pod in &usage.pods {
        let of_pod = [("namespace", pod.key.namespace.as_str()), ("pod", pod.key.name.as_str())];
        let pod_at = millis(pod.stats.timestamp);
        pod_cpu.samples.push((labels(&of_pod), seconds(pod.stats.cpu_usage_ns), pod_at));
        if let Some(bytes) = pod.stats.memory_working_set_bytes {
            pod_memory.samples.push((labels(&of_pod), bytes as f64, pod_at));
        }
        for container in &pod.containers {
            let of_container = labels(&[("container", &container.status.config.name), of_pod[0], of_pod[1]]);
            let at = millis(container.stats.timestamp);
            container_cpu.samples.push((of_container.clone(), seconds(container.stats.cpu_usage_ns), at));
            if let Some(bytes) = container.stats.memory_working_set_bytes {
                container_memory.samples.push((of_container.clone(), bytes as f64, at));
            }
            container_start.samples.push((of_container, seconds(container.status.started_at.unsigned_abs()), 0));
        }
    }
    let failed = vec![(String::new(), if usage.failed > 0 { 1.0 } else { 0.0 }, 0)];
    vec![
        container_cpu,
        container_memory,
        container_start,
        Family {
            samples: vec![(String::new(), seconds(host.cpu_ns), at)],
            ..family(
                "node_cpu_usage_seconds_total",
                "counter",
                "Cumulative cpu time consumed by the node in core-seconds",
            )
        },
        Family {
            samples: vec![(String::new(), host.memory_working_set as f64, at)],
            ..family("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes")
        },
        pod_cpu,
        pod_memory,
        Family {
            samples: failed.clone(),
            ..family(
                "resource_scrape_error",
                "gauge",
                "1 if there was an error while getting container metrics, 0 otherwise",
            )
        },
        Family {
            samples: failed,
            ..family("scrape_error", "gauge", "1 if there was an error while getting container metrics, 0 otherwise")
        },
    ]
}

/// `GET /metrics/cadvisor`
pub(super) async fn cadvisor(State(node): State<Arc<Node>>) -> Result<Response, Refused> {
    let gathered = crate::cri_v1::samples(&node.state.runtime(), node.state.images()).await;
    let pods = gathered.map_err(Refused::internal)?;
    let samples: Vec<_> = pods
        .into_iter()
        .flat_map(|(_, pod, containers)| std::iter::once(pod).chain(containers.into_iter().map(|(_, sample)| sample)))
        .collect();
    let usage = node.usage.usage(&node).await?;
    let one = |name, help, value: f64| Family { name, kind: "gauge", help, samples: vec![(String::new(), value, 0)] };
    let machine = [
        one("machine_cpu_cores", "Number of logical CPU cores.", usage.node.cores as f64),
        one("machine_memory_bytes", "Amount of memory installed on the machine.", usage.node.memory_total as f64),
        one("container_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise", 0.0),
    ];
    Ok(answer(crate::cri_v1::metrics_text(&samples) + &render(&machine)))
}

/// `GET /metrics/probes`
pub(super) async fn probes(State(node): State<Arc<Node>>) -> Response {
    answer(node.state.probe_metrics())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_is_exact() {
        let family =
            Family { name: "x", kind: "gauge", help: "Help.", samples: vec![(labels(&[("a", "q\"\\\n")]), 1.5, 7)] };
        assert_eq!(render(&[family]), "# HELP x Help.\n# TYPE x gauge\nx{a=\"q\\\"\\\\\\n\"} 1.5 7\n");
    }
}

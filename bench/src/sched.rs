//! The scheduler alone: pods that come all at once to a cluster that exists only in its tables. The workloads are those of
//! Kubernetes' own scheduler benchmark (`test/integration/scheduler_perf`), by name.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use coracle_api::informer::Delta;
use coracle_scheduler::{Action, Config, Engine, Update};
use k8s_openapi::api::core::v1::{Node, Pod};
use nix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::report::Figure;

/// Zones of the cluster, as in the workloads taken over.
const ZONES: usize = 3;
/// Pods of little worth on each node, where others are to push them away.
const LESSER_PER_NODE: usize = 4;

/// Pods with the usual requests that a node has room for, and some more.
const PER_NODE: usize = 20;

/// A workload: the specification of its pods, laid over the usual one.
struct Workload {
    name: &'static str,
    spec: fn() -> Value,
    /// How many such pods so many nodes admit.
    admits: fn(usize) -> usize,
    /// Whether the nodes are full of pods that must leave.
    preempts: bool,
}

fn many(nodes: usize) -> usize {
    nodes * PER_NODE
}

/// All of them want to be in one zone.
fn one_zone(nodes: usize) -> usize {
    nodes / ZONES * PER_NODE
}

fn one_each(nodes: usize) -> usize {
    nodes
}

const WORKLOADS: [Workload; 6] = [
    Workload { name: "basic", spec: || json!({}), admits: many, preempts: false },
    Workload { name: "node affinity", spec: node_affinity, admits: one_zone, preempts: false },
    Workload { name: "topology spread", spec: spread, admits: many, preempts: false },
    Workload { name: "pod anti-affinity", spec: apart, admits: one_each, preempts: false },
    Workload { name: "pod affinity", spec: together, admits: one_zone, preempts: false },
    Workload { name: "preemption", spec: preemptor, admits: one_each, preempts: true },
];

fn node_affinity() -> Value {
    let zones = json!([{"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["z0", "z1"]}]);
    json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": zones}]}}}})
}

fn spread() -> Value {
    json!({"topologySpreadConstraints": [{"maxSkew": 5, "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "measured"}}}]})
}

fn pods(kind: &str, topology: &str) -> Value {
    json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": topology, "labelSelector": {"matchLabels": {"app": "measured"}}}]}}})
}

fn apart() -> Value {
    pods("podAntiAffinity", "kubernetes.io/hostname")
}

fn together() -> Value {
    pods("podAffinity", "topology.kubernetes.io/zone")
}

fn preemptor() -> Value {
    json!({"priority": 10, "containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "3", "memory": "500Mi"}}}]})
}

fn made<K: DeserializeOwned>(object: Value) -> anyhow::Result<Arc<K>> {
    Ok(Arc::new(serde_json::from_value(object).context("make an object")?))
}

fn pod(name: &str, app: &str, over: &Value) -> anyhow::Result<Arc<Pod>> {
    let mut spec = json!({"schedulerName": "default-scheduler", "priority": 0,
        "containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "100m", "memory": "500Mi"}}}]});
    if let (Some(spec), Some(over)) = (spec.as_object_mut(), over.as_object()) {
        spec.extend(over.clone());
    }
    made(
        json!({"metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": app}}, "spec": spec, "status": {"phase": "Pending"}}),
    )
}

/// The pod as it stands on its node.
fn on(pod: &Pod, node: &str) -> Arc<Pod> {
    let mut bound = pod.clone();
    bound.spec.get_or_insert_default().node_name = Some(node.to_owned());
    Arc::new(bound)
}

fn update(engine: &mut Engine, old: Option<Arc<Pod>>, new: Option<Arc<Pod>>, now: Instant) {
    engine.update(&Update::Pod(Delta { old, new }), now);
}

/// Pods by name.
type Pods = HashMap<String, Arc<Pod>>;

/// A cluster with its nodes, and for preemption the pods on them.
fn cluster(workload: &Workload, nodes: usize) -> anyhow::Result<(Engine, Pods)> {
    let mut engine = Engine::new(Config::default(), 1);
    let mut pods = Pods::new();
    let now = Instant::now();
    for index in 0..nodes {
        let name = format!("node-{index}");
        let labels =
            json!({"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("z{}", index % ZONES)});
        let node: Arc<Node> = made(json!({"metadata": {"name": name, "labels": labels},
            "status": {"allocatable": {"cpu": "4", "memory": "32Gi", "pods": "110"}}}))?;
        engine.update(&Update::Node(Delta { old: None, new: Some(node) }), now);
        let lesser = json!({"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "900m", "memory": "500Mi"}}}]});
        for at in 0..if workload.preempts { LESSER_PER_NODE } else { 0 } {
            let lesser_name = format!("lesser-{index}-{at}");
            let lesser = on(&*pod(&lesser_name, "lesser", &lesser)?, &name);
            pods.insert(lesser_name, lesser.clone());
            update(&mut engine, None, Some(lesser), now);
        }
    }
    Ok((engine, pods))
}

/// How long this thread has computed: the scheduler waits for nothing, and what else the machine does is not its work.
fn computed() -> anyhow::Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("read the time of the thread")?;
    Ok(time.into())
}

/// Pods placed a second of one core, from when the first is seen until the last one's binding is.
fn run(workload: &Workload, nodes: usize, count: usize) -> anyhow::Result<f64> {
    let count = count.min((workload.admits)(nodes));
    let (mut engine, mut pods) = cluster(workload, nodes)?;
    let spec = (workload.spec)();
    let waiting = (0..count).map(|index| pod(&format!("pod-{index}"), "measured", &spec));
    let waiting = waiting.collect::<anyhow::Result<Vec<_>>>()?;
    for pod in &waiting {
        pods.insert(pod.metadata.name.clone().unwrap_or_default(), pod.clone());
    }
    let known = |name: &str| pods.get(name).cloned().with_context(|| format!("nobody made a pod {name}"));
    let mut now = Instant::now();
    let started = computed()?;
    for pod in waiting {
        update(&mut engine, None, Some(pod), now);
    }
    let mut placed = 0;
    while placed < count {
        // Waiting for back-off is not work: the clock is moved on instead.
        let Some(action) = engine.step(now) else {
            now = engine.next_due().with_context(|| format!("only {placed} of {count} pods have found a node"))?;
            continue;
        };
        match action {
            Action::Bind(bind) => {
                let pod = known(bind.pod())?;
                engine.bound(&bind, true, now);
                let bound = on(&pod, &bind.node);
                update(&mut engine, Some(pod), Some(bound), now);
                placed += 1;
            }
            Action::Report(report) => {
                let mut victims = report.victims().peekable();
                if !workload.preempts || victims.peek().is_none() {
                    bail!("a pod found no node: {}", report.message);
                }
                for victim in victims {
                    update(&mut engine, Some(known(victim)?), None, now);
                }
                now += Duration::from_millis(1);
            }
        }
    }
    Ok(count as f64 / (computed()? - started).as_secs_f64())
}

/// Every workload on every size of cluster.
pub(crate) fn measure(sizes: &[usize], count: usize, runs: usize) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for workload in &WORKLOADS {
        for &nodes in sizes {
            let rates = (0..runs).map(|_| run(workload, nodes, count)).collect::<anyhow::Result<_>>();
            let rates = rates.with_context(|| format!("{} on {nodes} nodes", workload.name))?;
            figures.push(Figure::ours(format!("scheduler: {}, {nodes} nodes", workload.name), "pods/s", rates));
        }
    }
    Ok(figures)
}

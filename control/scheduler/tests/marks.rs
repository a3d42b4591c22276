//! The choice among nodes against a naive reading of the marks: the node that a pod gets has the best sum of them.
#![forbid(unsafe_code)]

use std::sync::Arc;

use coracle_api::informer::Delta;
use coracle_scheduler::{Action, Config, Engine, Update};
use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::Instant;

const MEBI: i64 = 1 << 20;

#[derive(Clone, Debug)]
struct Host {
    cpu: i64,
    memory_gib: i64,
    zone: usize,
    /// Taints that only ask pods to stay away.
    deterred: usize,
    /// Megabytes of each image that is there.
    images: Vec<Option<i64>>,
}

#[derive(Clone, Debug)]
struct Ask {
    app: usize,
    cpu_millis: Option<i64>,
    memory_mib: Option<i64>,
    image: usize,
    tolerates: bool,
    /// Weight for hosts of this zone.
    zone: Option<(i64, usize)>,
    /// Weight for being with pods of this app, below zero for being away from them, on one host or in one zone.
    beside: Option<(i64, usize, bool)>,
    /// Spread over zones with pods of its app, as far as it goes.
    spread: bool,
}

fn host() -> impl Strategy<Value = Host> {
    let images = prop::collection::vec(prop::option::of(1..2000_i64), 2);
    (4..16_i64, 8..64_i64, 0..3_usize, 0..3_usize, images).prop_map(|(cpu, memory_gib, zone, deterred, images)| Host {
        cpu,
        memory_gib,
        zone,
        deterred,
        images,
    })
}

fn ask() -> impl Strategy<Value = Ask> {
    let beside = (prop_oneof![-5..0_i64, 1..5_i64], 0..2_usize, any::<bool>());
    let of = (0..2_usize, prop::option::of(1..2000_i64), prop::option::of(1..4000_i64), 0..2_usize, any::<bool>());
    (of, prop::option::of((1..5_i64, 0..3_usize)), prop::option::of(beside), any::<bool>()).prop_map(
        |((app, cpu_millis, memory_mib, image, tolerates), zone, beside, spread)| Ask {
            app,
            cpu_millis,
            memory_mib,
            image,
            tolerates,
            zone,
            beside,
            spread,
        },
    )
}

fn parse<K: serde::de::DeserializeOwned>(value: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(value).expect("well formed"))
}

fn node(at: usize, host: &Host) -> Arc<Node> {
    let taints: Vec<_> =
        (0..host.deterred).map(|n| json!({"key": format!("t{n}"), "effect": "PreferNoSchedule"})).collect();
    let images = host.images.iter().enumerate().filter_map(|(image, size)| {
        Some(json!({"names": [format!("i{image}:latest")], "sizeBytes": (*size)? * 1_000_000}))
    });
    parse(json!({
        "metadata": {"name": format!("n{at}"), "labels": {"kubernetes.io/hostname": format!("n{at}"), "zone": format!("z{}", host.zone)}},
        "spec": {"taints": taints},
        "status": {"allocatable": {"cpu": host.cpu.to_string(), "memory": format!("{}Gi", host.memory_gib), "pods": "110"},
            "images": images.collect::<Vec<_>>()},
    }))
}

fn pod(name: usize, ask: &Ask, at: Option<usize>) -> Arc<Pod> {
    let mut requests = json!({});
    if let Some(cpu) = ask.cpu_millis {
        requests["cpu"] = format!("{cpu}m").into();
    }
    if let Some(memory) = ask.memory_mib {
        requests["memory"] = format!("{memory}Mi").into();
    }
    let app = |app: usize| json!({"matchLabels": {"app": format!("a{app}")}});
    let mut spec =
        json!({"containers": [{"name": "c", "image": format!("i{}", ask.image), "resources": {"requests": requests}}]});
    if ask.tolerates {
        spec["tolerations"] = json!([{"operator": "Exists"}]);
    }
    if let Some((weight, zone)) = ask.zone {
        let zone = json!({"key": "zone", "operator": "In", "values": [format!("z{zone}")]});
        spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
            json!([{"weight": weight, "preference": {"matchExpressions": [zone]}}]);
    }
    if let Some((weight, other, host)) = ask.beside {
        let kind = if weight > 0 { "podAffinity" } else { "podAntiAffinity" };
        let key = if host { "kubernetes.io/hostname" } else { "zone" };
        spec["affinity"][kind]["preferredDuringSchedulingIgnoredDuringExecution"] =
            json!([{"weight": weight.abs(), "podAffinityTerm": {"topologyKey": key, "labelSelector": app(other)}}]);
    }
    if ask.spread {
        spec["topologySpreadConstraints"] = json!([{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": app(ask.app)}]);
    }
    if let Some(at) = at {
        spec["nodeName"] = format!("n{at}").into();
    }
    let name = format!("p{name}");
    parse(json!({"metadata": {"name": name, "namespace": "d", "uid": name, "labels": {"app": format!("a{}", ask.app)}},
        "spec": spec, "status": {"phase": "Pending"}}))
}

struct Model {
    hosts: Vec<Host>,
    pods: Vec<(Ask, usize)>,
}

/// Brings marks to 0..=100: the largest becomes 100, or 0 if they count against.
fn normalized(raw: &[i64], against: bool) -> Vec<i64> {
    let most = raw.iter().copied().max().unwrap_or_default();
    raw.iter()
        .map(|raw| {
            let mark = if most == 0 { 0 } else { raw * 100 / most };
            if against { 100 - mark } else { mark }
        })
        .collect()
}

impl Model {
    fn on(&self, at: usize) -> impl Iterator<Item = &Ask> {
        self.pods.iter().filter(move |(_, host)| *host == at).map(|(ask, _)| ask)
    }

    /// What the pods of a host and this one ask for: CPU in thousandths, memory in bytes.
    fn sums(&self, ask: &Ask, at: usize, defaults: (i64, i64)) -> (i64, i64) {
        let all = || self.on(at).chain([ask]);
        (
            all().map(|ask| ask.cpu_millis.unwrap_or(defaults.0)).sum(),
            all().map(|ask| ask.memory_mib.map_or(defaults.1, |memory| memory * MEBI)).sum(),
        )
    }

    fn fits(&self, ask: &Ask, at: usize) -> bool {
        let (cpu, memory) = self.sums(ask, at, (0, 0));
        let host = &self.hosts[at];
        (ask.cpu_millis.is_none() || cpu <= host.cpu * 1000)
            && (ask.memory_mib.is_none() || memory <= host.memory_gib * 1024 * MEBI)
    }

    fn has(&self, at: usize) -> (i64, i64) {
        (self.hosts[at].cpu * 1000, self.hosts[at].memory_gib * 1024 * MEBI)
    }

    fn free(&self, ask: &Ask, at: usize) -> i64 {
        let ((cpu, memory), (all_cpu, all_memory)) = (self.sums(ask, at, (100, 200 * MEBI)), self.has(at));
        let mark = |taken: i64, all: i64| if taken > all { 0 } else { (all - taken) * 100 / all };
        (mark(cpu, all_cpu) + mark(memory, all_memory)) / 2
    }

    fn balance(&self, ask: &Ask, at: usize) -> i64 {
        if ask.cpu_millis.is_none() && ask.memory_mib.is_none() {
            return 0;
        }
        let ((cpu, memory), (all_cpu, all_memory)) = (self.sums(ask, at, (0, 0)), self.has(at));
        let share = |taken: i64, all: i64| (taken as f64 / all as f64).min(1.0);
        ((1.0 - ((share(cpu, all_cpu) - share(memory, all_memory)) / 2.0).abs()) * 100.0) as i64
    }

    fn image(&self, ask: &Ask, at: usize) -> i64 {
        let holders = self.hosts.iter().filter(|host| host.images[ask.image].is_some()).count();
        let size = self.hosts[at].images[ask.image].unwrap_or_default() * 1_000_000;
        let counts = (size as f64 * (holders as f64 / self.hosts.len() as f64)) as i64;
        100 * (counts.clamp(23 * MEBI, 1000 * MEBI) - 23 * MEBI) / (977 * MEBI)
    }

    /// How much pods that stand, and the pod itself, want it there.
    fn company(&self, ask: &Ask, at: usize) -> i64 {
        let near =
            |other: usize, host: bool| if host { other == at } else { self.hosts[other].zone == self.hosts[at].zone };
        let mut sum = 0;
        for (other, there) in &self.pods {
            if let Some((weight, _, _)) = ask.beside.filter(|(_, app, host)| *app == other.app && near(*there, *host)) {
                sum += weight;
            }
            if let Some((weight, _, _)) = other.beside.filter(|(_, app, host)| *app == ask.app && near(*there, *host)) {
                sum += weight;
            }
        }
        sum
    }

    fn best(&self, ask: &Ask) -> Vec<usize> {
        let slots: Vec<usize> = (0..self.hosts.len()).filter(|at| self.fits(ask, *at)).collect();
        let each = |mark: &dyn Fn(usize) -> i64| -> Vec<i64> { slots.iter().map(|at| mark(*at)).collect() };
        let taints = each(&|at| if ask.tolerates { 0 } else { self.hosts[at].deterred as i64 });
        let zones =
            each(&|at| ask.zone.filter(|(_, zone)| *zone == self.hosts[at].zone).map_or(0, |(weight, _)| weight));
        let company = each(&|at| self.company(ask, at));
        let (least, most) = (company.iter().min().copied().unwrap_or(0), company.iter().max().copied().unwrap_or(0));
        let spread = self.spread(ask, &slots);
        let (taints, zones) = (normalized(&taints, true), normalized(&zones, false));
        let total = |index: usize| {
            let at = slots[index];
            let company = if most == least { 0 } else { 100 * (company[index] - least) / (most - least) };
            self.free(ask, at)
                + self.balance(ask, at)
                + self.image(ask, at)
                + 3 * taints[index]
                + 2 * zones[index]
                + 2 * company
                + 2 * spread[index]
        };
        let totals: Vec<i64> = (0..slots.len()).map(total).collect();
        let best = totals.iter().max().copied();
        slots.iter().zip(&totals).filter(|(_, total)| Some(**total) == best).map(|(at, _)| *at).collect()
    }

    fn spread(&self, ask: &Ask, slots: &[usize]) -> Vec<i64> {
        if !ask.spread {
            return vec![0; slots.len()];
        }
        let zone = |at: usize| self.hosts[at].zone;
        let mut zones: Vec<usize> = slots.iter().map(|at| zone(*at)).collect();
        zones.sort_unstable();
        zones.dedup();
        let weight = (zones.len() as f64 + 2.0).ln();
        let count = |at: usize| {
            self.pods.iter().filter(|(other, there)| other.app == ask.app && zone(*there) == zone(at)).count()
        };
        let raw: Vec<i64> = slots.iter().map(|at| (count(*at) as f64 * weight).round() as i64).collect();
        let (least, most) = (raw.iter().min().copied().unwrap_or(0), raw.iter().max().copied().unwrap_or(0));
        raw.iter().map(|raw| if most == 0 { 100 } else { 100 * (most + least - raw) / most }).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn each_pod_gets_a_node_with_the_best_marks(
        hosts in prop::collection::vec(host(), 1..6), asks in prop::collection::vec(ask(), 1..30), seed: u64,
    ) {
        let mut engine = Engine::new(Config::default(), seed);
        let now = Instant::now();
        for (at, host) in hosts.iter().enumerate() {
            engine.update(&Update::Node(Delta { old: None, new: Some(node(at, host)) }), now);
        }
        let mut model = Model { hosts, pods: Vec::new() };
        for (name, ask) in asks.into_iter().enumerate() {
            let made = pod(name, &ask, None);
            engine.update(&Update::Pod(Delta { old: None, new: Some(made.clone()) }), now);
            let best = model.best(&ask);
            match engine.step(now).expect("a verdict") {
                Action::Bind(bind) => {
                    let at: usize = bind.node[1..].parse().expect("a number");
                    prop_assert!(best.contains(&at), "p{} {:?} got n{}, not one of {:?} among {:?}", name, ask, at, best, model.pods);
                    engine.bound(&bind, true, now);
                    let bound = pod(name, &ask, Some(at));
                    engine.update(&Update::Pod(Delta { old: Some(made), new: Some(bound) }), now);
                    model.pods.push((ask, at));
                }
                Action::Report(report) => {
                    prop_assert!(best.is_empty(), "p{} {:?} got none of {:?}: {}", name, ask, best, report.message);
                    engine.update(&Update::Pod(Delta { old: Some(made), new: None }), now);
                }
            }
        }
    }
}

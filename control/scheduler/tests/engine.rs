//! The whole engine against a naive reading of what pods ask for, over random small clusters that change all the time.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Delta;
use coracle_scheduler::{Action, Config, Engine, Update};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::Instant;

/// Longest back-off.
const BACKOFF: Duration = Duration::from_secs(10);
const ZONES: usize = 3;

const NAMESPACES: usize = 3;

/// The namespaces whose pods a term of affinity means.
#[derive(Clone, Copy, Debug)]
enum Reach {
    Own,
    /// Those of this team, by a selector.
    Team(usize),
    /// This one by name, and those of the team.
    Named(usize, usize),
    All,
}

impl Reach {
    fn json(self) -> Value {
        match self {
            Self::Own => json!({}),
            Self::Team(team) => json!({"namespaceSelector": {"matchLabels": {"team": format!("t{team}")}}}),
            Self::Named(name, team) => json!({"namespaces": [format!("d{name}")],
                "namespaceSelector": {"matchLabels": {"team": format!("t{team}")}}}),
            Self::All => json!({"namespaceSelector": {}}),
        }
    }
}

/// What a pod asks for.
#[derive(Clone, Copy, Debug)]
struct Wish {
    namespace: usize,
    reach: Reach,
    app: usize,
    cpu: i64,
    priority: i32,
    disk: bool,
    tolerates: bool,
    port: bool,
    /// Not beside pods of its own app on one host (0) or in one zone (1).
    apart: Option<usize>,
    /// Only beside pods of this app in one zone.
    near: Option<usize>,
    /// At most one more in a zone than in the emptiest, or than none as long as there are fewer zones than this.
    spread: Option<i32>,
    /// Whether zones count from which only a taint keeps the pod away.
    honors_taints: bool,
}

/// A pod that asks for nothing.
const MODEST: Wish = Wish {
    namespace: 0,
    reach: Reach::Own,
    app: 0,
    cpu: 0,
    priority: 0,
    disk: false,
    tolerates: false,
    port: false,
    apart: None,
    near: None,
    spread: None,
    honors_taints: false,
};

#[derive(Clone, Copy, Debug)]
struct Host {
    zone: usize,
    cpu: i64,
    disk: bool,
    tainted: bool,
    cordoned: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Host(usize, Host),
    HostGone(usize),
    Pod(Wish),
    PodGone(usize),
    /// A namespace goes to another team.
    Team(usize, usize),
}

#[derive(Default)]
struct Model {
    hosts: BTreeMap<usize, Host>,
    pods: BTreeMap<usize, (Wish, Option<usize>)>,
    teams: [usize; NAMESPACES],
}

impl Model {
    fn on(&self, host: usize) -> impl Iterator<Item = &Wish> {
        self.pods.values().filter(move |(_, at)| *at == Some(host)).map(|(wish, _)| wish)
    }

    fn in_zone(&self, zone: usize) -> impl Iterator<Item = &Wish> {
        let placed = self.pods.values().filter_map(|(wish, at)| Some((wish, (*at)?)));
        placed.filter(move |(_, host)| self.hosts[host].zone == zone).map(|(wish, _)| wish)
    }

    /// Whether nodes of the pod's own kind (selector) count for it.
    fn selects(wish: &Wish, host: &Host) -> bool {
        !wish.disk || host.disk
    }

    /// Whether the terms of a pod mean the namespace of another.
    fn reaches(&self, wish: &Wish, other: &Wish) -> bool {
        match wish.reach {
            Reach::Own => other.namespace == wish.namespace,
            Reach::Team(team) => self.teams[other.namespace] == team,
            Reach::Named(name, team) => other.namespace == name || self.teams[other.namespace] == team,
            Reach::All => true,
        }
    }

    /// Whether a pod's spreading counts with a host.
    fn spreads_over(wish: &Wish, host: &Host) -> bool {
        Self::selects(wish, host) && (!wish.honors_taints || !host.tainted || wish.tolerates)
    }

    fn fits(&self, wish: &Wish, at: usize) -> bool {
        let host = &self.hosts[&at];
        let used: i64 = self.on(at).map(|other| other.cpu).sum();
        let means = |from: &Wish, app: usize, other: &Wish| other.app == app && self.reaches(from, other);
        let near_somebody = |app: usize| {
            self.in_zone(host.zone).any(|other| means(wish, app, other))
                || (means(wish, app, wish)
                    && !self.pods.values().any(|(other, at)| at.is_some() && means(wish, app, other)))
        };
        let count = |zone: usize| {
            let hosts = self.hosts.iter().filter(|(_, host)| host.zone == zone && Self::spreads_over(wish, host));
            let alike = |other: &&Wish| other.app == wish.app && other.namespace == wish.namespace;
            hosts.map(|(host, _)| self.on(*host).filter(alike).count()).sum::<usize>()
        };
        let zones: BTreeSet<usize> =
            self.hosts.values().filter(|host| Self::spreads_over(wish, host)).map(|host| host.zone).collect();
        let fewest = |least: i32| match zones.iter().map(|zone| count(*zone)).min() {
            _ if i32::try_from(zones.len()).is_ok_and(|zones| zones < least) => Some(0),
            fewest => fewest,
        };
        Self::selects(wish, host)
            && !host.cordoned
            && (!host.tainted || wish.tolerates)
            && used + wish.cpu <= host.cpu
            && !(wish.port && self.on(at).any(|other| other.port))
            && match wish.apart {
                None => true,
                Some(0) => self.on(at).all(|other| !means(wish, wish.app, other)),
                Some(_) => self.in_zone(host.zone).all(|other| !means(wish, wish.app, other)),
            }
            // Those who stand there may not want it beside them.
            && self.on(at).all(|other| !means(other, other.app, wish) || other.apart != Some(0))
            && self.in_zone(host.zone).all(|other| !means(other, other.app, wish) || other.apart != Some(1))
            && wish.near.is_none_or(near_somebody)
            && wish.spread.is_none_or(|least| fewest(least).is_none_or(|fewest| count(host.zone) < fewest + 1))
    }
}

fn node(name: usize, host: &Host) -> Arc<Node> {
    let taints = if host.tainted { json!([{"key": "t", "effect": "NoSchedule"}]) } else { json!([]) };
    parse(json!({
        "metadata": {"name": format!("n{name}"), "labels": {
            "kubernetes.io/hostname": format!("n{name}"), "zone": format!("z{}", host.zone), "disk": host.disk.to_string()}},
        "spec": {"taints": taints, "unschedulable": host.cordoned},
        "status": {"allocatable": {"cpu": host.cpu.to_string(), "memory": "100Gi", "pods": "110"}},
    }))
}

fn pod(name: usize, wish: &Wish, at: Option<usize>) -> Arc<Pod> {
    let app = |app: usize| json!({"matchLabels": {"app": format!("a{app}")}});
    let term = |key: &str, of: usize| {
        let mut term = json!({"topologyKey": key, "labelSelector": app(of)});
        if let (Some(term), Value::Object(reach)) = (term.as_object_mut(), wish.reach.json()) {
            term.extend(reach);
        }
        json!([term])
    };
    let mut spec = json!({
        "priority": wish.priority, "schedulerName": "default-scheduler",
        "containers": [{"name": "c", "resources": {"requests": {"cpu": wish.cpu.to_string()}}}],
    });
    if wish.disk {
        spec["nodeSelector"] = json!({"disk": "true"});
    }
    if wish.tolerates {
        spec["tolerations"] = json!([{"key": "t", "operator": "Exists"}]);
    }
    if wish.port {
        spec["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 80}]);
    }
    if let Some(scope) = wish.apart {
        let key = ["kubernetes.io/hostname", "zone"][scope];
        spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = term(key, wish.app);
    }
    if let Some(near) = wish.near {
        spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = term("zone", near);
    }
    if let Some(least) = wish.spread {
        let taints = if wish.honors_taints { "Honor" } else { "Ignore" };
        spec["topologySpreadConstraints"] = json!([{"maxSkew": 1, "topologyKey": "zone", "minDomains": least,
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": app(wish.app), "nodeTaintsPolicy": taints}]);
    }
    if let Some(host) = at {
        spec["nodeName"] = format!("n{host}").into();
    }
    let labels = json!({"app": format!("a{}", wish.app)});
    parse(
        json!({"metadata": {"name": format!("p{name}"), "namespace": format!("d{}", wish.namespace), "uid": format!("p{name}"), "labels": labels},
        "spec": spec, "status": {"phase": "Pending"}}),
    )
}

fn namespace(name: usize, team: usize) -> Arc<Namespace> {
    parse(json!({"metadata": {"name": format!("d{name}"), "labels": {"team": format!("t{team}")}}}))
}

fn parse<K: serde::de::DeserializeOwned>(value: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(value).expect("well formed"))
}

fn number(name: &str) -> usize {
    name[1..].parse().expect("a number")
}

/// An engine and the truth beside it.
struct Pair {
    engine: Engine,
    model: Model,
    now: Instant,
    serial: usize,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut engine = Engine::new(Config::default(), seed);
        let (model, now) = (Model::default(), Instant::now());
        for (name, team) in model.teams.iter().enumerate() {
            engine.update(&Update::Namespace(Delta { old: None, new: Some(namespace(name, *team)) }), now);
        }
        Self { engine, model, now, serial: 0 }
    }

    fn set_pod(&mut self, name: usize, old: Option<Arc<Pod>>, new: Option<Arc<Pod>>) {
        assert!(old.is_some() || new.is_some(), "p{name} is news of nothing");
        self.engine.update(&Update::Pod(Delta { old, new }), self.now);
    }

    fn add_pod(&mut self, wish: Wish, at: Option<usize>) -> usize {
        let name = self.serial;
        self.serial += 1;
        self.model.pods.insert(name, (wish, at));
        self.set_pod(name, None, Some(pod(name, &wish, at)));
        name
    }

    fn remove_pod(&mut self, name: usize) {
        let (wish, at) = self.model.pods.remove(&name).expect("it is there");
        self.set_pod(name, Some(pod(name, &wish, at)), None);
    }

    fn set_host(&mut self, name: usize, host: Option<Host>) {
        let old = self.model.hosts.get(&name).map(|host| node(name, host));
        let new = host.as_ref().map(|host| node(name, host));
        match host {
            Some(host) => drop(self.model.hosts.insert(name, host)),
            None => drop(self.model.hosts.remove(&name)),
        }
        if old.is_some() || new.is_some() {
            self.engine.update(&Update::Node(Delta { old, new }), self.now);
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Host(name, host) => {
                // A zone is a property of a host for good, or the model would have to move what stands there.
                let zone = self.model.hosts.get(name).map_or(host.zone, |old| old.zone);
                self.set_host(*name, Some(Host { zone, ..*host }));
            }
            Op::HostGone(name) => {
                let on: Vec<usize> =
                    self.model.pods.iter().filter(|(_, (_, at))| *at == Some(*name)).map(|(pod, _)| *pod).collect();
                on.into_iter().for_each(|pod| self.remove_pod(pod));
                self.set_host(*name, None);
            }
            Op::Pod(wish) => drop(self.add_pod(*wish, None)),
            Op::PodGone(nth) => {
                let names: Vec<usize> = self.model.pods.keys().copied().collect();
                if let Some(name) = names.get(nth % names.len().max(1)) {
                    self.remove_pod(*name);
                }
            }
            Op::Team(name, team) => {
                let old = std::mem::replace(&mut self.model.teams[*name], *team);
                let delta = Delta { old: Some(namespace(*name, old)), new: Some(namespace(*name, *team)) };
                self.engine.update(&Update::Namespace(delta), self.now);
            }
        }
    }

    /// Schedules until nobody is ready, past every back-off; each verdict is held against the model's.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.now += BACKOFF;
            while let Some(action) = self.engine.step(self.now) {
                match action {
                    Action::Bind(bind) => {
                        let (name, host) = (number(bind.pod()), number(&bind.node));
                        let (wish, _) = self.model.pods[&name];
                        assert!(self.model.fits(&wish, host), "p{name} {wish:?} does not fit n{host}");
                        self.model.pods.insert(name, (wish, Some(host)));
                        self.engine.bound(&bind, true, self.now);
                        self.set_pod(name, Some(pod(name, &wish, None)), Some(pod(name, &wish, Some(host))));
                    }
                    Action::Report(report) => {
                        let name = number(report.pod());
                        let (wish, _) = self.model.pods[&name];
                        let fits: Vec<&usize> =
                            self.model.hosts.keys().filter(|host| self.model.fits(&wish, **host)).collect();
                        assert!(fits.is_empty(), "p{name} {wish:?} fits {fits:?}, but: {}", report.message);
                        assert_eq!(report.victims().count(), 0, "all are equally important");
                    }
                }
            }
        }
        // Events alone must have woken whoever can be placed now.
        for (name, (wish, at)) in &self.model.pods {
            let fits = self.model.hosts.keys().find(|host| at.is_none() && self.model.fits(wish, **host));
            assert!(fits.is_none(), "p{name} {wish:?} sleeps, though it fits {fits:?}");
        }
    }
}

fn wish() -> impl Strategy<Value = Wish> {
    let kind = prop_oneof![
        4 => Just((None, None, None)),
        2 => (0..2_usize).prop_map(|scope| (Some(scope), None, None)),
        2 => (0..3_usize).prop_map(|app| (None, Some(app), None)),
        2 => (1..5_i32).prop_map(|least| (None, None, Some(least))),
    ];
    let reach = prop_oneof![
        2 => Just(Reach::Own),
        1 => (0..2_usize).prop_map(Reach::Team),
        1 => (0..NAMESPACES, 0..2_usize).prop_map(|(name, team)| Reach::Named(name, team)),
        1 => Just(Reach::All),
    ];
    let likes = (prop::bool::weighted(0.2), prop::bool::weighted(0.3), prop::bool::weighted(0.1), any::<bool>());
    (0..NAMESPACES, reach, 0..3_usize, 1..4_i64, likes, kind).prop_map(
        |(namespace, reach, app, cpu, (disk, tolerates, port, honors_taints), (apart, near, spread))| Wish {
            namespace,
            reach,
            app,
            cpu,
            disk,
            tolerates,
            port,
            apart,
            near,
            spread,
            honors_taints,
            ..MODEST
        },
    )
}

fn host() -> impl Strategy<Value = Host> {
    (0..ZONES, 2..8_i64, any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.1))
        .prop_map(|(zone, cpu, disk, tainted, cordoned)| Host { zone, cpu, disk, tainted, cordoned })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..6_usize, host()).prop_map(|(name, host)| Op::Host(name, host)),
        1 => (0..6_usize).prop_map(Op::HostGone),
        8 => wish().prop_map(Op::Pod),
        3 => (0..64_usize).prop_map(Op::PodGone),
        1 => (0..NAMESPACES, 0..2_usize).prop_map(|(name, team)| Op::Team(name, team)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_verdict_is_the_naive_one_and_nobody_sleeps_who_could_run(ops in prop::collection::vec(op(), 1..60), seed: u64) {
        let mut pair = Pair::new(seed);
        for op in &ops {
            pair.apply(op);
            pair.settle();
        }
    }

    #[test]
    fn preemption_takes_the_fewest_of_the_least_important(
        hosts in prop::collection::vec(3..9_i64, 1..5),
        standing in prop::collection::vec((1..4_i64, 0..4_i32, 0..8_usize), 1..20),
        cpu in 1..9_i64,
    ) {
        let mut pair = Pair::new(7);
        for (name, cpu) in hosts.iter().enumerate() {
            pair.set_host(name, Some(Host { zone: 0, cpu: *cpu, disk: false, tainted: false, cordoned: false }));
        }
        for (cpu, priority, at) in standing {
            let (wish, at) = (Wish { cpu, priority, ..MODEST }, at % hosts.len());
            if pair.model.fits(&wish, at) {
                pair.add_pod(wish, Some(at));
            }
        }
        let wish = Wish { cpu, priority: 2, ..MODEST };
        let name = pair.add_pod(wish, None);
        let lower = |model: &Model, host: usize| model.on(host).filter(|other| other.priority < 2).map(|other| other.cpu).sum::<i64>();
        let used = |model: &Model, host: usize| model.on(host).map(|other| other.cpu).sum::<i64>();
        let possible = (0..hosts.len()).any(|host| used(&pair.model, host) - lower(&pair.model, host) + cpu <= hosts[host]);
        match pair.engine.step(pair.now).expect("a verdict") {
            Action::Bind(bind) => prop_assert!(pair.model.fits(&wish, number(&bind.node))),
            Action::Report(report) => {
                prop_assert!((0..hosts.len()).all(|host| !pair.model.fits(&wish, host)), "p{} fits: {}", name, report.message);
                let victims: Vec<usize> = report.victims().map(number).collect();
                prop_assert_eq!(victims.is_empty(), !possible, "{}", report.message);
                let places: BTreeSet<Option<usize>> = victims.iter().map(|pod| pair.model.pods[pod].1).collect();
                prop_assert!(places.len() <= 1, "victims on {:?}", places);
                if let Some(Some(host)) = places.first() {
                    prop_assert!(victims.iter().all(|pod| pair.model.pods[pod].0.priority < 2));
                    let freed: i64 = victims.iter().map(|pod| pair.model.pods[pod].0.cpu).sum();
                    let after = used(&pair.model, *host) - freed + cpu;
                    prop_assert!(after <= hosts[*host], "still too full");
                    for pod in &victims {
                        prop_assert!(after + pair.model.pods[pod].0.cpu > hosts[*host], "p{} need not leave", pod);
                    }
                }
            }
        }
    }
}

/// Words that users and tools look for.
#[test]
fn messages_are_the_known_ones() {
    let usual = Wish { cpu: 4, ..MODEST };
    let mut pair = Pair::new(1);
    let message = |pair: &mut Pair| match pair.engine.step(pair.now).expect("a verdict") {
        Action::Report(report) => report.message,
        Action::Bind(bind) => panic!("bound to {}", bind.node),
    };
    pair.add_pod(usual, None);
    assert_eq!(message(&mut pair), "no nodes available to schedule pods");
    let small = Host { zone: 0, cpu: 2, disk: false, tainted: false, cordoned: false };
    for (name, host) in
        [small, Host { tainted: true, ..small }, Host { cordoned: true, ..small }].into_iter().enumerate()
    {
        pair.set_host(name, Some(host));
    }
    pair.add_pod(Wish { app: 1, ..usual }, None);
    pair.now += BACKOFF;
    let said = message(&mut pair);
    let wanted = "0/3 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable.";
    assert!(said.starts_with(wanted), "{said}");
    assert!(said.contains("preemption: 0/3 nodes are available: "), "{said}");
}

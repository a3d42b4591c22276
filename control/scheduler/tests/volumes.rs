//! Where pods with claims for volumes may go, against a naive reading of what the volumes allow, while all of it changes.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Delta;
use coracle_scheduler::{Action, Config, Engine, Update};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::{CSINode, StorageClass};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

/// Longest back-off.
const BACKOFF: Duration = Duration::from_secs(10);
const ZONES: usize = 2;
/// Claims that are bound to volumes of a driver, `c0`, `c1`, …; beside them are as many that wait for local volumes, `w0`, ….
const CLAIMS: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Host {
    zone: usize,
    /// How many volumes of the driver it takes.
    limit: Option<usize>,
}

/// A claim that is bound.
#[derive(Clone, Copy, Debug)]
struct Claim {
    /// Where its volume can be reached.
    zone: Option<usize>,
    /// For one pod at a time.
    exclusive: bool,
}

/// What a pod asks for: claims that are bound, and sizes of ones that are not.
#[derive(Clone, Debug)]
struct Wish {
    bound: BTreeSet<usize>,
    waiting: Vec<i64>,
}

#[derive(Clone, Debug)]
enum Op {
    Host(usize, Option<Host>),
    Claim(usize, Option<Claim>),
    /// A local volume, by its size.
    Local(usize, Option<(usize, i64)>),
    Pod(Wish),
    PodGone(usize),
}

#[derive(Default)]
struct Model {
    hosts: BTreeMap<usize, Host>,
    claims: BTreeMap<usize, Claim>,
    locals: BTreeMap<usize, (usize, i64)>,
    pods: BTreeMap<usize, (Wish, Option<usize>)>,
}

impl Model {
    fn fits(&self, wish: &Wish, at: usize) -> bool {
        let host = self.hosts[&at];
        let placed = || self.pods.values().filter_map(|(other, at)| Some((other, (*at)?)));
        let here: BTreeSet<usize> =
            placed().filter(|(_, place)| *place == at).flat_map(|(other, _)| other.bound.clone()).collect();
        let new = wish.bound.difference(&here).count();
        let free: Vec<i64> =
            self.locals.values().filter(|(zone, _)| *zone == host.zone).map(|(_, size)| *size).collect();
        wish.bound.iter().all(|claim| {
            self.claims.get(claim).is_some_and(|known| {
                known.zone.is_none_or(|zone| zone == host.zone)
                    && !(known.exclusive && placed().any(|(other, _)| other.bound.contains(claim)))
            })
        }) && host.limit.is_none_or(|limit| new == 0 || here.len() + new <= limit)
            && can_share_out(&wish.waiting, &free)
    }
}

/// Whether each of these can have a volume of its own that is large enough.
fn can_share_out(wanted: &[i64], free: &[i64]) -> bool {
    let Some((first, rest)) = wanted.split_first() else { return true };
    (0..free.len()).any(|at| {
        let others: Vec<i64> =
            free.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, size)| *size).collect();
        free[at] >= *first && can_share_out(rest, &others)
    })
}

fn parse<K: DeserializeOwned>(value: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(value).expect("well formed"))
}

fn node(name: usize, host: &Host) -> Arc<Node> {
    parse(json!({"metadata": {"name": format!("n{name}"), "labels": {"zone": format!("z{}", host.zone)}},
        "status": {"allocatable": {"cpu": "100", "pods": "110"}}}))
}

fn csi_node(name: usize, host: &Host) -> Arc<CSINode> {
    let driver =
        json!({"name": "csi.test", "nodeID": "x", "allocatable": host.limit.map(|count| json!({"count": count}))});
    parse(json!({"metadata": {"name": format!("n{name}")}, "spec": {"drivers": [driver]}}))
}

fn in_zone(zone: usize) -> Value {
    let zone = json!({"key": "zone", "operator": "In", "values": [format!("z{zone}")]});
    json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [zone]}]}})
}

fn volume(name: usize, claim: &Claim) -> Arc<PersistentVolume> {
    let owner = json!({"namespace": "d", "name": format!("c{name}"), "uid": format!("c{name}")});
    parse(json!({"metadata": {"name": format!("v{name}")}, "status": {"phase": "Bound"}, "spec": {
        "csi": {"driver": "csi.test", "volumeHandle": format!("v{name}")}, "claimRef": owner,
        "capacity": {"storage": "1"}, "nodeAffinity": claim.zone.map(in_zone)}}))
}

fn bound_claim(name: usize, claim: &Claim) -> Arc<PersistentVolumeClaim> {
    let mode = if claim.exclusive { "ReadWriteOncePod" } else { "ReadWriteMany" };
    parse(json!({"metadata": {"name": format!("c{name}"), "namespace": "d", "uid": format!("c{name}"),
        "annotations": {"pv.kubernetes.io/bind-completed": "yes"}}, "status": {"phase": "Bound"},
        "spec": {"volumeName": format!("v{name}"), "accessModes": [mode]}}))
}

fn local(name: usize, (zone, size): (usize, i64)) -> Arc<PersistentVolume> {
    parse(json!({"metadata": {"name": format!("l{name}")}, "status": {"phase": "Available"}, "spec": {
        "local": {"path": "/l"}, "storageClassName": "local", "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": size.to_string()}, "nodeAffinity": in_zone(zone)}}))
}

fn waiting_claim(pod: usize, at: usize, size: i64) -> Arc<PersistentVolumeClaim> {
    let name = format!("w{pod}-{at}");
    parse(json!({"metadata": {"name": name, "namespace": "d", "uid": name}, "status": {"phase": "Pending"}, "spec": {
        "storageClassName": "local", "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size.to_string()}}}}))
}

fn pod(name: usize, wish: &Wish, at: Option<usize>) -> Arc<Pod> {
    let bound = wish.bound.iter().map(|claim| format!("c{claim}"));
    let claims = bound.chain((0..wish.waiting.len()).map(|at| format!("w{name}-{at}")));
    let volume = |claim: String| json!({"name": claim, "persistentVolumeClaim": {"claimName": claim}});
    let volumes: Vec<Value> = claims.map(volume).collect();
    let at = at.map(|host| format!("n{host}"));
    parse(json!({"metadata": {"name": format!("p{name}"), "namespace": "d", "uid": format!("p{name}")},
        "spec": {"nodeName": at, "volumes": volumes, "containers": [{"name": "c"}]}, "status": {"phase": "Pending"}}))
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
        let (mut engine, now) = (Engine::new(Config::default(), seed), Instant::now());
        let class: Arc<StorageClass> = parse(json!({"metadata": {"name": "local"},
            "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}));
        engine.update(&Update::StorageClass(Delta { old: None, new: Some(class) }), now);
        Self { engine, model: Model::default(), now, serial: 0 }
    }

    fn update(&mut self, update: &Update) {
        self.engine.update(update, self.now);
    }

    fn set_pod(&mut self, old: Option<Arc<Pod>>, new: Option<Arc<Pod>>) {
        self.update(&Update::Pod(Delta { old, new }));
    }

    fn remove_pod(&mut self, name: usize) {
        let (wish, at) = self.model.pods.remove(&name).expect("it is there");
        self.set_pod(Some(pod(name, &wish, at)), None);
        for (at, size) in wish.waiting.iter().enumerate() {
            let old = Some(waiting_claim(name, at, *size));
            self.update(&Update::Claim(Delta { old, new: None }));
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Host(name, host) => {
                // A zone is a property of a host for good.
                let before = self.model.hosts.get(name).copied();
                let host = host.map(|host| Host { zone: before.map_or(host.zone, |old| old.zone), ..host });
                if host.is_none() {
                    let on = self.model.pods.iter().filter(|(_, (_, at))| *at == Some(*name));
                    on.map(|(pod, _)| *pod).collect::<Vec<_>>().into_iter().for_each(|pod| self.remove_pod(pod));
                }
                let of = |host: &Option<Host>| host.as_ref().map(|host| (node(*name, host), csi_node(*name, host)));
                let ((old, old_csi), (new, new_csi)) = (of(&before).unzip(), of(&host).unzip());
                match host {
                    Some(host) => drop(self.model.hosts.insert(*name, host)),
                    None => drop(self.model.hosts.remove(name)),
                }
                if old.is_some() || new.is_some() {
                    self.update(&Update::CsiNode(Delta { old: old_csi, new: new_csi }));
                    self.update(&Update::Node(Delta { old, new }));
                }
            }
            Op::Claim(name, claim) => {
                // Of one that is used nothing changes.
                let used = self.model.pods.values().any(|(wish, at)| at.is_some() && wish.bound.contains(name));
                let before = self.model.claims.get(name).copied();
                if used || (before.is_none() && claim.is_none()) {
                    return;
                }
                let volumes =
                    Delta { old: before.map(|old| volume(*name, &old)), new: claim.map(|new| volume(*name, &new)) };
                let claims = Delta {
                    old: before.map(|old| bound_claim(*name, &old)),
                    new: claim.map(|new| bound_claim(*name, &new)),
                };
                match claim {
                    Some(claim) => drop(self.model.claims.insert(*name, *claim)),
                    None => drop(self.model.claims.remove(name)),
                }
                self.update(&Update::Volume(volumes));
                self.update(&Update::Claim(claims));
            }
            Op::Local(name, new) => {
                let before = self.model.locals.get(name).copied();
                if before.is_none() && new.is_none() {
                    return;
                }
                match new {
                    Some(new) => drop(self.model.locals.insert(*name, *new)),
                    None => drop(self.model.locals.remove(name)),
                }
                let delta = Delta { old: before.map(|old| local(*name, old)), new: new.map(|new| local(*name, new)) };
                self.update(&Update::Volume(delta));
            }
            Op::Pod(wish) => {
                let name = self.serial;
                self.serial += 1;
                for (at, size) in wish.waiting.iter().enumerate() {
                    self.update(&Update::Claim(Delta { old: None, new: Some(waiting_claim(name, at, *size)) }));
                }
                self.model.pods.insert(name, (wish.clone(), None));
                self.set_pod(None, Some(pod(name, wish, None)));
            }
            Op::PodGone(nth) => {
                let names: Vec<usize> = self.model.pods.keys().copied().collect();
                if let Some(name) = names.get(nth % names.len().max(1)) {
                    self.remove_pod(*name);
                }
            }
        }
    }

    /// Schedules until nobody is ready, past every back-off; each verdict is held against the model's.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.now += BACKOFF;
            while let Some(action) = self.engine.step(self.now) {
                let number = |name: &str| name[1..].parse::<usize>().expect("a number");
                match action {
                    Action::Bind(bind) => {
                        let (name, host) = (number(bind.pod()), number(&bind.node));
                        let wish = self.model.pods[&name].0.clone();
                        assert!(self.model.fits(&wish, host), "p{name} {wish:?} does not fit n{host}");
                        self.model.pods.insert(name, (wish.clone(), Some(host)));
                        self.engine.bound(&bind, true, self.now);
                        self.set_pod(Some(pod(name, &wish, None)), Some(pod(name, &wish, Some(host))));
                        if !wish.waiting.is_empty() {
                            // Which volumes its claims got is not told: they are given back at once.
                            self.remove_pod(name);
                        }
                    }
                    Action::Report(report) => {
                        let wish = &self.model.pods[&number(report.pod())].0;
                        let fits = self.model.hosts.keys().find(|host| self.model.fits(wish, **host));
                        assert!(fits.is_none(), "{} {wish:?} fits {fits:?}, but: {}", report.pod(), report.message);
                    }
                }
            }
        }
        for (name, (wish, at)) in &self.model.pods {
            let fits = self.model.hosts.keys().find(|host| at.is_none() && self.model.fits(wish, **host));
            assert!(fits.is_none(), "p{name} {wish:?} sleeps, though it fits {fits:?}");
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let host = (0..ZONES, prop::option::of(0..3_usize)).prop_map(|(zone, limit)| Host { zone, limit });
    let claim = (prop::option::of(0..ZONES), any::<bool>()).prop_map(|(zone, exclusive)| Claim { zone, exclusive });
    let wish = (prop::collection::btree_set(0..CLAIMS, 0..3), prop::collection::vec(1..4_i64, 0..3));
    prop_oneof![
        3 => (0..4_usize, prop::option::weighted(0.8, host)).prop_map(|(name, host)| Op::Host(name, host)),
        3 => (0..CLAIMS, prop::option::weighted(0.8, claim)).prop_map(|(name, claim)| Op::Claim(name, claim)),
        3 => (0..5_usize, prop::option::weighted(0.7, (0..ZONES, 1..5_i64))).prop_map(|(name, local)| Op::Local(name, local)),
        6 => wish.prop_map(|(bound, waiting)| Op::Pod(Wish { bound, waiting })),
        2 => (0..64_usize).prop_map(Op::PodGone),
    ]
}

proptest! {
    #[test]
    fn pods_go_where_their_volumes_are_or_can_be(ops in prop::collection::vec(op(), 1..50), seed: u64) {
        let mut pair = Pair::new(seed);
        for op in &ops {
            pair.apply(op);
            pair.settle();
        }
    }
}

//! PodTopologySpread: pods that a selector counts are spread over the domains of a topology, strictly or as far as it goes.
//!
//! Counts are kept by domain and follow each pod that comes or goes; a verdict on a node is a look into a table.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cause, Context, Event, MAX_SCORE, node_affinity, taints};
use crate::state::selector::Selector;
use crate::state::{Cache, Change, Cluster, Column, NodeState, PodState, Shape, SpreadConstraint};

const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

static NO_TOPOLOGY: Cause = Cause {
    words: "node(s) didn't match pod topology spread constraints (missing required label)",
    unresolvable: true,
};
static SKEWED: Cause = Cause { words: "node(s) didn't match pod topology spread constraints", unresolvable: false };

/// One constraint with its counts.
#[derive(Debug)]
struct Counted {
    constraint: SpreadConstraint,
    column: Arc<Column>,
    /// Whether the pods of the node in each slot count.
    eligible: Vec<bool>,
    /// Pods by domain; `None` where no node of the domain is eligible.
    counts: Vec<Option<i64>>,
    /// How many domains have each count; kept for strict constraints.
    histogram: BTreeMap<i64, usize>,
    domains: usize,
    /// The fewest pods that any domain has; 0 while there are fewer domains than wanted.
    fewest: i64,
    /// 1 if the pod counts itself.
    own: i64,
}

impl Counted {
    fn counts_pod(&self, namespace: &str, other: &Shape) -> bool {
        *other.namespace == *namespace
            && self.constraint.selector.as_ref().is_some_and(|s| !s.is_everything() && s.matches(&other.labels))
    }

    fn add(&mut self, slot: u32, times: i64) {
        if !self.eligible[slot as usize] {
            return;
        }
        if let Some(count) = &mut self.counts[self.column.domains[slot as usize] as usize] {
            let before = *count;
            *count += times;
            if self.constraint.hard {
                move_one(&mut self.histogram, before, before + times);
                self.find_fewest();
            }
        }
    }

    fn find_fewest(&mut self) {
        let enough = self.domains >= usize::try_from(self.constraint.min_domains).unwrap_or_default();
        let least = self.histogram.first_key_value().map_or(i64::from(i32::MAX), |(count, _)| *count);
        self.fewest = if enough { least } else { 0 };
    }
}

fn move_one(histogram: &mut BTreeMap<i64, usize>, from: i64, to: i64) {
    if let Some(domains) = histogram.get_mut(&from) {
        *domains -= 1;
        if *domains == 0 {
            histogram.remove(&from);
        }
    }
    *histogram.entry(to).or_default() += 1;
}

/// The constraints of one shape.
#[derive(Debug)]
pub(crate) struct Spread {
    counted: Vec<Counted>,
    /// Nodes without one of the topologies earn nothing; not so for default constraints.
    strict_topology: bool,
}

/// The constraints for pods that state none (`defaultConstraints`, or the built-in ones), with the selector of the
/// Services that select the pod and of its owner; none for pods that belong to nothing.
pub(crate) fn default_constraints(pod: &Shape, context: &Context<'_>) -> Vec<SpreadConstraint> {
    let Some(selector) = owners_selector(pod, context.cluster) else {
        return Vec::new();
    };
    let built_in = |key: &str, max_skew| SpreadConstraint {
        topology_key: key.into(),
        max_skew,
        min_domains: 1,
        hard: false,
        selector: None,
        honors_affinity: true,
        honors_taints: false,
    };
    let constraints = context.args.default_constraints.clone();
    let mut constraints = constraints.unwrap_or_else(|| vec![built_in(HOSTNAME, 3), built_in(ZONE, 5)]);
    for constraint in &mut constraints {
        constraint.selector = Some(selector.clone());
    }
    constraints
}

fn owners_selector(pod: &Shape, cluster: &Cluster) -> Option<Selector> {
    let mut all = Selector::default();
    for service in cluster.services.list(&pod.namespace) {
        let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()).filter(|map| !map.is_empty());
        let Some(selector) = selector.map(|map| Selector::of_map(map.iter())) else { continue };
        if selector.matches(&pod.labels) {
            all.join(selector);
        }
    }
    if let Some((kind, name)) = &pod.owner {
        let namespace = &pod.namespace;
        let own = match kind.as_str() {
            "ReplicaSet" => {
                let set = cluster.replica_sets.get(namespace, name);
                set.and_then(|set| set.spec.as_ref()).map(|spec| Selector::new(&spec.selector))
            }
            "StatefulSet" => {
                let set = cluster.stateful_sets.get(namespace, name);
                set.and_then(|set| set.spec.as_ref()).map(|spec| Selector::new(&spec.selector))
            }
            "ReplicationController" => {
                let controller = cluster.replication_controllers.get(namespace, name);
                let selector = controller.and_then(|controller| controller.spec.as_ref()?.selector.as_ref());
                selector.map(|map| Selector::of_map(map.iter()))
            }
            _ => None,
        };
        if let Some(own) = own {
            all.join(own);
        }
    }
    (!all.is_everything()).then_some(all)
}

impl Spread {
    /// Counts anew; `None` if the pod has no constraints.
    pub(crate) fn new(pod: &Shape, constraints: Vec<SpreadConstraint>, cache: &mut Cache) -> Option<Self> {
        if constraints.is_empty() {
            return None;
        }
        let strict_topology = !pod.spread.is_empty();
        let columns: Vec<_> = constraints.iter().map(|constraint| cache.column(&constraint.topology_key)).collect();
        let mut counted: Vec<Counted> = Vec::with_capacity(constraints.len());
        for (constraint, column) in constraints.iter().zip(&columns) {
            // A node counts for strict constraints when it has the topologies of all strict ones; likewise for the others.
            let mut needed: Vec<&Column> = Vec::new();
            if constraint.hard || strict_topology {
                let alike = constraints.iter().zip(&columns).filter(|(other, _)| other.hard == constraint.hard);
                needed.extend(alike.map(|(_, column)| &**column));
            }
            needed.push(column);
            let mut eligible = vec![false; cache.slots()];
            let mut counts = vec![None; column.count];
            for (slot, node) in cache.nodes() {
                let counts_here = needed.iter().all(|column| column.of(slot) != 0)
                    && (!constraint.honors_affinity || node_affinity::matches(pod, node))
                    && (!constraint.honors_taints || tolerated(pod, node));
                eligible[slot as usize] = counts_here;
                if counts_here {
                    counts[column.of(slot)] = Some(0);
                }
            }
            let domains = counts.iter().flatten().count();
            let histogram = BTreeMap::from([(0, domains)]);
            let own = i64::from(constraint.selector.as_ref().is_some_and(|s| s.matches(&pod.labels)));
            let (constraint, column) = (constraint.clone(), column.clone());
            counted.push(Counted { constraint, column, eligible, counts, histogram, domains, fewest: 0, own });
        }
        let mut spread = Self { counted, strict_topology };
        for constraint in &mut spread.counted {
            constraint.histogram.retain(|_, domains| *domains > 0);
            constraint.find_fewest();
            for (slot, other) in cache.pods_of(&pod.namespace) {
                if !other.is_terminating && constraint.counts_pod(&pod.namespace, &other.shape) {
                    constraint.add(slot, 1);
                }
            }
        }
        Some(spread)
    }

    /// Follows a pod that came or went.
    pub(crate) fn apply(&mut self, pod: &Shape, change: &Change) {
        if change.pod.is_terminating {
            return;
        }
        for constraint in &mut self.counted {
            if constraint.counts_pod(&pod.namespace, &change.pod.shape) {
                constraint.add(change.slot, if change.came { 1 } else { -1 });
            }
        }
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.counted.iter().any(|counted| counted.constraint.hard)
    }

    pub(crate) fn filter(&self, slot: u32) -> Result<(), &'static Cause> {
        for counted in self.counted.iter().filter(|counted| counted.constraint.hard) {
            let domain = counted.column.of(slot);
            if domain == 0 {
                return Err(&NO_TOPOLOGY);
            }
            let count = counted.counts[domain].unwrap_or_default();
            if count + counted.own - counted.fewest > i64::from(counted.constraint.max_skew) {
                return Err(&SKEWED);
            }
        }
        Ok(())
    }

    /// Marks for the nodes that can take the pod; `None` if there are no lenient constraints.
    pub(crate) fn score(&self, slots: &[u32]) -> Option<Vec<i64>> {
        let soft: Vec<&Counted> = self.counted.iter().filter(|counted| !counted.constraint.hard).collect();
        if soft.is_empty() {
            return None;
        }
        let ignored = |slot: u32| self.strict_topology && soft.iter().any(|counted| counted.column.of(slot) == 0);
        let rated = slots.iter().filter(|slot| !ignored(**slot)).count();
        let mut sums = vec![0.0; slots.len()];
        for counted in &soft {
            let domains = if *counted.column.key == *HOSTNAME {
                rated
            } else {
                let mut seen = vec![false; counted.column.count];
                let mut domains = 0;
                for slot in slots.iter().filter(|slot| !ignored(**slot)) {
                    let domain = counted.column.of(*slot);
                    if domain != 0 && !std::mem::replace(&mut seen[domain], true) {
                        domains += 1;
                    }
                }
                domains
            };
            let weight = (domains as f64 + 2.0).ln();
            for (sum, slot) in sums.iter_mut().zip(slots) {
                let domain = counted.column.of(*slot);
                if domain != 0 {
                    let count = counted.counts[domain].unwrap_or_default();
                    *sum += count as f64 * weight + f64::from(counted.constraint.max_skew - 1);
                }
            }
        }
        let raw: Vec<i64> = sums.iter().map(|sum| sum.round() as i64).collect();
        let counted = || slots.iter().zip(&raw).filter(|(slot, _)| !ignored(**slot)).map(|(_, raw)| *raw);
        let (least, most) = (counted().min().unwrap_or_default(), counted().max().unwrap_or_default());
        let mark = |(slot, raw): (&u32, &i64)| match most {
            _ if ignored(*slot) => 0,
            0 => MAX_SCORE,
            most => MAX_SCORE * (most + least - raw) / most,
        };
        Some(slots.iter().zip(&raw).map(mark).collect())
    }
}

fn tolerated(pod: &Shape, node: &NodeState) -> bool {
    node.taints().iter().all(|taint| {
        taint.effect == "PreferNoSchedule"
            || taints::tolerates(pod, &taint.key, taint.value.as_deref().unwrap_or_default(), &taint.effect)
    })
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, _: &Context<'_>) -> bool {
    match event {
        Event::Node(node) => pod.shape.spread.iter().all(|c| !c.hard || node.label(&c.topology_key).is_some()),
        Event::NodeGone => true,
        Event::PodCame(other) | Event::PodLeft(other, _) => {
            let counts = |c: &SpreadConstraint| c.selector.as_ref().is_some_and(|s| s.matches(&other.shape.labels));
            other.shape.namespace == pod.shape.namespace
                && pod.shape.spread.iter().filter(|constraint| constraint.hard).any(counts)
        }
        Event::Storage | Event::Devices | Event::Namespace => false,
    }
}

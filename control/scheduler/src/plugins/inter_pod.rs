//! InterPodAffinity: pods that want to be, or must not be, in one domain of a topology with others; pods that stand
//! already have their say as well.
//!
//! Counts are kept by domain and follow each pod that comes or goes; a verdict on a node is a look into a table.

use std::sync::Arc;

use super::{Cause, Context, Event, MAX_SCORE};
use crate::config::Args;
use crate::state::{Cache, Change, Cluster, Column, PodState, PodTerm, Shape};

static NOT_NEAR: Cause = Cause { words: "node(s) didn't match pod affinity rules", unresolvable: true };
static TOO_NEAR: Cause = Cause { words: "node(s) didn't match pod anti-affinity rules", unresolvable: false };
static NOT_WANTED: Cause =
    Cause { words: "node(s) didn't satisfy existing pods anti-affinity rules", unresolvable: false };

/// Numbers by domain of one topology key.
#[derive(Debug)]
struct Tally {
    column: Arc<Column>,
    by_domain: Vec<i64>,
}

impl Tally {
    fn new(key: &Arc<str>, cache: &mut Cache) -> Self {
        let column = cache.column(key);
        Self { by_domain: vec![0; column.count], column }
    }

    /// Adds to the domain of a node; says whether it has one.
    fn add(&mut self, slot: u32, amount: i64) -> bool {
        let domain = self.column.of(slot);
        if domain != 0 {
            self.by_domain[domain] += amount;
        }
        domain != 0
    }

    fn at(&self, slot: u32) -> Option<i64> {
        let domain = self.column.of(slot);
        (domain != 0).then(|| self.by_domain[domain])
    }
}

/// One tally a topology key.
#[derive(Debug, Default)]
struct Tallies(Vec<Tally>);

impl Tallies {
    fn add(&mut self, key: &Arc<str>, slot: u32, amount: i64, cache: &mut Cache) {
        let at = match self.0.iter().position(|tally| tally.column.key == *key) {
            Some(at) => at,
            None => {
                self.0.push(Tally::new(key, cache));
                self.0.len() - 1
            }
        };
        self.0[at].add(slot, amount);
    }

    fn sum(&self, slot: u32) -> i64 {
        self.0.iter().filter_map(|tally| tally.at(slot)).sum()
    }
}

/// What pods on nodes mean to the pods of one shape.
#[derive(Debug)]
pub(crate) struct InterPod {
    /// For each required term: how many pods that satisfy all of them.
    required: Vec<Tally>,
    /// How many pods there are in all these tallies.
    found: i64,
    /// For each forbidden term: how many pods that match it.
    forbidden: Vec<Tally>,
    /// How many pods forbid pods of this shape.
    forbidding: Tallies,
    /// Weights of preferences of both sides.
    preferred: Tallies,
    /// The pod satisfies its own required terms, so it may be the first.
    is_first: bool,
}

impl InterPod {
    /// Counts anew.
    pub(crate) fn new(pod: &Shape, cache: &mut Cache, cluster: &Cluster, args: &Args) -> Self {
        let mut tally = |terms: &[PodTerm]| -> Vec<Tally> {
            terms.iter().map(|term| Tally::new(&term.topology_key, cache)).collect()
        };
        let labels = cluster.namespace_labels(&pod.namespace);
        let mut state = Self {
            required: tally(&pod.pods.required),
            forbidden: tally(&pod.pods.forbidden),
            found: 0,
            forbidding: Tallies::default(),
            preferred: Tallies::default(),
            is_first: pod.pods.required.iter().all(|term| term.selects(pod, labels)),
        };
        // Pods without terms matter only to a pod that has some.
        let others: Vec<_> = if pod.pods.is_empty() {
            cache.pods_with_terms().map(|(slot, pod)| (slot, pod.clone())).collect()
        } else {
            cache.all_pods().map(|(slot, pod)| (slot, pod.clone())).collect()
        };
        for (slot, other) in others {
            state.apply(pod, &Change { came: true, slot, pod: other }, cache, cluster, args);
        }
        state
    }

    /// Follows a pod that came or went.
    pub(crate) fn apply(&mut self, pod: &Shape, change: &Change, cache: &mut Cache, cluster: &Cluster, args: &Args) {
        let other = &*change.pod.shape;
        if pod.pods.is_empty() && other.pods.is_empty() {
            return;
        }
        let times = if change.came { 1 } else { -1 };
        let slot = change.slot;
        let labels = cluster.namespace_labels(&other.namespace);
        let terms = &pod.pods;
        if !terms.required.is_empty() && terms.required.iter().all(|term| term.selects(other, labels)) {
            for tally in &mut self.required {
                self.found += if tally.add(slot, times) { times } else { 0 };
            }
        }
        for (tally, term) in self.forbidden.iter_mut().zip(&terms.forbidden) {
            if term.selects(other, labels) {
                tally.add(slot, times);
            }
        }
        for (weight, term) in terms.preferred.iter().filter(|(_, term)| term.selects(other, labels)) {
            self.preferred.add(&term.topology_key, slot, weight * times, cache);
        }
        if other.pods.is_empty() {
            return;
        }
        let own_labels = cluster.namespace_labels(&pod.namespace);
        for term in &other.pods.forbidden {
            if term.selects(pod, own_labels) {
                self.forbidding.add(&term.topology_key, slot, times, cache);
            }
        }
        if args.ignores_preferences_of_others && terms.preferred.is_empty() {
            return;
        }
        if args.hard_affinity_weight > 0 {
            for term in other.pods.required.iter().filter(|term| term.selects(pod, own_labels)) {
                self.preferred.add(&term.topology_key, slot, args.hard_affinity_weight * times, cache);
            }
        }
        for (weight, term) in &other.pods.preferred {
            if term.selects(pod, own_labels) {
                self.preferred.add(&term.topology_key, slot, weight * times, cache);
            }
        }
    }

    /// Whether verdicts depend on what stands where.
    pub(crate) fn is_strict(&self) -> bool {
        !self.required.is_empty() || !self.forbidden.is_empty() || !self.forbidding.0.is_empty()
    }

    pub(crate) fn filter(&self, slot: u32) -> Result<(), &'static Cause> {
        let counts = |tally: &Tally| tally.at(slot);
        if self.required.iter().any(|tally| counts(tally).is_none_or(|count| count <= 0)) {
            // The first of a group that wants to be together may go wherever there is the topology.
            let may_be_first = self.found == 0 && self.is_first && self.required.iter().all(|t| counts(t).is_some());
            if !may_be_first {
                return Err(&NOT_NEAR);
            }
        }
        if self.forbidden.iter().any(|tally| counts(tally).is_some_and(|count| count > 0)) {
            return Err(&TOO_NEAR);
        }
        if self.forbidding.0.iter().any(|tally| counts(tally).is_some_and(|count| count > 0)) {
            return Err(&NOT_WANTED);
        }
        Ok(())
    }

    /// Marks for the nodes that can take the pod; `None` if nobody prefers anything.
    pub(crate) fn score(&self, slots: &[u32]) -> Option<Vec<i64>> {
        if self.preferred.0.is_empty() {
            return None;
        }
        let raw: Vec<i64> = slots.iter().map(|slot| self.preferred.sum(*slot)).collect();
        let (least, most) =
            (raw.iter().min().copied().unwrap_or_default(), raw.iter().max().copied().unwrap_or_default());
        let width = most - least;
        let mark = |raw: i64| if width == 0 { 0 } else { MAX_SCORE * (raw - least) / width };
        Some(raw.into_iter().map(mark).collect())
    }
}

pub(super) fn helps(pod: &PodState, event: Event<'_>, context: &Context<'_>) -> bool {
    let labels = |other: &Shape| context.cluster.namespace_labels(&other.namespace);
    match event {
        Event::Node(node) => {
            let mut keys =
                pod.shape.pods.required.iter().chain(&pod.shape.pods.forbidden).map(|term| &term.topology_key);
            pod.shape.pods.required.is_empty() || keys.any(|key| node.label(key).is_some())
        }
        Event::PodCame(other) => {
            pod.shape.pods.required.iter().any(|term| term.selects(&other.shape, labels(&other.shape)))
        }
        Event::PodLeft(other, _) => {
            let own = labels(&pod.shape);
            pod.shape.pods.forbidden.iter().any(|term| term.selects(&other.shape, labels(&other.shape)))
                || other.shape.pods.forbidden.iter().any(|term| term.selects(&pod.shape, own))
                // With the last of its group gone, it may be the first.
                || pod.shape.pods.required.iter().any(|term| term.selects(&other.shape, labels(&other.shape)))
        }
        Event::Namespace => true,
        Event::NodeGone | Event::Storage | Event::Devices => false,
    }
}

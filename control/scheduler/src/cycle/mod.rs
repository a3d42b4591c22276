//! One scheduling cycle: filter, score, choose; and where no node takes the pod, whom to make leave for it.

mod class;
mod failure;
mod preempt;

use std::sync::Arc;

use rand::{Rng, RngExt};

use class::{Class, Classes, Rejected, filter_node, rivals};
pub(crate) use failure::Failure;
pub(crate) use preempt::Candidate;

use crate::config::Profile;
use crate::plugins::{Context, PLUGINS, Rejection, index};
use crate::state::{Cache, Change, Cluster, PodState};

/// What all cycles share.
#[derive(Debug, Default)]
pub(crate) struct Cycles {
    classes: Classes,
    /// Where the next cycle begins among the nodes, so that all get their turn.
    start: usize,
}

/// What a cycle works on.
pub(crate) struct World<'a> {
    pub(crate) cache: &'a mut Cache,
    pub(crate) cluster: &'a Cluster,
    pub(crate) profile: &'a Profile,
}

impl World<'_> {
    /// All filters, without memory, with the pods that come before this one and without: a pod may both be in the way and
    /// be what an affinity asks for.
    fn check(&mut self, pod: &PodState, slot: u32, class: &mut Class) -> Result<(), Rejected> {
        let rivals = rivals(pod, slot, self.cache);
        if !rivals.is_empty() {
            rivals.iter().for_each(|rival| self.put(rival, slot, class, true));
            let verdict = self.check_plain(slot, class);
            rivals.iter().for_each(|rival| self.put(rival, slot, class, false));
            verdict?;
        }
        self.check_plain(slot, class)
    }

    fn check_plain(&mut self, slot: u32, class: &Class) -> Result<(), Rejected> {
        filter_node(&class.shape, slot, self.cache, self.cluster, self.profile)?;
        let counted = class.across.filter(slot, self.profile);
        counted.map_err(|(plugin, cause)| Rejected { plugin, rejection: cause.into() })
    }

    /// Puts a pod on a node, or takes it away, for trying.
    fn put(&mut self, pod: &Arc<PodState>, slot: u32, class: &mut Class, came: bool) {
        if let Some(node) = self.cache.scratch(slot) {
            if came {
                node.add(pod.clone());
            } else {
                node.remove(&pod.uid);
            }
        }
        let change = Change { came, slot, pod: pod.clone() };
        let shape = class.shape.clone();
        class.across.apply(&shape, &change, self.cache, self.cluster, self.profile);
    }
}

impl Cycles {
    /// The node for a pod, by slot, or why there is none. With it comes whom to make leave, if that helps.
    pub(crate) fn schedule(
        &mut self,
        pod: &PodState,
        world: &mut World<'_>,
        random: &mut impl Rng,
    ) -> Result<u32, Box<(Failure, Option<Candidate>)>> {
        let shape = &pod.shape;
        let context = Context { cache: world.cache, cluster: world.cluster, args: &world.profile.args };
        for (plugin, row) in PLUGINS.iter().enumerate() {
            let Some(pre_filter) = row.pre_filter.filter(|_| world.profile.filters[plugin]) else { continue };
            if let Err(rejection) = pre_filter(shape, &context) {
                let mut failure = Failure::everywhere(plugin, rejection, world.cache.len());
                preempt::explain_hopeless(pod, world, &mut failure);
                return Err(Box::new((failure, None)));
            }
        }
        let mut class = self.classes.take(shape, world.cache, world.cluster, world.profile);
        let outcome = self.choose(pod, world, &mut class, random);
        let outcome = outcome.map_err(|mut failure| {
            let candidate = preempt::run(pod, world, &mut class, &mut failure, random);
            Box::new((failure, candidate))
        });
        self.classes.keep(class);
        outcome
    }

    fn choose(
        &mut self,
        pod: &PodState,
        world: &mut World<'_>,
        class: &mut Class,
        random: &mut impl Rng,
    ) -> Result<u32, Failure> {
        let nominated = world.cache.nominated(&pod.uid).and_then(|name| world.cache.slot(name));
        if let Some(slot) = nominated
            && world.check(pod, slot, class).is_ok()
        {
            return Ok(slot);
        }
        if let Some(names) = pod.shape.pinned() {
            return Self::choose_pinned(pod, &names, world, class);
        }
        let order = world.cache.order();
        let enough = world.profile.enough(order.len());
        let mut feasible = Vec::new();
        let mut counts: Vec<usize> = Vec::new();
        let mut rejected = Vec::new();
        let is_strict = class.across.is_strict();
        let start = if order.is_empty() { 0 } else { self.start % order.len() };
        let mut looked = 0;
        for slot in order[start..].iter().chain(&order[..start]).copied() {
            looked += 1;
            let entry = class.entry(pod, slot, world.cache, world.cluster, world.profile);
            let mut reason = entry.reason;
            if entry.contended && (is_strict || nominated == Some(slot)) {
                reason = world.check(pod, slot, class).map_or_else(|rejected| class.intern(rejected), |()| 0);
            } else if reason == 0 && is_strict {
                let verdict = class.across.filter(slot, world.profile);
                reason = verdict.map_or_else(|(plugin, cause)| class.intern_cause(plugin, cause), |()| 0);
            }
            let Some(at) = (reason as usize).checked_sub(1) else {
                feasible.push(slot);
                if feasible.len() >= enough {
                    break;
                }
                continue;
            };
            if feasible.is_empty() {
                counts.resize(class.reasons.len(), 0);
                counts[at] += 1;
                if !class.reasons[at].rejection.unresolvable {
                    rejected.push(slot);
                }
            }
        }
        self.start = start + looked;
        match feasible.as_slice() {
            [] => {
                let reasons = class.reasons.iter().zip(counts).filter(|(_, count)| *count > 0);
                Err(Failure::new(order.len(), reasons.map(|(r, count)| (r.plugin, &r.rejection, count)), rejected))
            }
            [slot] => Ok(*slot),
            slots => Ok(best(slots, &class.marks(slots, world.profile), random)),
        }
    }

    /// The choice among the few nodes that the pod names; nothing of it is kept.
    fn choose_pinned(pod: &PodState, names: &[&str], world: &mut World<'_>, class: &mut Class) -> Result<u32, Failure> {
        let slots: Vec<u32> = names.iter().filter_map(|name| world.cache.slot(name)).collect();
        let (mut reasons, mut resolvable) = (Vec::new(), Vec::new());
        for slot in &slots {
            match world.check(pod, *slot, class) {
                Ok(()) => return Ok(*slot),
                Err(rejected) => {
                    if !rejected.rejection.unresolvable {
                        resolvable.push(*slot);
                    }
                    reasons.push((rejected.plugin, rejected.rejection, 1));
                }
            }
        }
        let others = world.cache.len() - slots.len();
        if others > 0 {
            let words = Rejection::unresolvable("node(s) didn't satisfy plugin(s) [NodeAffinity]");
            reasons.push((index("NodeAffinity"), words, others));
        }
        let reasons = reasons.iter().map(|(plugin, rejection, count)| (*plugin, rejection, *count));
        Err(Failure::new(world.cache.len(), reasons, resolvable))
    }
}

/// The node with the best mark; chance decides among equals.
fn best(slots: &[u32], marks: &[i64], random: &mut impl Rng) -> u32 {
    let most = marks.iter().copied().max().unwrap_or_default();
    let equals = marks.iter().filter(|mark| **mark == most).count();
    let chosen = random.random_range(0..equals.max(1));
    let mut best = slots.iter().zip(marks).filter(|(_, mark)| **mark == most).map(|(slot, _)| *slot);
    best.nth(chosen).unwrap_or(slots[0])
}

//! DefaultPreemption: which pods of lower priority would have to leave which node, and where that does the least harm.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use rand::{Rng, RngExt};

use super::World;
use super::class::Class;
use super::failure::{Failure, histogram};
use crate::plugins::PREEMPTION;
use crate::state::selector::Selector;
use crate::state::{Cluster, NodeState, PodState};

/// Said where removing pods cannot help.
const NOT_HELPFUL: &str = "Preemption is not helpful for scheduling";
const NO_VICTIMS: &str = "No preemption victims found for incoming pod";
/// What comes first in the message: pods give up no claims for devices.
const DEVICES_FIRST: &str = "no new claims to deallocate, preemption: ";

/// A node and the pods that must leave it.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) slot: u32,
    /// The most important first.
    pub(crate) victims: Vec<Arc<PodState>>,
    /// How many of them leave against their budgets.
    pub(crate) violations: usize,
}

/// What was found out about a node, as of a version of it and of the budgets.
#[derive(Clone, Debug)]
pub(super) struct Tried {
    generation: u64,
    budgets: u64,
    /// The candidate, or the place of the reasons why there is none among [`Class::vain`].
    outcome: Result<(Harm, Candidate), usize>,
}

/// Less is better, in this order.
type Harm = (usize, i32, i64, usize, Reverse<Timestamp>);

impl Candidate {
    fn harm(&self) -> Harm {
        let highest = self.victims.first().map_or(i32::MIN, |victim| victim.shape.priority);
        // Counted from the lowest priority there is, so that more victims never sum up to less.
        let sum = self.victims.iter().map(|victim| i64::from(victim.shape.priority) + i64::from(i32::MAX) + 1).sum();
        let top = self.victims.iter().filter(|victim| victim.shape.priority == highest);
        let since = top.map(|victim| victim.started).min().unwrap_or(Timestamp::MAX);
        (self.violations, highest, sum, self.victims.len(), Reverse(since))
    }
}

/// How important a pod is: more first.
fn importance(pod: &Arc<PodState>) -> (Reverse<i32>, Timestamp, Arc<str>) {
    (Reverse(pod.shape.priority), pod.started, pod.uid.clone())
}

/// Splits pods, the most important first, into those whose eviction breaks a budget and the others.
fn by_budgets(pods: Vec<Arc<PodState>>, cluster: &Cluster) -> (Vec<Arc<PodState>>, Vec<Arc<PodState>>) {
    let mut allowed: BTreeMap<(String, String), i32> = BTreeMap::new();
    pods.into_iter().partition(|pod| {
        let mut violates = false;
        if pod.shape.labels.is_empty() {
            return false;
        }
        for budget in cluster.budgets.list(&pod.shape.namespace) {
            let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref()).map(Selector::new);
            if !selector.is_some_and(|selector| !selector.is_everything() && selector.matches(&pod.shape.labels)) {
                continue;
            }
            let status = budget.status.as_ref();
            let disrupted = status.and_then(|status| status.disrupted_pods.as_ref());
            if disrupted.is_some_and(|pods| pods.contains_key(&*pod.name)) {
                continue;
            }
            let name = |text: &Option<String>| text.clone().unwrap_or_default();
            let key = (name(&budget.metadata.namespace), name(&budget.metadata.name));
            let left = allowed.entry(key).or_insert_with(|| status.and_then(|s| s.disruptions_allowed).unwrap_or(0));
            *left -= 1;
            violates |= *left < 0;
        }
        violates
    })
}

/// The fewest pods whose leaving lets the pod in, or why none do. The node is as before afterwards.
fn try_node(pod: &PodState, slot: u32, world: &mut World<'_>, class: &mut Class) -> Result<Candidate, Vec<String>> {
    let lower = |node: &NodeState| {
        let lower = node.pods.values().filter(|other| other.shape.priority < pod.shape.priority);
        lower.cloned().collect::<Vec<_>>()
    };
    let mut pods = world.cache.node(slot).map(lower).unwrap_or_default();
    if pods.is_empty() {
        return Err(vec![NO_VICTIMS.to_owned()]);
    }
    pods.sort_by_cached_key(importance);
    pods.iter().for_each(|other| world.put(other, slot, class, false));
    if let Err(rejected) = world.check(pod, slot, class) {
        pods.iter().for_each(|other| world.put(other, slot, class, true));
        return Err(rejected.rejection.reasons);
    }
    let (violating, others) = by_budgets(pods.clone(), world.cluster);
    let mut victims = Vec::new();
    let mut violations = 0;
    // The most important may stay first, and before all those whose leaving breaks a budget.
    for (is_violating, other) in
        violating.into_iter().map(|pod| (true, pod)).chain(others.into_iter().map(|pod| (false, pod)))
    {
        world.put(&other, slot, class, true);
        if world.check(pod, slot, class).is_err() {
            world.put(&other, slot, class, false);
            violations += usize::from(is_violating);
            victims.push(other);
        }
    }
    victims.iter().for_each(|victim| world.put(victim, slot, class, true));
    victims.sort_by_cached_key(importance);
    Ok(Candidate { slot, victims, violations })
}

/// Whether the pod may make others leave; if not, why.
fn may_preempt(pod: &PodState, world: &World<'_>, failure: &Failure) -> Result<(), &'static str> {
    if pod.shape.never_preempts {
        return Err("not eligible due to preemptionPolicy=Never.");
    }
    let nominated = world.cache.nominated(&pod.uid).or(pod.nominated.as_deref());
    let Some(slot) = nominated.and_then(|name| world.cache.slot(name)) else {
        return Ok(());
    };
    if !failure.resolvable.contains(&slot) {
        return Ok(());
    }
    let leaving = |other: &Arc<PodState>| other.is_terminating && other.shape.priority < pod.shape.priority;
    if world.cache.node(slot).is_some_and(|node| node.pods.values().any(leaving)) {
        return Err("not eligible due to a terminating pod on the nominated node.");
    }
    Ok(())
}

/// Adds to a failure that holds for every node what comes of preemption: nothing.
pub(super) fn explain_hopeless(pod: &PodState, world: &World<'_>, failure: &mut Failure) {
    if !world.profile.filters[PREEMPTION] || world.cache.len() == 0 {
        return;
    }
    failure.after = match may_preempt(pod, world, failure) {
        Err(reason) => format!("{DEVICES_FIRST}{reason}"),
        Ok(()) => {
            let reasons = BTreeMap::from([(NOT_HELPFUL.to_owned(), world.cache.len())]);
            format!("{DEVICES_FIRST}{}", histogram(world.cache.len(), &reasons))
        }
    };
}

/// Where room can be made with the least harm; adds to the failure what came of it.
pub(super) fn run(
    pod: &PodState,
    world: &mut World<'_>,
    class: &mut Class,
    failure: &mut Failure,
    random: &mut impl Rng,
) -> Option<Candidate> {
    let nodes = world.cache.len();
    if !world.profile.filters[PREEMPTION] || nodes == 0 {
        return None;
    }
    if let Err(reason) = may_preempt(pod, world, failure) {
        failure.after = format!("{DEVICES_FIRST}{reason}");
        failure.keeps_nomination = !pod.shape.never_preempts;
        return None;
    }
    let potential = &failure.resolvable;
    let wanted = (potential.len() * world.profile.args.preemption_percent / 100)
        .max(world.profile.args.preemption_least)
        .min(potential.len());
    let offset = if potential.is_empty() { 0 } else { random.random_range(0..potential.len()) };
    let budgets = world.cluster.budgets.version;
    // What stands elsewhere may change the verdict without the node changing.
    let nominated = world.cache.nominated(&pod.uid).and_then(|name| world.cache.slot(name));
    let is_strict = class.across.is_strict();
    // How many nodes have each of the reasons in vain.
    let mut vain: Vec<usize> = vec![0; class.vain.len()];
    let (mut best, mut found): (Option<(Harm, u32)>, usize) = (None, 0);
    for slot in potential[offset..].iter().chain(&potential[..offset]).copied() {
        let generation = world.cache.generation(slot);
        let known = class.tried.get(&slot).filter(|tried| {
            !is_strict && tried.generation == generation && tried.budgets == budgets && nominated != Some(slot)
        });
        let outcome = match known {
            Some(tried) => &tried.outcome,
            None => {
                let outcome = try_node(pod, slot, world, class).map(|candidate| (candidate.harm(), candidate));
                let outcome = outcome.map_err(|reasons| class.intern_vain(reasons));
                vain.resize(class.vain.len(), 0);
                // On its own node the pod is no rival of itself, but one of all others of its shape.
                let generation = if nominated == Some(slot) { 0 } else { generation };
                &class.tried.entry(slot).insert_entry(Tried { generation, budgets, outcome }).into_mut().outcome
            }
        };
        match outcome {
            Ok((harm, _)) => {
                if best.is_none_or(|(least, _)| *harm < least) {
                    best = Some((*harm, slot));
                }
                found += 1;
                if found >= wanted {
                    break;
                }
            }
            Err(reasons) => vain[*reasons] += 1,
        }
    }
    let Some((_, slot)) = best else {
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        for (words, count) in class.vain.iter().zip(vain).filter(|(_, count)| *count > 0) {
            words.iter().for_each(|reason| *reasons.entry(reason.clone()).or_default() += count);
        }
        let hopeless = nodes - potential.len();
        if hopeless > 0 {
            *reasons.entry(NOT_HELPFUL.to_owned()).or_default() += hopeless;
        }
        failure.after = format!("{DEVICES_FIRST}{}", histogram(nodes, &reasons));
        return None;
    };
    class.tried.get(&slot).and_then(|tried| tried.outcome.as_ref().ok()).map(|(_, candidate)| candidate.clone())
}

//! What is known of the pods of one shape: verdicts and marks of nodes, and counts across nodes. Pods of one template share
//! it, and only what has changed since the last of them is looked at again.

use std::collections::HashMap;
use std::sync::Arc;

use super::preempt::Tried;
use crate::config::Profile;
use crate::plugins::{
    Cause, Context, INTER_POD, InterPod, Normalize, PLUGINS, Rejection, SPREAD, Spread, default_constraints,
};
use crate::state::{Cache, Change, Cluster, PodState, Shape};

/// Verdicts kept over all classes; the classes not used for longest are dropped first.
const ENTRIES_MOST: usize = 1 << 19;
/// Classes kept, however small the cluster.
const CLASSES_MOST: usize = 256;
/// Scores whose marks depend on the marks of other nodes.
const RAWS: usize = 2;

/// The verdict on one node, as of a version of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    generation: u64,
    /// 0 if the node's own filters let the pod in, otherwise one more than the place of the reason.
    pub(super) reason: u32,
    /// Room was made on the node for other pods.
    pub(super) contended: bool,
    /// Weighted sum of the marks that stand for themselves.
    local: i64,
    raws: [i64; RAWS],
}

/// A rejection and the plug-in it comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Rejected {
    pub(super) plugin: usize,
    pub(super) rejection: Rejection,
}

/// State of filters and scores that look across nodes.
#[derive(Debug)]
pub(super) struct Across {
    pub(super) spread: Option<Spread>,
    pub(super) inter: Option<InterPod>,
    seen: u64,
    epoch: u64,
    owners: u64,
}

impl Across {
    fn new(shape: &Shape, pinned: bool, cache: &mut Cache, cluster: &Cluster, profile: &Profile) -> Self {
        let runs = |plugin: usize| profile.filters[plugin] || profile.weights[plugin] > 0;
        let mut constraints = Vec::new();
        if runs(SPREAD) {
            constraints.clone_from(&shape.spread);
            if constraints.is_empty() && !pinned {
                constraints = default_constraints(shape, &Context { cache, cluster, args: &profile.args });
            }
        }
        Self {
            seen: cache.log_end(),
            spread: Spread::new(shape, constraints, cache),
            inter: runs(INTER_POD).then(|| InterPod::new(shape, cache, cluster, &profile.args)),
            epoch: cache.epoch(),
            owners: cluster.owners_version(),
        }
    }

    /// Follows what happened since the last time; `false` if all must be counted anew.
    fn follow(&mut self, shape: &Shape, cache: &mut Cache, cluster: &Cluster, profile: &Profile) -> bool {
        let owners_matter = shape.spread.is_empty() && self.owners != cluster.owners_version();
        if self.epoch != cache.epoch() || owners_matter {
            return false;
        }
        if self.seen == cache.log_end() {
            return true;
        }
        let Some(changes) = cache.changes_since(self.seen) else {
            return false;
        };
        let changes: Vec<Change> = changes.cloned().collect();
        for change in changes {
            self.apply(shape, &change, cache, cluster, profile);
        }
        self.seen = cache.log_end();
        true
    }

    pub(super) fn apply(
        &mut self,
        shape: &Shape,
        change: &Change,
        cache: &mut Cache,
        cluster: &Cluster,
        profile: &Profile,
    ) {
        if let Some(spread) = &mut self.spread {
            spread.apply(shape, change);
        }
        if let Some(inter) = &mut self.inter {
            inter.apply(shape, change, cache, cluster, &profile.args);
        }
    }

    /// Whether verdicts depend on what stands on other nodes.
    pub(super) fn is_strict(&self) -> bool {
        self.spread.as_ref().is_some_and(Spread::is_strict) || self.inter.as_ref().is_some_and(InterPod::is_strict)
    }

    /// The first rejection by counts, with the plug-in it comes from.
    pub(super) fn filter(&self, slot: u32, profile: &Profile) -> Result<(), (usize, &'static Cause)> {
        if let Some(spread) = self.spread.as_ref().filter(|_| profile.filters[SPREAD]) {
            spread.filter(slot).map_err(|cause| (SPREAD, cause))?;
        }
        if let Some(inter) = self.inter.as_ref().filter(|_| profile.filters[INTER_POD]) {
            inter.filter(slot).map_err(|cause| (INTER_POD, cause))?;
        }
        Ok(())
    }
}

/// What is known of the pods of one shape.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) shape: Arc<Shape>,
    entries: Vec<Entry>,
    pub(super) reasons: Vec<Rejected>,
    /// Which of them are rejections by counts.
    causes: Vec<(&'static Cause, u32)>,
    pub(super) across: Across,
    /// What preemption would do on nodes.
    pub(super) tried: HashMap<u32, Tried>,
    /// Why preemption is in vain, each set of reasons once.
    pub(super) vain: Vec<Vec<String>>,
    storage: u64,
    used: u64,
}

/// The first rejection by a filter of the node's own.
pub(super) fn filter_node(
    shape: &Shape,
    slot: u32,
    cache: &Cache,
    cluster: &Cluster,
    profile: &Profile,
) -> Result<(), Rejected> {
    let context = Context { cache, cluster, args: &profile.args };
    let Some(node) = cache.node(slot) else {
        return Err(Rejected { plugin: 0, rejection: Rejection::unresolvable("node(s) were gone") });
    };
    for (plugin, row) in PLUGINS.iter().enumerate() {
        if let Some(filter) = row.filter.filter(|_| profile.filters[plugin]) {
            filter(shape, node, &context).map_err(|rejection| Rejected { plugin, rejection })?;
        }
    }
    Ok(())
}

/// The pods for which room was made on a node and which come before this one.
pub(super) fn rivals(pod: &PodState, slot: u32, cache: &Cache) -> Vec<Arc<PodState>> {
    let nominated = cache.node(slot).map(|node| node.nominated.as_slice()).unwrap_or_default();
    let comes_before = |other: &&Arc<PodState>| other.uid != pod.uid && other.shape.priority >= pod.shape.priority;
    nominated.iter().filter(comes_before).cloned().collect()
}

impl Class {
    pub(super) fn intern(&mut self, rejected: Rejected) -> u32 {
        let at = self.reasons.iter().position(|known| *known == rejected).unwrap_or_else(|| {
            self.reasons.push(rejected);
            self.reasons.len() - 1
        });
        // There are no more reasons than nodes.
        at as u32 + 1
    }

    /// As [`Class::intern`], for a rejection by counts.
    pub(super) fn intern_cause(&mut self, plugin: usize, cause: &'static Cause) -> u32 {
        if let Some((_, reason)) = self.causes.iter().find(|(known, _)| std::ptr::eq(*known, cause)) {
            return *reason;
        }
        let reason = self.intern(Rejected { plugin, rejection: cause.into() });
        self.causes.push((cause, reason));
        reason
    }

    /// The place of the reasons why preemption is in vain on a node.
    pub(super) fn intern_vain(&mut self, reasons: Vec<String>) -> usize {
        self.vain.iter().position(|known| *known == reasons).unwrap_or_else(|| {
            self.vain.push(reasons);
            self.vain.len() - 1
        })
    }

    /// The verdict of the node's own filters, from memory or anew.
    pub(super) fn entry(
        &mut self,
        pod: &PodState,
        slot: u32,
        cache: &mut Cache,
        cluster: &Cluster,
        profile: &Profile,
    ) -> Entry {
        let known = self.entries[slot as usize];
        let generation = cache.generation(slot);
        if known.generation == generation {
            return known;
        }
        let rivals = rivals(pod, slot, cache);
        let mut verdict = Ok(());
        if !rivals.is_empty()
            && let Some(node) = cache.scratch(slot)
        {
            rivals.iter().for_each(|rival| node.add(rival.clone()));
            verdict = filter_node(&self.shape, slot, cache, cluster, profile);
            if let Some(node) = cache.scratch(slot) {
                rivals.iter().for_each(|rival| drop(node.remove(&rival.uid)));
            }
        }
        let verdict = verdict.and_then(|()| filter_node(&self.shape, slot, cache, cluster, profile));
        let contended = cache.node(slot).is_some_and(|node| !node.nominated.is_empty());
        let mut entry = Entry { generation, contended, ..Entry::default() };
        match verdict {
            Err(rejected) => entry.reason = self.intern(rejected),
            Ok(()) => rate(&self.shape, slot, cache, cluster, profile, &mut entry),
        }
        self.entries[slot as usize] = entry;
        entry
    }

    /// Marks of the nodes, from best to worst comparable by number.
    pub(super) fn marks(&self, slots: &[u32], profile: &Profile) -> Vec<i64> {
        let entries = || slots.iter().map(|slot| &self.entries[*slot as usize]);
        let mut totals: Vec<i64> = entries().map(|entry| entry.local).collect();
        let mut add = |marks: Vec<i64>, weight: i64| {
            totals.iter_mut().zip(marks).for_each(|(total, mark)| *total += weight * mark);
        };
        for (raw, (weight, normalize)) in normalized(profile).enumerate().filter(|(_, (weight, _))| *weight > 0) {
            let mut marks: Vec<i64> = entries().map(|entry| entry.raws[raw]).collect();
            // Equal marks decide nothing.
            if marks.iter().all(|mark| *mark == marks[0]) {
                continue;
            }
            normalize.apply(&mut marks);
            add(marks, weight);
        }
        let weight = |plugin: usize| profile.weights[plugin];
        if let Some(marks) = self.across.spread.as_ref().filter(|_| weight(SPREAD) > 0).and_then(|s| s.score(slots)) {
            add(marks, weight(SPREAD));
        }
        if let Some(marks) = self.across.inter.as_ref().filter(|_| weight(INTER_POD) > 0).and_then(|s| s.score(slots)) {
            add(marks, weight(INTER_POD));
        }
        totals
    }
}

/// Weight and rule of the scores whose marks depend on those of other nodes.
fn normalized(profile: &Profile) -> impl Iterator<Item = (i64, Normalize)> {
    PLUGINS.iter().zip(&profile.weights).filter_map(|(row, weight)| {
        let (_, normalize) = row.score.filter(|(_, normalize)| *normalize != Normalize::None)?;
        Some((*weight, normalize))
    })
}

fn rate(shape: &Shape, slot: u32, cache: &Cache, cluster: &Cluster, profile: &Profile, entry: &mut Entry) {
    let context = Context { cache, cluster, args: &profile.args };
    let Some(node) = cache.node(slot) else { return };
    let mut raw = 0;
    for (row, weight) in PLUGINS.iter().zip(&profile.weights) {
        let Some((score, normalize)) = row.score else { continue };
        let mark = || if *weight > 0 { score(shape, node, &context) } else { 0 };
        if normalize == Normalize::None {
            entry.local += weight * mark();
        } else {
            entry.raws[raw] = mark();
            raw += 1;
        }
    }
}

/// The classes of the shapes that were scheduled last.
#[derive(Debug, Default)]
pub(super) struct Classes {
    known: HashMap<usize, Class>,
    clock: u64,
}

impl Classes {
    /// Takes out the class of a shape, up to date. [`Classes::keep`] puts it back.
    pub(super) fn take(
        &mut self,
        shape: &Arc<Shape>,
        cache: &mut Cache,
        cluster: &Cluster,
        profile: &Profile,
    ) -> Class {
        self.clock += 1;
        let pinned = shape.pinned().is_some();
        let mut class = match self.known.remove(&(Arc::as_ptr(shape) as usize)) {
            Some(mut class) => {
                if !class.across.follow(shape, cache, cluster, profile) {
                    class.across = Across::new(shape, pinned, cache, cluster, profile);
                }
                class
            }
            None => Class {
                shape: shape.clone(),
                entries: Vec::new(),
                reasons: Vec::new(),
                causes: Vec::new(),
                across: Across::new(shape, pinned, cache, cluster, profile),
                tried: HashMap::new(),
                vain: Vec::new(),
                storage: 0,
                used: 0,
            },
        };
        class.used = self.clock;
        let storage = cluster.storage_version() + cache.claims_version();
        if !shape.volumes.is_empty() && class.storage != storage {
            class.entries.clear();
            class.tried.clear();
            class.vain.clear();
            class.storage = storage;
        }
        if !pinned {
            class.entries.resize(cache.slots(), Entry::default());
        }
        if class.reasons.len().max(class.vain.len()) > cache.slots() + PLUGINS.len() {
            class.reasons.clear();
            class.causes.clear();
            class.tried.clear();
            class.vain.clear();
            class.entries.fill(Entry::default());
        }
        class
    }

    /// Keeps a class for the next pod of its shape.
    pub(super) fn keep(&mut self, class: Class) {
        if class.entries.is_empty() || class.shape.is_singular() {
            return;
        }
        let most = (ENTRIES_MOST / class.entries.len().max(1)).clamp(1, CLASSES_MOST);
        while self.known.len() >= most {
            let oldest = self.known.iter().min_by_key(|(_, class)| class.used).map(|(key, _)| *key);
            let Some(oldest) = oldest else { break };
            self.known.remove(&oldest);
        }
        self.known.insert(Arc::as_ptr(&class.shape) as usize, class);
    }
}

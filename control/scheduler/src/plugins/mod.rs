//! Filters and scores: pure functions of a pod's shape and a node, one file each, listed in one table.

mod balanced_allocation;
mod devices;
mod image_locality;
mod inter_pod;
mod node_affinity;
mod node_ports;
mod resources_fit;
mod spread;
mod taints;
mod unschedulable;
mod volumes;

use crate::config::Args;
use crate::state::{Cache, Cluster, NodeState, PodState, Shape};

pub(crate) use devices::{ClaimChoice, Programs, choose as choose_devices};
pub(crate) use inter_pod::InterPod;
pub(crate) use spread::{Spread, default_constraints};
pub(crate) use volumes::{Binding, SELECTED_NODE, VolumeChoice, bound_to, choose_volumes};

/// Best mark a score gives a node.
pub(crate) const MAX_SCORE: i64 = 100;

/// Why a node cannot take a pod, in the words that users see in the pod's condition.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Rejection {
    pub(crate) reasons: Vec<String>,
    /// Whether removing pods from the node cannot help.
    pub(crate) unresolvable: bool,
}

impl Rejection {
    pub(crate) fn unresolvable(reason: impl Into<String>) -> Self {
        Self { reasons: vec![reason.into()], unresolvable: true }
    }

    pub(crate) fn resolvable(reason: impl Into<String>) -> Self {
        Self { reasons: vec![reason.into()], unresolvable: false }
    }
}

/// A rejection by counts across nodes. There are few of them and many nodes, so they are told apart by where they are.
#[derive(Debug)]
pub(crate) struct Cause {
    words: &'static str,
    unresolvable: bool,
}

impl From<&Cause> for Rejection {
    fn from(cause: &Cause) -> Self {
        Self { reasons: vec![cause.words.to_owned()], unresolvable: cause.unresolvable }
    }
}

/// What a verdict may depend on beside the pod and the node.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) cluster: &'a Cluster,
    pub(crate) args: &'a Args,
}

/// Something that happened and may let a waiting pod be placed.
#[derive(Clone, Copy)]
pub(crate) enum Event<'a> {
    /// A node is new, or changed in a way that filters see.
    Node(&'a NodeState),
    NodeGone,
    /// A pod came to a node.
    PodCame(&'a PodState),
    /// A pod left its node, or shrank, or gave up the room that was made for it there.
    PodLeft(&'a PodState, Option<&'a NodeState>),
    /// A volume, a claim, a class or a driver changed.
    Storage,
    /// A claim for devices, their slices or a class of them changed.
    Devices,
    /// Labels of a namespace changed.
    Namespace,
}

/// A verdict on a pod that holds for every node.
type PreFilter = fn(&Shape, &Context<'_>) -> Result<(), Rejection>;
type Filter = fn(&Shape, &NodeState, &Context<'_>) -> Result<(), Rejection>;
/// A raw mark for a node; marks are brought to 0..=100 over all nodes as the row says.
type Score = fn(&Shape, &NodeState, &Context<'_>) -> i64;
/// Whether an event can help a pod that the plug-in rejected.
type Helps = fn(&PodState, Event<'_>, &Context<'_>) -> bool;

/// How raw marks become marks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Normalize {
    /// They are marks already.
    None,
    /// The largest becomes 100.
    Proportional,
    /// The largest becomes 0.
    Inverted,
}

/// One plug-in.
pub(crate) struct Plugin {
    /// As a KubeSchedulerConfiguration names it.
    pub(crate) name: &'static str,
    /// Of its score in the reference profile.
    pub(crate) weight: i64,
    pub(crate) pre_filter: Option<PreFilter>,
    pub(crate) filter: Option<Filter>,
    pub(crate) score: Option<(Score, Normalize)>,
    pub(crate) helps: Helps,
}

const fn row(name: &'static str, weight: i64, helps: Helps) -> Plugin {
    Plugin { name, weight, pre_filter: None, filter: None, score: None, helps }
}

const fn filter(filter: Filter, rest: Plugin) -> Plugin {
    Plugin { filter: Some(filter), ..rest }
}

const fn pre(pre_filter: PreFilter, rest: Plugin) -> Plugin {
    Plugin { pre_filter: Some(pre_filter), ..rest }
}

const fn score(score: Score, normalize: Normalize, rest: Plugin) -> Plugin {
    Plugin { score: Some((score, normalize)), ..rest }
}

fn never(_: &PodState, _: Event<'_>, _: &Context<'_>) -> bool {
    false
}

/// The plug-ins, in the order in which the reference profile runs them: the first filter that rejects is reported. Those
/// that look across nodes have no filter here: they keep counts, and the cycle asks them after the others.
pub(crate) const PLUGINS: &[Plugin] = &[
    filter(unschedulable::filter, row("NodeUnschedulable", 0, unschedulable::helps)),
    score(taints::score, Normalize::Inverted, filter(taints::filter, row("TaintToleration", 3, taints::helps))),
    score(
        node_affinity::score,
        Normalize::Proportional,
        filter(node_affinity::filter, row("NodeAffinity", 2, node_affinity::helps)),
    ),
    filter(node_ports::filter, row("NodePorts", 0, node_ports::helps)),
    score(
        resources_fit::score,
        Normalize::None,
        filter(resources_fit::filter, row("NodeResourcesFit", 1, resources_fit::helps)),
    ),
    filter(volumes::restrictions::filter, row("VolumeRestrictions", 0, volumes::helps)),
    filter(volumes::limits::filter, row("NodeVolumeLimits", 0, volumes::helps)),
    pre(volumes::binding::pre_filter, filter(volumes::binding::filter, row("VolumeBinding", 0, volumes::helps))),
    filter(volumes::zone::filter, row("VolumeZone", 0, volumes::helps)),
    pre(devices::pre_filter, filter(devices::filter, row("DynamicResources", 0, devices::helps))),
    row("PodTopologySpread", 2, spread::helps),
    row("InterPodAffinity", 2, inter_pod::helps),
    row("DefaultPreemption", 0, never),
    score(balanced_allocation::score, Normalize::None, row("NodeResourcesBalancedAllocation", 1, never)),
    score(image_locality::score, Normalize::None, row("ImageLocality", 1, never)),
];

/// Places of plug-ins that the cycle calls by name.
pub(crate) const SPREAD: usize = index("PodTopologySpread");
pub(crate) const INTER_POD: usize = index("InterPodAffinity");
pub(crate) const PREEMPTION: usize = index("DefaultPreemption");

/// The place of a plug-in in the table.
pub(crate) const fn index(name: &str) -> usize {
    let mut at = 0;
    while at < PLUGINS.len() {
        if same(PLUGINS[at].name, name) {
            return at;
        }
        at += 1;
    }
    PLUGINS.len()
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

impl Normalize {
    /// Brings raw marks to 0..=100.
    pub(crate) fn apply(self, marks: &mut [i64]) {
        let most = marks.iter().copied().max().unwrap_or_default();
        if self == Self::None {
            return;
        }
        for mark in marks {
            let scaled = if most == 0 { 0 } else { *mark * MAX_SCORE / most };
            *mark = if self == Self::Inverted { MAX_SCORE - scaled } else { scaled };
        }
    }
}

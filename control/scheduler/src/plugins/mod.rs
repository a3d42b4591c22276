//! Filters and scores: pure functions of a pod and a node, one file each, listed in one table.

mod balanced_allocation;
mod node_affinity;
mod node_name;
mod node_ports;
mod resources_fit;
mod taints;
mod unschedulable;

use crate::state::{NodeState, PodState};

/// Best mark a score gives a node.
pub(crate) const MAX_SCORE: i64 = 100;

/// Why a node cannot take a pod, in the words that users see in the pod's condition.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Rejection {
    pub(crate) reasons: Vec<String>,
    /// Whether removing pods from the node cannot help.
    pub(crate) unresolvable: bool,
}

impl Rejection {
    pub(crate) fn unresolvable(reason: impl Into<String>) -> Self {
        Self { reasons: vec![reason.into()], unresolvable: true }
    }

    pub(crate) fn resolvable(reasons: Vec<String>) -> Self {
        Self { reasons, unresolvable: false }
    }
}

type Filter = fn(&PodState, &NodeState) -> Result<(), Rejection>;
/// A raw mark for a node; marks are brought to 0..=100 over all nodes as the row says.
type Score = fn(&PodState, &NodeState) -> i64;

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

/// The filters, in the order in which the reference profile runs them: the first that rejects is reported.
pub(crate) const FILTERS: &[Filter] = &[
    unschedulable::filter,
    node_name::filter,
    taints::filter,
    node_affinity::filter,
    node_ports::filter,
    resources_fit::filter,
];

/// The scores with their weights in the reference profile.
pub(crate) const SCORES: &[(Score, i64, Normalize)] = &[
    (taints::score, 3, Normalize::Inverted),
    (node_affinity::score, 2, Normalize::Proportional),
    (resources_fit::score, 1, Normalize::None),
    (balanced_allocation::score, 1, Normalize::None),
];

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

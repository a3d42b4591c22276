//! Settings: profiles by `schedulerName`, which plug-ins they run with which weights and arguments.

mod file;

pub use file::ConfigError;

use crate::plugins::PLUGINS;
use crate::state::DEFAULT_SCHEDULER;
use crate::state::SpreadConstraint;
use crate::state::selector::NodeTerm;

/// How full nodes are rated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Strategy {
    LeastAllocated,
    MostAllocated,
    /// Points of (percent used, mark of 0..=100), ascending.
    RequestedToCapacityRatio(Vec<(i64, i64)>),
}

/// Arguments of plug-ins.
#[derive(Clone, Debug)]
pub(crate) struct Args {
    pub(crate) strategy: Strategy,
    /// Resources with weights.
    pub(crate) scored_resources: Vec<(String, i64)>,
    pub(crate) balanced_resources: Vec<(String, i64)>,
    pub(crate) ignored_resources: Vec<String>,
    pub(crate) ignored_resource_groups: Vec<String>,
    /// Required of every pod besides its own terms.
    pub(crate) added_affinity: Option<Vec<NodeTerm>>,
    pub(crate) added_preferred: Vec<(i64, NodeTerm)>,
    /// What a required term of a standing pod weighs for those it selects.
    pub(crate) hard_affinity_weight: i64,
    pub(crate) ignores_preferences_of_others: bool,
    /// `None`: the built-in ones.
    pub(crate) default_constraints: Option<Vec<SpreadConstraint>>,
    /// Part of the nodes on which preemption is tried (percent), and the least number of them.
    pub(crate) preemption_percent: usize,
    pub(crate) preemption_least: usize,
    /// How long a pod's volumes may take to be bound (seconds).
    pub(crate) bind_timeout_s: u64,
}

impl Default for Args {
    fn default() -> Self {
        let resources = || vec![("cpu".to_owned(), 1), ("memory".to_owned(), 1)];
        Self {
            strategy: Strategy::LeastAllocated,
            scored_resources: resources(),
            balanced_resources: resources(),
            ignored_resources: Vec::new(),
            ignored_resource_groups: Vec::new(),
            added_affinity: None,
            added_preferred: Vec::new(),
            hard_affinity_weight: 1,
            ignores_preferences_of_others: false,
            default_constraints: None,
            preemption_percent: 10,
            preemption_least: 100,
            bind_timeout_s: 600,
        }
    }
}

/// What runs for pods with one `schedulerName`.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) name: String,
    /// For each row of the table of plug-ins: whether its filter (and all but its score) runs.
    pub(crate) filters: Vec<bool>,
    /// For each row: the weight of its score; 0 for none.
    pub(crate) weights: Vec<i64>,
    /// Part of the nodes that are rated (percent); 0 to choose by their number.
    pub(crate) percent_to_score: usize,
    pub(crate) args: Args,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            name: DEFAULT_SCHEDULER.into(),
            filters: vec![true; PLUGINS.len()],
            weights: PLUGINS.iter().map(|plugin| plugin.weight).collect(),
            percent_to_score: 0,
            args: Args::default(),
        }
    }
}

/// The scheduler's settings; the default ones are those of a scheduler without a file.
#[derive(Clone, Debug)]
pub struct Config {
    pub(crate) profiles: Vec<Profile>,
    /// First and longest wait after a failed attempt (seconds).
    pub(crate) backoff_first_s: u64,
    pub(crate) backoff_most_s: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { profiles: vec![Profile::default()], backoff_first_s: 1, backoff_most_s: 10 }
    }
}

/// Fewest nodes that are rated, whatever the percentage.
const LEAST_TO_SCORE: usize = 100;
/// Smallest percentage that is chosen by the number of nodes.
const LEAST_PERCENT: usize = 5;

impl Profile {
    /// How many nodes that can take the pod are enough.
    pub(crate) fn enough(&self, nodes: usize) -> usize {
        let percent = match self.percent_to_score {
            0 => 50_usize.saturating_sub(nodes / 125).max(LEAST_PERCENT),
            percent => percent,
        };
        if nodes < LEAST_TO_SCORE || percent >= 100 { nodes } else { (nodes * percent / 100).max(LEAST_TO_SCORE) }
    }
}

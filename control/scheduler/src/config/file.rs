//! The settings file: `KubeSchedulerConfiguration` of `kubescheduler.config.k8s.io/v1`.
//!
//! Of the extension points, `score` switches and weighs scores, `multiPoint` both scores and filters, and every other one the
//! filters: a plug-in here is one filter and one score. Fields about clients, metrics and leader election are refused, since
//! nothing would follow them.

use k8s_openapi::api::core::v1::{NodeAffinity, TopologySpreadConstraint};
use serde::Deserialize;
use serde_json::Value;

use super::{Args, Config, Profile, Strategy};
use crate::plugins::{MAX_SCORE, PLUGINS, index};
use crate::state::SpreadConstraint;
use crate::state::selector::{Labels, NodeTerm};

/// Why a file is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not of the form, or has fields that nothing follows.
    #[error("{0}")]
    Form(String),
    /// It asks for another kind or version.
    #[error("apiVersion {0:?} and kind {1:?}, not kubescheduler.config.k8s.io/v1 and KubeSchedulerConfiguration")]
    Kind(String, String),
    /// Nobody has heard of the plug-in.
    #[error("profile {profile}: no plugin {name:?}")]
    Plugin {
        /// `schedulerName`.
        profile: String,
        /// As written.
        name: String,
    },
    /// Arguments of a plug-in that make no sense.
    #[error("profile {profile}: arguments of {plugin}: {reason}")]
    Arguments {
        /// `schedulerName`.
        profile: String,
        /// The plug-in.
        plugin: String,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    percentage_of_nodes_to_score: Option<usize>,
    pod_initial_backoff_seconds: Option<u64>,
    pod_max_backoff_seconds: Option<u64>,
    #[serde(default)]
    profiles: Vec<ProfileFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ProfileFile {
    scheduler_name: Option<String>,
    percentage_of_nodes_to_score: Option<usize>,
    #[serde(default)]
    plugins: std::collections::BTreeMap<String, PluginSet>,
    #[serde(default)]
    plugin_config: Vec<PluginConfig>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginSet {
    #[serde(default)]
    enabled: Vec<PluginRef>,
    #[serde(default)]
    disabled: Vec<PluginRef>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginRef {
    name: String,
    weight: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginConfig {
    name: String,
    args: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Weighted {
    name: String,
    #[serde(default = "one")]
    weight: i64,
}

fn one() -> i64 {
    1
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ScoringStrategy {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    resources: Vec<Weighted>,
    requested_to_capacity_ratio: Option<Shape>,
}

#[derive(Deserialize)]
struct Shape {
    shape: Vec<Point>,
}

#[derive(Deserialize)]
struct Point {
    utilization: i64,
    /// 0 to 10.
    score: i64,
}

/// Largest `score` of a point.
const POINT_SCORE: i64 = 10;

impl Config {
    /// Reads a `KubeSchedulerConfiguration` (YAML or JSON).
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file: File = serde_saphyr::from_str(text).map_err(|error| ConfigError::Form(error.to_string()))?;
        if file.api_version != "kubescheduler.config.k8s.io/v1" || file.kind != "KubeSchedulerConfiguration" {
            return Err(ConfigError::Kind(file.api_version, file.kind));
        }
        let mut config = Self::default();
        config.backoff_first_s = file.pod_initial_backoff_seconds.unwrap_or(config.backoff_first_s);
        config.backoff_most_s = file.pod_max_backoff_seconds.unwrap_or(config.backoff_most_s);
        if config.backoff_first_s == 0 || config.backoff_most_s < config.backoff_first_s {
            return Err(ConfigError::Form(
                "podInitialBackoffSeconds must be positive and not above podMaxBackoffSeconds".into(),
            ));
        }
        if !file.profiles.is_empty() {
            config.profiles = file.profiles.into_iter().map(profile).collect::<Result<_, _>>()?;
        }
        for profile in &mut config.profiles {
            if profile.percent_to_score == 0 {
                profile.percent_to_score = file.percentage_of_nodes_to_score.unwrap_or(0);
            }
        }
        let mut names: Vec<_> = config.profiles.iter().map(|profile| &profile.name).collect();
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ConfigError::Form(format!("two profiles are called {:?}", twice[0])));
        }
        Ok(config)
    }
}

fn profile(file: ProfileFile) -> Result<Profile, ConfigError> {
    let mut profile = Profile::default();
    if let Some(name) = file.scheduler_name {
        profile.name = name;
    }
    profile.percent_to_score = file.percentage_of_nodes_to_score.unwrap_or(0);
    for (point, set) in &file.plugins {
        if !POINTS.contains(&point.as_str()) {
            return Err(ConfigError::Form(format!("profile {}: no extension point {point:?}", profile.name)));
        }
        let (filters, scores) = (point != "score", point == "score" || point == "multiPoint");
        for plugin in &set.disabled {
            if plugin.name == "*" {
                (0..PLUGINS.len()).for_each(|at| switch(&mut profile, at, filters, scores, None));
            } else if let Some(at) = find(&profile.name, &plugin.name)? {
                switch(&mut profile, at, filters, scores, None);
            }
        }
        for plugin in &set.enabled {
            let Some(at) = find(&profile.name, &plugin.name)? else { continue };
            let usual = PLUGINS[at].weight;
            let weight = plugin.weight.filter(|weight| *weight > 0).unwrap_or(usual);
            switch(&mut profile, at, filters, scores && usual > 0, Some(weight));
        }
    }
    for config in file.plugin_config {
        let PluginConfig { name, args } = config;
        find(&profile.name, &name)?;
        arguments(&mut profile.args, &name, args).map_err(|reason| ConfigError::Arguments {
            profile: profile.name.clone(),
            plugin: name,
            reason,
        })?;
    }
    Ok(profile)
}

/// The extension points of a profile.
const POINTS: &[&str] = &[
    "multiPoint",
    "preEnqueue",
    "queueSort",
    "preFilter",
    "filter",
    "postFilter",
    "preScore",
    "score",
    "reserve",
    "permit",
    "preBind",
    "bind",
    "postBind",
];

/// What always runs here and cannot be switched: order of the queue, gates, binding, names of nodes (a selector here).
const ALWAYS: &[&str] = &["PrioritySort", "SchedulingGates", "DefaultBinder", "NodeName"];

/// The row of a plug-in; `None` for those without one.
fn find(profile: &str, name: &str) -> Result<Option<usize>, ConfigError> {
    match index(name) {
        at if at < PLUGINS.len() => Ok(Some(at)),
        _ if ALWAYS.contains(&name) => Ok(None),
        _ => Err(ConfigError::Plugin { profile: profile.to_owned(), name: name.to_owned() }),
    }
}

/// Switches a plug-in on with a weight, or off.
fn switch(profile: &mut Profile, at: usize, filters: bool, scores: bool, weight: Option<i64>) {
    if filters {
        profile.filters[at] = weight.is_some();
    }
    if scores {
        profile.weights[at] = weight.unwrap_or(0);
    }
}

/// Takes the member of arguments out when it is there.
fn member<T: serde::de::DeserializeOwned>(args: &mut Value, name: &str) -> Result<Option<T>, String> {
    let Some(value) = args.as_object_mut().and_then(|args| args.remove(name)) else { return Ok(None) };
    serde_json::from_value(value).map(Some).map_err(|error| format!("{name}: {error}"))
}

fn weighted(list: Vec<Weighted>) -> Vec<(String, i64)> {
    list.into_iter().map(|entry| (entry.name, entry.weight)).collect()
}

fn arguments(args: &mut Args, plugin: &str, mut given: Value) -> Result<(), String> {
    let given = &mut given;
    for header in ["apiVersion", "kind"] {
        member::<String>(given, header)?;
    }
    match plugin {
        "NodeResourcesFit" => {
            args.ignored_resources = member(given, "ignoredResources")?.unwrap_or_default();
            args.ignored_resource_groups = member(given, "ignoredResourceGroups")?.unwrap_or_default();
            if let Some(strategy) = member::<ScoringStrategy>(given, "scoringStrategy")? {
                if !strategy.resources.is_empty() {
                    args.scored_resources = weighted(strategy.resources);
                }
                args.strategy = match (strategy.kind.as_str(), strategy.requested_to_capacity_ratio) {
                    ("LeastAllocated", _) => Strategy::LeastAllocated,
                    ("MostAllocated", _) => Strategy::MostAllocated,
                    ("RequestedToCapacityRatio", Some(ratio)) => {
                        Strategy::RequestedToCapacityRatio(points(&ratio.shape)?)
                    }
                    (other, _) => return Err(format!("scoringStrategy: type {other:?} is unknown or lacks its shape")),
                };
            }
        }
        "NodeResourcesBalancedAllocation" => {
            if let Some(resources) = member(given, "resources")? {
                args.balanced_resources = weighted(resources);
            }
        }
        "InterPodAffinity" => {
            args.hard_affinity_weight = member(given, "hardPodAffinityWeight")?.unwrap_or(args.hard_affinity_weight);
            args.ignores_preferences_of_others = member(given, "ignorePreferredTermsOfExistingPods")?.unwrap_or(false);
        }
        "NodeAffinity" => {
            if let Some(added) = member::<NodeAffinity>(given, "addedAffinity")? {
                let required = added.required_during_scheduling_ignored_during_execution;
                args.added_affinity =
                    required.map(|selector| selector.node_selector_terms.iter().map(NodeTerm::new).collect());
                let preferred = added.preferred_during_scheduling_ignored_during_execution.unwrap_or_default();
                args.added_preferred =
                    preferred.iter().map(|term| (i64::from(term.weight), NodeTerm::new(&term.preference))).collect();
            }
        }
        "PodTopologySpread" => {
            let kind: Option<String> = member(given, "defaultingType")?;
            let list: Option<Vec<TopologySpreadConstraint>> = member(given, "defaultConstraints")?;
            if kind.as_deref() == Some("List") || list.is_some() {
                let list = list.unwrap_or_default();
                if list.iter().any(|constraint| constraint.label_selector.is_some()) {
                    return Err(
                        "defaultConstraints: a selector follows from the pod's owners and must not be given".into()
                    );
                }
                let none = Labels::new();
                args.default_constraints =
                    Some(list.iter().map(|constraint| SpreadConstraint::new(constraint, &none)).collect());
            }
        }
        "DefaultPreemption" => {
            args.preemption_percent = member(given, "minCandidateNodesPercentage")?.unwrap_or(args.preemption_percent);
            args.preemption_least = member(given, "minCandidateNodesAbsolute")?.unwrap_or(args.preemption_least);
        }
        "VolumeBinding" => {
            args.bind_timeout_s = member(given, "bindTimeoutSeconds")?.unwrap_or(args.bind_timeout_s);
        }
        _ => {}
    }
    match given.as_object().and_then(|rest| rest.keys().next()) {
        Some(unknown) => Err(format!("{unknown} is not known")),
        None => Ok(()),
    }
}

fn points(shape: &[Point]) -> Result<Vec<(i64, i64)>, String> {
    let ascending = shape.windows(2).all(|pair| pair[0].utilization < pair[1].utilization);
    let bounded = |point: &Point| (0..=100).contains(&point.utilization) && (0..=POINT_SCORE).contains(&point.score);
    if shape.is_empty() || !ascending || !shape.iter().all(bounded) {
        return Err("shape: utilization must ascend within 0 to 100, score must lie within 0 to 10".into());
    }
    Ok(shape.iter().map(|point| (point.utilization, point.score * MAX_SCORE / POINT_SCORE)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(rest: &str) -> Result<Config, ConfigError> {
        Config::parse(&format!("apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n{rest}"))
    }

    #[test]
    fn profiles_weigh_and_switch_plugins() {
        let config = file(
            "percentageOfNodesToScore: 40\nprofiles:\n- schedulerName: packed\n  plugins:\n    score:\n      disabled: [{name: '*'}]\n      enabled: [{name: NodeResourcesFit, weight: 5}]\n    filter:\n      disabled: [{name: NodePorts}]\n  pluginConfig:\n  - name: NodeResourcesFit\n    args:\n      scoringStrategy: {type: MostAllocated, resources: [{name: cpu, weight: 3}]}\n  - name: PodTopologySpread\n    args: {defaultingType: List}\n- schedulerName: usual\n",
        )
        .expect("well formed");
        let packed = &config.profiles[0];
        assert_eq!((packed.name.as_str(), packed.percent_to_score), ("packed", 40));
        assert_eq!(packed.weights.iter().sum::<i64>(), 5);
        assert!(!packed.filters[index("NodePorts")] && packed.filters[index("NodeResourcesFit")]);
        assert_eq!(packed.args.strategy, Strategy::MostAllocated);
        assert_eq!(packed.args.scored_resources, [("cpu".to_owned(), 3)]);
        assert_eq!(packed.args.default_constraints.as_deref().map(<[_]>::len), Some(0));
        assert!(config.profiles[1].weights.iter().sum::<i64>() > 5);
    }

    #[test]
    fn what_nothing_follows_is_refused() {
        for (rest, word) in [
            ("leaderElection: {leaderElect: true}\n", "leaderElection"),
            ("podInitialBackoffSeconds: 20\n", "podMaxBackoffSeconds"),
            ("profiles: [{schedulerName: a}, {schedulerName: a}]\n", "two profiles"),
            ("profiles: [{plugins: {score: {enabled: [{name: Magic}]}}}]\n", "Magic"),
            ("profiles: [{plugins: {scoer: {}}}]\n", "scoer"),
            ("profiles: [{pluginConfig: [{name: VolumeBinding, args: {bindTimeout: 1}}]}]\n", "bindTimeout"),
            (
                "profiles: [{pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {type: RequestedToCapacityRatio, requestedToCapacityRatio: {shape: [{utilization: 50, score: 11}]}}}}]}]\n",
                "score must lie",
            ),
        ] {
            let error = file(rest).expect_err(rest).to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(matches!(Config::parse("apiVersion: v1\nkind: Pod\n"), Err(ConfigError::Kind(..))));
    }
}

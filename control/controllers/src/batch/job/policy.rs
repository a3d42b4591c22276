//! What a Job's policies say: which failures count, and which successes are enough.

use k8s_openapi::api::batch::v1::{JobSpec, PodFailurePolicyOnExitCodesRequirement, SuccessPolicy};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::indexes::Indexes;

/// What becomes of a failed pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Action {
    Count,
    Ignore,
    FailIndex,
    /// The whole Job fails, for this reason.
    FailJob(String),
}

/// The action of the first rule that matches a failed pod; without a match it counts.
pub(super) fn failure(spec: &JobSpec, pod: &Pod) -> Action {
    let name = || format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
    let Some(policy) = &spec.pod_failure_policy else { return Action::Count };
    for (place, rule) in policy.rules.iter().enumerate() {
        let matched = if let Some(codes) = &rule.on_exit_codes {
            exit_code(codes, pod).map(|(container, code)| {
                format!(
                    "Container {container} for pod {} failed with exit code {code} matching {} rule at index {place}",
                    name(),
                    rule.action
                )
            })
        } else {
            let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            let wanted = rule.on_pod_conditions.as_deref().unwrap_or_default();
            let holds = |type_: &str, status: &str| {
                wanted
                    .iter()
                    .any(|wanted| wanted.type_ == type_ && wanted.status.as_deref().unwrap_or("True") == status)
            };
            conditions.into_iter().find(|condition| holds(&condition.type_, &condition.status)).map(|condition| {
                format!(
                    "Pod {} has condition {} matching {} rule at index {place}",
                    name(),
                    condition.type_,
                    rule.action
                )
            })
        };
        if let Some(message) = matched {
            return match rule.action.as_str() {
                "Ignore" => Action::Ignore,
                "FailIndex" if spec.backoff_limit_per_index.is_some() => Action::FailIndex,
                "FailJob" => Action::FailJob(message),
                _ => Action::Count,
            };
        }
    }
    Action::Count
}

/// The first container that ended with a code that the rule is about; never one that succeeded.
fn exit_code(rule: &PodFailurePolicyOnExitCodesRequirement, pod: &Pod) -> Option<(String, i32)> {
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    all.filter(|container| rule.container_name.as_ref().is_none_or(|name| *name == container.name)).find_map(
        |container| {
            let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
            let listed = rule.values.contains(&code);
            (code != 0 && (rule.operator == "In") == listed).then(|| (container.name.clone(), code))
        },
    )
}

/// The first rule of the success policy that the completed indexes satisfy.
pub(super) fn success(policy: &SuccessPolicy, completed: &Indexes, completions: i32) -> Option<usize> {
    policy.rules.iter().position(|rule| {
        let wanted = rule.succeeded_indexes.as_ref().map(|text| Indexes::parse(text, completions));
        let have = wanted.as_ref().map_or_else(|| completed.len(), |wanted| wanted.common(completed));
        let enough = match (rule.succeeded_count, &wanted) {
            (Some(count), _) => count,
            (None, Some(wanted)) => wanted.len(),
            (None, None) => return false,
        };
        have >= enough
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(rules: serde_json::Value) -> JobSpec {
        serde_json::from_value(json!({"template": {}, "backoffLimitPerIndex": 1, "podFailurePolicy": {"rules": rules}}))
            .expect("a spec")
    }

    fn pod(code: i32, condition: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "status": {
                "conditions": [{"type": condition, "status": "True"}],
                "containerStatuses": [{"name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"terminated": {"exitCode": code}}}],
            },
        }))
        .expect("a pod")
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let spec = spec(json!([
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3, 4]}},
            {"action": "FailIndex", "onExitCodes": {"operator": "NotIn", "values": [5], "containerName": "main"}},
        ]));
        assert_eq!(failure(&spec, &pod(3, "DisruptionTarget")), Action::Ignore);
        let message = "Container main for pod n/p failed with exit code 4 matching FailJob rule at index 1";
        assert_eq!(failure(&spec, &pod(4, "Ready")), Action::FailJob(message.into()));
        assert_eq!(failure(&spec, &pod(6, "Ready")), Action::FailIndex);
        assert_eq!(failure(&spec, &pod(5, "Ready")), Action::Count);
        assert_eq!(failure(&spec, &pod(0, "Ready")), Action::Count, "success matches no rule");
    }

    #[test]
    fn success_counts_the_listed_indexes() {
        let policy = |rule: serde_json::Value| serde_json::from_value(json!({"rules": [rule]})).expect("a policy");
        let done = Indexes::default().with([0, 2, 3]);
        assert_eq!(success(&policy(json!({"succeededCount": 3})), &done, 10), Some(0));
        assert_eq!(success(&policy(json!({"succeededIndexes": "0,2-4"})), &done, 10), None);
        assert_eq!(success(&policy(json!({"succeededIndexes": "0,2-4", "succeededCount": 2})), &done, 10), Some(0));
        assert_eq!(success(&policy(json!({"succeededIndexes": "2-3"})), &done, 10), Some(0));
    }
}

//! Cells of apps, batch, autoscaling, policy.

use serde_json::Value;

use super::cells::{NONE, View, human, or};
use crate::kinds::Kind;
use crate::object::text;

/// The cells of an object of these groups; `None` for other kinds.
pub(super) fn cells(kind: &Kind, v: &View<'_>) -> Option<Vec<Value>> {
    let template = "/spec/template/spec";
    Some(match (kind.group.as_str(), kind.resource.as_str()) {
        ("apps", "controllerrevisions") => {
            let owner = v.list("/metadata/ownerReferences").iter().find(|o| o["controller"].as_bool() == Some(true));
            let controller = owner.map(|o| {
                let api_version = text(o, "/apiVersion");
                let group = api_version.split_once('/').map_or("", |(group, _)| group);
                let kind = text(o, "/kind").to_lowercase();
                let kind = if group.is_empty() { kind } else { format!("{kind}.{group}") };
                format!("{kind}/{}", text(o, "/name"))
            });
            vec![v.name(), or(&controller.unwrap_or_default(), NONE), v.int("/revision").to_string().into(), v.age()]
        }
        ("apps", "daemonsets") => vec![
            v.name(),
            v.int("/status/desiredNumberScheduled").into(),
            v.int("/status/currentNumberScheduled").into(),
            v.int("/status/numberReady").into(),
            v.int("/status/updatedNumberScheduled").into(),
            v.int("/status/numberAvailable").into(),
            v.labels("/spec/template/spec/nodeSelector"),
            v.age(),
            v.containers(template, "name"),
            v.containers(template, "image"),
            v.selector("/spec/selector"),
        ],
        ("apps", "deployments") => vec![
            v.name(),
            format!("{}/{}", v.int("/status/readyReplicas"), v.int("/spec/replicas")).into(),
            v.int("/status/updatedReplicas").to_string().into(),
            v.int("/status/availableReplicas").to_string().into(),
            v.age(),
            v.containers(template, "name"),
            v.containers(template, "image"),
            v.selector("/spec/selector"),
        ],
        ("apps", "replicasets") => vec![
            v.name(),
            v.int("/spec/replicas").into(),
            v.int("/status/replicas").into(),
            v.int("/status/readyReplicas").into(),
            v.age(),
            v.containers(template, "name"),
            v.containers(template, "image"),
            v.selector("/spec/selector"),
        ],
        ("apps", "statefulsets") => vec![
            v.name(),
            format!("{}/{}", v.int("/status/readyReplicas"), v.int("/spec/replicas")).into(),
            v.age(),
            v.containers(template, "name"),
            v.containers(template, "image"),
        ],
        ("batch", "cronjobs") => {
            let suspended = v.object.pointer("/spec/suspend").and_then(Value::as_bool).unwrap_or(false);
            let last = v.text("/status/lastScheduleTime");
            vec![
                v.name(),
                v.text("/spec/schedule").into(),
                or(v.text("/spec/timeZone"), NONE),
                if suspended { "True".into() } else { "False".into() },
                v.count("/status/active").into(),
                if last.is_empty() { NONE.into() } else { v.since("/status/lastScheduleTime").into() },
                v.age(),
                v.containers("/spec/jobTemplate/spec/template/spec", "name"),
                v.containers("/spec/jobTemplate/spec/template/spec", "image"),
                v.selector("/spec/jobTemplate/spec/selector"),
            ]
        }
        ("batch", "jobs") => job(v),
        ("autoscaling", "horizontalpodautoscalers") => vec![
            v.name(),
            format!("{}/{}", v.text("/spec/scaleTargetRef/kind"), v.text("/spec/scaleTargetRef/name")).into(),
            targets(kind, v).into(),
            match v.object.pointer("/spec/minReplicas").and_then(Value::as_i64) {
                Some(min) => min.to_string().into(),
                None => "<unset>".into(),
            },
            v.int("/spec/maxReplicas").to_string().into(),
            v.int("/status/currentReplicas").to_string().into(),
            v.age(),
        ],
        ("policy", "poddisruptionbudgets") => vec![
            v.name(),
            v.int_or_text("/spec/minAvailable", "N/A"),
            v.int_or_text("/spec/maxUnavailable", "N/A"),
            v.int("/status/disruptionsAllowed").into(),
            v.age(),
        ],
        _ => return None,
    })
}

fn job(v: &View<'_>) -> Vec<Value> {
    let completions = v.object.pointer("/spec/completions").and_then(Value::as_i64);
    let parallelism = v.int("/spec/parallelism");
    let succeeded = v.int("/status/succeeded");
    let completions = match completions {
        Some(all) => format!("{succeeded}/{all}"),
        None if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        None => format!("{succeeded}/1"),
    };
    let moment = |pointer: &str| v.text(pointer).parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second);
    let duration = match (moment("/status/startTime"), moment("/status/completionTime")) {
        (None, _) => String::new(),
        (Some(start), Some(end)) => human(end - start),
        (Some(start), None) => human(v.now.as_second() - start),
    };
    let is = |condition: &str| v.condition(condition) == Some("True");
    let status = if is("Complete") {
        "Complete"
    } else if is("Failed") {
        "Failed"
    } else if !v.text("/metadata/deletionTimestamp").is_empty() {
        "Terminating"
    } else if is("Suspended") {
        "Suspended"
    } else if is("FailureTarget") {
        "FailureTarget"
    } else if is("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    vec![
        v.name(),
        status.into(),
        completions.into(),
        duration.into(),
        v.age(),
        v.containers("/spec/template/spec", "name"),
        v.containers("/spec/template/spec", "image"),
        v.selector("/spec/selector"),
    ]
}

/// Metrics as `name: current/target`.
fn targets(kind: &Kind, v: &View<'_>) -> String {
    if kind.version == "v1" {
        let Some(target) = v.object.pointer("/spec/targetCPUUtilizationPercentage").and_then(Value::as_i64) else {
            return NONE.into();
        };
        let current = v.object.pointer("/status/currentCPUUtilizationPercentage").and_then(Value::as_i64);
        return format!("cpu: {}/{target}%", current.map_or("<unknown>".to_owned(), |n| format!("{n}%")));
    }
    let now = v.list("/status/currentMetrics");
    let shown: Vec<String> = v
        .list("/spec/metrics")
        .iter()
        .enumerate()
        .map(|(at, metric)| {
            let source = match text(metric, "/type") {
                "Resource" => "resource",
                "ContainerResource" => "containerResource",
                "Pods" => "pods",
                "Object" => "object",
                _ => "external",
            };
            let value = |metric: &Value, part: &str| {
                let part = metric.pointer(&format!("/{source}/{part}"))?;
                if let Some(percent) = part["averageUtilization"].as_i64() {
                    return Some(format!("{percent}%"));
                }
                ["averageValue", "value"].iter().find_map(|m| part[*m].as_str()).map(str::to_owned)
            };
            let name = match source {
                "resource" | "containerResource" => format!("{}: ", text(metric, &format!("/{source}/name"))),
                _ => String::new(),
            };
            let current = now.get(at).and_then(|metric| value(metric, "current")).unwrap_or_else(|| "<unknown>".into());
            format!("{name}{current}/{}", value(metric, "target").unwrap_or_else(|| "<auto>".into()))
        })
        .collect();
    if shown.is_empty() { NONE.into() } else { shown.join(", ") }
}

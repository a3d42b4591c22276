//! Conversions between the versions of built-in kinds that have two: events and horizontal pod autoscalers.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::kinds::Conversion;
use crate::status::Status;

type Object = Map<String, Value>;

/// The conversion of a built-in resource, `None` for those with one version.
pub(crate) fn builtin(_group: &str, resource: &str) -> Option<Arc<dyn Conversion>> {
    match resource {
        "events" => Some(Arc::new(Pure(event))),
        "horizontalpodautoscalers" => Some(Arc::new(Pure(autoscaler))),
        _ => None,
    }
}

/// A conversion that needs nobody: a function from an object and a version to the object in that version.
struct Pure(fn(&mut Object, &str));

#[async_trait]
impl Conversion for Pure {
    async fn convert(&self, mut objects: Vec<Value>, api_version: &str) -> Result<Vec<Value>, Status> {
        for object in objects.iter_mut().filter_map(Value::as_object_mut) {
            if object.get("apiVersion").and_then(Value::as_str) != Some(api_version) {
                (self.0)(object, api_version);
                object.insert("apiVersion".into(), api_version.into());
            }
        }
        Ok(objects)
    }
}

/// Fields of events in the core group and in `events.k8s.io`; all others have one name.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn event(object: &mut Object, api_version: &str) {
    for (core, events) in EVENT_FIELDS {
        let (from, to) = if api_version == "v1" { (events, core) } else { (core, events) };
        if let Some(value) = object.remove(from) {
            object.insert(to.into(), value);
        }
    }
}

/// Where version 1 of autoscalers keeps what only version 2 has fields for.
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

fn autoscaler(object: &mut Object, api_version: &str) {
    if api_version == "autoscaling/v1" {
        autoscaler_to_v1(object);
    } else {
        autoscaler_to_v2(object);
    }
}

fn autoscaler_to_v1(object: &mut Object) {
    let mut kept = Vec::new();
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        let (cpu, others) = split_cpu(spec.remove("metrics"), &Names::SPEC);
        spec.extend(cpu.map(|percent| ("targetCPUUtilizationPercentage".to_owned(), percent)));
        kept.push((METRICS, others));
        kept.push((BEHAVIOR, spec.remove("behavior")));
    }
    if let Some(Value::Object(status)) = object.get_mut("status") {
        let (cpu, others) = split_cpu(status.remove("currentMetrics"), &Names::STATUS);
        status.extend(cpu.map(|percent| ("currentCPUUtilizationPercentage".to_owned(), percent)));
        kept.push((CURRENT_METRICS, others));
        kept.push((CONDITIONS, status.remove("conditions")));
    }
    for (name, value) in kept {
        if let Some(value) =
            value.filter(|value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()))
        {
            annotations(object).insert(name.into(), value.to_string().into());
        }
    }
}

fn autoscaler_to_v2(object: &mut Object) {
    let mut take = |name: &str| {
        let annotations = object.get_mut("metadata")?.get_mut("annotations")?.as_object_mut()?;
        let value = serde_json::from_str(annotations.remove(name)?.as_str()?).ok();
        if annotations.is_empty() {
            object.get_mut("metadata")?.as_object_mut()?.remove("annotations");
        }
        value
    };
    let [metrics, current, conditions, behavior]: [Option<Value>; 4] =
        [METRICS, CURRENT_METRICS, CONDITIONS, BEHAVIOR].map(&mut take);
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        let cpu = spec.remove("targetCPUUtilizationPercentage");
        let all = join_cpu(cpu, metrics, &Names::SPEC);
        if !all.is_empty() {
            spec.insert("metrics".into(), all.into());
        }
        spec.extend(behavior.map(|value| ("behavior".to_owned(), value)));
    }
    if let Some(Value::Object(status)) = object.get_mut("status") {
        let cpu = status.remove("currentCPUUtilizationPercentage");
        let all = join_cpu(cpu, current, &Names::STATUS);
        status.insert("currentMetrics".into(), if all.is_empty() { Value::Null } else { all.into() });
        status.extend(conditions.map(|value| ("conditions".to_owned(), value)));
    }
}

fn annotations(object: &mut Object) -> &mut Object {
    fn child<'a>(object: &'a mut Object, name: &str) -> &'a mut Object {
        let value = object.entry(name).or_insert_with(|| Value::Object(Object::new()));
        if !value.is_object() {
            *value = Value::Object(Object::new());
        }
        value.as_object_mut().expect("it was just made an object")
    }
    child(child(object, "metadata"), "annotations")
}

/// How the two versions name a metric's figures in a spec and in a status.
struct Names {
    /// Field of version 2 that holds the figures.
    figures: &'static str,
    utilization: &'static str,
    average: &'static str,
    value: &'static str,
}

impl Names {
    const SPEC: Self = Self {
        figures: "target",
        utilization: "targetAverageUtilization",
        average: "targetAverageValue",
        value: "targetValue",
    };
    const STATUS: Self = Self {
        figures: "current",
        utilization: "currentAverageUtilization",
        average: "currentAverageValue",
        value: "currentValue",
    };
}

/// The first metric of CPU utilisation as a percentage, and the others in version 1's form.
fn split_cpu(metrics: Option<Value>, names: &Names) -> (Option<Value>, Option<Value>) {
    let Some(Value::Array(metrics)) = metrics else { return (None, None) };
    let (mut cpu, mut others) = (None, Vec::new());
    for metric in metrics {
        let percent = metric.get("resource").filter(|resource| resource["name"] == "cpu");
        let percent = percent.and_then(|resource| resource.get(names.figures)?.get("averageUtilization"));
        match percent {
            Some(percent) if cpu.is_none() => cpu = Some(percent.clone()),
            _ => others.push(metric_to_v1(metric, names)),
        }
    }
    (cpu, Some(Value::Array(others)))
}

fn join_cpu(cpu: Option<Value>, others: Option<Value>, names: &Names) -> Vec<Value> {
    let others = match others {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let mut all: Vec<Value> = others.into_iter().map(|metric| metric_to_v2(metric, names)).collect();
    if let Some(percent) = cpu.filter(|percent| !percent.is_null()) {
        let mut figures = json!({"averageUtilization": percent});
        if names.figures == "target" {
            figures["type"] = "Utilization".into();
        }
        all.push(json!({"type": "Resource", "resource": {"name": "cpu", (names.figures): figures}}));
    }
    all
}

/// The source of a metric: the field named after its type.
fn source(metric: &mut Value) -> Option<&mut Object> {
    const SOURCES: [(&str, &str); 5] = [
        ("Resource", "resource"),
        ("ContainerResource", "containerResource"),
        ("Pods", "pods"),
        ("Object", "object"),
        ("External", "external"),
    ];
    let name = SOURCES.iter().find(|(kind, _)| metric["type"] == *kind)?.1;
    metric.get_mut(name)?.as_object_mut()
}

fn metric_to_v1(mut metric: Value, names: &Names) -> Value {
    let kind = metric["type"].clone();
    let Some(source) = source(&mut metric) else { return metric };
    if let Some(Value::Object(mut figures)) = source.remove(names.figures) {
        let average = if kind == "Object" { "averageValue" } else { names.average };
        for (from, to) in [("averageUtilization", names.utilization), ("averageValue", average), ("value", names.value)]
        {
            source.extend(figures.remove(from).map(|value| (to.to_owned(), value)));
        }
    }
    if let Some(Value::Object(mut which)) = source.remove("metric") {
        let selector = if kind == "External" { "metricSelector" } else { "selector" };
        source.extend(which.remove("name").map(|name| ("metricName".to_owned(), name)));
        source.extend(which.remove("selector").map(|value| (selector.to_owned(), value)));
    }
    if let Some(target) = source.remove("describedObject") {
        source.insert("target".into(), target);
    }
    metric
}

fn metric_to_v2(mut metric: Value, names: &Names) -> Value {
    let kind = metric["type"].clone();
    let Some(source) = source(&mut metric) else { return metric };
    if let Some(target) = source.remove("target").filter(|_| kind == "Object") {
        source.insert("describedObject".into(), target);
    }
    if let Some(name) = source.remove("metricName") {
        let mut which = json!({"name": name});
        let selector = source.remove("metricSelector").or_else(|| source.remove("selector"));
        if let Some(selector) = selector {
            which["selector"] = selector;
        }
        source.insert("metric".into(), which);
    }
    let average = if kind == "Object" { "averageValue" } else { names.average };
    let mut figures = Object::new();
    let mut mode = "Value";
    for (from, to, word) in [
        (names.value, "value", "Value"),
        (average, "averageValue", "AverageValue"),
        (names.utilization, "averageUtilization", "Utilization"),
    ] {
        if let Some(value) = source.remove(from) {
            figures.insert(to.into(), value);
            mode = word;
        }
    }
    if names.figures == "target" {
        figures.insert("type".into(), mode.into());
    }
    source.insert(names.figures.into(), Value::Object(figures));
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(object: &Value, convert: fn(&mut Object, &str), api_version: &str) -> Value {
        let mut object = object.clone();
        convert(object.as_object_mut().expect("object"), api_version);
        object["apiVersion"] = api_version.into();
        object
    }

    #[test]
    fn events_change_names_and_come_back() {
        let core = json!({
            "apiVersion": "v1", "metadata": {"name": "e"}, "involvedObject": {"kind": "Pod"}, "message": "m", "count": 2, "reason": "r",
            "source": {"component": "c"}, "firstTimestamp": null, "lastTimestamp": null, "reportingComponent": "c", "reportingInstance": "i"
        });
        let there = converted(&core, event, "events.k8s.io/v1");
        assert_eq!(there["regarding"]["kind"], "Pod");
        assert_eq!(there["note"], "m");
        assert_eq!(there["deprecatedCount"], 2);
        assert_eq!(there["reportingController"], "c");
        assert!(there.get("involvedObject").is_none());
        assert_eq!(converted(&there, event, "v1"), core);
    }

    #[test]
    fn autoscalers_keep_everything_in_version_1() {
        let v2 = json!({
            "apiVersion": "autoscaling/v2", "metadata": {"name": "h"},
            "spec": {
                "maxReplicas": 3,
                "metrics": [
                    {"type": "Pods", "pods": {"metric": {"name": "q"}, "target": {"type": "AverageValue", "averageValue": "10"}}},
                    {"type": "Object", "object": {"describedObject": {"kind": "Service", "name": "s"}, "metric": {"name": "r"}, "target": {"type": "Value", "value": "1k"}}},
                    {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}
                ],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 5}}
            },
            "status": {"desiredReplicas": 1, "conditions": [{"type": "AbleToScale", "status": "True"}],
                "currentMetrics": [{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 40}}}]}
        });
        let v1 = converted(&v2, autoscaler, "autoscaling/v1");
        assert_eq!(v1["spec"]["targetCPUUtilizationPercentage"], 70);
        assert_eq!(v1["status"]["currentCPUUtilizationPercentage"], 40);
        let metrics: Value =
            serde_json::from_str(v1["metadata"]["annotations"][METRICS].as_str().expect("annotation")).expect("JSON");
        assert_eq!(metrics[0], json!({"type": "Pods", "pods": {"metricName": "q", "targetAverageValue": "10"}}));
        assert_eq!(converted(&v1, autoscaler, "autoscaling/v2"), v2);
    }
}

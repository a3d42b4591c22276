//! Conversions between the versions of built-in kinds that have two: events and horizontal pod autoscalers.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::kinds::Conversion;
use crate::object;
use crate::status::Status;

/// Annotations in which a v1 autoscaler carries what v1 has no fields for.
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
const CURRENT: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";

/// The conversion of a built-in resource, `None` for those with one version.
pub(crate) fn builtin(group: &str, resource: &str) -> Option<Arc<dyn Conversion>> {
    match (group, resource) {
        ("" | "events.k8s.io", "events") => Some(Arc::new(Table { convert: event })),
        ("autoscaling", "horizontalpodautoscalers") => Some(Arc::new(Table { convert: autoscaler })),
        _ => None,
    }
}

/// A conversion by a function from an object and a wanted `apiVersion`.
struct Table {
    convert: fn(Value, &str) -> Result<Value, Status>,
}

#[async_trait]
impl Conversion for Table {
    async fn convert(&self, objects: Vec<Value>, api_version: &str) -> Result<Vec<Value>, Status> {
        objects
            .into_iter()
            .map(|mut object| {
                if object["apiVersion"].as_str() == Some(api_version) {
                    return Ok(object);
                }
                object = (self.convert)(object, api_version)?;
                object["apiVersion"] = api_version.into();
                Ok(object)
            })
            .collect()
    }
}

/// Members of an event: `v1`, `events.k8s.io/v1`.
const EVENT_MEMBERS: [(&str, &str); 8] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingInstance", "reportingInstance"),
];

fn event(mut object: Value, api_version: &str) -> Result<Value, Status> {
    let members = object::members(&mut object);
    for (core, grouped) in EVENT_MEMBERS {
        let (from, to) = if api_version == "v1" { (grouped, core) } else { (core, grouped) };
        if let Some(value) = members.remove(from) {
            members.insert(to.into(), value);
        }
    }
    Ok(object)
}

fn autoscaler(mut object: Value, api_version: &str) -> Result<Value, Status> {
    if api_version == "autoscaling/v1" {
        to_v1(&mut object)
    } else {
        to_v2(&mut object)?
    }
    Ok(object)
}

/// What v1 cannot say goes into annotations, as text.
fn to_v1(object: &mut Value) {
    let mut notes: Vec<(&str, Value)> = Vec::new();
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        let metrics = spec.remove("metrics").and_then(|m| m.as_array().cloned()).unwrap_or_default();
        let (cpu, others): (Vec<Value>, Vec<Value>) = metrics.into_iter().partition(is_cpu_utilization);
        let mut cpu = cpu.into_iter();
        if let Some(metric) = cpu.next() {
            spec.insert(
                "targetCPUUtilizationPercentage".into(),
                metric["resource"]["target"]["averageUtilization"].clone(),
            );
        }
        let rest: Vec<Value> = cpu.chain(others).collect();
        if !rest.is_empty() {
            notes.push((METRICS, rest.into()));
        }
        if let Some(behavior) = spec.remove("behavior") {
            notes.push((BEHAVIOR, behavior));
        }
    }
    if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
        let current = status.remove("currentMetrics").and_then(|m| m.as_array().cloned()).unwrap_or_default();
        let (cpu, rest): (Vec<Value>, Vec<Value>) = current.into_iter().partition(|metric| {
            metric["type"] == "Resource"
                && metric["resource"]["name"] == "cpu"
                && metric["resource"]["current"]["averageUtilization"].is_number()
        });
        if let Some(metric) = cpu.first() {
            status.insert(
                "currentCPUUtilizationPercentage".into(),
                metric["resource"]["current"]["averageUtilization"].clone(),
            );
        }
        if !rest.is_empty() {
            notes.push((CURRENT, rest.into()));
        }
        if let Some(conditions) = status.remove("conditions") {
            notes.push((CONDITIONS, conditions));
        }
    }
    if !notes.is_empty() {
        let annotations = object::members(object::metadata(object).entry("annotations").or_insert_with(|| json!({})));
        for (name, value) in notes {
            annotations.insert(name.into(), value.to_string().into());
        }
    }
}

fn is_cpu_utilization(metric: &Value) -> bool {
    metric["type"] == "Resource"
        && metric["resource"]["name"] == "cpu"
        && metric["resource"]["target"]["type"] == "Utilization"
}

/// The way back; text that is not JSON is refused.
fn to_v2(object: &mut Value) -> Result<(), Status> {
    let mut notes = Map::new();
    if let Some(annotations) = object::metadata(object).get_mut("annotations").and_then(Value::as_object_mut) {
        for name in [METRICS, BEHAVIOR, CURRENT, CONDITIONS] {
            if let Some(text) = annotations.remove(name) {
                let value = serde_json::from_str(text.as_str().unwrap_or_default())
                    .map_err(|error| Status::bad_request(format!("annotation {name}: {error}")))?;
                notes.insert(name.into(), value);
            }
        }
        if annotations.is_empty() {
            object::metadata(object).remove("annotations");
        }
    }
    let spec = object::members(object::members(object).entry("spec").or_insert_with(|| json!({})));
    let mut metrics = Vec::new();
    if let Some(percent) = spec.remove("targetCPUUtilizationPercentage").filter(Value::is_number) {
        let target = json!({"type": "Utilization", "averageUtilization": percent});
        metrics.push(json!({"type": "Resource", "resource": {"name": "cpu", "target": target}}));
    }
    if let Some(Value::Array(rest)) = notes.remove(METRICS) {
        metrics.extend(rest);
    }
    if !metrics.is_empty() {
        spec.insert("metrics".into(), metrics.into());
    }
    if let Some(behavior) = notes.remove(BEHAVIOR) {
        spec.insert("behavior".into(), behavior);
    }
    let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) else { return Ok(()) };
    let mut current = Vec::new();
    if let Some(percent) = status.remove("currentCPUUtilizationPercentage").filter(Value::is_number) {
        let value = json!({"averageUtilization": percent});
        current.push(json!({"type": "Resource", "resource": {"name": "cpu", "current": value}}));
    }
    if let Some(Value::Array(rest)) = notes.remove(CURRENT) {
        current.extend(rest);
    }
    if !current.is_empty() {
        status.insert("currentMetrics".into(), current.into());
    }
    if let Some(conditions) = notes.remove(CONDITIONS) {
        status.insert("conditions".into(), conditions);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoscalers_go_there_and_back() {
        let v2 = json!({
            "apiVersion": "autoscaling/v2", "metadata": {"name": "a"},
            "spec": {"maxReplicas": 3, "behavior": {"scaleUp": {}}, "metrics": [
                {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}},
                {"type": "Resource", "resource": {"name": "memory", "target": {"type": "AverageValue", "averageValue": "1Gi"}}},
            ]},
            "status": {"conditions": [{"type": "AbleToScale"}]},
        });
        let v1 = autoscaler(v2.clone(), "autoscaling/v1").expect("it converts");
        assert_eq!(v1["spec"]["targetCPUUtilizationPercentage"], 50);
        assert!(v1["spec"].get("metrics").is_none());
        assert_eq!(autoscaler(v1, "autoscaling/v2").expect("it converts"), v2);
    }

    #[test]
    fn events_go_there_and_back() {
        let core = json!({"involvedObject": {"name": "p"}, "message": "m", "count": 2, "reportingInstance": "i"});
        let grouped = event(core.clone(), "events.k8s.io/v1").expect("it converts");
        assert_eq!(
            (&grouped["regarding"]["name"], &grouped["note"], &grouped["deprecatedCount"]),
            (&json!("p"), &json!("m"), &json!(2))
        );
        assert_eq!(event(grouped, "v1").expect("it converts"), core);
    }
}

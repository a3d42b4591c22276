//! LimitRanger: default requests and limits, and their bounds.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::admission::plugin::{Plugin, forbid, look_all};
use crate::context::Operation;
use crate::kinds::edit::{child, each, list, put, text, unset};
use crate::kinds::pod::defaults;
use crate::kinds::quantity::Quantity;

type Amounts = BTreeMap<String, Quantity>;

pub static PLUGIN: Plugin = Plugin {
    name: "LimitRanger",
    handles: |ctx| {
        let pod = ctx.kind.is("", "pods") && (ctx.subresource.is_empty() || ctx.subresource == "resize");
        let claim = ctx.is_object_of("", "persistentvolumeclaims");
        (pod && (ctx.operation == Operation::Create
            || (ctx.operation == Operation::Update && ctx.subresource == "resize")))
            || (claim && matches!(ctx.operation, Operation::Create | Operation::Update))
    },
    admit: Some(|ctx, o, _| {
        Box::pin(async move {
            if ctx.kind.resource == "pods" && ctx.operation == Operation::Create {
                for range in look_all(ctx, "", "limitranges", &ctx.namespace).await? {
                    fill(o, &range);
                }
            }
            Ok(())
        })
    }),
    validate: Some(|ctx, o, _| {
        Box::pin(async move {
            let mut errors = Vec::new();
            for range in look_all(ctx, "", "limitranges", &ctx.namespace).await? {
                errors.extend(if ctx.kind.resource == "pods" { check_pod(o, &range) } else { check_claim(o, &range) });
            }
            match errors.as_slice() {
                [] => Ok(()),
                [one] => Err(forbid(ctx, o, one)),
                many => Err(forbid(ctx, o, format!("[{}]", many.join(", ")))),
            }
        })
    }),
};

fn amounts(v: Option<&Value>) -> Amounts {
    v.and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), Quantity::from_value(v)?)))
        .collect()
}

fn items<'a>(range: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    list(range.get("spec").unwrap_or(&Value::Null), "limits").iter().filter(move |l| text(l, "type") == kind)
}

/// Gives containers what a range says they get, and notes it in an annotation.
fn fill(pod: &mut Value, range: &Value) {
    let (mut requests, mut limits) = (serde_json::Map::new(), serde_json::Map::new());
    for item in items(range, "Container") {
        for (from, to) in [("defaultRequest", &mut requests), ("default", &mut limits)] {
            to.extend(item.get(from).and_then(Value::as_object).cloned().unwrap_or_default());
        }
    }
    let mut notes = Vec::new();
    for (containers, what) in [("containers", "container"), ("initContainers", "init container")] {
        each(child(pod, "spec"), containers, |c| {
            let name = text(c, "name").to_owned();
            for (field, defaults, word) in [("limits", &limits, "limit"), ("requests", &requests, "request")] {
                let mut set = Vec::new();
                for (k, v) in defaults {
                    let resources = child(c, "resources");
                    if resources.get(field).and_then(|m| m.get(k)).is_none() {
                        unset(child(resources, field), k, v.clone());
                        set.push(k.clone());
                    }
                }
                if !set.is_empty() {
                    set.sort();
                    notes.push((word, format!("{} {word} for {what} {name}", set.join(", "))));
                }
            }
        });
    }
    if !notes.is_empty() {
        // Requests first, as the words have always been.
        notes.sort_by_key(|(word, _)| *word == "limit");
        let text: Vec<String> = notes.into_iter().map(|(_, n)| n).collect();
        let annotations = child(child(pod, "metadata"), "annotations");
        put(annotations, "kubernetes.io/limit-ranger", json!(format!("LimitRanger plugin set: {}", text.join("; "))));
    }
}

fn bounds(item: &Value, kind: &str, requests: &Amounts, limits: &Amounts, errors: &mut Vec<String>) {
    for (k, min) in amounts(item.get("min")) {
        match (requests.get(&k), limits.get(&k)) {
            (None, _) => errors.push(format!("minimum {k} usage per {kind} is {min}.  No request is specified")),
            (Some(r), _) if *r < min => {
                errors.push(format!("minimum {k} usage per {kind} is {min}, but request is {r}"))
            }
            (_, Some(l)) if *l < min => errors.push(format!("minimum {k} usage per {kind} is {min}, but limit is {l}")),
            _ => {}
        }
    }
    for (k, max) in amounts(item.get("max")) {
        match (requests.get(&k), limits.get(&k)) {
            (_, None) => errors.push(format!("maximum {k} usage per {kind} is {max}.  No limit is specified")),
            (_, Some(l)) if *l > max => errors.push(format!("maximum {k} usage per {kind} is {max}, but limit is {l}")),
            (Some(r), _) if *r > max => {
                errors.push(format!("maximum {k} usage per {kind} is {max}, but request is {r}"))
            }
            _ => {}
        }
    }
    for (k, ratio) in amounts(item.get("maxLimitRequestRatio")) {
        match (requests.get(&k), limits.get(&k)) {
            (Some(r), Some(l)) if !r.is_zero() => {
                let have = l.millis() as f64 / r.millis() as f64;
                if have > ratio.millis() as f64 / 1000.0 {
                    errors.push(format!(
                        "{k} max limit to request ratio per {kind} is {ratio}, but provided ratio is {have:.6}"
                    ));
                }
            }
            _ => errors.push(format!(
                "{k} max limit to request ratio per {kind} is {ratio}, but no request is specified or request is 0"
            )),
        }
    }
}

fn check_pod(pod: &Value, range: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    for item in items(range, "Container") {
        for containers in ["containers", "initContainers"] {
            for c in list(spec, containers) {
                let (r, l) = (amounts(c.pointer("/resources/requests")), amounts(c.pointer("/resources/limits")));
                bounds(item, "Container", &r, &l, &mut errors);
            }
        }
    }
    for item in items(range, "Pod") {
        let (r, l) = (defaults::aggregate(spec, "requests"), defaults::aggregate(spec, "limits"));
        bounds(item, "Pod", &r, &l, &mut errors);
    }
    errors
}

fn check_claim(claim: &Value, range: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    let Some(asked) = claim.pointer("/spec/resources/requests/storage").and_then(Quantity::from_value) else {
        return errors;
    };
    for item in items(range, "PersistentVolumeClaim") {
        if let Some(min) = amounts(item.get("min")).get("storage").filter(|m| asked < **m) {
            errors.push(format!("minimum storage usage per PersistentVolumeClaim is {min}, but request is {asked}"));
        }
        if let Some(max) = amounts(item.get("max")).get("storage").filter(|m| asked > **m) {
            errors.push(format!("maximum storage usage per PersistentVolumeClaim is {max}, but request is {asked}"));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range() -> Value {
        json!({"spec": {"limits": [{"type": "Container", "min": {"cpu": "50m"}, "max": {"cpu": "500m"},
            "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "100m"}}]}})
    }

    #[test]
    fn fills_and_notes() {
        let mut pod = json!({"spec": {"containers": [{"name": "c"}]}});
        fill(&mut pod, &range());
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"limits": {"cpu": "500m"}, "requests": {"cpu": "100m"}})
        );
        assert_eq!(
            pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
            "LimitRanger plugin set: cpu request for container c; cpu limit for container c"
        );
        assert!(check_pod(&pod, &range()).is_empty());
    }

    #[test]
    fn bounds_in_words() {
        let pod = |r: &str, l: &str| json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": r}, "limits": {"cpu": l}}}]}});
        assert_eq!(
            check_pod(&pod("10m", "100m"), &range()),
            ["minimum cpu usage per Container is 50m, but request is 10m"]
        );
        assert_eq!(
            check_pod(&pod("100m", "600m"), &range()),
            ["maximum cpu usage per Container is 500m, but limit is 600m"]
        );
    }
}

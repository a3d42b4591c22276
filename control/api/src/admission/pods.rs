//! Small plugins about pods: Priority, RuntimeClass, DefaultTolerationSeconds; and TaintNodesByCondition.

use serde_json::{Value, json};

use crate::admission::plugin::{Plugin, creates, forbid, look, look_all, new_pod};
use crate::context::{Context, Operation};
use crate::kinds::edit::{child, flag, int, list, put, text};
use crate::status::Status;

/// Seconds that a pod stays on a node that went away.
const TOLERATION_SECONDS: i64 = 300;

pub static PRIORITY: Plugin = Plugin {
    name: "Priority",
    handles: |ctx| ctx.is_object_of("", "pods") || ctx.is_object_of("scheduling.k8s.io", "priorityclasses"),
    admit: Some(|ctx, o, old| Box::pin(async move { priority(ctx, o, old).await })),
    validate: Some(|ctx, o, _| {
        Box::pin(async move {
            if !ctx.kind.is("scheduling.k8s.io", "priorityclasses")
                || ctx.operation == Operation::Delete
                || !flag(o, "globalDefault")
            {
                return Ok(());
            }
            for other in look_all(ctx, "scheduling.k8s.io", "priorityclasses", "").await? {
                let name = crate::object::name(&other);
                if flag(&other, "globalDefault") && name != crate::object::name(o) {
                    return Err(forbid(
                        ctx,
                        o,
                        format!("PriorityClass {name} is already marked as default. Only one default can exist"),
                    ));
                }
            }
            Ok(())
        })
    }),
};

async fn priority(ctx: &Context, pod: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if !ctx.kind.is("", "pods") {
        return Ok(());
    }
    if ctx.operation == Operation::Update {
        // The numbers belong to the server; a client that leaves them out means to keep them.
        if let Some(old) = old {
            let spec = child(pod, "spec");
            for f in ["priority", "preemptionPolicy"] {
                if spec.get(f).is_none()
                    && let Some(v) = old.pointer(&format!("/spec/{f}"))
                {
                    put(spec, f, v.clone());
                }
            }
        }
        return Ok(());
    }
    if ctx.operation != Operation::Create {
        return Ok(());
    }
    let name = pod.pointer("/spec/priorityClassName").and_then(Value::as_str).unwrap_or_default().to_owned();
    let class = if name.is_empty() {
        look_all(ctx, "scheduling.k8s.io", "priorityclasses", "")
            .await?
            .into_iter()
            .filter(|c| flag(c, "globalDefault"))
            .min_by_key(|c| int(c, "value"))
    } else {
        match look(ctx, "scheduling.k8s.io", "priorityclasses", "", &name).await? {
            Some(c) => Some(c),
            None => return Err(forbid(ctx, pod, format!("no PriorityClass with name {name} was found"))),
        }
    };
    let value = class.as_ref().and_then(|c| int(c, "value")).unwrap_or(0);
    let policy = class.as_ref().map_or("PreemptLowerPriority", |c| match text(c, "preemptionPolicy") {
        "" => "PreemptLowerPriority",
        p => p,
    });
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    if let Some(given) = int(spec, "priority").filter(|g| *g != value) {
        return Err(forbid(
            ctx,
            pod,
            format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
            ),
        ));
    }
    let given = text(spec, "preemptionPolicy");
    if !given.is_empty() && given != policy {
        return Err(forbid(
            ctx,
            pod,
            format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
            ),
        ));
    }
    let spec = child(pod, "spec");
    put(spec, "priority", value);
    put(spec, "preemptionPolicy", policy);
    if let (true, Some(c)) = (name.is_empty(), &class) {
        put(spec, "priorityClassName", crate::object::name(c));
    }
    Ok(())
}

pub static RUNTIME_CLASS: Plugin = Plugin {
    name: "RuntimeClass",
    handles: new_pod,
    admit: Some(|ctx, pod, _| Box::pin(async move { runtime_class(ctx, pod).await })),
    validate: Some(|ctx, pod, _| {
        Box::pin(async move {
            let class = class_of(ctx, pod).await?;
            let fixed = class.as_ref().and_then(|c| c.pointer("/overhead/podFixed"));
            match (pod.pointer("/spec/overhead"), fixed) {
                (Some(_), None) => Err(forbid(
                    ctx,
                    pod,
                    "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead",
                )),
                (Some(a), Some(b)) if !crate::kinds::at::same(a, b) => {
                    Err(forbid(ctx, pod, "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"))
                }
                _ => Ok(()),
            }
        })
    }),
};

async fn class_of(ctx: &Context, pod: &Value) -> Result<Option<Value>, Status> {
    let name = pod.pointer("/spec/runtimeClassName").and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() {
        return Ok(None);
    }
    match look(ctx, "node.k8s.io", "runtimeclasses", "", name).await? {
        Some(c) => Ok(Some(c)),
        None => Err(forbid(ctx, pod, format!("pod rejected: RuntimeClass {name:?} not found"))),
    }
}

async fn runtime_class(ctx: &Context, pod: &mut Value) -> Result<(), Status> {
    let Some(class) = class_of(ctx, pod).await? else { return Ok(()) };
    if let Some(fixed) = class.pointer("/overhead/podFixed") {
        if pod.pointer("/spec/overhead").is_some_and(|o| !crate::kinds::at::same(o, fixed)) {
            return Err(forbid(ctx, pod, "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"));
        }
        put(child(pod, "spec"), "overhead", fixed.clone());
    }
    let Some(scheduling) = class.get("scheduling") else { return Ok(()) };
    for (k, v) in scheduling.get("nodeSelector").and_then(Value::as_object).into_iter().flatten() {
        let selector = child(child(pod, "spec"), "nodeSelector");
        if selector.get(k).is_some_and(|have| have != v) {
            return Err(forbid(
                ctx,
                pod,
                format!(
                    "conflict: runtimeClass.scheduling.nodeSelector[{k}] = {}; pod.spec.nodeSelector[{k}] = {}",
                    v.as_str().unwrap_or_default(),
                    text(pod.pointer("/spec/nodeSelector").unwrap_or(&Value::Null), k)
                ),
            ));
        }
        put(selector, k, v.clone());
    }
    let more = list(scheduling, "tolerations");
    if !more.is_empty() {
        let spec = child(pod, "spec");
        let mut all = list(spec, "tolerations").to_vec();
        all.extend(more.iter().filter(|t| !list(spec, "tolerations").contains(t)).cloned());
        put(spec, "tolerations", all);
    }
    Ok(())
}

pub static TOLERATIONS: Plugin = Plugin {
    name: "DefaultTolerationSeconds",
    handles: |ctx| ctx.is_object_of("", "pods") && matches!(ctx.operation, Operation::Create | Operation::Update),
    admit: Some(|_, pod, _| {
        Box::pin(async move {
            let spec = child(pod, "spec");
            let mut all = list(spec, "tolerations").to_vec();
            for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
                let tolerated = all.iter().any(|t| {
                    matches!(text(t, "effect"), "" | "NoExecute")
                        && (text(t, "key") == key || text(t, "key").is_empty())
                });
                if !tolerated {
                    all.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS}));
                }
            }
            put(spec, "tolerations", all);
            Ok(())
        })
    }),
    validate: None,
};

pub static TAINT_NODES: Plugin = Plugin {
    name: "TaintNodesByCondition",
    handles: |ctx| creates(ctx, "", "nodes"),
    admit: Some(|_, node, _| {
        Box::pin(async move {
            // Nothing is scheduled onto a node before it has said that it is ready.
            let spec = child(node, "spec");
            let mut taints = list(spec, "taints").to_vec();
            if !taints
                .iter()
                .any(|t| text(t, "key") == "node.kubernetes.io/not-ready" && text(t, "effect") == "NoSchedule")
            {
                taints.push(json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}));
                put(spec, "taints", taints);
            }
            Ok(())
        })
    }),
    validate: None,
};

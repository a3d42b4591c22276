//! Eviction: a deletion that respects pod disruption budgets.

use serde_json::{Value, json};

use crate::handlers::{self, Call};
use crate::http::{ReqBody, Response, json_response};
use crate::kinds::Subresource;
use crate::object;
use crate::status::{Cause, Details, Status};

/// Times that the budget is charged when somebody else changes it at the same time.
const TRIES: usize = 20;
/// Most pods that a budget remembers as being disrupted.
const DISRUPTED: usize = 2000;

/// POST of an Eviction on a pod.
pub(crate) async fn evict(call: &mut Call, sub: &Subresource, body: ReqBody) -> Result<Response, Status> {
    let eviction = call.read_object(body, &handlers::body_kind(sub, &call.kind)).await?;
    let name = call.route.name.clone();
    if object::name(&eviction) != name {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    let mut options =
        handlers::Options::parse(call, eviction.get("deleteOptions").cloned().unwrap_or_else(|| json!({})))?;
    let pod = call
        .api
        .get(&call.kind, &call.route.namespace, &name)
        .await?
        .ok_or_else(|| Status::not_found(&call.kind, &name))?;
    let phase = object::text(&pod, "/status/phase");
    let free = matches!(phase, "Succeeded" | "Failed" | "Pending")
        || pod.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string);
    if !free {
        charge(call, &pod).await?;
    }
    if !call.dry_run {
        mark(call, &mut options).await?;
    }
    handlers::delete_pod(call, &options).await?;
    Ok(json_response(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

/// Says in the pod's status why it goes (condition `DisruptionTarget`, KEP-3329): Jobs may not count such an end as a failure.
async fn mark(call: &Call, options: &mut handlers::Options) -> Result<(), Status> {
    let name = call.route.name.clone();
    let key = call.key();
    for _ in 0..TRIES {
        let entry = call.api.store.get(&key).await?.ok_or_else(|| Status::not_found(&call.kind, &name))?;
        let mut pod = call.decode(&entry.value).await?;
        handlers::preconditions(&call.kind, &name, options, &pod)?;
        let mut condition = json!({
            "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "lastProbeTime": null,
            "message": "Eviction API: evicting", "lastTransitionTime": crate::time::seconds(call.now),
        });
        if let Some(generation) = pod.pointer("/metadata/generation") {
            condition["observedGeneration"] = generation.clone();
        }
        let status = object::members(&mut pod).entry("status").or_insert_with(|| json!({}));
        let conditions = object::members(status).entry("conditions").or_insert_with(|| json!([]));
        let Some(conditions) = conditions.as_array_mut() else { return Ok(()) };
        conditions.retain(|held| object::text(held, "/type") != "DisruptionTarget");
        conditions.push(condition);
        let draft = coracle_store::Draft::encode(&pod).map_err(Status::internal)?;
        match call.api.store.put(&key, draft, coracle_store::Precondition::Revision(entry.revision)).await {
            Ok(marked) => {
                options.revision = options.revision.as_ref().map(|_| marked.revision.to_string());
                return Ok(());
            }
            Err(coracle_store::Error::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(Status::modified(&call.kind, &name))
}

/// Takes one disruption from the pod's budget; 429 when there is none left.
async fn charge(call: &Call, pod: &Value) -> Result<(), Status> {
    let row = call.api.kind("policy", "v1", "poddisruptionbudgets").ok_or_else(Status::no_such_resource)?;
    let namespace = object::namespace(pod);
    let budgets: Vec<Value> = call
        .api
        .list(&row, namespace)
        .await?
        .into_iter()
        .filter(|budget| budget.pointer("/spec/selector").is_some_and(|s| selects(s, pod)))
        .collect();
    let budget = match budgets.as_slice() {
        [] => return Ok(()),
        [one] => object::name(one).to_owned(),
        _ => {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            ));
        }
    };
    let unready = pod.pointer("/status/conditions").and_then(Value::as_array).is_none_or(|list| {
        !list.iter().any(|c| object::text(c, "/type") == "Ready" && object::text(c, "/status") == "True")
    });
    for _ in 0..TRIES {
        let key = row.key(namespace, &budget);
        let Some(entry) = call.api.store.get(&key).await? else { return Ok(()) };
        let mut object = crate::wire::parse_stored(&entry.value)?;
        let number = |object: &Value, pointer: &str| object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
        let healthy_enough = number(&object, "/status/currentHealthy") >= number(&object, "/status/desiredHealthy")
            && number(&object, "/status/desiredHealthy") > 0;
        let policy = object::text(&object, "/spec/unhealthyPodEvictionPolicy");
        if unready && (policy == "AlwaysAllow" || healthy_enough) {
            return Ok(());
        }
        if number(&object, "/status/observedGeneration") < number(&object, "/metadata/generation") {
            return Err(blocked(
                &budget,
                "Cannot evict pod as it would violate the pod's disruption budget.".into(),
                &format!("The disruption budget {budget} is still being processed by the server."),
                10,
            ));
        }
        let allowed = number(&object, "/status/disruptionsAllowed");
        let disrupted =
            object.pointer("/status/disruptedPods").and_then(Value::as_object).map_or(0, serde_json::Map::len);
        if allowed <= 0 || disrupted > DISRUPTED {
            let why = format!(
                "The disruption budget {budget} needs {} healthy pods and has {} currently",
                number(&object, "/status/desiredHealthy"),
                number(&object, "/status/currentHealthy")
            );
            return Err(blocked(
                &budget,
                "Cannot evict pod as it would violate the pod's disruption budget.".into(),
                &why,
                0,
            ));
        }
        if call.dry_run {
            return Ok(());
        }
        let status = object::members(object::members(&mut object).entry("status").or_insert_with(|| json!({})));
        status.insert("disruptionsAllowed".into(), (allowed - 1).into());
        let pods = object::members(status.entry("disruptedPods").or_insert_with(|| json!({})));
        pods.insert(object::name(pod).into(), crate::time::seconds(call.now).into());
        let draft = coracle_store::Draft::encode(&object).map_err(Status::internal)?;
        match call.api.store.put(&key, draft, coracle_store::Precondition::Revision(entry.revision)).await {
            Ok(_) => return Ok(()),
            Err(coracle_store::Error::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(Status::too_many_requests("Cannot evict pod: the disruption budget changes too quickly", 1))
}

fn selects(selector: &Value, pod: &Value) -> bool {
    let text = handlers::selector_text(selector);
    if text.is_empty() {
        return true;
    }
    crate::selector::LabelSelector::parse(&text).is_ok_and(|selector| selector.matches_object(pod))
}

fn blocked(budget: &str, message: String, why: &str, retry_after_seconds: u32) -> Status {
    let _ = budget;
    Status::new(429, "TooManyRequests", message).with(Details {
        causes: vec![Cause { reason: "DisruptionBudget".into(), message: why.into(), ..Cause::default() }],
        retry_after_seconds,
        ..Details::default()
    })
}

//! The condition `Dangling` of FlowSchemas: whether their priority level is missing.

use std::sync::Arc;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::flowcontrol::v1::{FlowSchema, PriorityLevelConfiguration};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::informer::Informer;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

const TYPE: &str = "Dangling";
/// As the conditions of a real server are applied.
const MANAGER: &str = "api-priority-and-fairness-config-consumer-v1";

/// Writes the condition wherever it is not what it should be; the caches show it when this returns.
pub(super) async fn write(
    api: &Arc<ApiServer>,
    schemas: &Informer<FlowSchema>,
    levels: &Informer<PriorityLevelConfiguration>,
) -> Result<(), Status> {
    let written = Api::<FlowSchema>::all(api.client(UserInfo::apiserver()));
    let applied = schemas.list().filter_map(|schema| applied(&schema, levels));
    let writes = applied.map(|(name, applied)| {
        let written = &written;
        async move {
            let params = PatchParams::apply(MANAGER).force();
            match written.patch_status(&name, &params, &Patch::Apply(&applied)).await {
                Ok(schema) => Ok(schema.metadata.resource_version.and_then(|text| text.parse::<u64>().ok())),
                // Deleted meanwhile.
                Err(kube::Error::Api(error)) if error.code == 404 => Ok(None),
                Err(error) => Err(Status::internal(format!("write the condition of {name}: {error}"))),
            }
        }
    });
    // At once, so that they share a flush.
    if let Some(last) = try_join_all(writes).await?.into_iter().flatten().max() {
        schemas.reached(last).await;
    }
    Ok(())
}

/// Name and status of a schema that does not have the right one.
fn applied(schema: &FlowSchema, levels: &Informer<PriorityLevelConfiguration>) -> Option<(String, Value)> {
    let name = schema.metadata.name.clone()?;
    let level = &schema.spec.as_ref()?.priority_level_configuration.name;
    let (status, reason, end) = if levels.get("", level).is_some() {
        ("False", "Found", "and it exists")
    } else {
        ("True", "NotFound", "but there is no such object")
    };
    let message = format!("This FlowSchema references the PriorityLevelConfiguration object named {level:?} {end}");
    let conditions = schema.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let now = conditions.into_iter().find(|condition| condition.type_.as_deref() == Some(TYPE));
    let now = now.filter(|now| now.status.as_deref() == Some(status));
    if now.is_some_and(|now| now.message.as_deref() == Some(&message)) {
        return None;
    }
    let since = now.and_then(|now| Some(now.last_transition_time.as_ref()?.0)).unwrap_or_else(Timestamp::now);
    let condition = json!({"type": TYPE, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": crate::time::seconds(since)});
    let applied = json!({"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema",
        "metadata": {"name": name}, "status": {"conditions": [condition]}});
    Some((name, applied))
}

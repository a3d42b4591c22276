//! The APIServices of group versions that this server serves for custom resources.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::json;

use crate::informer::Informer;
use crate::server::ApiServer;

/// Marks those that come and go with their definitions.
const AUTOMANAGED: &str = "kube-aggregator.kubernetes.io/automanaged";
/// Priority of groups of custom resources.
const GROUP_PRIORITY: i64 = 1000;
/// Priority of their versions.
const VERSION_PRIORITY: i64 = 100;

/// Makes the automatic APIServices agree with the served custom resources.
pub(super) async fn sync(
    api: &ApiServer,
    client: &Api<APIService>,
    informer: &Arc<Informer<APIService>>,
) -> Result<(), kube::Error> {
    let rows = api.registry.rows();
    let served: BTreeSet<(&str, &str)> = rows
        .all
        .iter()
        .filter(|kind| kind.crd.is_some() && kind.served)
        .map(|kind| (kind.group.as_str(), kind.version.as_str()))
        .collect();
    for (group, version) in &served {
        let name = format!("{version}.{group}");
        if informer.get("", &name).is_some() {
            continue;
        }
        let object = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {AUTOMANAGED: "true"}},
            "spec": {"group": group, "version": version, "groupPriorityMinimum": GROUP_PRIORITY, "versionPriority": VERSION_PRIORITY},
        }))
        .map_err(kube::Error::SerdeError)?;
        ignore(409, client.create(&PostParams::default(), &object).await.map(drop))?;
    }
    for object in informer.list() {
        let automatic = object.metadata.labels.as_ref().and_then(|labels| labels.get(AUTOMANAGED));
        let (Some(name), Some(spec)) = (&object.metadata.name, &object.spec) else { continue };
        let gone =
            !served.contains(&(spec.group.as_deref().unwrap_or_default(), spec.version.as_deref().unwrap_or_default()));
        if automatic.is_some_and(|word| word == "true") && gone && object.metadata.deletion_timestamp.is_none() {
            ignore(404, client.delete(name, &DeleteParams::default()).await.map(drop))?;
        }
    }
    Ok(())
}

/// Somebody else was faster.
fn ignore(code: u16, result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == code => Ok(()),
        other => other,
    }
}

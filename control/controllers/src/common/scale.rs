//! The scale subresource of any kind, custom ones included.

use std::sync::Arc;

use coracle_api::kinds::Kind;
use coracle_api::server::ApiServer;
use k8s_openapi::api::autoscaling::v1::Scale;
use kube::Api;
use kube::core::{ApiResource, DynamicObject};

use crate::machine::{Error, Host};

/// An object of some kind and its size.
pub(crate) struct Scaled {
    pub(crate) objects: Api<DynamicObject>,
    pub(crate) scale: Scale,
}

impl Scaled {
    /// How many replicas there should be.
    pub(crate) fn wanted(&self) -> i32 {
        self.scale.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or_default()
    }

    /// How many there are.
    pub(crate) fn running(&self) -> i32 {
        self.scale.status.as_ref().map_or(0, |status| status.replicas)
    }
}

/// The row of a kind, in this version or else in any other of its group.
pub(crate) fn row(api: &ApiServer, api_version: &str, kind: &str) -> Result<Arc<Kind>, String> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let other = || api.registry.rows().all.iter().find(|row| row.group == group && row.kind == kind).cloned();
    let found = api.registry.find_kind(group, version, kind).or_else(other);
    found.ok_or_else(|| format!("no matches for kind \"{kind}\" in version \"{api_version}\""))
}

/// Reads the size of an object.
pub(crate) async fn get(
    api: &ApiServer,
    host: &Host,
    namespace: &str,
    (api_version, kind, name): (&str, &str, &str),
) -> Result<Scaled, String> {
    let row = row(api, api_version, kind)?;
    let resource = ApiResource {
        group: row.group.clone(),
        version: row.version.clone(),
        api_version: if row.group.is_empty() { row.version.clone() } else { format!("{}/{}", row.group, row.version) },
        kind: row.kind.clone(),
        plural: row.resource.clone(),
    };
    let objects = Api::namespaced_with(host.client.clone(), namespace, &resource);
    let scale = objects.get_scale(name).await.map_err(|error| Error::at("get the scale")(error).message())?;
    Ok(Scaled { objects, scale })
}

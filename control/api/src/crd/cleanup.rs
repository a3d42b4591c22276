//! A definition that is being deleted takes its objects with it.

use std::sync::Arc;

use coracle_store::{Draft, Error, ListOptions, Precondition};
use serde_json::{Value, json};

use crate::http::ReqBody;
use crate::object;
use crate::server::{ApiServer, Caller};
use crate::status::Status;
use crate::user::UserInfo;
use crate::wire;

/// Finalizer that keeps a definition until its objects are gone.
pub(super) const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Deletes the objects of a definition, waits until they are gone, lets the definition go.
pub(super) async fn run(api: &Arc<ApiServer>, key: &str, definition: &Value) -> Result<(), Status> {
    let spec = &definition["spec"];
    let (group, plural) = (object::text(spec, "/group"), object::text(spec, "/names/plural"));
    let prefix = format!("/registry/{group}/{plural}/");
    loop {
        let listing = api.store.list(&prefix, ListOptions::default()).await?;
        if listing.entries.is_empty() {
            break;
        }
        for entry in &listing.entries {
            let value = wire::parse_stored(&entry.value)?;
            if value.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string) {
                continue;
            }
            remove(api, plural, &value).await?;
        }
        let mut watch = api.store.watch(&prefix, listing.revision).await?;
        tokio::select! {
            batch = watch.next() => { batch?; }
            () = api.shutdown.cancelled() => return Ok(()),
        }
    }
    loop {
        let Some(entry) = api.store.get(key).await? else { return Ok(()) };
        let mut object = wire::parse_stored(&entry.value)?;
        let finalizers = object.pointer_mut("/metadata/finalizers").and_then(Value::as_array_mut);
        let left = finalizers.map_or(0, |list| {
            list.retain(|name| name != FINALIZER);
            list.len()
        });
        let precondition = Precondition::Revision(entry.revision);
        let written = if left == 0 {
            api.store.delete(key, precondition).await.map(|_| ())
        } else {
            let draft = Draft::encode(&object).map_err(Status::internal)?;
            api.store.put(key, draft, precondition).await.map(|_| ())
        };
        match written {
            Err(Error::Conflict { .. }) => {}
            other => return other.map_err(Status::from),
        }
    }
}

/// Deletes one object the way everybody does, so that its finalizers count.
async fn remove(api: &Arc<ApiServer>, plural: &str, value: &Value) -> Result<(), Status> {
    let (namespace, name) = (object::namespace(value), object::name(value));
    let place = if namespace.is_empty() { String::new() } else { format!("namespaces/{namespace}/") };
    let uri = format!("/apis/{}/{place}{plural}/{name}", object::text(value, "/apiVersion"));
    let request = http::Request::delete(&uri).body(ReqBody::Whole(bytes::Bytes::new())).map_err(Status::internal)?;
    let caller = Caller::Local(Arc::new(UserInfo::apiserver()));
    let response = api.respond(caller, request).await;
    match response.status().as_u16() {
        200..=299 | 404 => Ok(()),
        code => Err(Status::internal(format!("delete {uri}: answered {code}"))),
    }
}

/// Adds the finalizer to a definition that stays; tells whether it changed.
pub(super) fn keep(definition: &mut Value) -> bool {
    if definition.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string) {
        return false;
    }
    let list = object::metadata(definition).entry("finalizers").or_insert_with(|| json!([]));
    match list.as_array_mut() {
        Some(list) if !list.iter().any(|name| name == FINALIZER) => {
            list.push(FINALIZER.into());
            true
        }
        _ => false,
    }
}

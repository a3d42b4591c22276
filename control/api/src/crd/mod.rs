//! Custom resources: rows of the table that CustomResourceDefinitions make at run time.

mod cleanup;
mod convert;
mod names;
mod rows;
mod strategy;

use std::sync::Arc;

use coracle_schema::FieldError;
use coracle_store::{Draft, Error, ListOptions, Precondition};
use serde_json::{Value, json};

use crate::kinds::Kind;
use crate::server::ApiServer;
use crate::status::Status;
use crate::wire;

/// Pause before the definitions are read again after a failure.
const RETRY: std::time::Duration = std::time::Duration::from_millis(200);
/// Times that conditions are written when somebody else writes at the same time.
const TRIES: usize = 10;

/// Takes in the definitions that exist, and follows their changes from there.
pub(crate) async fn start(api: &Arc<ApiServer>) -> Result<(), Status> {
    let mut after = reload(api).await?;
    let api = api.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = api.shutdown.cancelled() => return,
                error = follow(&api, after) => tracing::debug!(%error, "reading the custom resource definitions again"),
            }
            tokio::time::sleep(RETRY).await;
            match reload(&api).await {
                Ok(revision) => after = revision,
                Err(error) => tracing::warn!(%error, "read the custom resource definitions"),
            }
        }
    });
    Ok(())
}

async fn follow(api: &Arc<ApiServer>, after: u64) -> Error {
    let Some(row) = definitions(api) else { return Error::Closed };
    let mut watch = match api.store.watch(&row.prefix, after).await {
        Ok(watch) => watch,
        Err(error) => return error,
    };
    loop {
        if let Err(error) = watch.next().await {
            return error;
        }
        if let Err(error) = reload(api).await {
            tracing::warn!(%error, "read the custom resource definitions");
        }
    }
}

fn definitions(api: &ApiServer) -> Option<Arc<Kind>> {
    api.kind("apiextensions.k8s.io", "v1", "customresourcedefinitions")
}

/// Whether a write to this kind changes the table.
pub(crate) fn is_definition(kind: &Kind) -> bool {
    kind.is("apiextensions.k8s.io", "customresourcedefinitions")
}

/// Makes the table agree with the definitions in the store, and their conditions with the table. Returns the revision read.
pub(crate) async fn reload(api: &Arc<ApiServer>) -> Result<u64, Status> {
    let row = definitions(api).ok_or_else(Status::no_such_resource)?;
    let _turn = api.crd_turn.lock().await;
    let listing = api.store.list(&row.prefix, ListOptions::default()).await?;
    let mut definitions = Vec::with_capacity(listing.entries.len());
    for entry in &listing.entries {
        definitions.push((entry.revision, wire::parse_stored(&entry.value)?));
    }
    let verdicts = names::judge(&definitions);
    let known = api.registry.rows();
    let mut custom = Vec::new();
    for ((revision, definition), verdict) in definitions.iter().zip(&verdicts) {
        if verdict.established {
            custom.extend(rows::of(api, definition, *revision, &known));
        }
    }
    if !same(&known.all, &custom) {
        api.registry.set_custom(custom);
    }
    for ((_, definition), verdict) in definitions.iter().zip(verdicts) {
        write_conditions(api, &row, definition, &verdict).await?;
    }
    for (_, definition) in definitions {
        if definition.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string) {
            clean_up(api, row.key("", crate::object::name(&definition)), definition);
        }
    }
    Ok(listing.revision)
}

/// Starts the clean-up of a definition that is being deleted, once.
fn clean_up(api: &Arc<ApiServer>, key: String, definition: Value) {
    if !api.crd_cleanups.lock().insert(key.clone()) {
        return;
    }
    let api = api.clone();
    tokio::spawn(async move {
        while let Err(error) = cleanup::run(&api, &key, &definition).await {
            tracing::warn!(%error, key, "delete the objects of a definition");
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = api.shutdown.cancelled() => break,
            }
        }
        api.crd_cleanups.lock().remove(&key);
    });
}

/// Whether the custom rows are these very rows.
fn same(known: &[Arc<Kind>], custom: &[Arc<Kind>]) -> bool {
    let mut old = known.iter().filter(|kind| kind.crd.is_some());
    custom.iter().all(|new| old.next().is_some_and(|old| Arc::ptr_eq(old, new))) && old.next().is_none()
}

async fn write_conditions(
    api: &Arc<ApiServer>,
    row: &Kind,
    definition: &Value,
    verdict: &names::Verdict,
) -> Result<(), Status> {
    let name = crate::object::name(definition);
    let key = row.key("", name);
    for _ in 0..TRIES {
        let Some(entry) = api.store.get(&key).await? else { return Ok(()) };
        let mut object = wire::parse_stored(&entry.value)?;
        let status = crate::object::members(&mut object).entry("status").or_insert_with(|| json!({}));
        let before = status.clone();
        let now = crate::time::seconds(jiff::Timestamp::now());
        for condition in verdict.conditions() {
            set_condition(status, condition, &now);
        }
        status["acceptedNames"] = verdict.accepted.clone();
        let changed = *status != before;
        if !cleanup::keep(&mut object) && !changed {
            return Ok(());
        }
        let draft = Draft::encode(&object).map_err(Status::internal)?;
        match api.store.put(&key, draft, Precondition::Revision(entry.revision)).await {
            Ok(_) => return Ok(()),
            Err(Error::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(Status::modified(row, name))
}

fn set_condition(status: &mut Value, mut condition: Value, now: &str) {
    let list = crate::object::members(status).entry("conditions").or_insert_with(|| json!([]));
    if !list.is_array() {
        *list = json!([]);
    }
    let Some(list) = list.as_array_mut() else { return };
    condition["lastTransitionTime"] = now.into();
    match list.iter_mut().find(|known| known["type"] == condition["type"]) {
        Some(known) => {
            if known["status"] == condition["status"] {
                condition["lastTransitionTime"] = known["lastTransitionTime"].clone();
            }
            *known = condition;
        }
        None => list.push(condition),
    }
}

/// The version of the definition that a row stands for.
pub(super) fn version(kind: &Kind) -> Option<&Value> {
    let versions = kind.crd.as_ref()?.pointer("/spec/versions")?.as_array()?;
    versions.iter().find(|version| version["name"].as_str() == Some(&kind.version))
}

/// Fields that a custom resource's field selectors may name, such as `spec.color`.
pub(crate) fn selectable_fields(kind: &Kind) -> Vec<String> {
    let fields = version(kind).and_then(|version| version["selectableFields"].as_array());
    fields
        .into_iter()
        .flatten()
        .filter_map(|field| field["jsonPath"].as_str())
        .map(|path| path.trim_start_matches('.').to_owned())
        .collect()
}

/// `subresources.scale` of a custom resource's version.
pub(crate) fn scale(kind: &Kind) -> Option<Value> {
    version(kind)?.pointer("/subresources/scale").cloned()
}

/// Errors by the schema of a custom resource; nothing for built-in kinds.
pub(crate) fn validate(kind: &Kind, new: &Value, old: Option<&Value>) -> Vec<FieldError> {
    if kind.crd.is_none() {
        return Vec::new();
    }
    coracle_schema::validate::validate(new, old, kind.schema())
}

/// `openAPIV3Schema` of a custom resource's version.
pub(crate) fn open_api_schema(kind: &Kind) -> Option<&Value> {
    version(kind)?.pointer("/schema/openAPIV3Schema")
}

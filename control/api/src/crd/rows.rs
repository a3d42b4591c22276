//! The rows of a definition: one a version.

use std::sync::{Arc, OnceLock};

use coracle_schema::{Kind as Shape, Schema};
use serde_json::{Value, json};

use super::convert::Webhook;
use super::strategy::Custom;
use crate::kinds::{Column, Conversion, Kind, Scope, Subresource};
use crate::object;
use crate::registry::Rows;
use crate::server::ApiServer;

/// Member of the row's definition that tells which revision of it the row was made from.
const MADE_FROM: &str = "madeFrom";

/// The rows of a definition; those that were made from this revision of it before are kept.
pub(super) fn of(api: &Arc<ApiServer>, definition: &Value, revision: u64, known: &Rows) -> Vec<Arc<Kind>> {
    let spec = &definition["spec"];
    let versions = spec["versions"].as_array().cloned().unwrap_or_default();
    let storage = versions.iter().find(|v| v["storage"].as_bool() == Some(true));
    let storage = storage.map(|v| object::text(v, "/name").to_owned()).unwrap_or_default();
    // Objects stay in the version in which they were written until they are written again.
    let mixed = texts(&definition["status"]["storedVersions"]).iter().any(|stored| *stored != storage);
    // Conditions and other metadata do not make new rows.
    let made_from = json!({
        "spec": spec, "uid": object::uid(definition), "mixed": mixed,
        "deleting": definition.pointer("/metadata/deletionTimestamp"),
    });
    let (group, plural) = (object::text(spec, "/group"), object::text(spec, "/names/plural"));
    let old: Vec<Arc<Kind>> =
        known.all.iter().filter(|kind| kind.crd.is_some() && kind.is(group, plural)).cloned().collect();
    if !old.is_empty() && old.iter().all(|kind| kind.crd.as_ref().is_some_and(|crd| crd[MADE_FROM] == made_from)) {
        return old;
    }
    let schemas = Schema::from_crd(definition).unwrap_or_else(|errors| {
        // Validation refused this when it was written; an older definition is served without its schema.
        tracing::warn!(
            name = object::name(definition),
            errors = errors.len(),
            revision,
            "the schema is not structural"
        );
        Vec::new()
    });
    let mut crd = json!({"spec": spec, "metadata": {"name": object::name(definition), "uid": object::uid(definition)}});
    crd[MADE_FROM] = made_from;
    let crd = Arc::new(crd);
    let conversion: Option<Arc<dyn Conversion>> = (object::text(spec, "/conversion/strategy") == "Webhook")
        .then(|| Arc::new(Webhook::new(api, spec)) as Arc<dyn Conversion>);
    let deleting = definition.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string);
    versions
        .iter()
        .map(|version| {
            let name = object::text(version, "/name");
            let schema = schemas.iter().find(|(of, _)| of == name).map(|(_, schema)| schema.clone());
            Arc::new(row(&crd, version, &storage, schema, conversion.clone(), deleting, mixed))
        })
        .collect()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

fn row(
    crd: &Arc<Value>,
    version: &Value,
    storage: &str,
    schema: Option<Arc<Schema>>,
    conversion: Option<Arc<dyn Conversion>>,
    deleting: bool,
    mixed: bool,
) -> Kind {
    let spec = &crd["spec"];
    let names = &spec["names"];
    let (group, name) = (object::text(spec, "/group"), object::text(version, "/name"));
    let (plural, kind) = (object::text(names, "/plural"), object::text(names, "/kind"));
    let sub = |sub: &str, kind: &str, group: &str, version: &str| Subresource {
        name: sub.into(),
        kind: kind.into(),
        group: group.into(),
        version: version.into(),
        verbs: ["get", "patch", "update"].map(str::to_owned).into(),
    };
    let mut subresources = Vec::new();
    let has_status = version.pointer("/subresources/status").is_some_and(Value::is_object);
    if has_status {
        subresources.push(sub("status", kind, group, name));
    }
    if version.pointer("/subresources/scale").is_some_and(Value::is_object) {
        subresources.push(sub("scale", "Scale", "autoscaling", "v1"));
    }
    let mut verbs: Vec<String> =
        ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"].map(str::to_owned).into();
    if deleting {
        verbs.retain(|verb| verb != "create");
    }
    let custom = version["additionalPrinterColumns"].as_array().map(|columns| columns.iter().map(column).collect());
    let age = Column {
        name: "Age".into(),
        type_: "date".into(),
        format: String::new(),
        description: crate::table::description("", "", "Age").into(),
        priority: 0,
        json_path: Some(".metadata.creationTimestamp".into()),
    };
    let columns: Vec<Column> = custom.filter(|c: &Vec<Column>| !c.is_empty()).unwrap_or_else(|| vec![age]);
    let deprecated = version["deprecated"].as_bool() == Some(true);
    let warning = match object::text(version, "/deprecationWarning") {
        "" => format!("{group}/{name} {kind} is deprecated"),
        text => text.to_owned(),
    };
    let any = || {
        let mut any = Schema::of(Shape::Object);
        any.preserve_unknown = true;
        Arc::new(any)
    };
    let schema = schema.unwrap_or_else(any);
    Kind {
        group: group.into(),
        version: name.into(),
        resource: plural.into(),
        singular: object::text(names, "/singular").into(),
        kind: kind.into(),
        list_kind: object::text(names, "/listKind").into(),
        scope: if object::text(spec, "/scope") == "Namespaced" { Scope::Namespaced } else { Scope::Cluster },
        short_names: texts(&names["shortNames"]),
        categories: texts(&names["categories"]),
        verbs,
        subresources,
        columns,
        schema_name: format!("{}.{name}.{kind}", group.split('.').rev().collect::<Vec<_>>().join(".")),
        differs_when_read: mixed || coracle_schema::default::has_defaults(&schema),
        schema: OnceLock::from(schema),
        strategy: Arc::new(Custom { has_status, namespaced: object::text(spec, "/scope") == "Namespaced" }),
        prefix: format!("/registry/{group}/{plural}/"),
        storage_version: storage.into(),
        storage_group: group.into(),
        conversion,
        crd: Some(crd.clone()),
        deprecation: deprecated.then_some(warning),
        served: version["served"].as_bool() == Some(true),
    }
}

fn column(column: &Value) -> Column {
    Column {
        name: object::text(column, "/name").into(),
        type_: object::text(column, "/type").into(),
        format: object::text(column, "/format").into(),
        description: match object::text(column, "/description") {
            "" => {
                format!("Custom resource definition column (in JSONPath format): {}", object::text(column, "/jsonPath"))
            }
            text => text.to_owned(),
        },
        priority: column["priority"].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0),
        json_path: column["jsonPath"].as_str().map(str::to_owned),
    }
}

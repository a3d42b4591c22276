//! `meta.k8s.io` Tables: what `kubectl get` prints.

mod cells;
mod core;
mod describe;
mod others;
mod path;
mod workloads;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::http::{Include, Media};
use crate::kinds::{Column, Kind};
use crate::object;

pub(crate) use describe::description;

/// A Table of objects. Column definitions are left out when `head` is false (later events of a watch).
pub(crate) fn table(kind: &Kind, items: &[Value], media: Media, metadata: Value, head: bool, now: Timestamp) -> Value {
    let rows: Vec<Value> = items.iter().map(|item| row(kind, item, media, now)).collect();
    let mut table = json!({"kind": "Table", "apiVersion": media.meta, "metadata": metadata, "rows": rows});
    table["columnDefinitions"] = if head { Value::Array(columns(kind)) } else { Value::Null };
    table
}

/// The column definitions of a kind.
pub(crate) fn columns(kind: &Kind) -> Vec<Value> {
    let definition = |column: &Column| {
        json!({
            "name": column.name, "type": column.type_, "format": column.format,
            "description": column.description, "priority": column.priority,
        })
    };
    let name = Column {
        name: "Name".into(),
        type_: "string".into(),
        format: "name".into(),
        description: description("", "", "Name").into(),
        priority: 0,
        json_path: None,
    };
    let created = Column {
        name: "Created At".into(),
        type_: "date".into(),
        format: String::new(),
        description: description("", "", "Created At").into(),
        priority: 0,
        json_path: None,
    };
    if kind.crd.is_some() {
        return std::iter::once(&name).chain(&kind.columns).map(definition).collect();
    }
    if kind.columns.is_empty() {
        return [&name, &created].into_iter().map(definition).collect();
    }
    kind.columns.iter().map(definition).collect()
}

/// One row of a Table.
pub(crate) fn row(kind: &Kind, item: &Value, media: Media, now: Timestamp) -> Value {
    let cells = if kind.crd.is_some() { custom(kind, item, now) } else { builtin(kind, item, now) };
    let mut row = json!({"cells": cells});
    let conditions = cells::row_conditions(kind, item);
    if !conditions.is_empty() {
        row["conditions"] = Value::Array(conditions);
    }
    row["object"] = match media.include {
        Include::None => Value::Null,
        Include::Metadata => crate::handlers::partial(item, media.meta),
        Include::Object => item.clone(),
    };
    row
}

fn builtin(kind: &Kind, item: &Value, now: Timestamp) -> Vec<Value> {
    let view = cells::View { object: item, now };
    let made = core::cells(kind, &view)
        .or_else(|| workloads::cells(kind, &view))
        .or_else(|| others::cells(kind, &view))
        .unwrap_or_else(|| vec![object::name(item).into(), object::text(item, "/metadata/creationTimestamp").into()]);
    debug_assert!(kind.columns.is_empty() || made.len() == kind.columns.len(), "{kind:?}");
    made
}

fn custom(kind: &Kind, item: &Value, now: Timestamp) -> Vec<Value> {
    let view = cells::View { object: item, now };
    std::iter::once(object::name(item).into())
        .chain(kind.columns.iter().map(|column| {
            let found = column.json_path.as_deref().map(|text| path::find(item, text)).unwrap_or_default();
            cells::custom(&view, column, &found)
        }))
        .collect()
}

//! Defaults of custom resources' schemas, and of built-in list-map keys.

use serde_json::Value;

use crate::schema::{Schema, SchemaRef};

/// Sets absent fields (and nulls that may not be null) to their schema's default, parents before children.
pub fn default(value: &mut Value, schema: &Schema) {
    match value {
        Value::Object(map) => {
            for field in &schema.fields {
                let inner = field.schema.get();
                let Some(default) = field.default.as_ref().or(inner.default.as_ref()) else {
                    continue;
                };
                match map.get(field.name.as_ref()) {
                    None => {}
                    Some(Value::Null) if !inner.nullable => {}
                    Some(_) => continue,
                }
                map.insert(field.name.to_string(), default.clone());
            }
            for (name, inner) in map.iter_mut() {
                if let Some(child) = schema.child(name) {
                    default(inner, child);
                }
            }
            if let Some(values) = schema.values.as_ref().map(SchemaRef::get)
                && let Some(preset) = &values.default
            {
                for (name, inner) in map.iter_mut() {
                    if inner.is_null() && !values.nullable && schema.field(name).is_none() {
                        *inner = preset.clone();
                    }
                }
            }
        }
        Value::Array(items) => {
            let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else {
                return;
            };
            for item in items {
                if let (Value::Null, false, Some(preset)) = (&*item, inner.nullable, &inner.default) {
                    *item = preset.clone();
                }
                default(item, inner);
            }
        }
        _ => {}
    }
}

/// Whether anything in the schema has a default. Structural schemas do not refer to themselves.
pub fn has_defaults(schema: &Schema) -> bool {
    let below = |child: &SchemaRef| {
        let child = child.get();
        child.default.is_some() || has_defaults(child)
    };
    schema.fields.iter().any(|field| field.default.is_some() || below(&field.schema))
        || schema.values.as_ref().is_some_and(below)
        || schema.items.as_ref().is_some_and(below)
}

/// Drops nulls of custom resources that a default replaces or that may not be null, before [`default`].
pub fn drop_invalid_nulls(value: &mut Value, schema: &Schema) {
    match value {
        Value::Object(map) => {
            map.retain(|name, inner| match (inner.is_null(), schema.child(name)) {
                (true, Some(child)) => child.nullable || child.default.is_none(),
                _ => true,
            });
            for (name, inner) in map.iter_mut() {
                if let Some(child) = schema.child(name) {
                    drop_invalid_nulls(inner, child);
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner) = schema.items.as_ref().map(SchemaRef::get) {
                items.iter_mut().for_each(|item| drop_invalid_nulls(item, inner));
            }
        }
        _ => {}
    }
}

//! Dropping what a custom resource's schema does not know.

use serde_json::Value;

use crate::decode::{DecodeError, typed, warn};
use crate::gofmt;
use crate::schema::{Schema, SchemaRef};

/// Prunes `value` silently; the typed metadata of the object itself is left alone.
pub fn prune(value: &mut Value, schema: &Schema) {
    let mut path = String::new();
    walk(value, schema, false, &mut path, None);
}

/// Prunes `value`, naming each dropped field in `warnings`, and checks its metadata.
pub(crate) fn prune_strict(value: &mut Value, schema: &Schema, warnings: &mut Vec<String>) -> Result<(), DecodeError> {
    if !value.is_object() {
        return Ok(());
    }
    let metadata = Schema::builtin("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta");
    if let (Some(metadata), Some(inner)) = (metadata, value.get_mut("metadata")) {
        typed::conform_at(inner, &metadata, "metadata", warnings)?;
    }
    let mut path = String::new();
    walk(value, schema, true, &mut path, Some(warnings));
    Ok(())
}

fn walk(value: &mut Value, schema: &Schema, root: bool, path: &mut String, mut warnings: Option<&mut Vec<String>>) {
    let base = path.len();
    match value {
        Value::Array(items) => {
            let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else {
                return;
            };
            for (at, item) in items.iter_mut().enumerate() {
                path.push_str(&format!("[{at}]"));
                walk(item, inner, false, path, warnings.as_deref_mut());
                path.truncate(base);
            }
        }
        Value::Object(map) => {
            let object = root || schema.embedded;
            map.retain(|name, inner| {
                if object && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                    return true;
                }
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
                let keep = match schema.child(name) {
                    Some(child) => {
                        walk(inner, child, false, path, warnings.as_deref_mut());
                        true
                    }
                    None if schema.preserve_unknown => true,
                    None => {
                        if let Some(warnings) = warnings.as_deref_mut() {
                            warn(warnings, || format!("unknown field {}", gofmt::quote(path)));
                        }
                        false
                    }
                };
                path.truncate(base);
                keep
            });
        }
        _ => {}
    }
}

//! Dropping what a custom resource's schema does not know.

use serde_json::Value;

use crate::decode::{DecodeError, typed, warn};
use crate::gofmt;
use crate::schema::{Schema, SchemaRef};

/// Prunes `value` silently; metadata is left alone.
pub fn prune(value: &mut Value, schema: &Schema) {
    // Without a list of warnings nothing is checked, so nothing can fail.
    let _ = walk(value, schema, false, &mut String::new(), None);
}

/// Prunes `value`, naming each dropped field in `warnings`, and checks its metadata and that of objects in it.
pub(crate) fn prune_strict(value: &mut Value, schema: &Schema, warnings: &mut Vec<String>) -> Result<(), DecodeError> {
    walk(value, schema, true, &mut String::new(), Some(warnings))
}

fn walk(
    value: &mut Value,
    schema: &Schema,
    root: bool,
    path: &mut String,
    mut warnings: Option<&mut Vec<String>>,
) -> Result<(), DecodeError> {
    let base = path.len();
    match value {
        Value::Array(items) => {
            let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else { return Ok(()) };
            for (at, item) in items.iter_mut().enumerate() {
                path.push_str(&format!("[{at}]"));
                walk(item, inner, false, path, warnings.as_deref_mut())?;
                path.truncate(base);
            }
        }
        Value::Object(map) => {
            let object = root || schema.embedded;
            let mut unknown = Vec::new();
            for (name, inner) in map.iter_mut() {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
                match schema.child(name) {
                    Some(metadata) if name == "metadata" && object => {
                        if let Some(warnings) = warnings.as_deref_mut() {
                            typed::conform_at(inner, metadata, path, warnings)?;
                        }
                    }
                    Some(child) => walk(inner, child, false, path, warnings.as_deref_mut())?,
                    None if schema.preserve_unknown => {}
                    None if object && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") => {}
                    None => {
                        if let Some(warnings) = warnings.as_deref_mut() {
                            warn(warnings, || format!("unknown field {}", gofmt::quote(path)));
                        }
                        unknown.push(name.clone());
                    }
                }
                path.truncate(base);
            }
            for name in unknown {
                map.remove(&name);
            }
        }
        _ => {}
    }
    Ok(())
}

//! Definitions of custom resources.

use serde_json::{Map, Value, json};

use super::definitions::Writer;
use super::{Flavour, META, Resource};

/// Standard descriptions of the fields that every object has.
const API_VERSION: &str = "APIVersion defines the versioned schema of this representation of an object.";
const KIND: &str = "Kind is a string value representing the REST resource this object represents.";
/// Deepest schema that is published.
const MAX_DEPTH: usize = 100;

pub(super) fn add(writer: &mut Writer<'_>, resource: &Resource<'_>, schema: Option<&Value>) {
    let flavour = writer.flavour;
    let preserves = |schema: &Value| schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    let mut definition = match schema {
        None => object(json!({"type": "object"})),
        Some(schema) if flavour == Flavour::V2 && preserves(schema) => object(json!({"type": "object"})),
        Some(schema) => {
            let mut definition = object(if flavour == Flavour::V2 { for_v2(schema, 0) } else { schema.clone() });
            let metadata = typed_reference(writer, "ObjectMeta", "Standard object's metadata.");
            embed(&mut definition, flavour);
            let properties = definition.entry("properties").or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(properties) = properties {
                type_meta(properties);
                properties.insert("metadata".into(), metadata);
            }
            definition
        }
    };
    let kind = |kind: &str| json!([{"group": resource.group, "version": resource.version, "kind": kind}]);
    definition.insert("x-kubernetes-group-version-kind".into(), kind(resource.kind));
    let name = resource.definition();
    let mut properties = Map::new();
    type_meta(&mut properties);
    properties.insert("metadata".into(), typed_reference(writer, "ListMeta", "Standard list metadata."));
    let item = json!({"$ref": flavour.reference(&name)});
    let description = format!("List of {}.", resource.plural);
    properties.insert("items".into(), json!({"description": description, "type": "array", "items": item}));
    let list = json!({
        "description": format!("{} is a list of {}", resource.list_kind, resource.kind),
        "type": "object",
        "required": ["items"],
        "properties": properties,
        "x-kubernetes-group-version-kind": kind(resource.list_kind),
    });
    writer.put(name, Value::Object(definition));
    writer.put(resource.list_definition(), list);
}

fn typed_reference(writer: &mut Writer<'_>, name: &str, text: &str) -> Value {
    let name = format!("{META}{name}");
    let reference = writer.reference(&name);
    if writer.flavour == Flavour::V3 {
        json!({"allOf": [reference], "description": text})
    } else {
        json!({"$ref": reference["$ref"], "description": text})
    }
}

fn type_meta(properties: &mut Map<String, Value>) {
    properties.insert("apiVersion".into(), json!({"description": API_VERSION, "type": "string"}));
    properties.insert("kind".into(), json!({"description": KIND, "type": "string"}));
}

/// Objects inside that have metadata of their own get its fields.
fn embed(schema: &mut Map<String, Value>, flavour: Flavour) {
    for (name, inner) in schema.iter_mut() {
        match (name.as_str(), inner) {
            ("properties", Value::Object(properties)) => {
                properties.values_mut().filter_map(Value::as_object_mut).for_each(|inner| embed_here(inner, flavour));
            }
            ("items" | "additionalProperties", Value::Object(inner)) => embed_here(inner, flavour),
            _ => {}
        }
    }
}

fn embed_here(schema: &mut Map<String, Value>, flavour: Flavour) {
    embed(schema, flavour);
    let embedded = schema.get("x-kubernetes-embedded-resource") == Some(&Value::Bool(true));
    if !embedded || (flavour == Flavour::V2 && !schema.contains_key("properties")) {
        return;
    }
    let properties = schema.entry("properties").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(properties) = properties {
        type_meta(properties);
        let name = format!("{META}ObjectMeta");
        properties.insert("metadata".into(), json!({"$ref": flavour.reference(&name)}));
    }
}

/// A schema without what version 2 readers trip over: combinations, nullable types, the insides of free-form objects.
fn for_v2(schema: &Value, depth: usize) -> Value {
    let Value::Object(schema) = schema else { return schema.clone() };
    let is = |name: &str| schema.get(name) == Some(&Value::Bool(true));
    let mut out = Map::new();
    if depth > MAX_DEPTH {
        return Value::Object(out);
    }
    for (name, value) in schema {
        let kept = match name.as_str() {
            "allOf" | "anyOf" | "oneOf" | "not" | "nullable" => continue,
            "type" if is("nullable") || is("x-kubernetes-int-or-string") => continue,
            "items" | "properties" if is("nullable") || is("x-kubernetes-preserve-unknown-fields") => continue,
            "properties" => {
                let properties = value.as_object().into_iter().flatten();
                Value::Object(properties.map(|(name, inner)| (name.clone(), for_v2(inner, depth + 1))).collect())
            }
            "items" | "additionalProperties" => for_v2(value, depth + 1),
            _ => value.clone(),
        };
        out.insert(name.clone(), kept);
    }
    Value::Object(out)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

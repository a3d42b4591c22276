//! Definitions of built-in types.

use serde_json::{Map, Value, json};

use super::docs::Docs;
use super::{Flavour, META};
use crate::schema::{Field, Kind, ListType, Schema, SchemaRef, group_of};

/// Kinds that are published under every group.
const IN_EVERY_GROUP: [&str; 2] = ["DeleteOptions", "WatchEvent"];

/// Collects definitions with everything they refer to.
pub(super) struct Writer<'a> {
    pub(super) flavour: Flavour,
    docs: &'a Docs,
    done: Map<String, Value>,
    queue: Vec<String>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(flavour: Flavour, docs: &'a Docs) -> Self {
        Self { flavour, docs, done: Map::new(), queue: Vec::new() }
    }

    /// Adds a definition by name; unknown names are not added.
    pub(super) fn add(&mut self, name: &str) {
        self.queue.push(name.to_owned());
        while let Some(name) = self.queue.pop() {
            if self.done.contains_key(&name) {
                continue;
            }
            let Some(schema) = Schema::builtin(&name) else { continue };
            self.done.insert(name.clone(), Value::Null);
            let written = self.definition(&name, &schema);
            self.done.insert(name, written);
        }
    }

    /// Adds a ready-made definition.
    pub(super) fn put(&mut self, name: String, definition: Value) {
        self.done.insert(name, definition);
    }

    pub(super) fn finish(self) -> Map<String, Value> {
        self.done
    }

    /// A reference, with its target added.
    pub(super) fn reference(&mut self, name: &str) -> Value {
        self.queue.push(name.to_owned());
        json!({"$ref": self.flavour.reference(name)})
    }

    fn definition(&mut self, name: &str, schema: &Schema) -> Value {
        let mut out = Map::new();
        if let Some(text) = self.docs.of_type(name) {
            out.insert("description".into(), text.into());
        }
        let mut properties = Map::new();
        let mut required = Vec::new();
        for field in &schema.fields {
            properties.insert(field.name.to_string(), self.field(name, field));
            if field.required {
                required.push(Value::from(field.name.as_ref()));
            }
        }
        out.insert("type".into(), "object".into());
        if !properties.is_empty() {
            out.insert("properties".into(), Value::Object(properties));
        }
        if !required.is_empty() {
            out.insert("required".into(), Value::Array(required));
        }
        if schema.atomic {
            out.insert("x-kubernetes-map-type".into(), "atomic".into());
        }
        if let Some(kinds) = kinds_of(name, schema) {
            out.insert("x-kubernetes-group-version-kind".into(), kinds);
        }
        Value::Object(out)
    }

    fn field(&mut self, owner: &str, field: &Field) -> Value {
        let schema = field.schema.get();
        let mut out = self.node(&field.schema);
        // Version 3 wraps references that say more than the reference.
        let text = self.docs.of_field(owner, &field.name);
        let strukt = !schema.name.is_empty() && !field.pointer;
        if self.flavour == Flavour::V3 && out.contains_key("$ref") && (text.is_some() || strukt) {
            out = [("allOf".to_owned(), Value::Array(vec![Value::Object(out)]))].into_iter().collect();
        }
        if let Some(text) = text {
            out.insert("description".into(), text.into());
        }
        if let Some(default) = &field.default {
            out.insert("default".into(), default.clone());
        } else if self.flavour == Flavour::V3 && strukt && schema.is_struct() {
            out.insert("default".into(), json!({}));
        }
        match &schema.list {
            _ if schema.kind != Kind::List => {}
            ListType::Atomic => {
                if field.patch.merge_key.is_empty() && !field.patch.merge {
                    out.insert("x-kubernetes-list-type".into(), "atomic".into());
                }
            }
            ListType::Set => {
                out.insert("x-kubernetes-list-type".into(), "set".into());
            }
            ListType::Map(keys) => {
                out.insert("x-kubernetes-list-type".into(), "map".into());
                out.insert("x-kubernetes-list-map-keys".into(), keys.iter().map(AsRef::<str>::as_ref).collect());
            }
        }
        if field.atomic {
            out.insert("x-kubernetes-map-type".into(), "atomic".into());
        }
        let patch = field.patch;
        let strategies = [(patch.merge, "merge"), (patch.replace, "replace"), (patch.retain_keys, "retainKeys")];
        let strategies: Vec<&str> = strategies.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
        if !strategies.is_empty() {
            out.insert("x-kubernetes-patch-strategy".into(), strategies.join(",").into());
        }
        if !patch.merge_key.is_empty() {
            out.insert("x-kubernetes-patch-merge-key".into(), patch.merge_key.into());
        }
        Value::Object(out)
    }

    fn node(&mut self, child: &SchemaRef) -> Map<String, Value> {
        let schema = child.get();
        if !schema.name.is_empty() {
            return object(self.reference(schema.name));
        }
        if let Some((name, plain)) = special(schema.kind, self.flavour) {
            if !name.is_empty() {
                self.done.entry(name).or_insert(plain);
                return object(json!({"$ref": self.flavour.reference(name)}));
            }
            return object(plain);
        }
        match schema.kind {
            Kind::List => {
                let items = schema.items.as_ref().map(|items| self.item(items)).unwrap_or_default();
                object(json!({"type": "array", "items": items}))
            }
            _ => {
                let values = schema.values.as_ref().map(|values| self.item(values)).unwrap_or_default();
                object(json!({"type": "object", "additionalProperties": values}))
            }
        }
    }

    /// A list's items or a map's values.
    fn item(&mut self, child: &SchemaRef) -> Map<String, Value> {
        let inner = self.node(child);
        if self.flavour == Flavour::V3 && inner.contains_key("$ref") {
            let mut wrapped = Map::new();
            wrapped.insert("allOf".into(), Value::Array(vec![Value::Object(inner)]));
            if child.get().is_struct() {
                wrapped.insert("default".into(), json!({}));
            }
            return wrapped;
        }
        inner
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Scalars and types with an encoding of their own: the definition's name (empty when written in place) and its schema.
fn special(kind: Kind, flavour: Flavour) -> Option<(&'static str, Value)> {
    const CRD: [&str; 4] = [
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray",
    ];
    let v3 = flavour == Flavour::V3;
    Some(match kind {
        Kind::String => ("", json!({"type": "string"})),
        Kind::Bytes => ("", json!({"type": "string", "format": "byte"})),
        Kind::Bool => ("", json!({"type": "boolean"})),
        Kind::Int32 => ("", json!({"type": "integer", "format": "int32"})),
        Kind::Int64 => ("", json!({"type": "integer", "format": "int64"})),
        Kind::Float => ("", json!({"type": "number", "format": "double"})),
        Kind::Any => ("", json!({"type": "object"})),
        Kind::StringList => ("", json!({"type": "array", "items": {"type": "string"}})),
        Kind::IntOrString => (
            "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
            if v3 {
                json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
            } else {
                json!({"format": "int-or-string", "type": "string"})
            },
        ),
        Kind::Quantity => (
            "io.k8s.apimachinery.pkg.api.resource.Quantity",
            if v3 { json!({"oneOf": [{"type": "string"}, {"type": "number"}]}) } else { json!({"type": "string"}) },
        ),
        Kind::Time => ("io.k8s.apimachinery.pkg.apis.meta.v1.Time", json!({"type": "string", "format": "date-time"})),
        Kind::MicroTime => {
            ("io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime", json!({"type": "string", "format": "date-time"}))
        }
        Kind::Duration => ("io.k8s.apimachinery.pkg.apis.meta.v1.Duration", json!({"type": "string"})),
        Kind::Raw => ("io.k8s.apimachinery.pkg.runtime.RawExtension", json!({"type": "object"})),
        Kind::FieldsV1 => ("io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1", json!({"type": "object"})),
        Kind::Json => (CRD[0], json!({})),
        Kind::SchemaOrBool => (CRD[1], json!({})),
        Kind::SchemaOrArray => (CRD[2], json!({})),
        Kind::SchemaOrStrings => (CRD[3], json!({})),
        Kind::Object | Kind::List => return None,
    })
}

/// Group, version and kind of a definition that is an object of its own.
fn kinds_of(name: &str, schema: &Schema) -> Option<Value> {
    schema.field("kind").and(schema.field("apiVersion"))?;
    let kind = name.rsplit('.').next()?;
    if name.starts_with(META) {
        let every: Vec<Value> = if IN_EVERY_GROUP.contains(&kind) {
            let groups = crate::schema::group_versions().filter(|(group, _)| !group.starts_with("meta"));
            groups.map(|(group, version)| json!({"group": group, "version": version, "kind": kind})).collect()
        } else {
            vec![json!({"group": "", "version": "v1", "kind": kind})]
        };
        return matches!(
            kind,
            "DeleteOptions" | "WatchEvent" | "Status" | "APIGroup" | "APIGroupList" | "APIResourceList" | "APIVersions"
        )
        .then_some(Value::Array(every));
    }
    // Types that only carry a reference (`OwnerReference`, `ObjectReference`) have a kind but no metadata.
    schema.field("metadata").or_else(|| schema.field("status"))?;
    let (group, version) = group_of(name)?;
    Some(json!([{"group": group, "version": version, "kind": kind}]))
}

//! From a CustomResourceDefinition's `openAPIV3Schema` to the schema IR, with the structural rules checked.
//!
//! Source: "Specifying a structural schema" of the CRD documentation; the texts are the server's.

use std::borrow::Cow;
use std::sync::Arc;

use regex::Regex;
use serde_json::{Map, Value};

use super::{Field, Kind, ListType, Omit, Patch, Schema, SchemaRef, builtin};
use crate::cel;
use crate::error::{FieldError, Path};
use crate::prune;
use crate::validate::{Checks, Pattern, validate};

/// Deepest nesting of schemas.
const MAX_DEPTH: usize = 100;
/// The metadata of every custom resource.
const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const TYPES: [&str; 5] = ["array", "boolean", "integer", "number", "string"];

/// The schemas of a definition's versions, by name, in the definition's order.
pub type Versions = Vec<(String, Arc<Schema>)>;

impl Schema {
    /// Builds the schemas of all versions of a CustomResourceDefinition object, or says what is wrong with them.
    pub fn from_crd(crd: &Value) -> Result<Versions, Vec<FieldError>> {
        let versions = crd.pointer("/spec/versions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let of = |version: &Value| version.pointer("/schema/openAPIV3Schema").cloned();
        // Versions that share one schema are checked as the definition's own validation.
        let shared = versions.iter().all(|version| of(version) == versions.first().and_then(of));
        let (mut built, mut errors) = (Versions::new(), Vec::new());
        for (i, version) in versions.iter().enumerate() {
            let path = if shared {
                Path::new("spec.validation.openAPIV3Schema")
            } else {
                Path::new("spec.versions").index(i).child("schema.openAPIV3Schema")
            };
            let Some(schema) = of(version) else { continue };
            match Self::from_openapi(&schema, &path) {
                Ok(schema) => {
                    let name = version.get("name").and_then(Value::as_str).unwrap_or("");
                    built.push((name.to_owned(), schema));
                }
                Err(found) if !shared || i == 0 => errors.extend(found),
                Err(_) => {}
            }
        }
        if errors.is_empty() { Ok(built) } else { Err(errors) }
    }

    /// Builds the schema of one version; `path` is where it stands, for errors.
    pub fn from_openapi(schema: &Value, path: &Path) -> Result<Arc<Self>, Vec<FieldError>> {
        let mut builder = Builder { errors: Vec::new(), rules: Vec::new() };
        let mut root = builder.node(schema, path, Level::Root, 1);
        with_object_fields(&mut root);
        builder.check_costs(path);
        if builder.errors.is_empty() { Ok(Arc::new(root)) } else { Err(builder.errors) }
    }
}

/// Gives an object with metadata of its own the types of `apiVersion`, `kind` and `metadata`.
fn with_object_fields(schema: &mut Schema) {
    let mut fields = std::mem::take(&mut schema.fields);
    fields.retain(|field| !matches!(field.name.as_ref(), "apiVersion" | "kind" | "metadata"));
    for (name, definition) in [("apiVersion", ""), ("kind", ""), ("metadata", OBJECT_META)] {
        let inner = builtin::by_name(definition).unwrap_or_else(|| Arc::new(Schema::of(Kind::String)));
        fields.push(plain_field(name, SchemaRef::Inline(inner)));
    }
    schema.set_fields(fields);
}

fn plain_field(name: &str, schema: SchemaRef) -> Field {
    Field {
        name: Cow::Owned(name.to_owned()),
        schema,
        required: false,
        pointer: true,
        omit: Omit::Empty,
        atomic: false,
        patch: Patch::default(),
        default: None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Field,
    Item,
    /// Inside `allOf`, `anyOf`, `oneOf`, `not`: checks only.
    Nested,
}

struct Builder {
    errors: Vec<FieldError>,
    /// Rules with their path and how many values of their schema one object may hold at most.
    rules: Vec<(Path, u64)>,
}

impl Builder {
    fn node(&mut self, json: &Value, path: &Path, level: Level, multiplicity: u64) -> Schema {
        let Value::Object(map) = json else {
            self.errors.push(FieldError::invalid(path, json.clone(), "must be a schema object"));
            return Schema::of(Kind::Any);
        };
        if path.as_str().matches(['.', '[']).count() > MAX_DEPTH * 2 {
            self.errors.push(FieldError::forbidden(path, "schema is nested too deeply"));
            return Schema::of(Kind::Any);
        }
        let text = |name: &str| map.get(name).and_then(Value::as_str).unwrap_or("");
        let flag = |name: &str| map.get(name).and_then(Value::as_bool).unwrap_or(false);
        let int_or_string = flag("x-kubernetes-int-or-string");
        let preserve = flag("x-kubernetes-preserve-unknown-fields");
        let kind = match text("type") {
            _ if int_or_string => Kind::IntOrString,
            "object" => Kind::Object,
            "array" => Kind::List,
            "string" => Kind::String,
            "integer" => Kind::Int64,
            "number" => Kind::Float,
            "boolean" => Kind::Bool,
            _ => Kind::Any,
        };
        let mut schema = Schema::of(kind);
        schema.nullable = flag("nullable");
        schema.preserve_unknown = preserve || (kind == Kind::Any && level != Level::Nested);
        schema.embedded = flag("x-kubernetes-embedded-resource");
        schema.atomic = text("x-kubernetes-map-type") == "atomic";
        schema.list = list_type(map);
        schema.default = map.get("default").cloned();
        self.check_structure(map, &schema, path, level);
        self.children(map, &mut schema, path, level, multiplicity);
        if schema.embedded && level != Level::Nested {
            with_object_fields(&mut schema);
        }
        let checks = self.checks(map, path, level, &schema, multiplicity);
        schema.checks = Some(Box::new(checks));
        if let Some(default) = &schema.default {
            self.check_default(default, &schema, &path.child("default"));
        }
        schema
    }

    fn children(
        &mut self,
        map: &Map<String, Value>,
        schema: &mut Schema,
        path: &Path,
        level: Level,
        multiplicity: u64,
    ) {
        let inner = |level_of_child| if level == Level::Nested { Level::Nested } else { level_of_child };
        if let Some(Value::Object(properties)) = map.get("properties") {
            let required: Vec<&str> = strings(map.get("required")).collect();
            let mut fields = Vec::with_capacity(properties.len());
            for (name, property) in properties {
                let at = path.child("properties").key(name);
                let child = self.node(property, &at, inner(Level::Field), multiplicity);
                let mut field = plain_field(name, SchemaRef::Inline(Arc::new(child)));
                field.required = required.contains(&name.as_str());
                fields.push(field);
            }
            if fields.len() > usize::from(u16::MAX) {
                self.errors.push(FieldError::too_many(path.child("properties"), fields.len(), usize::from(u16::MAX)));
            } else {
                schema.set_fields(fields);
            }
        }
        match map.get("additionalProperties") {
            Some(Value::Bool(true)) => {
                let mut any = Schema::of(Kind::Any);
                any.preserve_unknown = true;
                schema.values = Some(SchemaRef::Inline(Arc::new(any)));
            }
            Some(json @ Value::Object(_)) => {
                let many = multiplicity.saturating_mul(bound(map, "maxProperties"));
                let child = self.node(json, &path.child("additionalProperties"), inner(Level::Field), many);
                schema.values = Some(SchemaRef::Inline(Arc::new(child)));
            }
            _ => {}
        }
        if let Some(items) = map.get("items") {
            if items.is_array() {
                self.errors
                    .push(FieldError::forbidden(path.child("items"), "items must be a schema object and not an array"));
            } else {
                let many = multiplicity.saturating_mul(bound(map, "maxItems"));
                let child = self.node(items, &path.child("items"), inner(Level::Item), many);
                schema.items = Some(SchemaRef::Inline(Arc::new(child)));
            }
        }
    }

    /// The structural rules of one node.
    fn check_structure(&mut self, map: &Map<String, Value>, schema: &Schema, path: &Path, level: Level) {
        let text = |name: &str| map.get(name).and_then(Value::as_str).unwrap_or("");
        let has = |name: &str| map.get(name).is_some_and(|value| !value.is_null());
        let ty = text("type");
        let errors = &mut self.errors;
        if level == Level::Nested {
            let allowed = matches!(ty, "integer" | "string") && path.as_str().contains(".anyOf[");
            if !ty.is_empty() && !allowed {
                errors.push(FieldError::forbidden(path.child("type"), "must be empty to be structural"));
            }
            for (name, words) in [
                ("additionalProperties", "must be undefined to be structural"),
                ("default", "must be undefined to be structural"),
                ("title", "must be empty to be structural"),
                ("description", "must be empty to be structural"),
                ("nullable", "must be false to be structural"),
                ("x-kubernetes-preserve-unknown-fields", "must be false to be structural"),
                ("x-kubernetes-embedded-resource", "must be false to be structural"),
                ("x-kubernetes-int-or-string", "must be false to be structural"),
                ("x-kubernetes-list-map-keys", "must be empty to be structural"),
                ("x-kubernetes-list-type", "must be undefined to be structural"),
                ("x-kubernetes-map-type", "must be undefined to be structural"),
            ] {
                if has(name) {
                    errors.push(FieldError::forbidden(path.child(name), words));
                }
            }
            return;
        }
        match ty {
            "" if schema.embedded => {
                let words = "must be object if x-kubernetes-embedded-resource is true";
                errors.push(FieldError::required(path.child("type"), words));
            }
            "" if schema.kind == Kind::IntOrString
                || map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true)) => {}
            "" => {
                let words = match level {
                    Level::Root => "must not be empty at the root",
                    Level::Item => "must not be empty for specified array items",
                    _ => "must not be empty for specified object fields",
                };
                errors.push(FieldError::required(path.child("type"), words));
            }
            "null" => {
                let words = "type cannot be set to null, use nullable as an alternative";
                errors.push(FieldError::forbidden(path.child("type"), words));
            }
            other if level == Level::Root && other != "object" => {
                errors.push(FieldError::invalid(path.child("type"), other, "must be object at the root"));
            }
            other if other != "object" && !TYPES.contains(&other) => {
                let all = ["array", "boolean", "integer", "number", "object", "string"];
                errors.push(FieldError::not_supported(path.child("type"), other, &all));
            }
            other if schema.embedded && other != "object" => {
                let words = "must be object if x-kubernetes-embedded-resource is true";
                errors.push(FieldError::invalid(path.child("type"), other, words));
            }
            _ => {}
        }
        if ty == "array" && !has("items") {
            errors.push(FieldError::required(path.child("items"), "must be specified"));
        }
        if level == Level::Root && has("additionalProperties") {
            errors.push(FieldError::forbidden(path.child("additionalProperties"), "must not be used at the root"));
        }
        let properties = map.get("properties").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
        match map.get("additionalProperties") {
            Some(Value::Bool(false)) => {
                errors.push(FieldError::forbidden(
                    path.child("additionalProperties"),
                    "additionalProperties cannot be set to false",
                ));
            }
            Some(value) if !value.is_null() && properties => {
                let words = "additionalProperties and properties are mutual exclusive";
                errors.push(FieldError::forbidden(path.child("additionalProperties"), words));
            }
            Some(value) if !value.is_null() && schema.embedded => {
                let words = "must not be used if x-kubernetes-embedded-resource is set";
                errors.push(FieldError::forbidden(path.child("additionalProperties"), words));
            }
            _ => {}
        }
        if schema.embedded && !properties && !has("x-kubernetes-preserve-unknown-fields") {
            let words = "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields";
            errors.push(FieldError::required(path.child("properties"), words));
        }
        if map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(false)) {
            errors.push(FieldError::invalid(
                path.child("x-kubernetes-preserve-unknown-fields"),
                false,
                "must be true or undefined",
            ));
        }
        for (name, words) in [
            ("id", "id is not supported"),
            ("additionalItems", "additionalItems is not supported"),
            ("patternProperties", "patternProperties is not supported"),
            ("definitions", "definitions is not supported"),
            ("dependencies", "dependencies is not supported"),
            ("$ref", "$ref is not supported"),
        ] {
            if has(name) {
                errors.push(FieldError::forbidden(path.child(name), words));
            }
        }
        if map.get("uniqueItems") == Some(&Value::Bool(true)) {
            let words = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            errors.push(FieldError::forbidden(path.child("uniqueItems"), words));
        }
        if level == Level::Root && schema.nullable {
            errors.push(FieldError::forbidden(path.child("nullable"), "nullable cannot be true at the root"));
        }
        self.check_topology(map, path, ty);
    }

    fn check_topology(&mut self, map: &Map<String, Value>, path: &Path, ty: &str) {
        let errors = &mut self.errors;
        if let Some(word) = map.get("x-kubernetes-map-type").and_then(Value::as_str) {
            if ty != "object" {
                errors.push(FieldError::invalid(
                    path.child("type"),
                    ty,
                    "must be object if x-kubernetes-map-type is specified",
                ));
            }
            if !matches!(word, "atomic" | "granular") {
                errors.push(FieldError::not_supported(
                    path.child("x-kubernetes-map-type"),
                    word,
                    &["atomic", "granular"],
                ));
            }
        }
        let list_type = map.get("x-kubernetes-list-type").and_then(Value::as_str);
        if let Some(word) = list_type {
            if ty != "array" {
                errors.push(FieldError::invalid(
                    path.child("type"),
                    ty,
                    "must be array if x-kubernetes-list-type is specified",
                ));
            }
            if !matches!(word, "atomic" | "set" | "map") {
                errors.push(FieldError::not_supported(
                    path.child("x-kubernetes-list-type"),
                    word,
                    &["atomic", "set", "map"],
                ));
            }
        }
        let keys: Vec<&str> = strings(map.get("x-kubernetes-list-map-keys")).collect();
        if !keys.is_empty() && list_type != Some("map") {
            let words = "must be map if x-kubernetes-list-map-keys is non-empty";
            errors.push(match list_type {
                None => FieldError::required(path.child("x-kubernetes-list-type"), words),
                Some(other) => FieldError::invalid(path.child("x-kubernetes-list-type"), other, words),
            });
        }
        if list_type != Some("map") {
            return;
        }
        if keys.is_empty() {
            let words = "must not be empty if x-kubernetes-list-type is map";
            errors.push(FieldError::required(path.child("x-kubernetes-list-map-keys"), words));
        }
        let items = map.get("items");
        let item_type = items.and_then(|items| items.get("type")).and_then(Value::as_str).unwrap_or("");
        if item_type != "object" {
            let words = "must be object if parent array's x-kubernetes-list-type is map";
            errors.push(FieldError::invalid(path.child("items").child("type"), item_type, words));
        }
        let required: Vec<&str> = strings(items.and_then(|items| items.get("required"))).collect();
        for (i, key) in keys.iter().enumerate() {
            let property = items.and_then(|items| items.get("properties")).and_then(|all| all.get(key));
            let all_keys: Value = keys.iter().copied().collect();
            let at = path.child("x-kubernetes-list-map-keys");
            let Some(property) = property else {
                errors.push(FieldError::invalid(at, all_keys, "entries must all be names of item properties"));
                continue;
            };
            if keys[..i].contains(key) {
                errors.push(FieldError::invalid(at, all_keys, "must not contain duplicate entries"));
            }
            if !required.contains(key) && property.get("default").is_none() {
                let at = path.child("items").child("properties").key(key).child("default");
                let words = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
                errors.push(FieldError::required(at, words));
            }
        }
    }

    /// A default must be what a client could have written.
    fn check_default(&mut self, default: &Value, schema: &Schema, path: &Path) {
        let mut pruned = default.clone();
        prune::prune(&mut pruned, schema);
        if pruned != *default {
            self.errors.push(FieldError::invalid(path, default.clone(), "must not have unknown fields"));
        }
        for mut error in validate(default, None, schema) {
            error.path = match error.path.as_str() {
                "" => path.clone(),
                inner => path.child(inner),
            };
            self.errors.push(error);
        }
    }

    fn checks(
        &mut self,
        map: &Map<String, Value>,
        path: &Path,
        level: Level,
        schema: &Schema,
        multiplicity: u64,
    ) -> Checks {
        let number = |name: &str| map.get(name).and_then(Value::as_f64);
        let count = |name: &str| map.get(name).and_then(Value::as_u64);
        let flag = |name: &str| map.get(name).and_then(Value::as_bool).unwrap_or(false);
        let pattern =
            map.get("pattern").and_then(Value::as_str).filter(|text| !text.is_empty()).and_then(
                |text| match Regex::new(text) {
                    Ok(regex) => Some(Pattern { text: text.to_owned(), regex }),
                    Err(error) => {
                        let words = format!("must be a valid regular expression, but isn't: {error}");
                        self.errors.push(FieldError::invalid(path.child("pattern"), text, words));
                        None
                    }
                },
            );
        // The two ways to write int-or-string carry an `anyOf` of types that the type itself already says.
        let int_or_string = schema.kind == Kind::IntOrString;
        let mut group = |name: &str| -> Vec<Schema> {
            let list = map.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let group = list.iter().enumerate().filter(|(_, json)| !(int_or_string && only_type(json)));
            group.map(|(i, json)| self.node(json, &path.child(name).index(i), Level::Nested, multiplicity)).collect()
        };
        let (all_of, any_of, one_of) = (group("allOf"), group("anyOf"), group("oneOf"));
        let not = map.get("not").map(|json| Box::new(self.node(json, &path.child("not"), Level::Nested, multiplicity)));
        Checks {
            minimum: number("minimum"),
            exclusive_minimum: flag("exclusiveMinimum"),
            maximum: number("maximum"),
            exclusive_maximum: flag("exclusiveMaximum"),
            multiple_of: number("multipleOf"),
            min_length: count("minLength"),
            max_length: count("maxLength"),
            pattern,
            min_items: count("minItems"),
            max_items: count("maxItems"),
            min_properties: count("minProperties"),
            max_properties: count("maxProperties"),
            required: strings(map.get("required")).map(str::to_owned).collect(),
            allowed: map.get("enum").and_then(Value::as_array).cloned().unwrap_or_default(),
            format: map.get("format").and_then(Value::as_str).unwrap_or("").to_owned(),
            all_of,
            any_of,
            one_of,
            not,
            rules: if level == Level::Nested { Vec::new() } else { self.rules(map, path, schema, multiplicity) },
        }
    }

    fn rules(&mut self, map: &Map<String, Value>, path: &Path, schema: &Schema, multiplicity: u64) -> Vec<cel::Rule> {
        let list = map.get("x-kubernetes-validations").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let mut rules = Vec::with_capacity(list.len());
        for (i, json) in list.iter().enumerate() {
            let at = path.child("x-kubernetes-validations").index(i);
            match cel::Rule::compile(json, schema, &at) {
                Ok(rule) => {
                    self.rules.push((at.child("rule"), multiplicity.saturating_mul(rule.cost_estimate())));
                    rules.push(rule);
                }
                Err(errors) => self.errors.extend(errors),
            }
        }
        rules
    }

    /// Rules that may cost too much on the largest object the schema allows.
    fn check_costs(&mut self, path: &Path) {
        let mut total: u64 = 0;
        for (at, cost) in &self.rules {
            total = total.saturating_add(*cost);
            if *cost > cel::MAX_ESTIMATED_RULE_COST {
                let words = cost_words("estimated rule cost", *cost, cel::MAX_ESTIMATED_RULE_COST);
                self.errors.push(FieldError::forbidden(at, words));
            }
        }
        if total > cel::MAX_ESTIMATED_SCHEMA_COST {
            let words = cost_words(
                "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema",
                total,
                cel::MAX_ESTIMATED_SCHEMA_COST,
            );
            self.errors.push(FieldError::forbidden(path, words));
        }
    }
}

fn cost_words(what: &str, cost: u64, limit: u64) -> String {
    let factor = cost as f64 / limit as f64;
    let factor = if factor > 100.0 { "more than 100x".to_owned() } else { format!("factor of {factor:.1}x") };
    format!(
        "{what} exceeds budget by {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

/// How many items a list or map may hold, for cost estimates.
fn bound(map: &Map<String, Value>, name: &str) -> u64 {
    map.get(name).and_then(Value::as_u64).unwrap_or(cel::UNBOUNDED_ITEMS)
}

fn list_type(map: &Map<String, Value>) -> ListType {
    match map.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("set") => ListType::Set,
        Some("map") => {
            let keys = strings(map.get("x-kubernetes-list-map-keys"));
            ListType::Map(keys.map(|key| Cow::Owned(key.to_owned())).collect())
        }
        _ => ListType::Atomic,
    }
}

/// A branch of int-or-string's `anyOf`: a type and nothing else, or the `anyOf` of such.
fn only_type(json: &Value) -> bool {
    json.as_object().is_some_and(|map| {
        map.iter().all(|(name, value)| match name.as_str() {
            "type" => true,
            "anyOf" => value.as_array().is_some_and(|list| list.iter().all(only_type)),
            _ => false,
        })
    })
}

fn strings(value: Option<&Value>) -> impl Iterator<Item = &str> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

//! Values brought into the shape of their built-in type: what a typed server does by decoding into a struct and encoding again.
//!
//! [`conform`] checks types, drops unknown fields, nulls and empty optional fields, and writes scalars canonically.
//! [`fill`] adds what the type always writes (`status: {}`, `resources: {}`); call it after defaulting, before storing.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{DecodeError, scalar, warn};
use crate::quantity::Quantity;
use crate::schema::{Field, Kind, Omit, Schema, SchemaRef};
use crate::{gofmt, prune};

/// Brings `value` into the shape of `schema`. Unknown fields are dropped and reported in `warnings`.
pub fn conform(value: &mut Value, schema: &Schema, warnings: &mut Vec<String>) -> Result<(), DecodeError> {
    if schema.go.is_empty() {
        return prune::prune_strict(value, schema, warnings);
    }
    Walk { warnings, trail: Vec::new(), strukt: "" }.node(value, schema)
}

/// The same below a path, for the typed parts of custom resources.
pub(crate) fn conform_at(
    value: &mut Value,
    schema: &Schema,
    field: &str,
    warnings: &mut Vec<String>,
) -> Result<(), DecodeError> {
    Walk { warnings, trail: vec![Step::Field(Cow::Owned(field.to_owned()))], strukt: "" }.node(value, schema)
}

/// Where the walk stands.
enum Step<'a> {
    Field(Cow<'a, str>),
    Key(String),
    Index(usize),
}

struct Walk<'a> {
    warnings: &'a mut Vec<String>,
    trail: Vec<Step<'a>>,
    /// Name of the innermost struct, for errors.
    strukt: &'a str,
}

impl<'a> Walk<'a> {
    fn node(&mut self, value: &mut Value, schema: &'a Schema) -> Result<(), DecodeError> {
        if value.is_null() {
            return Ok(());
        }
        match schema.kind {
            Kind::Object if schema.values.is_some() => self.map(value, schema),
            Kind::Object => self.strukt(value, schema),
            Kind::List => self.list(value, schema),
            Kind::StringList => {
                let Value::Array(items) = value else {
                    return Err(self.mismatch(value, &schema.go));
                };
                for item in items {
                    if item.is_null() {
                        *item = Value::String(String::new());
                    } else if !item.is_string() {
                        return Err(self.mismatch(item, "string"));
                    }
                }
                Ok(())
            }
            Kind::SchemaOrBool if value.is_boolean() => Ok(()),
            Kind::SchemaOrArray | Kind::SchemaOrStrings if value.is_array() => {
                let Value::Array(items) = value else {
                    return Ok(());
                };
                match &schema.items {
                    Some(inner) if schema.kind == Kind::SchemaOrArray => {
                        items.iter_mut().try_for_each(|item| self.node(item, inner.get()))
                    }
                    _ => Ok(()),
                }
            }
            Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings => {
                match (&schema.items, value.is_object()) {
                    (Some(inner), true) => self.node(value, inner.get()),
                    _ if schema.kind == Kind::SchemaOrBool => {
                        Err(DecodeError::Type("boolean or JSON schema expected".into()))
                    }
                    _ => Err(self.mismatch(value, &schema.go)),
                }
            }
            _ => self.scalar(value, schema),
        }
    }

    fn strukt(&mut self, value: &mut Value, schema: &'a Schema) -> Result<(), DecodeError> {
        let Value::Object(map) = value else {
            return Err(self.mismatch(value, &schema.go));
        };
        let outer = std::mem::replace(&mut self.strukt, schema.name.rsplit('.').next().unwrap_or(""));
        let names: Vec<String> = map.keys().cloned().collect();
        for name in names {
            let Some(field) = schema.field(&name) else {
                map.remove(&name);
                let path = self.path(&name);
                warn(self.warnings, || format!("unknown field {}", gofmt::quote(&path)));
                continue;
            };
            let Some(inner) = map.get_mut(&name) else {
                continue;
            };
            self.trail.push(Step::Field(Cow::Borrowed(&field.name)));
            self.node(inner, field.schema.get())?;
            self.trail.pop();
            if inner.is_null() || (left_out(field, inner) && field.omit != Omit::Never) {
                map.remove(&name);
            }
        }
        self.strukt = outer;
        Ok(())
    }

    fn map(&mut self, value: &mut Value, schema: &'a Schema) -> Result<(), DecodeError> {
        let Value::Object(map) = value else {
            return Err(self.mismatch(value, &schema.go));
        };
        let Some(inner) = schema.values.as_ref().map(SchemaRef::get) else {
            return Ok(());
        };
        for (key, item) in map.iter_mut() {
            if item.is_null() {
                *item = zero(inner);
                continue;
            }
            self.trail.push(Step::Key(key.clone()));
            self.node(item, inner)?;
            self.trail.pop();
        }
        Ok(())
    }

    fn list(&mut self, value: &mut Value, schema: &'a Schema) -> Result<(), DecodeError> {
        let Value::Array(items) = value else {
            return Err(self.mismatch(value, &schema.go));
        };
        let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else {
            return Ok(());
        };
        for (at, item) in items.iter_mut().enumerate() {
            if item.is_null() {
                *item = zero(inner);
                continue;
            }
            self.trail.push(Step::Index(at));
            self.node(item, inner)?;
            self.trail.pop();
        }
        Ok(())
    }

    fn scalar(&self, value: &mut Value, schema: &Schema) -> Result<(), DecodeError> {
        let canonical = match (schema.kind, &*value) {
            (Kind::Any | Kind::Json | Kind::Raw, _)
            | (Kind::String, Value::String(_))
            | (Kind::Bool, Value::Bool(_))
            | (Kind::FieldsV1, Value::Object(_))
            | (Kind::Float, Value::Number(_)) => return Ok(()),
            (Kind::Int32, Value::Number(number)) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => {
                return Ok(());
            }
            (Kind::Int64, Value::Number(number)) if number.as_i64().is_some() => return Ok(()),
            (Kind::IntOrString, Value::String(_)) => return Ok(()),
            (Kind::IntOrString, Value::Number(number)) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => {
                return Ok(());
            }
            (Kind::IntOrString, other) => {
                let text = format!("json: cannot unmarshal {} into Go value of type int32", noun(other));
                return Err(DecodeError::Type(text));
            }
            (Kind::Quantity, Value::String(text)) => quantity(text)?,
            (Kind::Quantity, Value::Number(number)) => quantity(&number.to_string())?,
            (Kind::Quantity, other) => quantity(&gofmt::json(other))?,
            (Kind::Time, Value::String(text)) => scalar::time(text).map_err(DecodeError::Type)?,
            (Kind::MicroTime, Value::String(text)) => scalar::micro_time(text).map_err(DecodeError::Type)?,
            (Kind::Duration, Value::String(text)) => {
                scalar::format_duration(scalar::duration(text).map_err(DecodeError::Type)?)
            }
            (Kind::Time | Kind::MicroTime | Kind::Duration, other) => {
                let text = format!("json: cannot unmarshal {} into Go value of type string", noun(other));
                return Err(DecodeError::Type(text));
            }
            (Kind::Bytes, Value::String(text)) => base64_text(text)?,
            _ => return Err(self.mismatch(value, &schema.go)),
        };
        if value.as_str() != Some(&canonical) {
            *value = Value::String(canonical);
        }
        Ok(())
    }

    /// `spec.containers[0].name` with `last` appended.
    fn path(&self, last: &str) -> String {
        let mut path = String::new();
        for step in &self.trail {
            match step {
                Step::Field(name) => super::tree::push_name(&mut path, name),
                Step::Key(name) => super::tree::push_name(&mut path, name),
                Step::Index(at) => super::tree::push_index(&mut path, *at),
            }
        }
        super::tree::push_name(&mut path, last);
        path
    }

    fn mismatch(&self, value: &Value, go: &str) -> DecodeError {
        // A number of the wrong size or kind of number is shown.
        let noun = match value {
            Value::Number(number) if matches!(go, "int32" | "int64" | "uint8") => {
                Cow::Owned(format!("number {number}"))
            }
            other => noun(other),
        };
        let fields: Vec<&str> = self
            .trail
            .iter()
            .filter_map(|step| match step {
                Step::Field(name) => Some(name.as_ref()),
                _ => None,
            })
            .collect();
        DecodeError::Type(if fields.is_empty() {
            format!("json: cannot unmarshal {noun} into Go value of type {go}")
        } else {
            format!(
                "json: cannot unmarshal {noun} into Go struct field {}.{} of type {go}",
                self.strukt,
                fields.join(".")
            )
        })
    }
}

/// How Go's decoder names a JSON value.
fn noun(value: &Value) -> Cow<'static, str> {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "bool".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(_) => "array".into(),
        Value::Object(_) => "object".into(),
    }
}

fn quantity(text: &str) -> Result<String, DecodeError> {
    text.parse::<Quantity>().map(|quantity| quantity.to_string()).map_err(|error| DecodeError::Type(error.to_string()))
}

/// Standard base64, line breaks ignored as Go does.
fn base64_text(text: &str) -> Result<String, DecodeError> {
    use base64::Engine as _;
    let engine = base64::engine::general_purpose::STANDARD;
    let clean: Cow<'_, str> =
        if text.contains(['\n', '\r']) { text.replace(['\n', '\r'], "").into() } else { text.into() };
    match engine.decode(clean.as_bytes()) {
        Ok(_) => Ok(clean.into_owned()),
        Err(error) => {
            let at = match error {
                base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
                base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidPadding => clean.len() / 4 * 4,
            };
            Err(DecodeError::Type(format!("illegal base64 data at input byte {at}")))
        }
    }
}

/// Whether an optional field with this value is left out.
fn left_out(field: &Field, value: &Value) -> bool {
    if field.pointer {
        return false;
    }
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0) && field.schema.get().kind != Kind::IntOrString,
        Value::String(text) => text.is_empty() && !matches!(field.schema.get().kind, Kind::IntOrString),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty() && field.schema.get().values.is_some(),
    }
}

/// The zero value of a type.
fn zero(schema: &Schema) -> Value {
    match schema.kind {
        Kind::Object if schema.values.is_none() => Value::Object(Map::new()),
        Kind::String => "".into(),
        Kind::Bool => false.into(),
        Kind::Int32 | Kind::Int64 | Kind::Float | Kind::IntOrString => 0.into(),
        Kind::Quantity => "0".into(),
        Kind::Duration => "0s".into(),
        _ => Value::Null,
    }
}

/// Adds the fields that the type always writes: structs that are never empty, required fields' zero values, `null` for
/// required lists, maps and pointers that are absent.
pub fn fill(value: &mut Value, schema: &Schema) {
    match (schema.kind, value) {
        (Kind::Object, Value::Object(map)) => match &schema.values {
            Some(inner) => map.values_mut().for_each(|item| fill(item, inner.get())),
            None => fill_struct(map, schema),
        },
        (Kind::List, Value::Array(items)) => {
            if let Some(inner) = &schema.items {
                items.iter_mut().for_each(|item| fill(item, inner.get()));
            }
        }
        (Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings, Value::Object(map)) => {
            if let Some(inner) = &schema.items {
                fill_struct(map, inner.get());
            }
        }
        (Kind::SchemaOrArray, Value::Array(items)) => {
            if let Some(inner) = &schema.items {
                items.iter_mut().for_each(|item| fill(item, inner.get()));
            }
        }
        _ => {}
    }
}

fn fill_struct(map: &mut Map<String, Value>, schema: &Schema) {
    for field in &schema.fields {
        let inner = field.schema.get();
        if let Some(present) = map.get_mut(field.name.as_ref()) {
            fill(present, inner);
            continue;
        }
        // Kinds that are structs to the encoder: never empty, so always written.
        let strukt = inner.is_struct()
            || matches!(
                inner.kind,
                Kind::Quantity | Kind::Time | Kind::MicroTime | Kind::IntOrString | Kind::Raw | Kind::Duration
            );
        let written = match field.omit {
            Omit::Never => true,
            Omit::Empty => !field.pointer && strukt && inner.kind != Kind::Duration,
            Omit::Zero => false,
        };
        // `apiVersion` and `kind` stand in the envelope of embedded objects too, where they are optional.
        if !written {
            continue;
        }
        let mut absent = if field.pointer { Value::Null } else { zero(inner) };
        fill(&mut absent, inner);
        map.insert(field.name.to_string(), absent);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Format, decode, strict_error};
    use super::*;
    use serde_json::json;

    fn schema(name: &str) -> std::sync::Arc<Schema> {
        Schema::builtin(name).expect("built in")
    }

    fn error(name: &str, body: Value) -> String {
        let bytes = serde_json::to_vec(&body).expect("encodes");
        decode(&bytes, Format::Json, &schema(name)).expect_err("wrong").to_string()
    }

    #[test]
    fn unknown_fields_are_named_and_dropped() {
        let body = json!({"kind": "Pod", "spec": {"containers": [{"name": "a", "imge": "x"}], "foo": 1}, "dta": {}});
        let bytes = serde_json::to_vec(&body).expect("encodes");
        let decoded = decode(&bytes, Format::Json, &schema("io.k8s.api.core.v1.Pod")).expect("decodes");
        assert_eq!(decoded.value, json!({"kind": "Pod", "spec": {"containers": [{"name": "a"}]}}));
        assert_eq!(
            strict_error(&decoded.warnings),
            "strict decoding error: unknown field \"dta\", unknown field \"spec.containers[0].imge\", unknown field \"spec.foo\""
        );
    }

    #[test]
    fn a_field_that_is_unknown_is_not_called_repeated_too() {
        let body = br#"{"spec": {"more": {"a": 1, "a": 2}, "more": 1, "moreover": [{"a": 1, "a": 2}], "paused": true, "paused": false}}"#;
        let decoded = decode(body, Format::Json, &schema("io.k8s.api.apps.v1.Deployment")).expect("decodes");
        assert_eq!(
            strict_error(&decoded.warnings),
            "strict decoding error: unknown field \"spec.more\", unknown field \"spec.moreover\", duplicate field \"spec.paused\""
        );
    }

    #[test]
    fn strict_errors_stand_in_document_order() {
        let body = br#"{"spec": {"unknownField": "foo", "replicas": 2, "replicas": 3}, "metadata": {"x": 1}}"#;
        let decoded = decode(body, Format::Json, &schema("io.k8s.api.apps.v1.Deployment")).expect("decodes");
        assert_eq!(
            strict_error(&decoded.warnings),
            "strict decoding error: unknown field \"spec.unknownField\", duplicate field \"spec.replicas\", unknown field \"metadata.x\""
        );
    }

    #[test]
    fn type_errors_are_gos() {
        let deployment = "io.k8s.api.apps.v1.Deployment";
        assert_eq!(
            error(deployment, json!({"spec": {"replicas": "x"}})),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"
        );
        assert_eq!(
            error(deployment, json!({"metadata": {"labels": {"a": 1}}})),
            "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string"
        );
        assert_eq!(
            error(deployment, json!({"spec": {"template": {"spec": {"containers": {"name": "a"}}}}})),
            "json: cannot unmarshal object into Go struct field PodSpec.spec.template.spec.containers of type []v1.Container"
        );
        assert_eq!(
            error(deployment, json!({"spec": {"replicas": 1.5}})),
            "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32"
        );
        assert_eq!(error(deployment, json!([])), "json: cannot unmarshal array into Go value of type v1.Deployment");
        assert_eq!(
            error("io.k8s.api.core.v1.Secret", json!({"data": {"a": "!"}})),
            "illegal base64 data at input byte 0"
        );
    }

    #[test]
    fn scalars_become_canonical_and_empties_go() {
        let body = json!({"spec": {"hostNetwork": false, "nodeName": "", "volumes": [], "containers": [{
            "name": "c", "resources": {"limits": {"cpu": 0.5, "memory": "1024Ki"}}, "command": null
        }], "terminationGracePeriodSeconds": 0}, "metadata": {"creationTimestamp": null, "labels": {}}});
        let bytes = serde_json::to_vec(&body).expect("encodes");
        let mut value = decode(&bytes, Format::Json, &schema("io.k8s.api.core.v1.Pod")).expect("decodes").value;
        let limits = json!({"limits": {"cpu": "500m", "memory": "1Mi"}});
        assert_eq!(
            value,
            json!({"metadata": {}, "spec": {"containers": [{"name": "c", "resources": limits}], "terminationGracePeriodSeconds": 0}})
        );
        value["spec"]["containers"][0]["resources"] = Value::Null;
        value["spec"]["containers"][0].as_object_mut().expect("object").remove("resources");
        fill(&mut value, &schema("io.k8s.api.core.v1.Pod"));
        assert_eq!(value["spec"]["containers"][0], json!({"name": "c", "resources": {}}));
        assert_eq!(value["status"], json!({}));
    }

    #[test]
    fn fill_writes_what_a_server_writes() {
        let mut job = json!({"metadata": {"name": "a"}, "spec": {"schedule": "x", "jobTemplate": {"spec": {"template": {"spec": {"containers": []}}}}}});
        fill(&mut job, &schema("io.k8s.api.batch.v1.CronJob"));
        assert_eq!(job["spec"]["jobTemplate"]["metadata"], json!({}));
        assert_eq!(job["spec"]["jobTemplate"]["spec"]["template"]["metadata"], json!({}));
        assert_eq!(job["status"], json!({}));
        let mut role = json!({"metadata": {}});
        fill(&mut role, &schema("io.k8s.api.rbac.v1.Role"));
        assert_eq!(role["rules"], Value::Null);
    }
}

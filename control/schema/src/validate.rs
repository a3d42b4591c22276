//! Values of custom resources against their schema: types, bounds, patterns, formats, combinations, rules.
//!
//! The texts are the server's (`spec.n in body should be greater than or equal to 1`). On an update, what did not change is not
//! judged again.

pub(crate) mod format;

use std::collections::HashSet;

use regex::Regex;
use serde_json::{Map, Value};

use crate::cel;
use crate::error::{FieldError, Path};
use crate::gofmt;
use crate::schema::{Kind, ListType, Schema, SchemaRef};

/// The value checks of one schema node.
#[derive(Debug, Default)]
pub struct Checks {
    pub minimum: Option<f64>,
    pub exclusive_minimum: bool,
    pub maximum: Option<f64>,
    pub exclusive_maximum: bool,
    pub multiple_of: Option<f64>,
    /// In characters.
    pub min_length: Option<u64>,
    /// In characters.
    pub max_length: Option<u64>,
    pub pattern: Option<Pattern>,
    pub min_items: Option<u64>,
    pub max_items: Option<u64>,
    pub min_properties: Option<u64>,
    pub max_properties: Option<u64>,
    pub required: Vec<String>,
    /// `enum`
    pub allowed: Vec<Value>,
    pub format: String,
    pub all_of: Vec<Schema>,
    pub any_of: Vec<Schema>,
    pub one_of: Vec<Schema>,
    pub not: Option<Box<Schema>>,
    /// `x-kubernetes-validations`
    pub rules: Vec<cel::Rule>,
}

#[derive(Debug)]
pub struct Pattern {
    pub text: String,
    pub regex: Regex,
}

/// Everything that is wrong with `value`; `old` is the stored object on an update.
pub fn validate(value: &Value, old: Option<&Value>, schema: &Schema) -> Vec<FieldError> {
    let mut errors = Vec::new();
    node(value, old, schema, &mut Place { path: Path::root(), root: true }, &mut errors);
    // Rules see only what is well formed.
    if errors.is_empty() {
        let mut budget = cel::Budget::of_object();
        rules(value, old, schema, &Path::root(), &mut budget, &mut errors);
    }
    errors
}

struct Place {
    path: Path,
    root: bool,
}

impl Place {
    fn child(&self, name: &str) -> Self {
        Self { path: self.path.child(name), root: false }
    }

    fn index(&self, at: usize) -> Self {
        Self { path: self.path.index(at), root: false }
    }

    /// `spec.n in body …`
    fn says(&self, words: &str) -> String {
        let path = self.path.as_str();
        if path.is_empty() { format!("in body {words}") } else { format!("{path} in body {words}") }
    }
}

fn node(value: &Value, old: Option<&Value>, schema: &Schema, place: &mut Place, errors: &mut Vec<FieldError>) {
    if old == Some(value) && !place.root {
        return;
    }
    // The typed metadata of the object is judged by the object's own rules.
    if !schema.name.is_empty() {
        return;
    }
    if value.is_null() && (schema.nullable || schema.kind == Kind::Any) {
        return;
    }
    if !fits(value, schema) {
        let (found, wanted) = (type_name(value), kind_name(schema.kind));
        let words = place.says(&format!("must be of type {wanted}: {}", gofmt::quote(found)));
        errors.push(FieldError::type_invalid(&place.path, found, words));
        return;
    }
    let nothing = Checks::default();
    let checks = schema.checks.as_deref().unwrap_or(&nothing);
    enumeration(value, checks, place, errors);
    match value {
        Value::String(text) => string(text, checks, place, errors),
        Value::Number(number) => self::number(number, checks, place, errors),
        Value::Array(items) => list(items, old, schema, checks, place, errors),
        Value::Object(map) => object(map, old, schema, checks, place, errors),
        _ => {}
    }
    combinations(value, checks, place, errors);
}

fn fits(value: &Value, schema: &Schema) -> bool {
    match (schema.kind, value) {
        (Kind::Any, _)
        | (Kind::Object, Value::Object(_))
        | (Kind::List, Value::Array(_))
        | (Kind::String | Kind::IntOrString, Value::String(_))
        | (Kind::Float, Value::Number(_))
        | (Kind::Bool, Value::Bool(_)) => true,
        (Kind::Int32 | Kind::Int64 | Kind::IntOrString, Value::Number(number)) => {
            !number.is_f64() || number.as_f64().is_some_and(|float| float.fract() == 0.0)
        }
        _ => false,
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Object => "object",
        Kind::List => "array",
        Kind::Int32 | Kind::Int64 => "integer",
        Kind::Float => "number",
        Kind::Bool => "boolean",
        Kind::IntOrString => "integer,string",
        _ => "string",
    }
}

fn enumeration(value: &Value, checks: &Checks, place: &Place, errors: &mut Vec<FieldError>) {
    if checks.allowed.is_empty() || checks.allowed.contains(value) {
        return;
    }
    let allowed: Vec<String> = checks
        .allowed
        .iter()
        .map(|allowed| allowed.as_str().map_or_else(|| gofmt::json(allowed), str::to_owned))
        .collect();
    errors.push(FieldError::not_supported(&place.path, value.clone(), &allowed));
}

fn string(text: &str, checks: &Checks, place: &Place, errors: &mut Vec<FieldError>) {
    let length =
        if checks.min_length.is_some() || checks.max_length.is_some() { text.chars().count() as u64 } else { 0 };
    if let Some(max) = checks.max_length.filter(|max| length > *max) {
        errors.push(FieldError::too_long(&place.path, usize::try_from(max).unwrap_or(usize::MAX)));
    }
    if let Some(min) = checks.min_length.filter(|min| length < *min) {
        errors.push(FieldError::invalid(
            &place.path,
            text,
            place.says(&format!("should be at least {min} chars long")),
        ));
    }
    if let Some(pattern) = checks.pattern.as_ref().filter(|pattern| !pattern.regex.is_match(text)) {
        errors.push(FieldError::invalid(&place.path, text, place.says(&format!("should match '{}'", pattern.text))));
    }
    if !format::fits(&checks.format, text) {
        let words = place.says(&format!("must be of type {}: {}", checks.format, gofmt::quote(text)));
        errors.push(FieldError::type_invalid(&place.path, text, words));
    }
}

fn number(number: &serde_json::Number, checks: &Checks, place: &Place, errors: &mut Vec<FieldError>) {
    let Some(float) = number.as_f64() else { return };
    let mut wrong = |words: &str, bound: f64| {
        let mut text = format!("should be {words} ");
        gofmt::float_into(&mut text, bound);
        errors.push(FieldError::invalid(&place.path, Value::Number(number.clone()), place.says(&text)));
    };
    match checks.maximum {
        Some(max) if checks.exclusive_maximum && float >= max => wrong("less than", max),
        Some(max) if float > max => wrong("less than or equal to", max),
        _ => {}
    }
    match checks.minimum {
        Some(min) if checks.exclusive_minimum && float <= min => wrong("greater than", min),
        Some(min) if float < min => wrong("greater than or equal to", min),
        _ => {}
    }
    if let Some(factor) = checks.multiple_of.filter(|factor| *factor > 0.0 && (float / factor).fract() != 0.0) {
        wrong("a multiple of", factor);
    }
}

fn list(
    items: &[Value],
    old: Option<&Value>,
    schema: &Schema,
    checks: &Checks,
    place: &Place,
    errors: &mut Vec<FieldError>,
) {
    let count = items.len() as u64;
    if let Some(max) = checks.max_items.filter(|max| count > *max) {
        errors.push(FieldError::too_many(&place.path, items.len(), usize::try_from(max).unwrap_or(usize::MAX)));
    }
    if let Some(min) = checks.min_items.filter(|min| count < *min) {
        let words = place.says(&format!("should have at least {min} items"));
        errors.push(FieldError::invalid(&place.path, Value::Array(items.to_vec()), words));
    }
    let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else { return };
    let earlier = Correlation::new(schema, old);
    for (at, item) in items.iter().enumerate() {
        node(item, earlier.find(at, item), inner, &mut place.index(at), errors);
    }
    let mut seen: HashSet<Value> = HashSet::new();
    for (at, item) in items.iter().enumerate() {
        let Some(identity) = identity(item, schema) else { continue };
        if !seen.insert(identity.clone()) {
            errors.push(FieldError::duplicate(place.path.index(at), identity));
        }
    }
}

/// What an item of a set or list map must be unique by.
fn identity(item: &Value, schema: &Schema) -> Option<Value> {
    match &schema.list {
        ListType::Atomic => None,
        ListType::Set => Some(item.clone()),
        ListType::Map(keys) => {
            let items = schema.items.as_ref().map(SchemaRef::get);
            let map = item.as_object()?;
            let key = |name: &str| map.get(name).cloned().or_else(|| items?.field(name)?.schema.get().default.clone());
            Some(Value::Object(keys.iter().filter_map(|name| Some((name.to_string(), key(name)?))).collect()))
        }
    }
}

/// Finds the earlier form of a list item.
struct Correlation<'a> {
    schema: &'a Schema,
    old: &'a [Value],
    by_identity: std::collections::HashMap<Value, &'a Value>,
}

impl<'a> Correlation<'a> {
    fn new(schema: &'a Schema, old: Option<&'a Value>) -> Self {
        let old = old.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let keyed = matches!(schema.list, ListType::Map(_));
        let by_identity = if keyed {
            old.iter().filter_map(|item| Some((identity(item, schema)?, item))).collect()
        } else {
            std::collections::HashMap::new()
        };
        Self { schema, old, by_identity }
    }

    /// For judging again: an item at the same place counts as the same when the list is not keyed.
    fn find(&self, at: usize, item: &Value) -> Option<&'a Value> {
        if matches!(self.schema.list, ListType::Map(_)) { self.find_keyed(item) } else { self.old.get(at) }
    }

    /// For transition rules: only keyed lists relate old and new items.
    fn find_keyed(&self, item: &Value) -> Option<&'a Value> {
        self.by_identity.get(&identity(item, self.schema)?).copied()
    }
}

fn object(
    map: &Map<String, Value>,
    old: Option<&Value>,
    schema: &Schema,
    checks: &Checks,
    place: &Place,
    errors: &mut Vec<FieldError>,
) {
    let count = map.len() as u64;
    if let Some(max) = checks.max_properties.filter(|max| count > *max) {
        errors.push(FieldError::too_many(&place.path, map.len(), usize::try_from(max).unwrap_or(usize::MAX)));
    }
    if let Some(min) = checks.min_properties.filter(|min| count < *min) {
        let words = place.says(&format!("should have at least {min} properties"));
        errors.push(FieldError::invalid(&place.path, Value::Object(map.clone()), words));
    }
    for name in checks.required.iter().filter(|name| !map.contains_key(name.as_str())) {
        errors.push(FieldError::required(place.path.child(name), ""));
    }
    if schema.embedded && !place.root {
        for name in ["apiVersion", "kind"] {
            if map.get(name).and_then(Value::as_str).is_none_or(str::is_empty) {
                errors.push(FieldError::required(place.path.child(name), "must not be empty"));
            }
        }
    }
    for (name, inner) in map {
        if let Some(child) = schema.child(name) {
            let old = old.and_then(|old| old.get(name));
            node(inner, old, child, &mut place.child(name), errors);
        }
    }
}

/// `allOf`, `anyOf`, `oneOf`, `not`.
fn combinations(value: &Value, checks: &Checks, place: &Place, errors: &mut Vec<FieldError>) {
    let judge = |schema: &Schema| {
        let mut found = Vec::new();
        node(value, None, schema, &mut Place { path: place.path.clone(), root: place.root }, &mut found);
        found
    };
    // These are errors of the object as a whole, as the server reports them.
    let whole = |words: String| FieldError::invalid(Path::root(), "", words);
    let name = gofmt::quote(place.path.as_str());
    for schema in &checks.all_of {
        let found = judge(schema);
        if !found.is_empty() {
            errors.push(whole(format!("{name} must validate all the schemas (allOf)")));
            errors.extend(found);
        }
    }
    if !checks.any_of.is_empty() {
        let failures: Vec<_> = checks.any_of.iter().map(judge).collect();
        if !failures.iter().any(Vec::is_empty) {
            errors.push(whole(format!("{name} must validate at least one schema (anyOf)")));
            errors.extend(failures.into_iter().min_by_key(Vec::len).unwrap_or_default());
        }
    }
    if !checks.one_of.is_empty() {
        let failures: Vec<_> = checks.one_of.iter().map(judge).collect();
        match failures.iter().filter(|found| found.is_empty()).count() {
            1 => {}
            0 => {
                errors.push(whole(format!("{name} must validate one and only one schema (oneOf). Found none valid")));
                errors.extend(failures.into_iter().min_by_key(Vec::len).unwrap_or_default());
            }
            many => {
                let words =
                    format!("{name} must validate one and only one schema (oneOf). Found {many} valid alternatives");
                errors.push(whole(words));
            }
        }
    }
    if checks.not.as_ref().is_some_and(|schema| judge(schema).is_empty()) {
        errors.push(whole(format!("{name} must not validate the schema (not)")));
    }
}

/// Runs the rules of a node and of everything below it.
fn rules(
    value: &Value,
    old: Option<&Value>,
    schema: &Schema,
    path: &Path,
    budget: &mut cel::Budget,
    errors: &mut Vec<FieldError>,
) {
    if value.is_null() || !schema.name.is_empty() {
        return;
    }
    for rule in schema.checks.iter().flat_map(|checks| &checks.rules) {
        if budget.is_spent() {
            return;
        }
        if let Some(error) = rule.check(value, old, schema, path, budget) {
            errors.push(error);
        }
    }
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                let Some(child) = schema.child(name) else { continue };
                let old = old.and_then(|old| old.get(name));
                let at = if schema.field(name).is_some() { path.child(name) } else { path.key(name) };
                rules(inner, old, child, &at, budget, errors);
            }
        }
        Value::Array(items) => {
            let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else { return };
            let earlier = Correlation::new(schema, old);
            for (at, item) in items.iter().enumerate() {
                rules(item, earlier.find_keyed(item), inner, &path.index(at), budget, errors);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;

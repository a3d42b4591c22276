//! CEL values. JSON is borrowed, not copied.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::net::IpAddr;
use std::rc::Rc;

use jiff::Timestamp;
use serde_json::{Map, Number, Value};

use super::authorizer::Query;
use crate::decode::scalar;
use crate::quantity::Quantity;
use crate::schema::{Kind, ListType, Schema, SchemaRef};

/// Why an expression has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CelError {
    #[error("{0}")]
    Message(String),
    #[error("operation cancelled: actual cost limit exceeded")]
    Budget,
}

impl CelError {
    pub fn message(text: impl Into<String>) -> Self {
        Self::Message(text.into())
    }
}

/// A value; JSON of the objects in scope is borrowed for `'a`.
#[derive(Clone, Debug)]
pub enum Val<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Text(Cow<'a, str>),
    Bytes(Rc<[u8]>),
    List(Rc<Vec<Val<'a>>>),
    Map(Rc<Vec<(Val<'a>, Val<'a>)>>),
    Array(&'a [Value], Option<&'a Schema>),
    Object(&'a Map<String, Value>, Option<&'a Schema>),
    Timestamp(Timestamp),
    /// Nanoseconds.
    Duration(i64),
    Type(Cow<'static, str>),
    Optional(Option<Rc<Val<'a>>>),
    Quantity(Quantity),
    Ip(IpAddr),
    Cidr(IpAddr, u8),
    Url(Rc<Url>),
    /// A named string format.
    Format(&'static str),
    Semver(Rc<Semver>),
    Authorizer(Rc<Query<'a>>),
    Verdict(Rc<super::Verdict>),
    /// Variables that are evaluated when first used.
    Variables,
}

/// The parts of a URL.
#[derive(Debug, PartialEq, Eq)]
pub struct Url {
    pub(super) scheme: String,
    pub(super) host: String,
    pub(super) port: String,
    pub(super) path: String,
    pub(super) query: Vec<(String, String)>,
}

/// A semantic version; build metadata does not count.
#[derive(Debug, PartialEq, Eq)]
pub struct Semver {
    pub(super) numbers: [u64; 3],
    pub(super) pre: Vec<String>,
}

impl<'a> Val<'a> {
    /// A JSON value as its schema (or, without one, its own type) says.
    pub fn from_json(value: &'a Value, schema: Option<&'a Schema>) -> Self {
        let format = schema.and_then(|schema| schema.checks.as_ref()).map_or("", |checks| checks.format.as_str());
        match value {
            Value::Null => Self::Null,
            Value::Bool(flag) => Self::Bool(*flag),
            Value::Number(number) => Self::number(number, schema),
            Value::String(text) => {
                let special = match format {
                    "date-time" => scalar::parse_time(text, "").ok().map(Self::Timestamp),
                    "date" => text.parse::<jiff::civil::Date>().ok().and_then(|date| {
                        date.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|at| Self::Timestamp(at.timestamp()))
                    }),
                    "duration" => scalar::duration(text).ok().map(Self::Duration),
                    "byte" => {
                        use base64::Engine as _;
                        base64::engine::general_purpose::STANDARD
                            .decode(text)
                            .ok()
                            .map(|bytes| Self::Bytes(bytes.into()))
                    }
                    _ => None,
                };
                special.unwrap_or(Self::Text(Cow::Borrowed(text)))
            }
            Value::Array(items) => Self::Array(items, schema),
            Value::Object(map) => Self::Object(map, schema),
        }
    }

    fn number(number: &Number, schema: Option<&Schema>) -> Self {
        let wants_double = schema.is_some_and(|schema| schema.kind == Kind::Float);
        match (number.as_i64(), number.as_f64()) {
            (Some(int), _) if !wants_double => Self::Int(int),
            (_, Some(float))
                if !wants_double && float.fract() == 0.0 && schema.is_some_and(|s| s.kind == Kind::Int64) =>
            {
                Self::Int(float as i64)
            }
            (_, float) => Self::Double(float.unwrap_or(f64::NAN)),
        }
    }

    /// A quantity such as `8Gi`; `None` if it is none.
    pub fn quantity(text: &str) -> Option<Self> {
        text.parse().ok().map(Self::Quantity)
    }

    /// A semantic version; `None` if it is none.
    pub fn semver(text: &str) -> Option<Self> {
        super::library::parse_semver(text, &[]).map(|version| Self::Semver(Rc::new(version)))
    }

    pub fn text(text: impl Into<Cow<'a, str>>) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn list(items: Vec<Self>) -> Self {
        Self::List(Rc::new(items))
    }

    pub(super) fn some(value: Self) -> Self {
        Self::Optional(Some(Rc::new(value)))
    }

    /// The name of the value's type.
    pub fn type_name(&self) -> &str {
        match self {
            Self::Null => "null_type",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Uint(_) => "uint",
            Self::Double(_) => "double",
            Self::Text(_) => "string",
            Self::Bytes(_) => "bytes",
            Self::List(_) | Self::Array(..) => "list",
            Self::Map(_) | Self::Object(..) | Self::Variables => "map",
            Self::Timestamp(_) => "google.protobuf.Timestamp",
            Self::Duration(_) => "google.protobuf.Duration",
            Self::Type(_) => "type",
            Self::Optional(_) => "optional_type",
            Self::Quantity(_) => "kubernetes.Quantity",
            Self::Ip(_) => "net.IP",
            Self::Cidr(..) => "net.CIDR",
            Self::Url(_) => "kubernetes.URL",
            Self::Format(_) => "kubernetes.NamedFormat",
            Self::Semver(_) => "kubernetes.Semver",
            Self::Authorizer(_) => "kubernetes.authorization.Authorizer",
            Self::Verdict(_) => "kubernetes.authorization.Decision",
        }
    }

    /// How many items a list, entries a map, or characters a text holds.
    pub(super) fn size(&self) -> Option<usize> {
        Some(match self {
            Self::Text(text) => text.chars().count(),
            Self::Bytes(bytes) => bytes.len(),
            Self::List(items) => items.len(),
            Self::Array(items, _) => items.len(),
            Self::Map(entries) => entries.len(),
            Self::Object(map, _) => map.len(),
            _ => return None,
        })
    }

    /// The items of a list.
    pub(super) fn items(&self) -> Option<Vec<Self>> {
        Some(match self {
            Self::List(items) => items.as_ref().clone(),
            Self::Array(items, schema) => {
                let inner = schema.and_then(|schema| schema.items.as_ref()).map(SchemaRef::get);
                items.iter().map(|item| Self::from_json(item, inner)).collect()
            }
            _ => return None,
        })
    }

    /// The item at a place.
    pub(super) fn item(&self, at: usize) -> Option<Self> {
        match self {
            Self::List(items) => items.get(at).cloned(),
            Self::Array(items, schema) => {
                let inner = schema.and_then(|schema| schema.items.as_ref()).map(SchemaRef::get);
                items.get(at).map(|item| Self::from_json(item, inner))
            }
            _ => None,
        }
    }

    /// The entries of a map.
    pub(super) fn entries(&self) -> Option<Vec<(Self, Self)>> {
        Some(match self {
            Self::Map(entries) => entries.as_ref().clone(),
            Self::Object(map, schema) => map
                .iter()
                .map(|(name, value)| {
                    let inner = schema.and_then(|schema| schema.child(name));
                    (Self::text(name.as_str()), Self::from_json(value, inner))
                })
                .collect(),
            _ => return None,
        })
    }

    /// What a map holds under a key.
    pub(super) fn get(&self, key: &Self) -> Option<Self> {
        match (self, key) {
            (Self::Map(entries), key) => {
                entries.iter().find(|(own, _)| own.equals(key)).map(|(_, value)| value.clone())
            }
            (Self::Object(map, schema), Self::Text(name)) => {
                let inner = schema.and_then(|schema| schema.child(name));
                map.get(name.as_ref()).map(|value| Self::from_json(value, inner))
            }
            _ => None,
        }
    }

    /// CEL equality: numbers across types, lists and maps by content; lists of sets and keyed lists in any order.
    pub(super) fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Null, Self::Null) | (Self::Variables, Self::Variables) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Timestamp(a), Self::Timestamp(b)) => a == b,
            (Self::Duration(a), Self::Duration(b)) => a == b,
            (Self::Type(a), Self::Type(b)) => a == b,
            (Self::Quantity(a), Self::Quantity(b)) => a == b,
            (Self::Ip(a), Self::Ip(b)) => a == b,
            (Self::Cidr(a, n), Self::Cidr(b, m)) => a == b && n == m,
            (Self::Url(a), Self::Url(b)) => a == b,
            (Self::Semver(a), Self::Semver(b)) => a == b,
            (Self::Format(a), Self::Format(b)) => a == b,
            (Self::Optional(a), Self::Optional(b)) => match (a, b) {
                (Some(a), Some(b)) => a.equals(b),
                (a, b) => a.is_none() && b.is_none(),
            },
            (Self::Object(a, _), Self::Object(b, _)) => a == b,
            (Self::Array(a, schema), Self::Array(b, _)) => {
                a == b || (schema.is_some_and(|schema| schema.list != ListType::Atomic) && same_items(a, b))
            }
            _ => self.equals_loosely(other),
        }
    }

    fn equals_loosely(&self, other: &Self) -> bool {
        if let Some(order) = self.compare_numbers(other) {
            return order == Some(Ordering::Equal);
        }
        if let (Some(a), Some(b)) = (self.items(), other.items()) {
            return a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.equals(b));
        }
        match (self.entries(), other.size()) {
            (Some(entries), Some(size)) if matches!(other, Self::Map(_) | Self::Object(..)) => {
                entries.len() == size
                    && entries.iter().all(|(key, value)| other.get(key).is_some_and(|other| other.equals(value)))
            }
            _ => false,
        }
    }

    /// `None` if either is no number.
    fn compare_numbers(&self, other: &Self) -> Option<Option<Ordering>> {
        let whole = |value: &Self| match value {
            Self::Int(int) => Some(i128::from(*int)),
            Self::Uint(int) => Some(i128::from(*int)),
            _ => None,
        };
        let float = |value: &Self| match value {
            Self::Int(int) => Some(*int as f64),
            Self::Uint(int) => Some(*int as f64),
            Self::Double(float) => Some(*float),
            _ => None,
        };
        if let (Some(a), Some(b)) = (whole(self), whole(other)) {
            return Some(Some(a.cmp(&b)));
        }
        Some(float(self)?.partial_cmp(&float(other)?))
    }

    /// The order of two values of one type; `None` if they have none.
    pub(super) fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            (Self::Text(a), Self::Text(b)) => Some(a.cmp(b)),
            (Self::Bytes(a), Self::Bytes(b)) => Some(a.cmp(b)),
            (Self::Timestamp(a), Self::Timestamp(b)) => Some(a.cmp(b)),
            (Self::Duration(a), Self::Duration(b)) => Some(a.cmp(b)),
            _ => self.compare_numbers(other).flatten(),
        }
    }

    /// The value as JSON; `None` for what has no JSON form.
    pub fn to_json(&self) -> Option<Value> {
        Some(match self {
            Self::Null => Value::Null,
            Self::Bool(flag) => (*flag).into(),
            Self::Int(int) => (*int).into(),
            Self::Uint(int) => (*int).into(),
            Self::Double(float) => Value::Number(Number::from_f64(*float)?),
            Self::Text(text) => text.as_ref().into(),
            Self::Bytes(bytes) => {
                use base64::Engine as _;
                base64::engine::general_purpose::STANDARD.encode(bytes).into()
            }
            Self::Array(items, _) => Value::Array(items.to_vec()),
            Self::Object(map, _) => Value::Object((*map).clone()),
            Self::List(items) => Value::Array(items.iter().map(Self::to_json).collect::<Option<_>>()?),
            Self::Map(entries) => {
                let mut map = Map::new();
                for (key, value) in entries.iter() {
                    let key = match key {
                        Self::Text(text) => text.to_string(),
                        Self::Int(int) => int.to_string(),
                        Self::Uint(int) => int.to_string(),
                        Self::Bool(flag) => flag.to_string(),
                        _ => return None,
                    };
                    map.insert(key, value.to_json()?);
                }
                Value::Object(map)
            }
            Self::Timestamp(at) => at.to_string().into(),
            Self::Duration(nanos) => scalar::format_duration(*nanos).into(),
            Self::Type(name) => name.as_ref().into(),
            Self::Optional(Some(inner)) => inner.to_json()?,
            Self::Optional(None) => Value::Null,
            Self::Quantity(quantity) => quantity.to_string().into(),
            Self::Ip(ip) => ip.to_string().into(),
            Self::Cidr(ip, bits) => format!("{ip}/{bits}").into(),
            _ => return None,
        })
    }
}

fn same_items(a: &[Value], b: &[Value]) -> bool {
    let set: std::collections::HashSet<&Value> = a.iter().collect();
    a.len() == b.len() && b.iter().all(|item| set.contains(item))
}

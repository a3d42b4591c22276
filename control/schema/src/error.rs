//! Field errors: what is wrong, where, in the words of the API server (`k8s.io/apimachinery` field errors).

use std::fmt;

use serde_json::Value;

use crate::gofmt;

/// A field path as Kubernetes writes it: `spec.containers[0].env[HOME]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Path(String);

impl Path {
    /// The path of the object itself (written as nothing).
    pub const fn root() -> Self {
        Self(String::new())
    }

    /// A path starting at a field, or any ready-made path.
    pub fn new(field: impl Into<String>) -> Self {
        Self(field.into())
    }

    /// `path.field`
    #[must_use]
    pub fn child(&self, field: &str) -> Self {
        if self.0.is_empty() {
            return Self(field.to_owned());
        }
        let mut text = String::with_capacity(self.0.len() + 1 + field.len());
        text.push_str(&self.0);
        text.push('.');
        text.push_str(field);
        Self(text)
    }

    /// `path[index]`
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    /// `path[key]`, for a map's key
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Path {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<String> for Path {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&Path> for Path {
    fn from(path: &Path) -> Self {
        path.clone()
    }
}

/// What kind of mistake a field holds. [`ErrorKind::reason`] is the cause's reason in a `Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    TooFew,
    TooShort,
    TypeInvalid,
    Internal,
}

impl ErrorKind {
    /// `reason` of the cause in `Status.details.causes`.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TooFew => "FieldValueTooFew",
            Self::TooShort => "FieldValueTooShort",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::Internal => "InternalError",
        }
    }

    /// The words a message begins with.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::TooFew => "Too few",
            Self::TooShort => "Too short",
            Self::Internal => "Internal error",
        }
    }

    const fn shows_value(self) -> bool {
        !matches!(self, Self::Required | Self::Forbidden | Self::TooLong | Self::TooShort | Self::Internal)
    }
}

/// One wrong field. `Display` is the server's full line (`spec.replicas: Invalid value: -1: must be …`),
/// [`FieldError::message`] is what a cause's `message` holds (the same without the path).
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: ErrorKind,
    pub path: Path,
    /// The offending value; `None` leaves it out of the message.
    pub value: Option<Value>,
    pub detail: String,
}

impl FieldError {
    pub fn new(kind: ErrorKind, path: impl Into<Path>, value: Option<Value>, detail: impl Into<String>) -> Self {
        Self { kind, path: path.into(), value, detail: detail.into() }
    }

    pub fn required(path: impl Into<Path>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Required, path, None, detail)
    }

    pub fn invalid(path: impl Into<Path>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, path, Some(value.into()), detail)
    }

    /// An update that changes what may not change: `Invalid value: …: field is immutable`.
    pub fn immutable(path: impl Into<Path>, value: impl Into<Value>) -> Self {
        Self::invalid(path, value, "field is immutable")
    }

    pub fn not_found(path: impl Into<Path>, value: impl Into<Value>) -> Self {
        Self::new(ErrorKind::NotFound, path, Some(value.into()), "")
    }

    pub fn duplicate(path: impl Into<Path>, value: impl Into<Value>) -> Self {
        Self::new(ErrorKind::Duplicate, path, Some(value.into()), "")
    }

    pub fn forbidden(path: impl Into<Path>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Forbidden, path, None, detail)
    }

    pub fn type_invalid(path: impl Into<Path>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::TypeInvalid, path, Some(value.into()), detail)
    }

    pub fn internal(path: impl Into<Path>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, path, None, detail)
    }

    /// `supported` is listed in the given order; the server sorts most of its lists.
    pub fn not_supported<S: AsRef<str>>(path: impl Into<Path>, value: impl Into<Value>, supported: &[S]) -> Self {
        let mut detail = String::new();
        for (i, word) in supported.iter().enumerate() {
            detail.push_str(if i == 0 { "supported values: " } else { ", " });
            gofmt::quote_into(&mut detail, word.as_ref());
        }
        Self::new(ErrorKind::NotSupported, path, Some(value.into()), detail)
    }

    /// `max` in bytes.
    pub fn too_long(path: impl Into<Path>, max: usize) -> Self {
        let unit = if max == 1 { "byte" } else { "bytes" };
        Self::new(ErrorKind::TooLong, path, None, format!("may not be more than {max} {unit}"))
    }

    pub fn too_many(path: impl Into<Path>, actual: usize, max: usize) -> Self {
        let unit = if max == 1 { "item" } else { "items" };
        Self::new(ErrorKind::TooMany, path, Some(actual.into()), format!("must have at most {max} {unit}"))
    }

    pub fn too_few(path: impl Into<Path>, actual: usize, min: usize) -> Self {
        let unit = if min == 1 { "item" } else { "items" };
        Self::new(ErrorKind::TooFew, path, Some(actual.into()), format!("must have at least {min} {unit}"))
    }

    /// The error without its path: `Invalid value: -1: must be greater than or equal to 0`.
    pub fn message(&self) -> String {
        let mut text = self.kind.words().to_owned();
        if let (true, Some(value)) = (self.kind.shows_value(), &self.value) {
            text.push_str(": ");
            gofmt::value_into(&mut text, value);
        }
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }

    /// The cause's `reason`.
    pub const fn reason(&self) -> &'static str {
        self.kind.reason()
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An error of the object itself is written with `<nil>` in place of its path.
        let path = if self.path.0.is_empty() { "<nil>" } else { &self.path.0 };
        write!(f, "{path}: {}", self.message())
    }
}

impl std::error::Error for FieldError {}

/// Several errors in one line as the server aggregates them: one alone, or `[a, b]` without repeats.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut lines: Vec<String> = Vec::with_capacity(errors.len());
    for error in errors {
        let line = error.to_string();
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    match lines.as_slice() {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_are_the_servers() {
        let path = Path::new("spec").child("containers").index(0).child("name");
        assert_eq!(FieldError::required(&path, "").to_string(), "spec.containers[0].name: Required value");
        assert_eq!(
            FieldError::not_supported("spec.restartPolicy", "x", &["Always", "Never"]).to_string(),
            "spec.restartPolicy: Unsupported value: \"x\": supported values: \"Always\", \"Never\""
        );
        assert_eq!(
            FieldError::immutable("spec.selector", json!({"matchLabels": {"a": "<b>"}})).to_string(),
            "spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"\\u003cb\\u003e\"}}: field is immutable"
        );
        assert_eq!(FieldError::too_long("a", 63).to_string(), "a: Too long: may not be more than 63 bytes");
        assert_eq!(FieldError::too_many("a", 3, 1).to_string(), "a: Too many: 3: must have at most 1 item");
        let twice = [FieldError::forbidden("a", "no"), FieldError::forbidden("a", "no"), FieldError::required("b", "")];
        assert_eq!(aggregate(&twice), "[a: Forbidden: no, b: Required value]");
    }
}

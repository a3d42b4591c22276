//! The error type of the request path: a `metav1.Status`, worded as a real API server words it.
//!
//! Source: `k8s.io/apimachinery/pkg/api/errors`. Every handler, strategy and admission plugin returns this type; the HTTP
//! layer writes it as the body with `code` as the HTTP status.

use coracle_schema::FieldError;
use serde::Serialize;
use serde_json::{Value, json};

use crate::kinds::Kind;

/// A failed (or, for some deletes, a successful) answer that is not an object of the requested kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// HTTP status, repeated in the body.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`; empty when the real server leaves it out.
    pub reason: &'static str,
    /// The sentence that a person reads.
    pub message: String,
    /// What the sentence is about.
    pub details: Option<Box<Details>>,
    /// Continue token of an expired list.
    pub continue_token: Option<String>,
}

/// `metav1.StatusDetails`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// Name of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// API group of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Resource or kind of the object, whichever the real server writes there.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// UID of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// One entry a wrong field.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// Seconds after which a retry makes sense.
    #[serde(skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes the field by reference")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// `metav1.StatusCause`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cause {
    /// Such as `FieldValueRequired`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The sentence without the field.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Path of the field.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

impl Status {
    /// A status with a message and no details.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None, continue_token: None }
    }

    /// The same with details.
    #[must_use]
    pub fn with(mut self, details: Details) -> Self {
        self.details = Some(Box::new(details));
        self
    }

    fn of(kind: &Kind, name: &str) -> Details {
        Details { name: name.into(), group: kind.group.clone(), kind: kind.resource.clone(), ..Details::default() }
    }

    /// 404 for an object.
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} {name:?} not found", kind.group_resource())).with(Self::of(kind, name))
    }

    /// 404 for a path that leads nowhere.
    pub fn no_such_resource() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource").with(Details::default())
    }

    /// 409: an object of that name is there.
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} {name:?} already exists", kind.group_resource()))
            .with(Self::of(kind, name))
    }

    /// 409: the write is based on an old version, or a precondition failed; `why` ends the sentence.
    pub fn conflict(kind: &Kind, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", kind.group_resource());
        Self::new(409, "Conflict", message).with(Self::of(kind, name))
    }

    /// 409 with the sentence for a stale `resourceVersion`.
    pub fn modified(kind: &Kind, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(kind, name, why)
    }

    /// 422 with one cause a field error.
    pub fn invalid(kind: &Kind, name: &str, errors: &[FieldError]) -> Self {
        Self::invalid_kind(&kind.group, &kind.kind, name, errors)
    }

    /// The same for a kind without a row (`Scale`, `DeleteOptions`, …).
    pub fn invalid_kind(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let mut sentences: Vec<String> = Vec::with_capacity(errors.len());
        for error in errors {
            let sentence = error.to_string();
            // A real server aggregates errors and drops equal sentences.
            if !sentences.contains(&sentence) {
                sentences.push(sentence);
            }
        }
        let list = match sentences.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let causes = errors
            .iter()
            .map(|error| Cause {
                reason: error.reason().into(),
                message: error.message(),
                field: error.path.to_string(),
            })
            .collect();
        Self::new(422, "Invalid", format!("{qualified} {name:?} is invalid: {list}")).with(Details {
            name: name.into(),
            group: group.into(),
            kind: kind.into(),
            causes,
            ..Details::default()
        })
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 for an object: `pods "x" is forbidden: why`. An empty name gives `pods is forbidden: why`.
    pub fn forbidden(kind: &Kind, name: &str, why: impl std::fmt::Display) -> Self {
        let resource = kind.group_resource();
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {why}")
        } else {
            format!("{resource} {name:?} is forbidden: {why}")
        };
        Self::new(403, "Forbidden", message).with(Self::of(kind, name))
    }

    /// 405.
    pub fn method_not_allowed(kind: &Kind, verb: &str) -> Self {
        let message = format!("{verb} is not supported on resources of kind {:?}", kind.group_resource());
        Self::new(405, "MethodNotAllowed", message).with(Self::of(kind, ""))
    }

    /// 405 for a path without a kind.
    pub fn no_such_method() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
            .with(Details::default())
    }

    /// 406; `accepted` are the media types that would be served.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let list = accepted.join(", ");
        Self::new(406, "NotAcceptable", format!("only the following media types are accepted: {list}"))
    }

    /// 415; `accepted` are the media types that would be read.
    pub fn unsupported_media_type(accepted: &[&str], got: &str) -> Self {
        let list = accepted.join(", ");
        let message =
            format!("the body of the request was in an unknown format - accepted media types include: {list}");
        let _ = got;
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 410: the requested revision was compacted.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413.
    pub fn too_large(limit_bytes: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit_bytes}");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// 429 with a hint when to retry.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self::new(429, "TooManyRequests", message).with(Details { retry_after_seconds, ..Details::default() })
    }

    /// 500; the cause is for the operator, so it must not hold secrets.
    pub fn internal(why: impl std::fmt::Display) -> Self {
        let why = why.to_string();
        Self::new(500, "InternalError", format!("Internal error occurred: {why}"))
            .with(Details { causes: vec![Cause { message: why, ..Cause::default() }], ..Details::default() })
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 504.
    pub fn timeout(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self::new(504, "Timeout", message).with(Details { retry_after_seconds, ..Details::default() })
    }

    /// The `Status` object that stands in the body.
    pub fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": self.state(), "code": self.code,
        });
        let map = value.as_object_mut().expect("the literal above is an object");
        if !self.message.is_empty() {
            map.insert("message".into(), self.message.clone().into());
        }
        if !self.reason.is_empty() {
            map.insert("reason".into(), self.reason.into());
        }
        if let Some(details) = &self.details {
            map.insert("details".into(), serde_json::to_value(details).expect("details hold strings and numbers"));
        }
        if let Some(token) = &self.continue_token {
            map.insert("metadata".into(), json!({"continue": token}));
        }
        value
    }

    fn state(&self) -> &'static str {
        if self.code < 400 { "Success" } else { "Failure" }
    }
}

impl From<coracle_store::Error> for Status {
    fn from(error: coracle_store::Error) -> Self {
        match error {
            coracle_store::Error::Compacted { .. } => {
                Self::expired("The resourceVersion for the provided watch is too old.")
            }
            other => Self::internal(other),
        }
    }
}

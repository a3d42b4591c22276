//! The `authorizer` variable of admission policies: chained calls that end in a question to the authoriser.

use std::fmt;

use super::value::{CelError, Val};

/// One question: may this user do that?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A non-resource path; all of the below is then empty but the verb.
    pub path: Option<String>,
    pub group: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    pub verb: String,
    pub field_selector: String,
    pub label_selector: String,
    /// `(namespace, name)` of a service account to ask for in place of the request's user.
    pub service_account: Option<(String, String)>,
}

/// The authoriser's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    pub reason: String,
    /// Set when the question could not be answered.
    pub error: Option<String>,
}

/// Answers questions of policies; it knows the request's user.
pub trait Authorizer {
    fn decide(&self, access: &Access) -> Verdict;
}

/// A question in the making.
#[derive(Clone)]
pub struct Query<'a> {
    pub(super) authorizer: &'a dyn Authorizer,
    pub(super) access: Access,
    /// The resource of the request itself, for `authorizer.requestResource`.
    pub(super) request: Access,
}

impl fmt::Debug for Query<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Query").field("access", &self.access).finish_non_exhaustive()
    }
}

impl<'a> Query<'a> {
    /// `authorizer.group("apps")…`, step by step.
    pub(super) fn call(&self, name: &str, args: &[Val<'a>]) -> Option<Result<Val<'a>, CelError>> {
        let text = |at: usize| match args.get(at) {
            Some(Val::Text(text)) => Some(text.to_string()),
            _ => None,
        };
        let mut next = self.clone();
        match (name, args.len()) {
            ("path", 1) => next.access.path = Some(text(0)?),
            ("group", 1) => next.access.group = text(0)?,
            ("serviceAccount", 2) => next.access.service_account = Some((text(0)?, text(1)?)),
            ("resource", 1) => next.access.resource = text(0)?,
            ("subresource", 1) => next.access.subresource = text(0)?,
            ("namespace", 1) => next.access.namespace = text(0)?,
            ("name", 1) => next.access.name = text(0)?,
            ("fieldSelector", 1) => next.access.field_selector = text(0)?,
            ("labelSelector", 1) => next.access.label_selector = text(0)?,
            ("check", 1) => {
                next.access.verb = text(0)?;
                let verdict = self.authorizer.decide(&next.access);
                return Some(Ok(Val::Verdict(std::rc::Rc::new(verdict))));
            }
            _ => return None,
        }
        Some(Ok(Val::Authorizer(std::rc::Rc::new(next))))
    }

    pub(super) fn select(&self, field: &str) -> Option<Val<'a>> {
        (field == "requestResource")
            .then(|| Val::Authorizer(std::rc::Rc::new(Self { access: self.request.clone(), ..self.clone() })))
    }
}

impl Verdict {
    pub(super) fn call<'a>(&self, name: &str) -> Option<Val<'a>> {
        Some(match name {
            "allowed" => Val::Bool(self.allowed && self.error.is_none()),
            "reason" => Val::text(self.reason.clone()),
            "errored" => Val::Bool(self.error.is_some()),
            "error" => Val::text(self.error.clone().unwrap_or_default()),
            _ => return None,
        })
    }
}

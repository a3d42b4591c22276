//! What strategies and admission know of the request at hand.

use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::Value;

use crate::kinds::Kind;
use crate::server::ApiServer;
use crate::user::UserInfo;

/// `admission.k8s.io/v1` operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// POST of an object (also PUT or apply that creates).
    Create,
    /// PUT or PATCH of an object or of one of its subresources.
    Update,
    /// DELETE, also of each object of a collection.
    Delete,
    /// exec, attach, portforward, proxy.
    Connect,
}

impl Operation {
    /// `CREATE`, `UPDATE`, `DELETE`, `CONNECT`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

/// One request on one object, as strategies and admission plugins see it.
pub struct Context {
    /// The server: other objects (`api.get`, `api.list`), informers, in-process clients.
    pub api: Arc<ApiServer>,
    /// Who asks.
    pub user: Arc<UserInfo>,
    /// Row of the resource in the path (for `pods/binding` the row of pods).
    pub kind: Arc<Kind>,
    /// Namespace, empty for cluster-scoped objects.
    pub namespace: String,
    /// Name of the object, empty before `generateName` has been resolved.
    pub name: String,
    /// Subresource in the path, empty for the object itself.
    pub subresource: String,
    /// What is done.
    pub operation: Operation,
    /// Whether nothing may be persisted (side effects of admission included).
    pub dry_run: bool,
    /// `fieldManager` of the request, or its default from the User-Agent.
    pub field_manager: String,
    /// One time for the whole request: creationTimestamp, managedFields, deletionTimestamp.
    pub now: Timestamp,
    /// CreateOptions, UpdateOptions, PatchOptions or DeleteOptions as an object, `Null` when none.
    pub options: Value,
    /// Sentences for `Warning` headers, in order, without the `299 - ` frame.
    pub warnings: Mutex<Vec<String>>,
    /// Audit annotations that plugins leave.
    pub annotations: Mutex<Vec<(String, String)>>,
}

impl Context {
    /// Adds a `Warning` header to the answer.
    pub fn warn(&self, sentence: impl Into<String>) {
        self.warnings.lock().push(sentence.into());
    }

    /// Whether the request is for this resource (group and plural), in any version, and no subresource.
    pub fn is_object_of(&self, group: &str, resource: &str) -> bool {
        self.subresource.is_empty() && self.kind.is(group, resource)
    }

    /// The request's time as RFC 3339 with whole seconds, as `metav1.Time` is written.
    pub fn now_text(&self) -> String {
        crate::time::seconds(self.now)
    }
}

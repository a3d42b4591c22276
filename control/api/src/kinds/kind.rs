//! One row of the table of kinds.

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use coracle_schema::Schema;
use serde_json::Value;

use crate::kinds::Strategy;
use crate::status::Status;

/// Where the objects of a kind live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In a namespace.
    Namespaced,
    /// In the cluster.
    Cluster,
}

/// A subresource of a row.
#[derive(Clone, Debug)]
pub struct Subresource {
    /// Last part of the path, such as `status`.
    pub name: String,
    /// Kind of its body.
    pub kind: String,
    /// API group of that kind, when it differs from the row's.
    pub group: String,
    /// API version of that kind.
    pub version: String,
    /// Verbs that it serves.
    pub verbs: Vec<String>,
}

/// A printer column: what `kubectl get` shows.
#[derive(Clone, Debug)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// OpenAPI type of the cell.
    pub type_: String,
    /// OpenAPI format, `name` for the name's column.
    pub format: String,
    /// What the column shows.
    pub description: String,
    /// 0 is always shown, 1 with `-o wide`.
    pub priority: i32,
    /// JSON path of the cell (CRDs); built-in kinds have functions in `table`.
    pub json_path: Option<String>,
}

/// How the objects of a row are brought into another version of the same resource.
#[async_trait]
pub trait Conversion: Send + Sync {
    /// Converts objects of any version of the resource into `api_version` (`group/version`); the order is kept.
    async fn convert(&self, objects: Vec<Value>, api_version: &str) -> Result<Vec<Value>, Status>;
}

/// One resource in one version.
pub struct Kind {
    /// API group, empty for core.
    pub group: String,
    /// Version, such as `v1`.
    pub version: String,
    /// Plural name in the path, such as `pods`.
    pub resource: String,
    /// Singular name, such as `pod`.
    pub singular: String,
    /// Kind, such as `Pod`.
    pub kind: String,
    /// Kind of its lists, such as `PodList`.
    pub list_kind: String,
    /// Namespaced or not.
    pub scope: Scope,
    /// Short names, such as `po`.
    pub short_names: Vec<String>,
    /// Categories, such as `all`.
    pub categories: Vec<String>,
    /// Verbs that are served: `create delete deletecollection get list patch update watch`.
    pub verbs: Vec<String>,
    /// Subresources.
    pub subresources: Vec<Subresource>,
    /// Printer columns; for CRDs without the name's column.
    pub columns: Vec<Column>,
    /// Name of its schema: `io.k8s.api.core.v1.Pod`; of a CRD a name that is unique for it.
    pub schema_name: String,
    /// The schema itself; built-in ones are built when first used.
    pub(crate) schema: OnceLock<Arc<Schema>>,
    /// What differs from kind to kind.
    pub strategy: Arc<dyn Strategy>,
    /// Key prefix in the store with a slash at the end, empty for kinds that are never stored (reviews, bindings).
    pub prefix: String,
    /// Version in which the objects are stored.
    pub storage_version: String,
    /// API group in which the objects are stored (events have two groups).
    pub storage_group: String,
    /// Conversion between the versions, when there are several.
    pub conversion: Option<Arc<dyn Conversion>>,
    /// The CRD object behind the row, `None` for built-in kinds.
    pub crd: Option<Arc<Value>>,
    /// Sentence for a `Warning` header when this version is used and deprecated.
    pub deprecation: Option<String>,
    /// Whether stored objects may not be what a reader is to see: a CRD's schema got defaults after they were written, or they are of
    /// a version that was the stored one before.
    pub differs_when_read: bool,
    /// Whether the version is in discovery (a CRD's version may be stored but not served).
    pub served: bool,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kind({}, {})", self.group_resource(), self.version)
    }
}

impl Kind {
    /// `pods` or `deployments.apps`.
    pub fn group_resource(&self) -> String {
        if self.group.is_empty() { self.resource.clone() } else { format!("{}.{}", self.resource, self.group) }
    }

    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Whether it is this group and plural, in any version.
    pub fn is(&self, group: &str, resource: &str) -> bool {
        self.group == group && self.resource == resource
    }

    /// Whether objects live in namespaces.
    pub fn namespaced(&self) -> bool {
        self.scope == Scope::Namespaced
    }

    /// Whether objects of this kind are kept in the store.
    pub fn stored(&self) -> bool {
        !self.prefix.is_empty()
    }

    /// Whether objects have a protobuf form.
    pub fn has_protobuf(&self) -> bool {
        self.crd.is_none() && self.group != crate::usage::GROUP
    }

    /// Whether the row's version is the one that is written into the store.
    pub fn is_storage_version(&self) -> bool {
        self.version == self.storage_version && self.group == self.storage_group
    }

    /// Whether a verb is served on the resource itself.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    /// The subresource of that name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Key of an object in the store.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        match self.scope {
            Scope::Namespaced => format!("{}{namespace}/{name}", self.prefix),
            Scope::Cluster => format!("{}{name}", self.prefix),
        }
    }

    /// Key prefix of all objects, or of those in one namespace.
    pub fn key_prefix(&self, namespace: &str) -> String {
        match self.scope {
            Scope::Namespaced if !namespace.is_empty() => format!("{}{namespace}/", self.prefix),
            _ => self.prefix.clone(),
        }
    }

    /// The schema, built when first asked for.
    pub fn schema(&self) -> &Arc<Schema> {
        self.schema.get_or_init(|| crate::wire::builtin_schema(&self.schema_name))
    }
}

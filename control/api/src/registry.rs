//! The live table of kinds: the built-in rows, and those that CRDs add and take away at run time.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::kinds::{Kind, builtin};

/// All rows of one moment.
pub struct Rows {
    /// In the order of discovery.
    pub all: Vec<Arc<Kind>>,
    by_path: HashMap<(String, String), Vec<Arc<Kind>>>,
    /// Raised by every change, for caches of discovery and OpenAPI documents.
    pub generation: u64,
}

impl Rows {
    fn new(all: Vec<Arc<Kind>>, generation: u64) -> Self {
        let mut by_path: HashMap<(String, String), Vec<Arc<Kind>>> = HashMap::new();
        for kind in &all {
            by_path.entry((kind.group.clone(), kind.resource.clone())).or_default().push(kind.clone());
        }
        Self { all, by_path, generation }
    }
}

/// The table.
pub struct Registry {
    rows: RwLock<Arc<Rows>>,
    generation: watch::Sender<u64>,
}

impl Default for Registry {
    fn default() -> Self {
        Self { rows: RwLock::new(Arc::new(Rows::new(builtin().to_vec(), 1))), generation: watch::Sender::new(1) }
    }
}

impl Registry {
    /// The rows as they are now.
    pub fn rows(&self) -> Arc<Rows> {
        self.rows.read().clone()
    }

    /// The row of a resource in a version.
    pub fn find(&self, group: &str, version: &str, resource: &str) -> Option<Arc<Kind>> {
        let key = (group.to_owned(), resource.to_owned());
        self.rows.read().by_path.get(&key)?.iter().find(|kind| kind.version == version).cloned()
    }

    /// The row of a resource in the version in which it is stored.
    pub fn find_stored(&self, group: &str, resource: &str) -> Option<Arc<Kind>> {
        let key = (group.to_owned(), resource.to_owned());
        let rows = self.rows();
        let versions = rows.by_path.get(&key)?;
        versions.iter().find(|kind| kind.is_storage_version()).or(versions.first()).cloned()
    }

    /// The row of a kind, such as an owner reference names it.
    pub fn find_kind(&self, group: &str, version: &str, kind: &str) -> Option<Arc<Kind>> {
        self.rows().all.iter().find(|row| row.group == group && row.version == version && row.kind == kind).cloned()
    }

    /// Replaces all rows of CRDs.
    pub fn set_custom(&self, custom: Vec<Arc<Kind>>) {
        let generation = *self.generation.borrow() + 1;
        let all = builtin().iter().cloned().chain(custom).collect();
        *self.rows.write() = Arc::new(Rows::new(all, generation));
        self.generation.send_replace(generation);
    }

    /// Tells of every change of the rows.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

//! Shared, decoded caches of stored objects for the controllers and the scheduler of the same process.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;

/// What happened to an object: `old` and `new` are the decoded versions, shared with the cache.
#[derive(Debug)]
pub struct Delta<K> {
    /// The version before; `None` when it was added.
    pub old: Option<Arc<K>>,
    /// The version now; `None` when it was deleted.
    pub new: Option<Arc<K>>,
}

impl<K> Clone for Delta<K> {
    fn clone(&self) -> Self {
        Self { old: self.old.clone(), new: self.new.clone() }
    }
}

//! The topology of the nodes by key: which domain each node is in, as a small number.

use std::collections::HashMap;
use std::sync::Arc;

use super::NodeState;

/// The domains of one topology key.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) key: Arc<str>,
    /// Domain of the node in each slot; 0 where the node has no such label.
    pub(crate) domains: Vec<u32>,
    /// One more than the largest domain.
    pub(crate) count: usize,
}

impl Column {
    pub(crate) fn new(key: &Arc<str>, slots: &[Option<NodeState>]) -> Self {
        let mut known: HashMap<&str, u32> = HashMap::new();
        let mut domains = vec![0; slots.len()];
        for (own, slot) in domains.iter_mut().zip(slots) {
            if let Some(value) = slot.as_ref().and_then(|node| node.label(key)) {
                let next = known.len() as u32 + 1;
                *own = *known.entry(value).or_insert(next);
            }
        }
        Self { key: key.clone(), domains, count: known.len() + 1 }
    }

    /// The domain of a node; 0 if it has none.
    pub(crate) fn of(&self, slot: u32) -> usize {
        self.domains[slot as usize] as usize
    }
}

//! NetworkPolicy: from the model to rules. [`peers`] turns a rule into disjoint ranges, [`state`] keeps the tables in step.

mod peers;
mod state;

#[cfg(test)]
mod tests;

pub(crate) use state::{PolicyChange, PolicyState};

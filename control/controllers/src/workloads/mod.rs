//! Controllers of what users run: each kind one file.

pub(crate) mod deployment;
pub(crate) mod replica_set;
mod rollout;

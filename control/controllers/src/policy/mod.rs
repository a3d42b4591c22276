//! Controllers of policies on pods.

pub(crate) mod disruption;

//! Controllers of work that ends.

pub(crate) mod job;
pub(crate) mod ttl;

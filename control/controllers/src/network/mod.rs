//! Controllers that tell where Services lead.

pub(crate) mod endpoint_slice;

//! Controllers that tell where Services lead.

pub(crate) mod balancer;
pub(crate) mod endpoint_slice;
pub(crate) mod endpoints;
pub(crate) mod mirror;
mod slices;

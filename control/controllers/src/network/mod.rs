//! Controllers that tell where Services lead.

pub(crate) mod balancer;
pub(crate) mod endpoint_slice;
pub(crate) mod endpoints;
pub(crate) mod mirror;
pub(crate) mod service_cidrs;
mod slices;

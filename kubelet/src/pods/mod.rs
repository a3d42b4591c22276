//! Pod workers: one task per pod moves what is observed towards what is wanted.

mod amounts;
mod resolved;
mod status;

mod admit;
mod backoff;
mod context;
mod hooks;
mod id_ranges;
mod mirror;
mod monitor;
mod report;
mod resize;
mod start;
mod stop;
mod worker;

pub mod eviction;

mod manager;
pub mod table;

#[cfg(test)]
mod simulation;

pub use context::Context;
pub(crate) use context::allocatable;
pub(crate) use id_ranges::IdRanges;
pub use manager::PodManager;
pub(crate) use status::is_final;
pub use table::PodTable;

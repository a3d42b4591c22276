//! Pod workers: one task per pod moves what is observed towards what is wanted.

mod resolved;
mod status;

mod context;
mod hooks;
mod monitor;
mod start;
mod worker;

mod manager;
pub mod table;

pub use context::Context;
pub use manager::PodManager;
pub use table::PodTable;

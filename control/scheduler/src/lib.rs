//! The scheduler: it gives each pod a node.
//!
//! Pods wait in the [`queue`]; each cycle takes one, looks at a snapshot of the nodes ([`state`]), asks the filters which
//! nodes can take it and the scores which is best ([`plugins`], pure functions, one file each), assumes it there and
//! binds it without waiting. What cannot be placed waits for an event that may change that.
#![forbid(unsafe_code)]

mod queue;
mod state;

mod plugins;

mod cycle;
mod driver;

pub use driver::run;

//! The scheduler: it gives each pod a node.
//!
//! Changes of objects ([`update`]) keep what is known of nodes and pods ([`state`]) up to date and wake pods that wait
//! ([`queue`]). Each [`cycle`] takes one pod, asks the filters which nodes can take it and the scores which is best
//! ([`plugins`], pure functions, one file each), or whom to make leave for it. The [`engine`] is all that without IO; the
//! [`driver`] feeds it and writes what it decides, without waiting.
#![forbid(unsafe_code)]

mod config;
mod state;
mod update;

mod queue;

mod plugins;

mod cycle;
mod engine;

mod driver;

pub use config::{Config, ConfigError};
pub use driver::run;
pub use engine::{Action, Bind, Engine, Report};
pub use update::Update;

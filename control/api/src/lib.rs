//! The Kubernetes API server of Coracle: one generic request path over a table of kinds.
#![forbid(unsafe_code)]

pub mod server;
pub mod user;
pub mod status;
pub mod time;
pub mod object;
pub mod kinds;
pub mod context;
pub mod authz;
pub mod admission;
pub mod bootstrap;
mod convert;
mod table;
pub mod node;
pub mod informer;

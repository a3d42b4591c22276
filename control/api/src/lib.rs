//! The Kubernetes API server of Coracle: one generic request path over a table of kinds.
//!
//! A request goes `http` (connection, path, media types) → `handlers` (authenticate with `authn`, authorise with `authz`,
//! find the row in `registry`) → one of the generic handlers, which calls the row's strategy (`kinds`) and `admission` →
//! the store. What is read is answered with the stored bytes; tables, partial objects, other versions and protobuf are
//! made from them only when a request asks.
#![forbid(unsafe_code)]

pub mod server;
mod pki;
mod http;
pub mod user;
pub mod authn;
pub mod authz;
mod health;
mod discovery;
mod registry;
pub mod kinds;
mod crd;
mod aggregate;
mod handlers;
pub mod context;
mod wire;
pub mod object;
pub mod time;
pub mod selector;
pub mod admission;
pub mod bootstrap;
mod eviction;
mod convert;
mod table;
pub mod status;
mod proxy;
pub mod node;
mod net;
mod tls_client;
mod outbound;
mod in_process;
pub mod informer;

pub use health::{KUBERNETES_VERSION, git_version};
pub use http::{BoxError, ReqBody, ResBody};
pub use in_process::Service;
pub use pki::{Identity, Pki, PkiError, Purpose};
pub use registry::{Registry, Rows};
pub use server::{ApiServer, Caller, Config, StartError};

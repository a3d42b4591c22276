//! The Kubernetes API server of Coracle: one generic request path over a table of kinds.
//!
//! A request goes `http` (connection, path, media types) → `handlers` (authenticate with `authn`, authorise with `authz`,
//! find the row in `registry`) → one of the generic handlers, which calls the row's strategy (`kinds`) and `admission` →
//! the store. What is read is answered with the stored bytes; tables, partial objects, other versions and protobuf are
//! made from them only when a request asks.
#![forbid(unsafe_code)]

pub mod admission;
mod aggregate;
pub mod audit;
pub mod authn;
pub mod authz;
pub mod bootstrap;
pub mod context;
mod convert;
mod crd;
mod discovery;
mod eviction;
mod flow;
mod handlers;
mod health;
mod http;
mod in_process;
pub mod informer;
pub mod kinds;
mod metrics;
mod net;
pub mod node;
pub mod object;
mod outbound;
mod pki;
mod proxy;
mod registry;
pub mod selector;
pub mod server;
pub mod status;
mod table;
pub mod time;
mod tls_client;
mod usage;
pub mod user;
mod wire;

pub use coracle_schema as schema;
pub use health::{KUBERNETES_VERSION, git_version};
pub use http::{BoxError, ReqBody, ResBody};
pub use in_process::Service;
pub use pki::request::CertificateRequest;
pub use pki::{Identity, Pki, PkiError, Purpose};
pub use registry::{Registry, Rows};
pub use server::{ApiServer, Caller, Config, StartError};
pub use tls_client::unverified as unverified_tls;

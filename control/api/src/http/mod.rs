//! HTTP below the Kubernetes meaning: bodies, query strings, paths, media types, answers, connections.

mod body;
mod negotiate;
mod query;
mod respond;
mod route;
pub(crate) mod serve;

pub use body::{BoxError, ReqBody, ResBody, empty, stream};
pub use negotiate::{Format, Include, Media, Shape};
pub use query::Query;
pub use respond::{Response, bytes_response, json_response, status_response, text_response};
pub use route::{ResourceRoute, Route, Verb};
pub(crate) use negotiate::{SERVED, SERVED_CUSTOM};
pub(crate) use respond::no_cache;

/// Largest request body, in bytes (as `--max-request-bytes` of a real server).
pub const BODY_LIMIT_BYTES: usize = 3 << 20;

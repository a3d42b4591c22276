//! HTTP below the Kubernetes meaning: bodies, query strings, paths, media types, answers, connections.

mod body;
mod negotiate;
mod query;
mod respond;
mod route;
pub(crate) mod serve;

pub use body::{BoxError, ReqBody, ResBody};
pub(crate) use body::{empty, full, holding, stream};
pub(crate) use negotiate::{Format, Include, Media, Shape};
pub(crate) use negotiate::{SERVED, SERVED_CUSTOM};
pub(crate) use query::{Query, encode};
pub(crate) use respond::no_cache;
pub(crate) use respond::{Response, bytes_response, json_response, pieces_response, status_response, text_response};
pub(crate) use route::{ResourceRoute, Route, Verb};

/// Largest request body, in bytes (as `--max-request-bytes` of a real server).
pub(crate) const BODY_LIMIT_BYTES: usize = 3 << 20;

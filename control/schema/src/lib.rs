//! The schema engine: built-in kinds and custom resources are decoded, pruned, defaulted, validated, merged and described by
//! the same code, over `serde_json::Value`. Pure functions, no IO.

#![forbid(unsafe_code)]

pub mod apply;
pub mod cel;
pub mod decode;
pub mod default;
mod error;
pub mod fuzz;
pub mod gofmt;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod prune;
pub mod quantity;
pub mod schema;
pub mod validate;

pub use error::{ErrorKind, FieldError, Path, aggregate};
pub use schema::{Field, Kind, ListType, Schema, SchemaRef, definition_for};

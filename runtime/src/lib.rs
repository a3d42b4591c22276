//! An OCI runtime as a library: from a specification (runtime-spec 1.3) to a running container. See `README.md`.
#![forbid(unsafe_code)]

mod error;
pub use error::{Error, Result, Step};

//! Reading container logs: CRI lines, across rotated files, following as they grow.

mod files;
mod follow;
mod line;
mod reader;

pub use line::{LogLine, Stream, parse};
pub use reader::{LogOptions, StreamFilter, read};

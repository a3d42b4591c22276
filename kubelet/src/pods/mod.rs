//! Pod workers: one task per pod moves what is observed towards what is wanted.

pub mod table;

pub use table::PodTable;

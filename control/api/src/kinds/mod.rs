//! The table of kinds: one row a resource and version, built-in rows at compile time, rows of CRDs at run time.

pub mod alloc;
pub mod apps;
pub mod at;
pub mod batch;
mod builtin;
pub mod core;
pub mod edit;
pub mod extension;
pub mod ipaddress;
mod kind;
pub mod meta;
pub mod misc;
pub mod names;
pub mod net;
pub mod pod;
pub mod quantity;
pub mod rbac;
pub mod resources;
pub mod reviews;
pub mod row;
pub mod service;
pub mod storage;
mod strategies;
mod strategy;
pub mod table;

pub use builtin::builtin;
pub(crate) use builtin::schema_name;
pub use kind::{Column, Conversion, Kind, Scope, Subresource};
pub use strategy::{FieldLabel, Finish, Generic, OnDelete, Strategy};

#[cfg(test)]
mod tests;

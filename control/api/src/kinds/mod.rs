//! The table of kinds: one row a resource and version, built-in rows at compile time, rows of CRDs at run time.

mod builtin;
mod kind;
mod strategies;
mod strategy;

pub use builtin::builtin;
pub use kind::{Column, Conversion, Kind, Scope, Subresource};
pub use strategy::{FieldLabel, Finish, Generic, OnDelete, Strategy};

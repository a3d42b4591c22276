//! System calls that no library wraps safely: thin, typed, returning owned descriptors. The only crate with `unsafe`.

pub mod packet;
pub mod pipe;
pub mod ring;

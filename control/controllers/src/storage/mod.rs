//! Controllers of volumes: claims and what they are bound to.

pub(crate) mod attach;
pub(crate) mod bind;
pub(crate) mod ephemeral;
pub(crate) mod local;
mod matching;
pub(crate) mod protect;

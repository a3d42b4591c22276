//! What several controllers share: pods made from templates, readiness, hashes of templates.

pub(crate) mod hash;
pub(crate) mod intstr;
pub(crate) mod pods;
pub(crate) mod selector;

//! What several controllers share: what an object owns, pods made from templates, revisions, readiness.

pub(crate) mod control;
pub(crate) mod hash;
pub(crate) mod intstr;
pub(crate) mod labelled;
pub(crate) mod owned;
pub(crate) mod pods;
pub(crate) mod replica;
pub(crate) mod revisions;
pub(crate) mod scale;
pub(crate) mod selector;

//! An OCI runtime as a library: from a specification (runtime-spec 1.3) to a running container.
//!
//! [`Plan::compile`] turns a specification into a list of steps and checks all that can be checked without touching the
//! system. [`spawn`] clones the container's first process as a child of the caller; [`Init`] follows it through its
//! set-up to the running program without blocking. [`exec`] adds processes to a container. [`Cgroup`] limits, measures,
//! freezes and kills. Nothing here keeps files of its own: that is the business of the `corun` command ([`state`]).
#![forbid(unsafe_code)]

mod error;
//pub mod spec;
pub mod capability;
mod idmap;
pub mod seccomp;
pub mod device;
//pub mod cgroup;
//mod plan;
//mod resolve;
//mod child;
//mod spawn;
//pub mod exec;
//pub mod hooks;
//pub mod sealed;

//pub use cgroup::Cgroup;
pub use coracle_sys::process::Exit;
pub use error::{Error, Result, Step};
//pub use plan::{Gate, Options, Plan};
//pub use spawn::{Init, Stage, Stdio, spawn};

//! What the tests of every crate share: programs they need, bounded waiting, hosts of their own (namespaces), clean-up.
#![forbid(unsafe_code)]

mod eventually;
mod image;
mod kubectl;
mod machine;
mod need;
mod pypi;

pub use eventually::{Deadline, eventually};
pub use image::Image;
pub use kubectl::kubectl;
pub use machine::Machine;
pub use need::need;
pub use pypi::python;

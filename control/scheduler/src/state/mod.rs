//! What the scheduler knows: resources, pods and nodes in the form in which filters and scores read them.

mod node;
mod pod;
mod resources;
mod snapshot;

pub(crate) use node::NodeState;
pub(crate) use pod::PodState;
pub(crate) use resources::{Resources, quantity};
pub(crate) use snapshot::{Cache, takes_room};

//! What the scheduler knows: resources, pods and nodes in the form in which filters and scores read them.

mod cache;
mod cluster;
mod columns;
mod node;
mod pod;
mod resources;
pub(crate) mod selector;
mod shape;

pub(crate) use cache::{Cache, Change};
pub(crate) use cluster::Cluster;
pub(crate) use columns::Column;
pub(crate) use node::NodeState;
pub(crate) use pod::{PodState, takes_room};
pub(crate) use resources::{Resources, millis, units};
pub(crate) use shape::{DEFAULT_SCHEDULER, PodTerm, Shape, Shapes, SpreadConstraint};

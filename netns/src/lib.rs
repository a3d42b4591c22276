//! The network of a node: pod namespaces and links, Service rules, NetworkPolicy, cluster DNS, routes to other nodes.
//!
//! One [`Network`] a daemon. The node agent calls [`Network::setup_pod`] and [`Network::teardown_pod`] around a pod's life and feeds
//! [`Network::update`] with what the API says ([`model::Change`]); all rules, names and routes follow from these two.
#![forbid(unsafe_code)]

mod config;
pub mod model;
mod pod;

pub use config::{Config, Family, Overlay};
pub use model::Protocol;
pub use pod::{HostPort, PodKey, PodNet, PodNetwork};

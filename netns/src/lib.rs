//! The network of a node: pod namespaces and links, Service rules, NetworkPolicy, cluster DNS, routes to other nodes.
//!
//! One [`Network`] a daemon. The node agent calls [`Network::setup_pod`] and [`Network::teardown_pod`] around a pod's life and feeds
//! [`Network::update`] with what the API says ([`model::Change`]); all rules, names and routes follow from these two.
#![forbid(unsafe_code)]

mod check;
mod cni;
mod config;
mod error;
pub mod model;
mod netlink;
mod network;

mod conntrack;
mod dns;
mod hosts;
mod iptables;
mod nft;
mod pods;
mod policy;
mod program;
mod rules;
mod services;

#[doc(hidden)]
pub mod bare;
#[doc(hidden)]
pub mod fuzzing;

pub use check::{Finding, check};
pub use cni::CniConfig;
pub use config::{Config, Family, Overlay, ProxyMode};
pub use dns::Metrics as DnsMetrics;
pub use error::Error;
pub use hosts::WireGuardKey;
pub use model::Protocol;
pub use netlink::NetlinkError;
pub use network::Network;
pub use pods::{HostPort, IpamError, PodKey, PodNet, PodNetwork};

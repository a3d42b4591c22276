//! The node agent: it makes the pods that are bound to this node run, and says how they are.
//!
//! Data flows from the API's watch (or a folder of static pods) to one worker per pod ([`pods`]), which drives the
//! container verbs of [`cri`]; `native` carries these verbs out through `coracle-runtime`, with the long-lived part (being
//! the parent of containers, holding their output, writing their logs) in a process of its own, the [`supervisor`].
#![forbid(unsafe_code)]

pub mod config;
pub mod cri;
pub mod names;

pub mod grpc;

pub mod certificates;
pub mod cgroups;
pub mod cri_v1;
pub mod csi;
pub mod devices;
pub mod dra;
pub mod images;
pub mod logs;
pub mod native;
pub mod network;
pub mod node;
pub mod plugins;
pub mod pods;
pub mod probes;
pub mod server;
pub mod shutdown;
pub mod streaming;
pub mod supervisor;
pub mod volumes;

mod agent;
mod cleanup;
mod events;
mod metrics;

pub use agent::{AgentError, Kubelet};
pub use cleanup::cleanup;
pub use config::Config;
pub use names::{ContainerId, Layout, PodKey};

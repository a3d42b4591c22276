//! The node's HTTPS API on port 10250: who asks, whether they may, and the answers.

mod auth;
mod authorize;
mod tls;

mod containers;
pub(crate) mod metrics;
mod node_logs;
mod pods;
mod sessions;
mod state;
mod stats;

mod router;
mod serve;

pub use auth::Identity;
pub use serve::{NodeServer, ServerConfig};
pub use state::NodeState;

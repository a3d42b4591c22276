//! The cluster's DNS: names of Services and pods from memory ("Kubernetes DNS-Based Service Discovery", version 1.1.0), everything else from the host's
//! resolvers with a cache.
//!
//! It answers on the DNS service address itself, which is an address of the node's link: no rule and no hop stands between a pod and the answer, and the
//! questions are not tracked as connections.

mod cache;
mod forward;
mod metrics;
mod names;
mod response;
mod server;
mod zone;

pub use metrics::Metrics;
pub(crate) use server::Server;

/// What an empty zone replies to a datagram, for fuzzers.
pub(crate) fn reply_to(config: &crate::Config, bytes: &[u8]) -> Option<Vec<u8>> {
    match response::step(&zone::Zone::new(config), bytes) {
        response::Step::Reply { message, size } => response::encode(&message, size, true, &Metrics::default()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

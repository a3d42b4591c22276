//! Controllers that keep the cluster itself in order: nodes, namespaces, accounts, garbage.

pub(crate) mod accounts;
pub(crate) mod aggregation;
pub(crate) mod bootstrap_tokens;
pub(crate) mod device_taints;
pub(crate) mod events;
pub(crate) mod legacy_tokens;
pub(crate) mod namespaces;
pub(crate) mod node_ipam;
pub(crate) mod node_lifecycle;
pub(crate) mod pod_gc;
pub(crate) mod policy_status;
pub(crate) mod quota;
pub(crate) mod resource_claims;
pub(crate) mod root_ca;
pub(crate) mod taint_eviction;
pub(crate) mod token_secrets;
mod zones;

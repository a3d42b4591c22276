//! Node IPAM: each node gets a range of its own out of the cluster's pod addresses (`spec.podCIDR`).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Length of a node's prefix (`--node-cidr-mask-size`).
const NODE_PREFIX: u8 = 24;

pub(crate) struct NodeIpam {
    host: Host,
    nodes: Arc<Informer<Node>>,
    cluster: Option<Range>,
}

/// An IPv4 range out of which nodes get theirs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Range {
    base: u32,
    prefix: u8,
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let IpAddr::V4(address) = address.parse().ok()? else {
            return None;
        };
        let prefix: u8 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        let mask = u32::MAX.checked_shl(u32::from(32 - prefix)).unwrap_or_default();
        Some(Self { base: u32::from(address) & mask, prefix })
    }

    /// The first node range that nobody holds.
    fn first_free(self, held: &HashSet<String>) -> Option<String> {
        let count = 1_u32.checked_shl(u32::from(NODE_PREFIX.checked_sub(self.prefix)?))?;
        (0..count)
            .map(|index| format!("{}/{NODE_PREFIX}", Ipv4Addr::from(self.base + (index << (32 - NODE_PREFIX)))))
            .find(|range| !held.contains(range))
    }
}

impl NodeIpam {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { nodes: host.informer(), cluster: Range::parse(&api.config.cluster_cidr), host }
    }
}

impl Controller for NodeIpam {
    // The identity that may patch nodes in the bootstrap roles.
    const NAME: &'static str = "node-controller";
    // One at a time: two nodes must not be given the same range.
    const WORKERS: usize = 1;

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        // One key for all nodes, so that each assignment is seen before the next is made.
        sources.watch(&self.nodes, |_, _, queue| queue.add(Key::new("", "")));
    }

    async fn reconcile(&self, _: &Key) -> Result<Outcome, Error> {
        let Some(cluster) = self.cluster else {
            return Ok(Outcome::Done);
        };
        let nodes = self.nodes.list();
        let held = |node: &Arc<Node>| node.spec.as_ref().and_then(|spec| spec.pod_cidr.clone());
        let mut taken: HashSet<String> = nodes.iter().filter_map(held).collect();
        let api: Api<Node> = Api::all(self.host.client.clone());
        for node in nodes.iter().filter(|node| held(node).is_none() && node.metadata.deletion_timestamp.is_none()) {
            let Some(range) = cluster.first_free(&taken) else {
                let note = format!("Node {} status is now: CIDRNotAvailable", node.name_any());
                self.host.event(&**node, EventType::Normal, "CIDRNotAvailable", "Allocate", note).await;
                continue;
            };
            let patch = serde_json::json!({"spec": {"podCIDR": range, "podCIDRs": [range]}});
            self.host.patch(&api, &node.name_any(), patch).await?;
            taken.insert(range);
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_given_once_and_run_out() {
        let range = Range::parse("10.42.0.0/22").expect("a range");
        let mut held = HashSet::new();
        while let Some(next) = range.first_free(&held) {
            assert!(held.insert(next));
        }
        let mut all: Vec<_> = held.into_iter().collect();
        all.sort();
        assert_eq!(all, ["10.42.0.0/24", "10.42.1.0/24", "10.42.2.0/24", "10.42.3.0/24"]);
        assert_eq!(Range::parse("fd00::/48"), None);
    }
}

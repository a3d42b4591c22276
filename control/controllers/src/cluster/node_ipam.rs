//! Node IPAM: each node gets ranges of its own out of the cluster's pod addresses (`spec.podCIDRs`), one of each family.

use std::collections::HashSet;
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Length of a node's prefix (`--node-cidr-mask-size-ipv4`, `-ipv6`): room for the 500 pods that a node may have.
const NODE_PREFIX: u8 = 23;
const NODE_PREFIX_V6: u8 = 64;

pub(crate) struct NodeIpam {
    host: Host,
    nodes: Arc<Informer<Node>>,
    /// The preferred family first.
    cluster: Vec<IpNet>,
}

/// The first node range of a cluster's range of which nobody holds a part; ranges of another length may be held.
fn first_free(cluster: &IpNet, held: &HashSet<IpNet>) -> Option<IpNet> {
    let length = if cluster.addr().is_ipv4() { NODE_PREFIX } else { NODE_PREFIX_V6 };
    cluster.subnets(length).ok()?.find(|range| !held.iter().any(|other| range.contains(other) || other.contains(range)))
}

/// The ranges that a node holds.
fn held(node: &Node) -> impl Iterator<Item = IpNet> + '_ {
    let ranges = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_ref());
    ranges.into_iter().flatten().filter_map(|range| range.parse().ok())
}

impl NodeIpam {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let cluster = api.config.cluster_cidr.split(',').filter_map(|range| range.trim().parse().ok()).collect();
        Self { nodes: host.informer(), cluster, host }
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
        let nodes: Vec<_> = self.nodes.list().collect();
        let mut taken: HashSet<IpNet> = nodes.iter().flat_map(|node| held(node)).collect();
        let api: Api<Node> = Api::all(self.host.client.clone());
        let without = |node: &&Arc<Node>| held(node).next().is_none() && node.metadata.deletion_timestamp.is_none();
        for node in nodes.iter().filter(without) {
            let ranges: Option<Vec<IpNet>> = self.cluster.iter().map(|cluster| first_free(cluster, &taken)).collect();
            let Some(ranges) = ranges.filter(|ranges| !ranges.is_empty()) else {
                let note = format!("Node {} status is now: CIDRNotAvailable", node.name_any());
                self.host.event(&**node, EventType::Normal, "CIDRNotAvailable", "Allocate", note).await;
                continue;
            };
            let patch = serde_json::json!({"spec": {"podCIDR": ranges[0], "podCIDRs": ranges}});
            self.host.patch(&api, &node.name_any(), patch).await?;
            taken.extend(ranges);
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_given_once_and_run_out() {
        for (cluster, last, count) in [("10.42.0.0/21", "10.42.6.0/23", 4), ("fd00:42::/62", "fd00:42:0:3::/64", 4)] {
            let (cluster, mut held, mut all) = (cluster.parse().expect("a range"), HashSet::new(), Vec::new());
            while let Some(next) = first_free(&cluster, &held) {
                assert!(held.insert(next));
                all.push(next.to_string());
            }
            assert_eq!((all.len(), all.last().map(String::as_str)), (count, Some(last)));
        }
    }

    #[test]
    fn ranges_of_another_length_are_left_alone() {
        let cluster = "10.42.0.0/21".parse().expect("a range");
        let held = ["10.42.1.0/24", "10.42.2.0/25"].map(|range| range.parse().expect("a range")).into();
        assert_eq!(first_free(&cluster, &held).map(|range| range.to_string()).as_deref(), Some("10.42.4.0/23"));
    }
}

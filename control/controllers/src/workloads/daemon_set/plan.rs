//! What a DaemonSet does next: from nodes and pods to the pods that go and the nodes that get one. Values to values.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::DaemonSetSpec;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::fit::{Fit, Wants};
use super::{by_node, limits};
use crate::common::{pods, revisions};

/// How far an update may go, in nodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Limits {
    /// Pods are replaced when somebody removes them.
    OnDelete,
    /// So many nodes may be without an available pod.
    Unavailable(i32),
    /// So many nodes may have a new pod beside the old one.
    Surge(i32),
}

/// What the status counts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Counts {
    pub(super) desired: i32,
    pub(super) current: i32,
    pub(super) misscheduled: i32,
    pub(super) ready: i32,
    pub(super) available: i32,
    pub(super) updated: i32,
}

/// What is to be done, and what is.
#[derive(Default)]
pub(super) struct Plan {
    /// Pods that have ended, by node: each goes after its pause.
    pub(super) ended: Vec<(String, Arc<Pod>)>,
    pub(super) delete: Vec<Arc<Pod>>,
    /// Nodes that get a pod.
    pub(super) create: Vec<String>,
    pub(super) counts: Counts,
}

/// The pods of one node, as an update sees them.
struct Place {
    node: String,
    old: Option<Arc<Pod>>,
    new: Option<Arc<Pod>>,
    /// More than one old or new pod, or one that is going: not a place to update now.
    unsettled: bool,
}

impl Plan {
    pub(super) fn new(
        spec: &DaemonSetSpec,
        wants: &Wants,
        nodes: &[Arc<Node>],
        pods: &[Arc<Pod>],
        hash: &str,
        now: Timestamp,
    ) -> Self {
        let mut plan = Self::default();
        let on = by_node(pods);
        let fits: HashMap<String, Fit> = nodes.iter().map(|node| (node.name_any(), wants.fit(node))).collect();
        let desired = i32::try_from(fits.values().filter(|fit| fit.should_run).count()).unwrap_or(i32::MAX);
        let limits = limits(spec, desired);
        let min_ready = spec.min_ready_seconds.unwrap_or_default();
        let available = |pod: &Pod| pods::is_available(pod, min_ready, now);
        let is_new = |pod: &Pod| pod.labels().get(revisions::HASH_LABEL).map(String::as_str) == Some(hash);
        let nothing = Vec::new();
        let mut places = Vec::new();
        for node in nodes {
            let name = node.name_any();
            let fit = fits.get(&name).copied().unwrap_or(Fit { should_run: false, may_stay: false });
            let mut here = on.get(&name).unwrap_or(&nothing).clone();
            here.sort_by_key(|pod| (pod.creation_timestamp(), pod.name_any()));
            plan.count(fit, &here, &available, &is_new);
            if here.is_empty() && fit.should_run {
                plan.create.push(name);
                continue;
            }
            if !fit.may_stay {
                plan.delete.extend(here.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()));
                continue;
            }
            let (ended, live): (Vec<_>, Vec<_>) = here
                .iter()
                .filter(|pod| pod.metadata.deletion_timestamp.is_none())
                .cloned()
                .partition(|pod| matches!(pods::phase(pod), "Failed" | "Succeeded"));
            plan.ended.extend(ended.into_iter().map(|pod| (name.clone(), pod)));
            let going = here.iter().any(|pod| pod.metadata.deletion_timestamp.is_some());
            let settled = plan.settle(matches!(limits, Limits::Surge(_)), live, &is_new, &available);
            places.push(Place { node: name, unsettled: going || settled.unsettled, ..settled });
        }
        // Pods for nodes that are no more; those that were bound are the node controller's.
        for (node, pods) in &on {
            if !fits.contains_key(node) {
                let unbound = |pod: &&Arc<Pod>| {
                    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().is_empty()
                        && pod.metadata.deletion_timestamp.is_none()
                };
                plan.delete.extend(pods.iter().filter(unbound).cloned());
            }
        }
        match limits {
            Limits::OnDelete => {}
            Limits::Unavailable(most) => plan.roll(&places, most, desired, &fits, &available),
            Limits::Surge(most) => plan.surge(&places, most, &available),
        }
        plan
    }

    /// Keeps one pod of a node, or with surge one old and one new; the oldest stay.
    fn settle(
        &mut self,
        surge: bool,
        live: Vec<Arc<Pod>>,
        is_new: &dyn Fn(&Pod) -> bool,
        available: &dyn Fn(&Pod) -> bool,
    ) -> Place {
        let mut place = Place { node: String::new(), old: None, new: None, unsettled: false };
        let mut kept = 0;
        for pod in live {
            let slot = if is_new(&pod) { &mut place.new } else { &mut place.old };
            if slot.is_some() || (!surge && kept > 0) {
                place.unsettled = true;
                self.delete.push(pod);
            } else {
                kept += 1;
                *slot = Some(pod);
            }
        }
        // With surge the old pod goes once the new one serves, or at once when it serves no longer itself.
        if let (Some(old), Some(new)) = (&place.old, &place.new)
            && (available(new) || !pods::is_ready(old))
        {
            self.delete.push(old.clone());
            place.unsettled = true;
        }
        place
    }

    fn count(&mut self, fit: Fit, here: &[Arc<Pod>], available: &dyn Fn(&Pod) -> bool, is_new: &dyn Fn(&Pod) -> bool) {
        let counts = &mut self.counts;
        if !fit.should_run {
            counts.misscheduled += i32::from(!here.is_empty());
            return;
        }
        counts.desired += 1;
        let Some(first) = here.iter().find(|pod| pods::is_ready(pod)).or(here.first()) else { return };
        counts.current += 1;
        let ready = pods::is_ready(first);
        counts.ready += i32::from(ready);
        counts.available += i32::from(ready && available(first));
        counts.updated += i32::from(is_new(first));
    }

    /// Removes old pods as long as enough nodes are served; those that do not serve anyway go first.
    fn roll(
        &mut self,
        places: &[Place],
        most: i32,
        desired: i32,
        fits: &HashMap<String, Fit>,
        available: &dyn Fn(&Pod) -> bool,
    ) {
        let serves = |place: &Place| {
            !place.unsettled && place.new.as_ref().or(place.old.as_ref()).is_some_and(|pod| available(pod))
        };
        let wanted = |place: &&Place| fits.get(&place.node).is_some_and(|fit| fit.should_run);
        let served = places.iter().filter(wanted).filter(|place| serves(place)).count();
        let unavailable = desired - i32::try_from(served).unwrap_or(i32::MAX);
        let mut budget = most - unavailable;
        for place in places.iter().filter(|place| !place.unsettled) {
            let (Some(old), None) = (&place.old, &place.new) else { continue };
            if available(old) {
                if budget <= 0 {
                    continue;
                }
                budget -= 1;
            }
            self.delete.push(old.clone());
        }
    }

    /// Gives nodes with an old pod a new one beside it.
    fn surge(&mut self, places: &[Place], most: i32, available: &dyn Fn(&Pod) -> bool) {
        let both =
            places.iter().filter(|place| place.unsettled || (place.old.is_some() && place.new.is_some())).count();
        let mut budget = most - i32::try_from(both).unwrap_or(i32::MAX);
        for place in places.iter().filter(|place| !place.unsettled) {
            let (Some(old), None) = (&place.old, &place.new) else { continue };
            if available(old) {
                if budget <= 0 {
                    continue;
                }
                budget -= 1;
            }
            self.create.push(place.node.clone());
        }
    }
}

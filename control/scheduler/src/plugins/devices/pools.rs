//! The devices that a node can reach, out of the slices that drivers publish.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::api::core::v1::NodeSelector;
use k8s_openapi::api::resource::v1::{Device, DeviceRequestAllocationResult, ResourceSlice};

use crate::state::selector::{NodeTerm, any_matches};
use crate::state::{Cluster, NodeState, millis, units};

/// Driver, pool, device.
pub(super) type Id<'a> = (&'a str, &'a str, &'a str);

/// A device and where it comes from.
pub(super) struct Reachable<'a> {
    pub(super) id: Id<'a>,
    pub(super) device: &'a Device,
    /// Where it can be used; `None`: everywhere.
    pub(super) place: Place<'a>,
}

/// Which nodes reach a device.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Node(&'a str),
    Selected(&'a NodeSelector),
    Everywhere,
}

impl<'a> Place<'a> {
    fn of(name: Option<&'a String>, selector: Option<&'a NodeSelector>, all: Option<bool>) -> Option<Self> {
        match (name, selector) {
            (Some(name), _) => Some(Self::Node(name)),
            (None, Some(selector)) => Some(Self::Selected(selector)),
            (None, None) => all.filter(|all| *all).map(|_| Self::Everywhere),
        }
    }

    fn includes(self, node: &NodeState) -> bool {
        match self {
            Self::Node(name) => name == node.name(),
            Self::Selected(selector) => {
                let terms: Vec<_> = selector.node_selector_terms.iter().map(NodeTerm::new).collect();
                any_matches(&terms, node.name(), node.labels())
            }
            Self::Everywhere => true,
        }
    }
}

/// What there is for a node.
#[derive(Default)]
pub(super) struct Pools<'a> {
    pub(super) devices: Vec<Reachable<'a>>,
    /// Driver and pool of those of which some slices are still to come.
    pub(super) incomplete: BTreeSet<(&'a str, &'a str)>,
    /// What is left of counters that devices share: driver, pool, set, counter.
    pub(super) counters: BTreeMap<(&'a str, &'a str, &'a str, &'a str), i128>,
    /// Devices that somebody has, or has a part of.
    pub(super) taken: HashSet<Id<'a>>,
    /// What others have of the capacities of devices that are shared (thousandths), by device and name.
    pub(super) portions: HashMap<(Id<'a>, &'a str), i128>,
}

/// The devices of claims that are allocated, or being so; those that are only looked after count for nobody.
fn taken(cluster: &Cluster) -> impl Iterator<Item = &DeviceRequestAllocationResult> {
    let stored = cluster.resource_claims.all().filter_map(|claim| claim.status.as_ref()?.allocation.as_ref());
    let results = stored.chain(cluster.assumed_claims.values()).flat_map(|allocation| &allocation.devices);
    results.flat_map(|devices| devices.results.iter().flatten()).filter(|result| result.admin_access != Some(true))
}

impl<'a> Pools<'a> {
    pub(super) fn of(node: &NodeState, cluster: &'a Cluster) -> Self {
        let mut slices: BTreeMap<(&str, &str), Vec<&ResourceSlice>> = BTreeMap::new();
        for slice in cluster.resource_slices.all() {
            slices.entry((&slice.spec.driver, &slice.spec.pool.name)).or_default().push(slice);
        }
        let mut pools = Self::default();
        for result in taken(cluster) {
            let id = (&*result.driver, &*result.pool, &*result.device);
            pools.taken.insert(id);
            for (name, amount) in result.consumed_capacity.iter().flatten() {
                *pools.portions.entry((id, &**name)).or_default() += i128::from(millis(amount));
            }
        }
        for ((driver, pool), mut slices) in slices {
            let newest = slices.iter().map(|slice| slice.spec.pool.generation).max();
            slices.retain(|slice| Some(slice.spec.pool.generation) == newest);
            let wanted = slices.iter().map(|slice| slice.spec.pool.resource_slice_count).max().unwrap_or_default();
            slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
            let is_whole = i64::try_from(slices.len()).is_ok_and(|count| count >= wanted);
            let before = pools.devices.len();
            for slice in &slices {
                pools.add(driver, pool, slice, node);
            }
            // A driver is changing the pool: what it will hold is not known.
            if !is_whole && pools.devices.len() > before {
                pools.devices.truncate(before);
                pools.incomplete.insert((driver, pool));
            }
        }
        pools.draw(cluster);
        pools
    }

    fn add(&mut self, driver: &'a str, pool: &'a str, slice: &'a ResourceSlice, node: &NodeState) {
        let spec = &slice.spec;
        for set in spec.shared_counters.iter().flatten() {
            for (name, counter) in &set.counters {
                self.counters.insert((driver, pool, &set.name, name), i128::from(units(&counter.value)));
            }
        }
        let of_slice = Place::of(spec.node_name.as_ref(), spec.node_selector.as_ref(), spec.all_nodes);
        for device in spec.devices.iter().flatten() {
            let own = || Place::of(device.node_name.as_ref(), device.node_selector.as_ref(), device.all_nodes);
            let place = if spec.per_device_node_selection == Some(true) { own() } else { of_slice };
            if let Some(place) = place.filter(|place| place.includes(node)) {
                self.devices.push(Reachable { id: (driver, pool, &device.name), device, place });
            }
        }
    }

    /// Takes off the counters what taken devices draw, wherever these are.
    fn draw(&mut self, cluster: &'a Cluster) {
        if self.counters.is_empty() {
            return;
        }
        for slice in cluster.resource_slices.all() {
            let (driver, pool) = (&*slice.spec.driver, &*slice.spec.pool.name);
            for device in slice.spec.devices.iter().flatten() {
                if !self.taken.contains(&(driver, pool, &*device.name)) {
                    continue;
                }
                for draw in device.consumes_counters.iter().flatten() {
                    for (name, counter) in &draw.counters {
                        if let Some(left) = self.counters.get_mut(&(driver, pool, &*draw.counter_set, &**name)) {
                            *left -= i128::from(units(&counter.value));
                        }
                    }
                }
            }
        }
    }
}

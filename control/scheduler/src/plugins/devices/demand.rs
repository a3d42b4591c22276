//! From claims to the search for their devices, and from its solution to what is written into the claims.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};
use k8s_openapi::api::resource::v1::{
    AllocationResult, DeviceAllocationConfiguration, DeviceAllocationResult, DeviceClass,
    DeviceRequestAllocationResult, DeviceSelector, DeviceToleration, ResourceClaim,
};

use super::allocate::{Alternative, Claim, Constraint, Device, Unsolved, allocate as search};
use super::capacity::{Portions, is_shared, portions};
use super::device::{attribute, qualified};
use super::pools::{Place, Pools, Reachable};
use crate::state::{Cluster, NodeState, millis};

/// One way to satisfy a request, as the claim has it.
struct Way<'a> {
    /// `request` or `request/subrequest`
    name: String,
    class: &'a str,
    mode: Option<&'a str>,
    count: Option<i64>,
    selectors: &'a [DeviceSelector],
    tolerations: &'a [DeviceToleration],
    /// What it asks for of the capacities of each device.
    capacity: Option<&'a Portions>,
    admin: bool,
}

/// The ways to satisfy each request of a claim.
fn ways(claim: &ResourceClaim) -> Vec<Vec<Way<'_>>> {
    let requests = claim.spec.devices.iter().flat_map(|devices| devices.requests.iter().flatten());
    let ways = requests.map(|request| match &request.exactly {
        Some(exactly) => vec![Way {
            name: request.name.clone(),
            class: &exactly.device_class_name,
            mode: exactly.allocation_mode.as_deref(),
            count: exactly.count,
            selectors: exactly.selectors.as_deref().unwrap_or_default(),
            tolerations: exactly.tolerations.as_deref().unwrap_or_default(),
            capacity: exactly.capacity.as_ref().and_then(|capacity| capacity.requests.as_ref()),
            admin: exactly.admin_access == Some(true),
        }],
        None => {
            let all = request.first_available.iter().flatten();
            let way =
                |sub: &'_ k8s_openapi::api::resource::v1::DeviceSubRequest| format!("{}/{}", request.name, sub.name);
            all.map(|sub| Way {
                name: way(sub),
                class: &sub.device_class_name,
                mode: sub.allocation_mode.as_deref(),
                count: sub.count,
                selectors: sub.selectors.as_deref().unwrap_or_default(),
                tolerations: sub.tolerations.as_deref().unwrap_or_default(),
                capacity: sub.capacity.as_ref().and_then(|capacity| capacity.requests.as_ref()),
                admin: false,
            })
            .collect()
        }
    });
    ways.collect()
}

fn class_of<'a>(way: &Way<'_>, cluster: &'a Cluster) -> Option<&'a Arc<DeviceClass>> {
    cluster.device_classes.get("", way.class)
}

/// What keeps a claim from being allocated anywhere.
pub(super) fn check(claim: &ResourceClaim, cluster: &Cluster) -> Result<(), String> {
    for way in ways(claim).iter().flatten() {
        if class_of(way, cluster).is_none() {
            return Err(format!("request {}: device class {} does not exist", way.name, way.class));
        }
    }
    Ok(())
}

/// Whether a request tolerates every taint of a device that keeps pods away.
fn is_tolerated(reachable: &Reachable<'_>, tolerations: &[DeviceToleration]) -> bool {
    reachable.device.taints.iter().flatten().filter(|taint| taint.effect != "None").all(|taint| {
        tolerations.iter().any(|toleration| {
            let any_value = toleration.operator.as_deref() == Some("Exists");
            let keys = toleration.key.as_deref().filter(|key| !key.is_empty());
            toleration.effect.as_ref().is_none_or(|effect| effect.is_empty() || *effect == taint.effect)
                && keys.is_none_or(|key| key == taint.key)
                && (any_value
                    || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
        })
    })
}

/// The requests of a way, as a constraint or a configuration may name them.
fn is_named(requests: &Option<Vec<String>>, way: &str) -> bool {
    let requests = requests.as_deref().unwrap_or_default();
    requests.is_empty() || requests.iter().any(|name| name == way || way.split('/').next() == Some(name))
}

/// Devices for claims that have none, on a node.
pub(super) fn allocate(
    claims: &[&Arc<ResourceClaim>],
    node: &NodeState,
    cluster: &Cluster,
) -> Result<Vec<AllocationResult>, String> {
    let pools = Pools::of(node, cluster);
    let places: BTreeMap<_, usize> = pools.counters.keys().enumerate().map(|(at, key)| (*key, at)).collect();
    let mut counters: Vec<i128> = pools.counters.values().copied().collect();
    let capacities = capacities(&pools, &mut counters);
    let device = |reachable: &Reachable<'_>| {
        let (driver, pool, _) = reachable.id;
        let mut draws: BTreeMap<usize, i128> = BTreeMap::new();
        let mut known = true;
        for draw in reachable.device.consumes_counters.iter().flatten() {
            for (name, counter) in &draw.counters {
                match places.get(&(driver, pool, &*draw.counter_set, &**name)) {
                    Some(at) => *draws.entry(*at).or_default() += i128::from(crate::state::units(&counter.value)),
                    None => known = false,
                }
            }
        }
        // A device that draws on a counter that nobody has defined can be had by nobody.
        let (is_taken, shared) = (pools.taken.contains(&reachable.id), known && is_shared(reachable.device));
        Device { taken: !known || is_taken, shared, draws: draws.into_iter().collect() }
    };
    let devices: Vec<Device> = pools.devices.iter().map(device).collect();
    let all_ways: Vec<Vec<Vec<Way<'_>>>> = claims.iter().map(|claim| ways(claim)).collect();
    let mut wanted = Vec::new();
    for (claim, ways) in claims.iter().zip(&all_ways) {
        wanted.push(demand(claim, ways, &pools, &capacities, cluster)?);
    }
    let solution = search(&wanted, &devices, &counters).map_err(|unsolved| match unsolved {
        Unsolved::Impossible => "cannot allocate all claims".to_owned(),
        Unsolved::TooHard => "cannot allocate all claims: the search for devices took too many steps".to_owned(),
    })?;
    let results = claims.iter().zip(&all_ways).zip(solution).map(|((claim, ways), chosen)| {
        let picked = ways.iter().zip(chosen).map(|(ways, (number, devices))| (&ways[number], devices));
        result(claim, &picked.collect::<Vec<_>>(), &pools, node, cluster)
    });
    Ok(results.collect())
}

/// The counter of each capacity of each device that is shared.
type Capacities<'a> = HashMap<(usize, (&'a str, &'a str)), usize>;

/// What is left of the capacities of devices that are shared becomes counters (of thousandths) behind the others.
fn capacities<'a>(pools: &Pools<'a>, counters: &mut Vec<i128>) -> Capacities<'a> {
    let mut places = Capacities::new();
    for (at, reachable) in pools.devices.iter().enumerate().filter(|(_, reachable)| is_shared(reachable.device)) {
        for (name, capacity) in reachable.device.capacity.iter().flatten() {
            let had = pools.portions.get(&(reachable.id, &**name)).copied().unwrap_or_default();
            places.insert((at, qualified(name, reachable.id.0)), counters.len());
            counters.push(i128::from(millis(&capacity.value)) - had);
        }
    }
    places
}

fn demand(
    claim: &ResourceClaim,
    ways: &[Vec<Way<'_>>],
    pools: &Pools<'_>,
    capacities: &Capacities<'_>,
    cluster: &Cluster,
) -> Result<Claim, String> {
    let constraints = claim.spec.devices.iter().flat_map(|devices| devices.constraints.iter().flatten());
    let constraints: Vec<_> = constraints.collect();
    let mut requests = Vec::new();
    for ways in ways {
        let mut alternatives = Vec::new();
        for way in ways {
            let all = way.mode == Some("All");
            let (mut fits, mut parts) = (Vec::new(), BTreeMap::new());
            for (at, reachable) in pools.devices.iter().enumerate() {
                let Some(portions) = portions(reachable.device, reachable.id.0, way.capacity) else { continue };
                if fits_way(way, reachable, cluster).map_err(|error| format!("request {}: {error}", way.name))? {
                    fits.push(at);
                    if is_shared(reachable.device) {
                        let draw = |(name, amount): (&String, _)| {
                            let place = capacities.get(&(at, qualified(name, reachable.id.0)))?;
                            Some((*place, i128::from(millis(amount))))
                        };
                        parts.insert(at, portions.iter().filter_map(draw).collect());
                    }
                }
            }
            if all && !pools.incomplete.is_empty() {
                return Err(format!("request {}: a pool of devices is being updated", way.name));
            }
            let under =
                constraints.iter().enumerate().filter(|(_, constraint)| is_named(&constraint.requests, &way.name));
            let count = usize::try_from(way.count.unwrap_or(1)).unwrap_or(1);
            alternatives.push(Alternative {
                count: (!all).then_some(count),
                fits,
                portions: parts,
                admin: way.admin,
                constraints: under.map(|(number, _)| number).collect(),
            });
        }
        requests.push(alternatives);
    }
    let constraint = |constraint: &&k8s_openapi::api::resource::v1::DeviceConstraint| {
        let same = constraint.match_attribute.is_some();
        let name = constraint.match_attribute.as_ref().or(constraint.distinct_attribute.as_ref());
        let mut known = Vec::new();
        let values = pools.devices.iter().enumerate().filter_map(|(at, reachable)| {
            let value = attribute(reachable.device, reachable.id.0, name?)?;
            let number = known.iter().position(|other| *other == value).unwrap_or_else(|| {
                known.push(value);
                known.len() - 1
            });
            Some((at, number))
        });
        Constraint { same, values: values.collect() }
    };
    Ok(Claim { requests, constraints: constraints.iter().map(constraint).collect() })
}

fn fits_way(way: &Way<'_>, reachable: &Reachable<'_>, cluster: &Cluster) -> Result<bool, String> {
    if !is_tolerated(reachable, way.tolerations) {
        return Ok(false);
    }
    let of_class = class_of(way, cluster).into_iter().flat_map(|class| class.spec.selectors.iter().flatten());
    for (number, selector) in of_class.chain(way.selectors).enumerate() {
        let Some(cel) = &selector.cel else { continue };
        let matches = cluster.programs.matches(&cel.expression, reachable.id.0, reachable.device);
        if !matches.map_err(|error| format!("selector #{number}: {error}"))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is written into a claim.
fn result(
    claim: &ResourceClaim,
    picked: &[(&Way<'_>, Vec<usize>)],
    pools: &Pools<'_>,
    node: &NodeState,
    cluster: &Cluster,
) -> AllocationResult {
    let mut results: Vec<DeviceRequestAllocationResult> = Vec::new();
    let mut config = Vec::new();
    for (way, devices) in picked {
        for at in devices {
            let Reachable { id: (driver, pool, device), device: described, .. } = pools.devices[*at];
            let part = portions(described, driver, way.capacity).filter(|_| is_shared(described) && !way.admin);
            let share_id = part.as_ref().map(|_| share_id(claim, results.len()));
            results.push(DeviceRequestAllocationResult {
                request: way.name.clone(),
                driver: driver.to_owned(),
                pool: pool.to_owned(),
                device: device.to_owned(),
                admin_access: way.admin.then_some(true),
                tolerations: (!way.tolerations.is_empty()).then(|| way.tolerations.to_vec()),
                consumed_capacity: part,
                share_id,
                binding_conditions: described.binding_conditions.clone(),
                binding_failure_conditions: described.binding_failure_conditions.clone(),
            });
        }
        let of_class = class_of(way, cluster).into_iter().flat_map(|class| class.spec.config.iter().flatten());
        config.extend(of_class.map(|held| DeviceAllocationConfiguration {
            source: "FromClass".into(),
            requests: Some(vec![way.name.clone()]),
            opaque: held.opaque.clone(),
        }));
    }
    let of_claim = claim.spec.devices.iter().flat_map(|devices| devices.config.iter().flatten());
    let matters = of_claim.filter(|held| picked.iter().any(|(way, _)| is_named(&held.requests, &way.name)));
    config.extend(matters.map(|held| DeviceAllocationConfiguration {
        source: "FromClaim".into(),
        requests: held.requests.clone(),
        opaque: held.opaque.clone(),
    }));
    let used = picked.iter().flat_map(|(_, devices)| devices).map(|at| &pools.devices[*at]);
    // What is made ready for a node is of use there only, wherever else it could have been.
    let used = used.map(|reachable| match reachable.device.binds_to_node {
        Some(true) => Place::Node(node.name()),
        _ => reachable.place,
    });
    AllocationResult {
        devices: Some(DeviceAllocationResult {
            results: Some(results),
            config: (!config.is_empty()).then_some(config),
        }),
        node_selector: node_selector(used),
        allocation_timestamp: None,
    }
}

/// What tells one part of a device that is shared from the others: a UUID, which follows from the claim and the result's place
/// in it.
fn share_id(claim: &ResourceClaim, at: usize) -> String {
    let half = |which: u8| {
        let mut hasher = DefaultHasher::new();
        (claim.metadata.uid.as_deref(), claim.metadata.name.as_deref(), at, which).hash(&mut hasher);
        hasher.finish()
    };
    let (high, low) = (half(0), half(1));
    // RFC 9562, section 5.8: version 8, whose bits are whoever's.
    let (high, low) = (high & !0xf000 | 0x8000, low & !(0b11 << 62) | (0b10 << 62));
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// The nodes where all of the devices can be used; `None`: everywhere.
fn node_selector<'a>(places: impl Iterator<Item = Place<'a>>) -> Option<NodeSelector> {
    let mut term = NodeSelectorTerm::default();
    for place in places {
        match place {
            Place::Node(name) => {
                let named = NodeSelectorRequirement {
                    key: "metadata.name".into(),
                    operator: "In".into(),
                    values: Some(vec![name.to_owned()]),
                };
                let term = NodeSelectorTerm { match_fields: Some(vec![named]), match_expressions: None };
                return Some(NodeSelector { node_selector_terms: vec![term] });
            }
            // The API allows one term in a slice's selector.
            Place::Selected(selector) => {
                for from in &selector.node_selector_terms {
                    let parts = [
                        (&from.match_expressions, &mut term.match_expressions),
                        (&from.match_fields, &mut term.match_fields),
                    ];
                    for (from, to) in parts {
                        for requirement in from.iter().flatten() {
                            let held = to.get_or_insert_default();
                            if !held.contains(requirement) {
                                held.push(requirement.clone());
                            }
                        }
                    }
                }
            }
            Place::Everywhere => {}
        }
    }
    let is_empty = term.match_expressions.is_none() && term.match_fields.is_none();
    (!is_empty).then(|| NodeSelector { node_selector_terms: vec![term] })
}

//! Keeps the tables in step with Services and EndpointSlices: each change touches the elements that differ and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::balance::{REFUSE, Shape};
use super::compile::{Action, FrontKey, Here, Place, fronts, local_endpoints};
use super::keys::{ALLOWED, ENDPOINTS, Key, front_element, map_of};
use crate::Family;
use crate::model::{EndpointSlice, ObjectKey, Protocol, Service};
use crate::nft::{Chain, Table, Value, Verdict};

/// A Service with its slices; either may be known first.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub(crate) service: Option<Service>,
    /// By name. Most Services have one, for which a tree would keep room for eleven.
    pub(crate) slices: Vec<(Arc<str>, EndpointSlice)>,
}

impl Entry {
    /// The slices themselves.
    pub(crate) fn slices(&self) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.slices.iter().map(|(_, slice)| slice)
    }
}

/// All Services and what of them is in the tables.
#[derive(Debug)]
pub(crate) struct Proxy {
    here: Here,
    /// Where our own DNS answers: a Service there that has no endpoints is not refused.
    own: Vec<IpAddr>,
    entries: HashMap<ObjectKey, Entry>,
    /// The Service that a slice was of when last seen.
    slice_service: HashMap<ObjectKey, ObjectKey>,
    /// The Services that want a front, in order, of which the first has it. Two seldom want the same.
    claims: HashMap<FrontKey, Vec<ObjectKey>>,
    installed: HashMap<FrontKey, Action>,
    shapes: HashMap<(Family, Shape), (usize, Arc<str>)>,
    forgotten: Vec<Forgotten>,
    /// Fronts of UDP whose endpoints changed since they were taken last.
    moved: BTreeSet<SocketAddr>,
}

/// An endpoint that clients must not be kept to any more: elements of `map` whose key ends with the front and whose value is the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forgotten {
    pub(crate) family: Family,
    pub(crate) map: &'static str,
    pub(crate) front: Arc<[u8]>,
    pub(crate) endpoint: Box<[u8]>,
}

/// A change of what Services consist of.
pub(crate) enum ProxyChange {
    Service(ObjectKey, Option<Service>),
    Slice(ObjectKey, Option<EndpointSlice>),
    /// The zone of this node.
    Zone(Option<Arc<str>>),
}

impl Proxy {
    /// No Services, seen from `node`.
    pub(crate) fn new(node: &str, own: Vec<IpAddr>) -> Self {
        Self {
            here: Here { node: node.into(), zone: None },
            own,
            entries: HashMap::new(),
            slice_service: HashMap::new(),
            claims: HashMap::new(),
            installed: HashMap::new(),
            shapes: HashMap::new(),
            forgotten: Vec::new(),
            moved: BTreeSet::new(),
        }
    }

    /// What is known of a Service.
    pub(crate) fn entry(&self, key: &ObjectKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// The health check node port of a Service, and how many endpoints this node has.
    pub(crate) fn health(&self, key: &ObjectKey) -> Option<(u16, usize)> {
        let entry = self.entries.get(key)?;
        let service = entry.service.as_ref().filter(|service| !service.served_elsewhere)?;
        Some((service.health_check_node_port?, local_endpoints(&self.here, service, entry.slices())))
    }

    /// The endpoints that were let go since this was asked last.
    pub(crate) fn take_forgotten(&mut self) -> Vec<Forgotten> {
        std::mem::take(&mut self.forgotten)
    }

    /// The fronts of UDP whose endpoints changed since this was asked last, with the endpoints that they have now.
    pub(crate) fn take_moved(&mut self) -> HashMap<SocketAddr, HashSet<SocketAddr>> {
        const PLACES: [Place; 4] = [Place::Services, Place::External, Place::NodePorts, Place::NodePortsExternal];
        let moved = std::mem::take(&mut self.moved);
        let endpoints = |front: &SocketAddr| {
            let keys = PLACES.map(|place| FrontKey {
                place,
                address: front.ip(),
                protocol: Protocol::Udp,
                port: front.port(),
            });
            keys.iter().flat_map(|key| backends_of(self.installed.get(key))).copied().collect()
        };
        moved.iter().map(|front| (*front, endpoints(front))).collect()
    }

    /// What becomes of connections to each front of a family, in order.
    pub(crate) fn fronts(&self, family: Family) -> BTreeMap<&FrontKey, &Action> {
        self.installed.iter().filter(|(key, _)| Family::of(key.address) == family).collect()
    }

    /// Whether something answers at a front by rule.
    pub(crate) fn has_front(&self, key: &FrontKey) -> bool {
        self.installed.contains_key(key)
    }

    /// Takes changes in and brings the tables in step; returns the Services that may have changed.
    pub(crate) fn update(
        &mut self,
        changes: impl IntoIterator<Item = ProxyChange>,
        tables: &mut BTreeMap<Family, Table>,
    ) -> BTreeSet<ObjectKey> {
        let mut touched: BTreeMap<ObjectKey, Vec<FrontKey>> = BTreeMap::new();
        for change in changes {
            match change {
                ProxyChange::Service(key, service) => {
                    self.touch(&key, &mut touched);
                    self.entries.entry(key).or_default().service = service;
                }
                ProxyChange::Slice(key, slice) => {
                    if let Some(old) = self.slice_service.remove(&key) {
                        self.touch(&old, &mut touched);
                        self.entries.entry(old).or_default().slices.retain(|(name, _)| *name != key.name);
                    }
                    if let Some(slice) = slice {
                        self.touch(&slice.service, &mut touched);
                        self.slice_service.insert(key.clone(), slice.service.clone());
                        let slices = &mut self.entries.entry(slice.service.clone()).or_default().slices;
                        slices.retain(|(name, _)| *name != key.name);
                        slices.push((key.name, slice));
                    }
                }
                ProxyChange::Zone(zone) => {
                    if self.here.zone != zone {
                        let all: Vec<ObjectKey> = self.entries.keys().cloned().collect();
                        all.iter().for_each(|key| self.touch(key, &mut touched));
                        self.here.zone = zone;
                    }
                }
            }
        }
        // Who wants which front now.
        let mut wanted: BTreeSet<FrontKey> = BTreeSet::new();
        let mut now: HashMap<ObjectKey, HashMap<FrontKey, Action>> = HashMap::new();
        for (service, before) in &touched {
            for key in before {
                if let Some(claims) = self.claims.get_mut(key) {
                    claims.retain(|other| other != service);
                }
                wanted.insert(*key);
            }
            let after = self.fronts_of(service);
            for key in after.keys() {
                let claims = self.claims.entry(*key).or_default();
                let place = claims.partition_point(|other| other < service);
                claims.insert(place, service.clone());
                wanted.insert(*key);
            }
            now.insert(service.clone(), after);
        }
        for key in wanted {
            let owner = self.claims.get(&key).and_then(|claims| claims.first()).cloned();
            let action = owner.and_then(|owner| match now.get(&owner) {
                Some(fronts) => fronts.get(&key).cloned(),
                // Another Service gets what this one gave up.
                None => self.fronts_of(&owner).remove(&key),
            });
            if action.is_none() && self.claims.get(&key).is_some_and(Vec::is_empty) {
                self.claims.remove(&key);
            }
            let own = self.own.contains(&key.address);
            let action = action.filter(|action| !own || matches!(action, Action::Balance { .. }));
            self.install(key, action, tables);
        }
        self.entries
            .retain(|key, entry| !touched.contains_key(key) || entry.service.is_some() || !entry.slices.is_empty());
        touched.into_keys().collect()
    }

    fn touch(&self, key: &ObjectKey, touched: &mut BTreeMap<ObjectKey, Vec<FrontKey>>) {
        if !touched.contains_key(key) {
            touched.insert(key.clone(), self.fronts_of(key).into_keys().collect());
        }
    }

    fn fronts_of(&self, key: &ObjectKey) -> HashMap<FrontKey, Action> {
        let Some(entry) = self.entries.get(key) else { return HashMap::new() };
        let Some(service) = &entry.service else { return HashMap::new() };
        fronts(&self.here, service, entry.slices()).into_iter().map(|front| (front.key, front.action)).collect()
    }

    /// Replaces what a front does.
    fn install(&mut self, key: FrontKey, action: Option<Action>, tables: &mut BTreeMap<Family, Table>) {
        let Some(table) = tables.get_mut(&Family::of(key.address)) else { return };
        let old = self.installed.get(&key).cloned();
        if old == action {
            return;
        }
        let new_shape = action.as_ref().and_then(|action| shape_of(&key, action));
        let old_shape = old.as_ref().and_then(|action| shape_of(&key, action));
        if new_shape != old_shape
            && let Some(shape) = new_shape
        {
            self.hold(shape, table);
        }
        let verdict = action.as_ref().map(|action| match (action, &new_shape) {
            (Action::Drop, _) => Verdict::Drop,
            (Action::Balance { .. }, Some(shape)) => Verdict::Goto(self.shapes[&(table.family, *shape)].1.clone()),
            (Action::Refuse | Action::Balance { .. }, _) => Verdict::Goto(REFUSE.into()),
        });
        table.set_element(map_of(key.place), front_element(&key), verdict.map(Value::Verdict));
        if new_shape != old_shape
            && let Some(shape) = old_shape
        {
            self.release(shape, table);
        }
        replace_backends(table, &key, old.as_ref(), old_shape, action.as_ref(), new_shape);
        if let Some(shape) = old_shape.filter(|shape| shape.affinity.is_some()) {
            let kept = backends_of(action.as_ref());
            let gone = backends_of(old.as_ref())
                .iter()
                .filter(|endpoint| !kept.contains(endpoint) || new_shape.is_none_or(|shape| shape.affinity.is_none()));
            let front: Arc<[u8]> = match shape.any_address {
                // Clients of a node port came to some address of the node.
                true => Key::default().protocol(key.protocol).port(key.port).bytes().into(),
                false => front_key(&key).bytes().into(),
            };
            self.forgotten.extend(gone.map(|endpoint| Forgotten {
                family: table.family,
                map: shape.affinity_map(),
                front: front.clone(),
                endpoint: Key::default().endpoint(*endpoint).bytes(),
            }));
        }
        replace_sources(table, &key, sources_of(old.as_ref()), sources_of(action.as_ref()));
        if key.protocol == Protocol::Udp {
            self.moved.insert(SocketAddr::new(key.address, key.port));
        }
        match action {
            Some(action) => self.installed.insert(key, action),
            None => self.installed.remove(&key),
        };
    }

    fn hold(&mut self, shape: Shape, table: &mut Table) {
        let family = table.family;
        let (count, _) = self.shapes.entry((family, shape)).or_insert_with(|| {
            let name: Arc<str> = shape.chain().into();
            table.set_chain(&name, Some(Chain { base: None, rules: shape.rules(family) }));
            (0, name)
        });
        *count += 1;
    }

    fn release(&mut self, shape: Shape, table: &mut Table) {
        let key = (table.family, shape);
        let Some((count, name)) = self.shapes.get_mut(&key) else { return };
        *count -= 1;
        if *count == 0 {
            table.set_chain(name, None);
            self.shapes.remove(&key);
        }
    }
}

fn shape_of(key: &FrontKey, action: &Action) -> Option<Shape> {
    let Action::Balance { backends, affinity, sources } = action else { return None };
    Some(Shape {
        count: u32::try_from(backends.len()).ok()?,
        local: matches!(key.place, Place::External | Place::NodePortsExternal),
        any_address: matches!(key.place, Place::NodePorts | Place::NodePortsExternal),
        affinity: *affinity,
        ranged: sources.is_some(),
    })
}

fn backends_of(action: Option<&Action>) -> &[SocketAddr] {
    match action {
        Some(Action::Balance { backends, .. }) => backends,
        _ => &[],
    }
}

fn sources_of(action: Option<&Action>) -> &[IpNet] {
    match action {
        Some(Action::Balance { sources: Some(sources), .. }) => sources,
        _ => &[],
    }
}

fn front_key(key: &FrontKey) -> Key {
    Key::default().front(key.address, key.protocol, key.port)
}

fn replace_backends(
    table: &mut Table,
    key: &FrontKey,
    old: Option<&Action>,
    old_shape: Option<Shape>,
    new: Option<&Action>,
    new_shape: Option<Shape>,
) {
    let (before, after) = (backends_of(old), backends_of(new));
    let offset = old_shape.or(new_shape).map_or(0, |shape| shape.offset());
    for place in 0..before.len().max(after.len()) {
        let number = offset + u32::try_from(place).expect("a Service has fewer than 2^16 endpoints");
        let value = after.get(place).map(|endpoint| Key::default().endpoint(*endpoint).data());
        if before.get(place) != after.get(place) {
            table.set_element(ENDPOINTS, front_key(key).number(number).element(), value);
        }
    }
}

/// The External front of an address has the same sources as its Services front, whose elements serve both.
fn replace_sources(table: &mut Table, key: &FrontKey, before: &[IpNet], after: &[IpNet]) {
    if key.place != Place::Services {
        return;
    }
    let element =
        |range: &IpNet| front_key(key).address(range.network()).until(front_key(key).address(range.broadcast()));
    for gone in before.iter().filter(|range| !after.contains(range)) {
        table.set_element(ALLOWED, element(gone), None);
    }
    for come in after.iter().filter(|range| !before.contains(range)) {
        table.set_element(ALLOWED, element(come), Some(Value::None));
    }
}

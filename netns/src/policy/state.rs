//! Policies, and the pods and namespaces that they speak of; and the chains, sets and verdicts that follow.
//!
//! The chains and sets of a family are made anew from the whole state when something changed, and the table finds what differs. Local pods that the same
//! policies select share a chain; each rule of a policy is one look-up in a set of (peer, protocol, port) ranges.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use super::peers::{Cell, Grant, Range, address, block, cells, everyone, number};
use crate::model::{Labels, NetworkPolicy, ObjectKey, Peer, Pod, PolicyRule, PortMatch, Protocol, Selector};
use crate::nft::{Chain, Element, Expr, Field, MetaKey, PayloadBase, R, Rule, SetData, SetSpec, Table, Value, Verdict};
use crate::pods::Record;
use crate::services::keys::{Key, POLICY_EGRESS, POLICY_INGRESS};
use crate::services::layout::Header;
use crate::{Config, Family};

/// What the chains and sets of policies are called, to tell them from those of Services.
const CHAIN_PREFIX: &str = "policy-";
const SET_PREFIX: &str = "peers-";

/// A change of what policies speak of.
pub(crate) enum PolicyChange {
    Policy(ObjectKey, Option<NetworkPolicy>),
    Pod(ObjectKey, Option<Pod>),
    Namespace(Arc<str>, Option<Labels>),
    /// A pod of this node gets its link; its object may be known already or come later.
    Made(Record),
    /// A pod of this node has lost its addresses, whatever its object still says.
    Gone(String),
}

/// All that policies speak of.
#[derive(Debug)]
pub(crate) struct PolicyState {
    node: Arc<str>,
    policies: BTreeMap<ObjectKey, NetworkPolicy>,
    pods: HashMap<ObjectKey, Pod>,
    namespaces: HashMap<Arc<str>, Labels>,
    /// The cluster's DNS as the pod that users know: `k8s-app: kube-dns` in `kube-system`.
    dns: Pod,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Direction {
    Ingress,
    Egress,
}

/// What a family's tables are to hold of policies.
#[derive(Default)]
struct Wanted {
    chains: BTreeMap<String, Vec<Rule>>,
    sets: BTreeMap<String, Vec<Cell>>,
    /// By map and local pod.
    verdicts: HashMap<(&'static str, IpAddr), String>,
}

impl PolicyState {
    /// No policies.
    pub(crate) fn new(config: &Config) -> Self {
        let dns = Pod {
            ips: config.dns_ips.clone(),
            labels: Labels::from([("k8s-app".into(), "kube-dns".into())]),
            named_ports: [("dns", Protocol::Udp), ("dns-tcp", Protocol::Tcp)]
                .map(|(name, protocol)| crate::model::NamedPort { name: name.into(), protocol, port: config.dns_port })
                .into(),
            ..Pod::default()
        };
        Self {
            node: config.node_name.as_str().into(),
            policies: BTreeMap::new(),
            pods: HashMap::new(),
            namespaces: HashMap::new(),
            dns,
        }
    }

    /// Takes changes in and brings the tables in step.
    pub(crate) fn update(&mut self, changes: Vec<PolicyChange>, tables: &mut BTreeMap<Family, Table>) {
        let had = !self.policies.is_empty();
        let mut changed = false;
        for change in changes {
            changed |= match change {
                PolicyChange::Policy(key, policy) => replace(&mut self.policies, key, policy),
                PolicyChange::Pod(key, Some(mut pod)) => {
                    // Of our own pods the addresses are known before the API says so.
                    if let Some(known) = self.pods.get(&key).filter(|known| known.uid == pod.uid && pod.ips.is_empty())
                    {
                        pod.ips.clone_from(&known.ips);
                    }
                    self.pods.insert(key, pod.clone()) != Some(pod)
                }
                PolicyChange::Pod(key, None) => self.pods.remove(&key).is_some(),
                PolicyChange::Namespace(name, Some(labels)) => {
                    self.namespaces.insert(name, labels.clone()) != Some(labels)
                }
                PolicyChange::Namespace(name, None) => self.namespaces.remove(&name).is_some(),
                PolicyChange::Made(record) => self.made(record),
                PolicyChange::Gone(uid) => {
                    let gone = self.pods.values_mut().filter(|pod| *pod.uid == *uid).map(|pod| pod.finished = true);
                    gone.count() > 0
                }
            };
        }
        if !changed || (!had && self.policies.is_empty()) {
            return;
        }
        for table in tables.values_mut() {
            let wanted = self.wanted(table.family);
            install(table, &wanted);
        }
    }

    fn made(&mut self, record: Record) -> bool {
        let key = ObjectKey::new(&record.key.namespace, &record.key.name);
        match self.pods.get_mut(&key).filter(|known| *known.uid == *record.key.uid) {
            Some(known) => std::mem::replace(&mut known.ips, record.ips.clone()) != record.ips,
            None => {
                let (uid, node) = (record.key.uid.as_str().into(), Some(self.node.clone()));
                let pod = Pod { uid, ips: record.ips, labels: record.net.labels, node, ..Pod::default() };
                self.pods.insert(key, pod);
                true
            }
        }
    }

    fn wanted(&self, family: Family) -> Wanted {
        let mut wanted = Wanted::default();
        for (key, pod) in self.pods.iter().filter(|(_, pod)| pod.node.as_ref() == Some(&self.node) && is_peer(pod)) {
            let address = pod.ips.iter().copied().find(|address| Family::of(*address) == family);
            let Some(address) = address else { continue };
            for direction in [Direction::Ingress, Direction::Egress] {
                if let Some(chain) = self.chain_for(family, direction, key, pod, &mut wanted) {
                    wanted.verdicts.insert((direction.map(), address), chain);
                }
            }
        }
        wanted
    }

    /// The chain of a local pod, made if no other pod has made it yet; `None` if no policy selects the pod.
    fn chain_for(
        &self,
        family: Family,
        direction: Direction,
        key: &ObjectKey,
        pod: &Pod,
        wanted: &mut Wanted,
    ) -> Option<String> {
        let selecting = self
            .policies
            .iter()
            .filter(|(policy, spec)| policy.namespace == key.namespace && spec.pods.matches(&pod.labels));
        let rules: Vec<(&ObjectKey, &Vec<PolicyRule>)> =
            selecting.filter_map(|(policy, spec)| direction.rules(spec).map(|rules| (policy, rules))).collect();
        if rules.is_empty() {
            return None;
        }
        let mut sets = Vec::new();
        for (policy, rules) in &rules {
            for (place, rule) in rules.iter().enumerate() {
                // Names of ports mean the selected pod's ones on the way in: such rules differ from pod to pod.
                let target = (direction == Direction::Ingress && has_names(rule)).then_some(key);
                let name = format!("{SET_PREFIX}{:016x}", hash(&(direction, policy, place, target)));
                wanted
                    .sets
                    .entry(name.clone())
                    .or_insert_with(|| cells(&self.grants(family, direction, policy, pod, rule)));
                sets.push(name);
            }
        }
        let policies: Vec<&ObjectKey> = rules.iter().map(|(policy, _)| *policy).collect();
        let chain = format!("{CHAIN_PREFIX}{}-{:016x}", direction.word(), hash(&(policies, &sets)));
        wanted.chains.entry(chain.clone()).or_insert_with(|| {
            let mut chain: Vec<Rule> = sets.iter().map(|set| allow(family, direction, set)).collect();
            chain.push(vec![Expr::Verdict(Verdict::Drop)]);
            chain
        });
        Some(chain)
    }

    fn grants(
        &self,
        family: Family,
        direction: Direction,
        policy: &ObjectKey,
        pod: &Pod,
        rule: &PolicyRule,
    ) -> Vec<Grant> {
        let everyone = vec![everyone(family)];
        let peers = if rule.peers.is_empty() { everyone } else { self.addresses(family, policy, rule) };
        if rule.ports.is_empty() {
            return vec![Grant { peers, ports: None }];
        }
        let mut grants = Vec::new();
        for port in &rule.ports {
            match &port.port {
                PortMatch::All => {
                    grants.push(Grant { peers: peers.clone(), ports: Some((port.protocol, 0, u16::MAX)) })
                }
                PortMatch::Range(low, high) => {
                    grants.push(Grant { peers: peers.clone(), ports: Some((port.protocol, *low, (*high).max(*low))) })
                }
                PortMatch::Named(name) if direction == Direction::Ingress => {
                    let numbers = named(pod, name, port.protocol);
                    grants.extend(
                        numbers
                            .map(|number| Grant { peers: peers.clone(), ports: Some((port.protocol, number, number)) }),
                    );
                }
                PortMatch::Named(name) => {
                    for (_, peer, address) in self.peer_pods(family) {
                        let is_peer = peers.iter().any(|(low, high)| (*low..=*high).contains(&address));
                        let numbers = named(peer, name, port.protocol).filter(|_| is_peer);
                        grants.extend(numbers.map(|number| Grant {
                            peers: vec![(address, address)],
                            ports: Some((port.protocol, number, number)),
                        }));
                    }
                }
            }
        }
        grants
    }

    fn addresses(&self, family: Family, policy: &ObjectKey, rule: &PolicyRule) -> Vec<Range> {
        let mut ranges = Vec::new();
        for peer in &rule.peers {
            match peer {
                Peer::Block { cidr, except } if Family::of(cidr.addr()) == family => {
                    ranges.extend(block(*cidr, except))
                }
                Peer::Block { .. } => {}
                Peer::Pods { namespaces, pods } => {
                    let selected = self.peer_pods(family).filter(|(namespace, pod, _)| {
                        self.selects_namespace(namespaces.as_ref(), policy, namespace) && pods.matches(&pod.labels)
                    });
                    ranges.extend(selected.map(|(_, _, address)| (address, address)));
                }
            }
        }
        ranges
    }

    fn selects_namespace(&self, selector: Option<&Selector>, policy: &ObjectKey, namespace: &str) -> bool {
        match selector {
            None => *policy.namespace == *namespace,
            Some(selector) => selector.matches(self.namespaces.get(namespace).unwrap_or(&Labels::new())),
        }
    }

    /// Pods that can be peers, with namespace and address.
    fn peer_pods(&self, family: Family) -> impl Iterator<Item = (&str, &Pod, u128)> {
        let pods = self.pods.iter().map(|(key, pod)| (&*key.namespace, pod)).filter(|(_, pod)| is_peer(pod));
        pods.chain([("kube-system", &self.dns)]).filter_map(move |(namespace, pod)| {
            let address = pod.ips.iter().copied().find(|address| Family::of(*address) == family)?;
            Some((namespace, pod, number(address)))
        })
    }
}

impl Direction {
    fn rules(self, policy: &NetworkPolicy) -> Option<&Vec<PolicyRule>> {
        match self {
            Self::Ingress => policy.ingress.as_ref(),
            Self::Egress => policy.egress.as_ref(),
        }
    }

    fn map(self) -> &'static str {
        match self {
            Self::Ingress => POLICY_INGRESS,
            Self::Egress => POLICY_EGRESS,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "in",
            Self::Egress => "out",
        }
    }
}

fn replace<V: PartialEq + Clone>(map: &mut BTreeMap<ObjectKey, V>, key: ObjectKey, value: Option<V>) -> bool {
    match value {
        Some(value) => map.insert(key, value.clone()) != Some(value),
        None => map.remove(&key).is_some(),
    }
}

fn is_peer(pod: &Pod) -> bool {
    !pod.host_network && !pod.finished
}

fn has_names(rule: &PolicyRule) -> bool {
    rule.ports.iter().any(|port| matches!(port.port, PortMatch::Named(_)))
}

fn named(pod: &Pod, name: &str, protocol: Protocol) -> impl Iterator<Item = u16> {
    pod.named_ports.iter().filter(move |port| port.name == name && port.protocol == protocol).map(|port| port.port)
}

fn hash(value: &impl Hash) -> u64 {
    // The same state gives the same names in every run of the same build: `new` uses fixed keys.
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Lets a packet go on if the set has its peer, protocol and port.
fn allow(family: Family, direction: Direction, set: &str) -> Rule {
    let a = u8::try_from(family.address_len() / 4).expect("an address has at most four words");
    let header = match direction {
        Direction::Ingress => Header::Source,
        Direction::Egress => Header::Destination,
    };
    vec![
        header.load(family, R(0)),
        Expr::Meta { key: MetaKey::L4Proto, to: R(a) },
        Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, to: R(a + 1) },
        Expr::InNamedSet { set: set.into(), key: R(0), invert: false },
        Expr::Verdict(Verdict::Return),
    ]
}

fn element(family: Family, cell: &Cell) -> Element {
    let key = |peer: u128, protocol: u8, port: u16| {
        Key::default().address(address(family, peer)).protocol_number(protocol).port(port)
    };
    key(cell.peers.0, cell.protocols.0, cell.ports.0).until(key(cell.peers.1, cell.protocols.1, cell.ports.1))
}

fn install(table: &mut Table, wanted: &Wanted) {
    let family = table.family;
    for (name, cells) in &wanted.sets {
        let spec = SetSpec {
            interval: true,
            ..SetSpec::new(vec![Field::Address(family), Field::Protocol, Field::Port], SetData::None)
        };
        table.set_set(name, Some(spec));
        let elements: HashSet<Element> = cells.iter().map(|cell| element(family, cell)).collect();
        let known = table.sets.get(name.as_str()).map(|set| &set.elements);
        let gone: Vec<Element> =
            known.into_iter().flat_map(|known| known.keys()).filter(|old| !elements.contains(old)).cloned().collect();
        gone.into_iter().for_each(|old| table.set_element(name, old, None));
        elements.into_iter().for_each(|new| table.set_element(name, new, Some(Value::None)));
    }
    for (name, rules) in &wanted.chains {
        table.set_chain(name, Some(Chain { base: None, rules: rules.clone() }));
    }
    for map in [POLICY_INGRESS, POLICY_EGRESS] {
        let verdicts: HashMap<Element, &String> = wanted
            .verdicts
            .iter()
            .filter(|((of, _), _)| *of == map)
            .map(|((_, address), chain)| (Key::default().address(*address).element(), chain))
            .collect();
        let known = table.sets.get(map).map(|set| &set.elements);
        let gone: Vec<Element> = known
            .into_iter()
            .flat_map(|known| known.keys())
            .filter(|old| !verdicts.contains_key(old))
            .cloned()
            .collect();
        gone.into_iter().for_each(|old| table.set_element(map, old, None));
        for (element, chain) in verdicts {
            table.set_element(map, element, Some(Value::Verdict(Verdict::Jump(chain.as_str().into()))));
        }
    }
    let stale = |names: BTreeSet<Arc<str>>, prefix: &str, keep: &dyn Fn(&str) -> bool| -> Vec<Arc<str>> {
        names.into_iter().filter(|name| is_made(name, prefix) && !keep(name)).collect()
    };
    for name in stale(table.chains.keys().cloned().collect(), CHAIN_PREFIX, &|name| wanted.chains.contains_key(name)) {
        table.set_chain(&name, None);
    }
    for name in stale(table.sets.keys().cloned().collect(), SET_PREFIX, &|name| wanted.sets.contains_key(name)) {
        table.set_set(&name, None);
    }
}

/// Whether a name is one that [`PolicyState`] makes: the prefix and a hash at the end.
fn is_made(name: &str, prefix: &str) -> bool {
    name.starts_with(prefix)
        && name
            .rsplit('-')
            .next()
            .is_some_and(|end| end.len() == 16 && end.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

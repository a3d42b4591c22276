//! From the state of Services, pods and policies to chains.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::rule::{Match, Rule, Target};
use crate::model::Protocol;
use crate::nft::{Element, Expr, Table, Value, Verdict};
use crate::services::compile::{Action, FrontKey, Place};
use crate::services::keys::{HAIRPIN, HOST_PORTS, POLICY_EGRESS, POLICY_INGRESS, UNTRACKED};
use crate::services::layout::MASQUERADE_MARK;
use crate::services::proxy::Proxy;
use crate::{Config, Family};

/// Beginning of the names of all chains.
pub(crate) const PREFIX: &str = "CORACLE-";

/// Chains by table and name.
pub(crate) type Chains = BTreeMap<(&'static str, String), Vec<Rule>>;

/// The chains that the kernel's own chains jump to: table, chain of the kernel, chain of ours.
pub(crate) const HOOKS: [(&str, &str, &str); 10] = [
    ("raw", "PREROUTING", "CORACLE-RAW"),
    ("raw", "OUTPUT", "CORACLE-UNTRACKED"),
    ("mangle", "PREROUTING", "CORACLE-SHUT"),
    ("mangle", "OUTPUT", "CORACLE-SHUT"),
    ("nat", "PREROUTING", "CORACLE-PREROUTING"),
    ("nat", "OUTPUT", "CORACLE-OUTPUT"),
    ("nat", "POSTROUTING", "CORACLE-POSTROUTING"),
    ("filter", "INPUT", "CORACLE-INPUT"),
    ("filter", "FORWARD", "CORACLE-FORWARD"),
    ("filter", "OUTPUT", "CORACLE-FRONTS"),
];

struct Compiler<'a> {
    config: &'a Config,
    family: Family,
    chains: Chains,
}

/// All chains of a family. `table` holds what is the same for both back ends: pods, host ports, policies.
pub(crate) fn compile(config: &Config, proxy: &Proxy, table: &Table) -> Chains {
    let mut compiler = Compiler { config, family: table.family, chains: Chains::new() };
    compiler.raw(table);
    compiler.shut(proxy);
    compiler.nat(proxy, table);
    compiler.filter(proxy, table);
    compiler.chains
}

/// Reads the bytes of a key or value of a set.
struct Reader<'a>(&'a [u8], Family);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.0.split_first_chunk().expect("our own keys are whole");
        self.0 = rest;
        *first
    }

    fn address(&mut self) -> IpAddr {
        match self.1 {
            Family::V4 => Ipv4Addr::from(self.take::<4>()).into(),
            Family::V6 => Ipv6Addr::from(self.take::<16>()).into(),
        }
    }

    fn protocol(&mut self) -> u8 {
        self.take::<4>()[0]
    }

    fn port(&mut self) -> u16 {
        let [high, low, ..] = self.take::<4>();
        u16::from_be_bytes([high, low])
    }
}

/// Elements in order, so that the same state gives the same text.
fn elements<'a>(table: &'a Table, set: &str) -> Vec<(&'a Element, &'a Value)> {
    let mut all: Vec<_> = table.sets.get(set).into_iter().flat_map(|set| &set.elements).collect();
    all.sort_unstable_by_key(|(element, _)| *element);
    all
}

fn protocol(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|known| known.number() == number)
}

fn port(protocol: Protocol, port: u16) -> [Match; 2] {
    [Match::Protocol(protocol.number()), Match::Ports(protocol, port, port)]
}

fn host(address: IpAddr) -> IpNet {
    address.into()
}

fn loopback() -> IpNet {
    IpNet::new(Ipv4Addr::new(127, 0, 0, 0).into(), 8).expect("8 is a prefix length")
}

fn is_external(place: Place) -> bool {
    matches!(place, Place::External | Place::NodePortsExternal)
}

/// A name of a chain or list, at most 28 characters as iptables wants.
fn named(kind: &str, value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{PREFIX}{kind}-{:016x}", hasher.finish())
}

impl Compiler<'_> {
    fn add(&mut self, table: &'static str, chain: &str, matches: impl IntoIterator<Item = Match>, target: Target) {
        let rules = self.chains.entry((table, format!("{PREFIX}{chain}"))).or_default();
        rules.push(Rule::new(matches, target));
    }

    fn chain(&mut self, table: &'static str, chain: &str) {
        self.chains.entry((table, format!("{PREFIX}{chain}"))).or_default();
    }

    fn ranges(&self, all: &[IpNet]) -> Vec<IpNet> {
        all.iter().copied().filter(|range| Family::of(range.addr()) == self.family).collect()
    }

    fn pods(&self) -> Match {
        Match::From(self.config.link_prefix.clone())
    }

    fn raw(&mut self, table: &Table) {
        self.chain("raw", "UNTRACKED");
        match self.family {
            // Pods may not send to the host's loopback addresses (CVE-2020-8558), nor from an address that is not theirs.
            Family::V4 => self.add("raw", "RAW", [self.pods(), Match::Destination(loopback())], Target::Drop),
            Family::V6 => self.add("raw", "RAW", [self.pods(), Match::Spoofed], Target::Drop),
        }
        self.add("raw", "RAW", [], Target::Jump(format!("{PREFIX}UNTRACKED")));
        for (element, _) in elements(table, UNTRACKED) {
            let mut key = Reader(&element.key, self.family);
            let (address, number, at) = (host(key.address()), key.protocol(), key.port());
            let Some(of) = protocol(number) else { continue };
            let question = [Match::Destination(address), Match::Protocol(number), Match::Ports(of, at, at)];
            self.add("raw", "UNTRACKED", question, Target::NoTrack);
            let answer = [Match::Source(address), Match::Protocol(number), Match::FromPort(of, at)];
            self.add("raw", "UNTRACKED", answer, Target::NoTrack);
        }
    }

    /// Jumps to the chain of a name for the outside, if the packet comes from there, and to that for the inside.
    fn sides(&mut self, table: &'static str, from: &str, name: &str) {
        let inside = format!("{name}-INSIDE");
        let outside = format!("{name}-OUTSIDE");
        self.chain(table, &inside);
        self.chain(table, &outside);
        for range in self.ranges(&self.config.cluster_cidrs) {
            self.add(table, from, [Match::Source(range)], Target::Goto(format!("{PREFIX}{inside}")));
        }
        self.add(table, from, [], Target::Jump(format!("{PREFIX}{outside}")));
        self.add(table, from, [], Target::Goto(format!("{PREFIX}{inside}")));
    }

    /// Connections that get no answer are dropped before routing, which may know no way to their address.
    fn shut(&mut self, proxy: &Proxy) {
        self.add("mangle", "SHUT", [Match::NewConnection], Target::Goto(format!("{PREFIX}SHUT-NEW")));
        self.sides("mangle", "SHUT-NEW", "SHUT");
        for (key, action) in proxy.fronts(self.family) {
            let open: Vec<IpNet> = match action {
                Action::Drop => Vec::new(),
                Action::Balance { sources: Some(sources), .. } => sources.to_vec(),
                _ => continue,
            };
            let place = if is_external(key.place) { "SHUT-OUTSIDE" } else { "SHUT-INSIDE" };
            let chain = named("S", key);
            for front in self.front(key) {
                self.add("mangle", place, front, Target::Goto(chain.clone()));
            }
            let allowed = open.into_iter().map(|range| Rule::new([Match::Source(range)], Target::Return));
            self.chains.insert(("mangle", chain), allowed.chain([Rule::new([], Target::Drop)]).collect());
        }
    }

    fn nat(&mut self, proxy: &Proxy, table: &Table) {
        let chain = |name: &str| format!("{PREFIX}{name}");
        for name in ["CLUSTER", "OUTSIDE", "HOST-PORTS"] {
            self.chain("nat", name);
        }
        for hook in ["PREROUTING", "OUTPUT"] {
            self.add("nat", hook, [Match::ToHost], Target::Jump(chain("HOST-PORTS")));
            for range in self.ranges(&self.config.cluster_cidrs) {
                self.add("nat", hook, [Match::Source(range)], Target::Goto(chain("CLUSTER")));
            }
        }
        // The host's own connections are masqueraded, since the address they leave from may not be routed back by another node.
        self.add("nat", "OUTPUT", [], Target::Goto(chain("MARKED")));
        self.add("nat", "PREROUTING", [], Target::Goto(chain("OUTSIDE")));
        self.add("nat", "MARKED", [], Target::SetMark(MASQUERADE_MARK));
        self.add("nat", "MARKED", [], Target::Jump(chain("CLUSTER")));
        self.add("nat", "MARKED", [], Target::ClearMark(MASQUERADE_MARK));
        for (element, value) in elements(table, HOST_PORTS) {
            let (mut key, Value::Data(data)) = (Reader(&element.key, self.family), value) else { continue };
            let (address, number, at, mut data) =
                (key.address(), key.protocol(), key.port(), Reader(data, self.family));
            let Some(of) = protocol(number) else { continue };
            let very = (!address.is_unspecified()).then(|| Match::Destination(host(address)));
            let pod = SocketAddr::new(data.address(), data.port());
            let matches = very.clone().into_iter().chain(port(of, at));
            let rule = Rule::new(matches, Target::To(pod));
            let rules = self.chains.entry(("nat", chain("HOST-PORTS"))).or_default();
            // Ports of a very address come before those of any.
            let place = if very.is_some() { 0 } else { rules.len() };
            rules.insert(place, rule);
        }
        for (key, action) in proxy.fronts(self.family) {
            if let Action::Balance { backends, affinity, sources } = action {
                let target = self.balance(key, backends, *affinity);
                let from = if is_external(key.place) { "OUTSIDE" } else { "CLUSTER" };
                let sources =
                    sources.as_ref().map(|ranges| ranges.iter().map(|range| Some(Match::Source(*range))).collect());
                for source in sources.unwrap_or_else(|| vec![None]) {
                    for front in self.front(key) {
                        self.add("nat", from, source.clone().into_iter().chain(front), Target::Goto(target.clone()));
                    }
                }
            } else if is_external(key.place) {
                // Not to be led anywhere by what is meant for the inside.
                for front in self.front(key) {
                    self.add("nat", "OUTSIDE", front, Target::Return);
                }
            }
        }
        self.add("nat", "OUTSIDE", [], Target::Goto(chain("MARKED")));
        self.source_nat(table);
    }

    /// What tells the connections of a front; one of them is enough.
    fn front(&self, key: &FrontKey) -> Vec<Vec<Match>> {
        let to = port(key.protocol, key.port);
        match key.place {
            Place::Services | Place::External => {
                vec![[Match::Destination(host(key.address))].into_iter().chain(to).collect()]
            }
            Place::NodePorts | Place::NodePortsExternal if self.config.node_port_addresses.is_empty() => {
                vec![[Match::ToHost].into_iter().chain(to).collect()]
            }
            Place::NodePorts | Place::NodePortsExternal => self
                .ranges(&self.config.node_port_addresses)
                .into_iter()
                .map(|range| [Match::Destination(range), Match::ToHost].into_iter().chain(to.clone()).collect())
                .collect(),
        }
    }

    /// The chain that chooses an endpoint.
    fn balance(&mut self, key: &FrontKey, backends: &[SocketAddr], affinity: Option<u32>) -> String {
        let name = named("B", key);
        let protocol = || Match::Protocol(key.protocol.number());
        let mut rules = Vec::new();
        if let Some(seconds) = affinity {
            for endpoint in backends {
                let list = named("E", &(key, endpoint));
                let recent = Match::Recent { list: list.clone(), seconds };
                rules.push(Rule::new([recent], Target::Goto(list.clone())));
                let remember = [Match::Remember { list: list.clone() }, protocol()];
                self.chains.insert(("nat", list), vec![Rule::new(remember, Target::To(*endpoint))]);
            }
        }
        for (place, endpoint) in backends.iter().enumerate() {
            let left = backends.len() - place;
            let chance = (left > 1).then_some(Match::OneIn(left));
            rules.push(match affinity {
                Some(_) => Rule::new(chance, Target::Goto(named("E", &(key, endpoint)))),
                None => Rule::new(chance.into_iter().chain([protocol()]), Target::To(*endpoint)),
            });
        }
        self.chains.insert(("nat", name.clone()), rules);
        name
    }

    /// The sender becomes the node: its gateway address towards own pods, whose links have no address, else that of the link.
    fn source_nat(&mut self, table: &Table) {
        let snat = || Target::Goto(format!("{PREFIX}SOURCE"));
        let pods = || Match::By(self.config.link_prefix.clone());
        let mut rules = Vec::new();
        for pod in self.hairpin(table) {
            rules.push(Rule::new([Match::Source(pod), Match::Destination(pod)], snat()));
        }
        rules.push(Rule::new([Match::Mark(MASQUERADE_MARK)], snat()));
        if self.family == Family::V4 {
            rules.push(Rule::new([pods(), Match::Source(loopback())], snat()));
        }
        if let Some(own) = self.config.pod_cidr(self.family) {
            for range in self.ranges(&self.config.cluster_cidrs) {
                rules.push(Rule::new([Match::Destination(range)], Target::Return));
            }
            rules.push(Rule::new([Match::Source(own)], Target::Masquerade));
        }
        let gateway = self.config.gateway(self.family).map(|gateway| Rule::new([pods()], Target::SourceIs(gateway)));
        let source = gateway.into_iter().chain([Rule::new([], Target::Masquerade)]).collect();
        self.chains.insert(("nat", format!("{PREFIX}POSTROUTING")), rules);
        self.chains.insert(("nat", format!("{PREFIX}SOURCE")), source);
    }

    fn hairpin(&self, table: &Table) -> Vec<IpNet> {
        elements(table, HAIRPIN).iter().map(|(pod, _)| host(Reader(&pod.key, self.family).address())).collect()
    }

    fn filter(&mut self, proxy: &Proxy, table: &Table) {
        self.fronts(proxy);
        let fronts = || Target::Jump(format!("{PREFIX}FRONTS"));
        for hook in ["INPUT", "FORWARD"] {
            self.add("filter", hook, [Match::KnownConnection], Target::Return);
            self.add("filter", hook, [], fronts());
            // A pod may always reach itself, through a Service too.
            for pod in if hook == "FORWARD" { self.hairpin(table) } else { Vec::new() } {
                self.add("filter", hook, [Match::Source(pod), Match::Destination(pod)], Target::Return);
            }
            self.policy(table, POLICY_EGRESS, hook);
        }
        self.policy(table, POLICY_INGRESS, "FORWARD");
    }

    /// Connections to fronts without endpoints and to nobody's addresses of Services, which no rule has led anywhere.
    fn fronts(&mut self, proxy: &Proxy) {
        self.add("filter", "FRONTS", [Match::NewConnection], Target::Jump(format!("{PREFIX}UNSERVED")));
        self.sides("filter", "UNSERVED", "UNSERVED");
        for (key, _) in proxy.fronts(self.family).into_iter().filter(|(_, action)| **action == Action::Refuse) {
            let place = if is_external(key.place) { "UNSERVED-OUTSIDE" } else { "UNSERVED-INSIDE" };
            let target = Target::Refuse { tcp: key.protocol == Protocol::Tcp, six: self.family == Family::V6 };
            for front in self.front(key) {
                self.add("filter", place, front, target.clone());
            }
        }
        // Addresses of our own inside of the range (DNS) are nobody's to refuse.
        if let Some(own) = self.config.dns_ip(self.family) {
            self.add("filter", "UNSERVED-INSIDE", [Match::Destination(host(own))], Target::Return);
        }
        for range in self.ranges(&self.config.service_cidrs) {
            let six = self.family == Family::V6;
            let tcp = [Match::Destination(range), Match::Protocol(Protocol::Tcp.number())];
            self.add("filter", "UNSERVED-INSIDE", tcp, Target::Refuse { tcp: true, six });
            self.add("filter", "UNSERVED-INSIDE", [Match::Destination(range)], Target::Refuse { tcp: false, six });
        }
    }

    /// The chains of local pods' policies; a chain that comes to its end drops.
    fn policy(&mut self, table: &Table, map: &str, hook: &str) {
        let ingress = map == POLICY_INGRESS;
        for (element, value) in elements(table, map) {
            let Value::Verdict(Verdict::Jump(name)) = value else { continue };
            let pod = host(Reader(&element.key, self.family).address());
            let chain = named("P", name);
            let side = if ingress { Match::Destination(pod) } else { Match::Source(pod) };
            self.add("filter", hook, [side], Target::Jump(chain.clone()));
            let sets = table.chains.get(name).into_iter().flat_map(|chain| chain.rules.iter().flatten());
            let names = sets.filter_map(|expression| match expression {
                Expr::InNamedSet { set, .. } => Some(set),
                _ => None,
            });
            let cells = names.flat_map(|set| elements(table, set));
            let mut rules: Vec<Rule> = cells.filter_map(|(cell, _)| self.allowed(cell, ingress)).collect();
            rules.push(Rule::new([], Target::Drop));
            self.chains.insert(("filter", chain), rules);
        }
    }

    /// Lets a range of peers, protocols and ports through.
    fn allowed(&self, cell: &Element, ingress: bool) -> Option<Rule> {
        let ends = [&*cell.key, cell.end.as_deref()?].map(|bytes| {
            let mut reader = Reader(bytes, self.family);
            (reader.address(), reader.protocol(), reader.port())
        });
        let [(low, first, from), (high, _, to)] = ends;
        let mut matches =
            vec![if ingress { Match::SourceRange(low, high) } else { Match::DestinationRange(low, high) }];
        if let Some(protocol) = protocol(first) {
            matches.extend([Match::Protocol(first), Match::Ports(protocol, from, to)]);
        }
        Some(Rule::new(matches, Target::Return))
    }
}

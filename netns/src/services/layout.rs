//! The part of a table that is the same for every state of the cluster: base chains and the ways between them.

use ipnet::IpNet;

use super::balance::{REFUSE, refuse};
use super::keys::{
    EXTERNAL, HAIRPIN, HOST_PORTS, Key, NODE_ADDRESSES, NODE_PORTS, NODE_PORTS_EXTERNAL, POLICY_EGRESS, POLICY_INGRESS,
    SERVICES, UNTRACKED, sets,
};
use crate::netlink::route::octets;
use crate::nft::{
    BaseChain, CmpOp, CtKey, Expr, FibResult, Hook, MetaKey, NatKind, PayloadBase, R, Reg, Rule, Table, Value, Verdict,
};
use crate::{Config, Family};

/// The bit of a packet's mark that asks for masquerading on the way out, the one that kube-proxy uses for it.
pub(crate) const MASQUERADE_MARK: u32 = 0x4000;
/// `RTN_LOCAL`.
const LOCAL: u32 = 2;
/// `NF_CT_STATE_BIT(IP_CT_ESTABLISHED) | NF_CT_STATE_BIT(IP_CT_RELATED)`.
const KNOWN_CONNECTION: u32 = 2 | 4;

const CLUSTER: &str = "cluster";
const FROM_OUTSIDE: &str = "from-outside";
const LOCAL_ADDRESS: &str = "local-address";
const SOURCE_NAT: &str = "source-nat";

/// An address in the network header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Header {
    Source,
    Destination,
}

impl Header {
    /// Loads the address.
    pub(crate) fn load(self, family: Family, to: Reg) -> Expr {
        let (offset, len) = match (self, family) {
            (Self::Source, Family::V4) => (12, 4),
            (Self::Destination, Family::V4) => (16, 4),
            (Self::Source, Family::V6) => (8, 16),
            (Self::Destination, Family::V6) => (24, 16),
        };
        Expr::Payload { base: PayloadBase::Network, offset, len, to }
    }

    /// Goes on if the address is inside of a range (or is not).
    fn within(self, range: IpNet, inside: bool) -> Rule {
        let family = Family::of(range.addr());
        let op = if inside { CmpOp::Eq } else { CmpOp::Ne };
        let mask = octets(range.netmask());
        let zero = vec![0; mask.len()];
        vec![
            self.load(family, R(0)),
            Expr::Bitwise { from: R(0), to: R(0), mask, xor: zero },
            Expr::Cmp { reg: R(0), op, value: octets(range.network()) },
        ]
    }
}

fn port(offset: u32, to: Reg) -> Expr {
    Expr::Payload { base: PayloadBase::Transport, offset, len: 2, to }
}

/// Loads destination address, protocol and port into consecutive registers.
pub(crate) fn front_key(family: Family, at: Reg) -> Rule {
    const DESTINATION_PORT: u32 = 2;
    end_key(family, at, Header::Destination, DESTINATION_PORT)
}

fn end_key(family: Family, at: Reg, address: Header, port_offset: u32) -> Rule {
    let a = words(family);
    vec![
        address.load(family, at),
        Expr::Meta { key: MetaKey::L4Proto, to: R(at.0 + a) },
        port(port_offset, R(at.0 + a + 1)),
    ]
}

/// Registers that an address takes.
fn words(family: Family) -> u8 {
    u8::try_from(family.address_len() / 4).expect("an address has at most four words")
}

fn then(mut rule: Rule, more: impl IntoIterator<Item = Expr>) -> Rule {
    rule.extend(more);
    rule
}

fn goto(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain.into()))
}

fn jump(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain.into()))
}

fn to_local_address() -> Rule {
    vec![
        Expr::Fib { result: FibResult::AddressType, source: false, to: R(0) },
        Expr::Cmp { reg: R(0), op: CmpOp::Eq, value: LOCAL.to_ne_bytes().into() },
    ]
}

fn set_mark(mask: u32, xor: u32) -> Rule {
    vec![
        Expr::Meta { key: MetaKey::Mark, to: R(0) },
        Expr::Bitwise { from: R(0), to: R(0), mask: mask.to_ne_bytes().into(), xor: xor.to_ne_bytes().into() },
        Expr::SetMark { from: R(0) },
    ]
}

/// Goes on if any of some bits are set.
fn any_bits(load: Expr, bits: u32) -> Rule {
    vec![
        load,
        Expr::Bitwise { from: R(0), to: R(0), mask: bits.to_ne_bytes().into(), xor: vec![0; 4] },
        Expr::Cmp { reg: R(0), op: CmpOp::Ne, value: vec![0; 4] },
    ]
}

/// A table without Services, pods and policies.
pub(crate) fn table(config: &Config, family: Family) -> Table {
    let mut table = Table::new(family, &config.table);
    for (name, spec) in sets(config, family) {
        table.set_set(name, Some(spec));
    }
    for range in config.node_port_addresses.iter().filter(|range| Family::of(range.addr()) == family) {
        // A set of ranges is a concatenation in our tables; the second half is any address.
        let (low, high) = (family.unspecified(), broadest(family));
        let element = Key::default()
            .address(range.network())
            .address(low)
            .until(Key::default().address(range.broadcast()).address(high));
        table.set_element(NODE_ADDRESSES, element, Some(Value::None));
    }
    let mut chain = |name: &str, base, rules| table.set_chain(name, Some(crate::nft::Chain { base, rules }));
    let base = |kind, hook, priority| Some(BaseChain { kind, hook, priority });
    chain(REFUSE, None, refuse());
    chain(SOURCE_NAT, None, source_nat(config, family));
    chain(LOCAL_ADDRESS, None, local_address(family));
    chain(CLUSTER, None, cluster(config, family));
    chain(FROM_OUTSIDE, None, from_outside(config, family));
    chain("untracked-in", base("filter", Hook::Prerouting, -300), raw_prerouting(config, family));
    chain("untracked-out", base("filter", Hook::Output, -300), untracked(family));
    chain("prerouting", base("nat", Hook::Prerouting, -100), prerouting(config, family));
    chain("output", base("nat", Hook::Output, -100), output(config, family));
    chain("input", base("filter", Hook::Input, 0), policy(family, false));
    chain("forward", base("filter", Hook::Forward, 0), policy(family, true));
    chain("postrouting", base("nat", Hook::Postrouting, 100), postrouting(config, family));
    table
}

fn broadest(family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::BROADCAST.into(),
        Family::V6 => std::net::Ipv6Addr::from(u128::MAX).into(),
    }
}

fn ranges(all: &[IpNet], family: Family) -> impl Iterator<Item = IpNet> {
    all.iter().copied().filter(move |range| Family::of(range.addr()) == family)
}

/// Goes on if the packet's link is a pod's.
fn pod_link(config: &Config, key: MetaKey) -> Rule {
    vec![
        Expr::Meta { key, to: R(0) },
        Expr::Cmp { reg: R(0), op: CmpOp::Eq, value: config.link_prefix.as_bytes().into() },
    ]
}

/// Questions to the node's own DNS and its answers, be they of pods or of the host.
fn untracked(family: Family) -> Vec<Rule> {
    let end = [Expr::InSet { set: UNTRACKED, key: R(0), invert: false }, Expr::NoTrack];
    vec![then(front_key(family, R(0)), end.clone()), then(end_key(family, R(0), Header::Source, 0), end)]
}

fn loopback() -> IpNet {
    IpNet::new(std::net::Ipv4Addr::new(127, 0, 0, 0).into(), 8).expect("8 is a prefix length")
}

fn raw_prerouting(config: &Config, family: Family) -> Vec<Rule> {
    let drop = Expr::Verdict(Verdict::Drop);
    let first = match family {
        // Links of pods accept the host's loopback addresses for the answers to host ports; pods may not send there (CVE-2020-8558).
        Family::V4 => {
            then(pod_link(config, MetaKey::InName), then(Header::Destination.within(loopback(), true), [drop]))
        }
        // IPv6 has no rp_filter: a pod may only send from its own address.
        Family::V6 => then(
            pod_link(config, MetaKey::InName),
            [
                Expr::Fib { result: FibResult::Link, source: true, to: R(0) },
                Expr::Cmp { reg: R(0), op: CmpOp::Eq, value: vec![0; 4] },
                drop,
            ],
        ),
    };
    [vec![first], untracked(family)].concat()
}

fn prerouting(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![then(to_local_address(), [jump(LOCAL_ADDRESS)])];
    rules.extend(
        ranges(&config.cluster_cidrs, family).map(|range| then(Header::Source.within(range, true), [goto(CLUSTER)])),
    );
    rules.push(vec![goto(FROM_OUTSIDE)]);
    rules
}

/// The host's own connections: as pods' ones, but masqueraded, since the address they leave from may not be routed back by another node.
fn output(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![then(to_local_address(), [jump(LOCAL_ADDRESS)])];
    rules.extend(
        ranges(&config.cluster_cidrs, family).map(|range| then(Header::Source.within(range, true), [goto(CLUSTER)])),
    );
    rules.extend(marked(vec![jump(CLUSTER)]));
    rules
}

/// A rule with the masquerade mark set while it runs.
fn marked(rule: Rule) -> [Rule; 3] {
    [set_mark(!MASQUERADE_MARK, MASQUERADE_MARK), rule, set_mark(!MASQUERADE_MARK, 0)]
}

/// Host ports: first those of the very address, then those of any.
fn local_address(family: Family) -> Vec<Rule> {
    let a = words(family);
    let pod = R(a + 2);
    let lead = [
        Expr::Map { map: HOST_PORTS, key: R(0), to: pod },
        Expr::Nat { kind: NatKind::Destination, address: pod, port: Some(R(pod.0 + a)) },
    ];
    let exact = front_key(family, R(0));
    let mut any = exact.clone();
    any[0] = Expr::Load { to: R(0), value: vec![0; family.address_len()] };
    vec![then(exact, lead.clone()), then(any, lead)]
}

fn node_port(config: &Config, family: Family, map: &'static str) -> Rule {
    let a = words(family);
    let mut rule = to_local_address();
    if !config.node_port_addresses.is_empty() {
        rule.push(Header::Destination.load(family, R(0)));
        rule.push(Expr::Load { to: R(a), value: vec![0; family.address_len()] });
        rule.push(Expr::InSet { set: NODE_ADDRESSES, key: R(0), invert: false });
    }
    then(rule, front_key(family, R(0)).split_off(1)).into_iter().chain([Expr::VerdictMap { map, key: R(a) }]).collect()
}

fn cluster(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![
        then(front_key(family, R(0)), [Expr::VerdictMap { map: SERVICES, key: R(0) }]),
        node_port(config, family, NODE_PORTS),
    ];
    // Addresses of our own inside of the range (DNS) are nobody's to refuse.
    let own = config.dns_ip(family).map(|address| {
        vec![
            Header::Destination.load(family, R(0)),
            Expr::Cmp { reg: R(0), op: CmpOp::Eq, value: octets(address) },
            Expr::Verdict(Verdict::Return),
        ]
    });
    rules.extend(own);
    rules.extend(
        ranges(&config.service_cidrs, family)
            .map(|range| then(Header::Destination.within(range, true), [goto(REFUSE)])),
    );
    rules
}

fn from_outside(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![
        then(front_key(family, R(0)), [Expr::VerdictMap { map: EXTERNAL, key: R(0) }]),
        node_port(config, family, NODE_PORTS_EXTERNAL),
    ];
    rules.extend(marked(vec![jump(CLUSTER)]));
    rules
}

fn postrouting(config: &Config, family: Family) -> Vec<Rule> {
    let a = words(family);
    let mut rules = vec![
        vec![
            Header::Source.load(family, R(0)),
            Header::Destination.load(family, R(a)),
            Expr::InSet { set: HAIRPIN, key: R(0), invert: false },
            goto(SOURCE_NAT),
        ],
        then(any_bits(Expr::Meta { key: MetaKey::Mark, to: R(0) }, MASQUERADE_MARK), [goto(SOURCE_NAT)]),
    ];
    if family == Family::V4 {
        let from_loopback = then(pod_link(config, MetaKey::OutName), Header::Source.within(loopback(), true));
        rules.push(then(from_loopback, [goto(SOURCE_NAT)]));
    }
    if let Some(own) = config.pod_cidr(family) {
        let leaves = ranges(&config.cluster_cidrs, family).flat_map(|range| Header::Destination.within(range, false));
        rules.push(then(Header::Source.within(own, true), leaves.chain([Expr::Masquerade])));
    }
    rules
}

/// The sender becomes the node: its gateway address towards own pods, whose links have no address, else that of the link.
fn source_nat(config: &Config, family: Family) -> Vec<Rule> {
    let to_pod = config.gateway(family).map(|gateway| {
        then(
            pod_link(config, MetaKey::OutName),
            [
                Expr::Load { to: R(0), value: octets(gateway) },
                Expr::Nat { kind: NatKind::Source, address: R(0), port: None },
            ],
        )
    });
    to_pod.into_iter().chain([vec![Expr::Masquerade]]).collect()
}

/// Policy: what a pod may connect to, and (towards pods) what may connect to it. Answers are always let through.
fn policy(family: Family, to_pods: bool) -> Vec<Rule> {
    let mut rules = vec![
        then(any_bits(Expr::Ct { key: CtKey::State, to: R(0) }, KNOWN_CONNECTION), [Expr::Verdict(Verdict::Accept)]),
        vec![Header::Source.load(family, R(0)), Expr::VerdictMap { map: POLICY_EGRESS, key: R(0) }],
    ];
    if to_pods {
        let a = words(family);
        // A pod may always reach itself, through a Service too.
        rules.insert(
            1,
            vec![
                Header::Source.load(family, R(0)),
                Header::Destination.load(family, R(a)),
                Expr::InSet { set: HAIRPIN, key: R(0), invert: false },
                Expr::Verdict(Verdict::Accept),
            ],
        );
        rules.push(vec![Header::Destination.load(family, R(0)), Expr::VerdictMap { map: POLICY_INGRESS, key: R(0) }]);
    }
    rules
}

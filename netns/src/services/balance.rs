//! The chains that choose an endpoint. Their number depends on the shapes of Services (how many endpoints, which affinity), not on how many
//! Services there are: the endpoints themselves are elements of one map, found by front and random number.

use super::keys::{AFFINITY, AFFINITY_LOCAL, ALLOWED, ENDPOINTS, LOCAL_OFFSET};
use super::layout::{Header, front_key};
use crate::Family;
use crate::nft::{CmpOp, Expr, NatKind, R, Reg, Rule, Verdict};

/// A shape of balancing; Services of the same shape share a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Shape {
    /// How many endpoints, at least one.
    pub(crate) count: u32,
    /// The endpoints of this node only.
    pub(crate) local: bool,
    /// The front is a node port: its address is not part of its key.
    pub(crate) any_address: bool,
    pub(crate) affinity: Option<u32>,
    /// Sources are checked first.
    pub(crate) ranged: bool,
}

impl Shape {
    /// The chain's name.
    pub(crate) fn chain(&self) -> String {
        let mut name = format!("balance-{}", self.count);
        for (flag, word) in [(self.local, "-local"), (self.any_address, "-node"), (self.ranged, "-ranged")] {
            if flag {
                name.push_str(word);
            }
        }
        if let Some(seconds) = self.affinity {
            name.push_str(&format!("-sticky{seconds}"));
        }
        name
    }

    /// The number of the first endpoint.
    pub(crate) fn offset(&self) -> u32 {
        if self.local { LOCAL_OFFSET } else { 0 }
    }

    /// The map of the endpoints that clients had last.
    pub(crate) fn affinity_map(&self) -> &'static str {
        if self.local { AFFINITY_LOCAL } else { AFFINITY }
    }

    /// The chain's rules.
    ///
    /// Registers from 0 on: client address, front (address, protocol, port), number, endpoint (address, port). An address takes `a` registers, so
    /// IPv6 fills all sixteen.
    pub(crate) fn rules(&self, family: Family) -> Vec<Rule> {
        let a = u8::try_from(family.address_len() / 4).expect("an address has at most four words");
        let (client, front, number) = (R(0), R(a), R(2 * a + 2));
        let affinity = self.affinity_map();
        let mut rules = Vec::new();
        if self.ranged {
            // Front and client side by side, the other way round.
            let mut rule = front_key(family, R(0));
            rule.push(Header::Source.load(family, R(a + 2)));
            rule.push(Expr::InSet { set: ALLOWED, key: R(0), invert: true });
            rule.push(Expr::Verdict(Verdict::Drop));
            rules.push(rule);
        }
        let mut key = front_key(family, front);
        if self.any_address {
            key[0] = Expr::Load { to: front, value: vec![0; family.address_len()] };
        }
        let nat =
            |endpoint: Reg| Expr::Nat { kind: NatKind::Destination, address: endpoint, port: Some(R(endpoint.0 + a)) };
        if let Some(seconds) = self.affinity {
            key.push(Header::Source.load(family, client));
            let timeout_ms = u64::from(seconds) * 1000;
            let mut again = key.clone();
            again.push(Expr::Map { map: affinity, key: client, to: number });
            again.push(Expr::Update { map: affinity, key: client, data: number, timeout_ms });
            again.push(nat(number));
            rules.push(again);
        }
        let endpoint = R(number.0 + 1);
        key.push(Expr::Random { modulus: self.count, offset: self.offset(), to: number });
        key.push(Expr::Map { map: ENDPOINTS, key: front, to: endpoint });
        let mut choose = key;
        if let Some(seconds) = self.affinity {
            let mut remember = choose.clone();
            remember.push(Expr::Update {
                map: affinity,
                key: client,
                data: endpoint,
                timeout_ms: u64::from(seconds) * 1000,
            });
            remember.push(nat(endpoint));
            rules.push(remember);
        }
        // Without affinity, or when no more clients can be remembered.
        choose.push(nat(endpoint));
        rules.push(choose);
        rules
    }
}

/// The chain of fronts without endpoints.
pub(crate) const REFUSE: &str = "refuse";

/// Refuses as the protocol does it: a reset for TCP, port unreachable for others.
pub(crate) fn refuse() -> Vec<Rule> {
    use crate::nft::{MetaKey, Reject};
    let tcp = vec![crate::Protocol::Tcp.number()];
    vec![
        vec![
            Expr::Meta { key: MetaKey::L4Proto, to: R(0) },
            Expr::Cmp { reg: R(0), op: CmpOp::Eq, value: tcp },
            Expr::Reject(Reject::TcpReset),
        ],
        vec![Expr::Reject(Reject::PortUnreachable)],
    ]
}

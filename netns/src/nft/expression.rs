//! The expressions of nf_tables' virtual machine that our rules are made of (`struct nft_expr_ops` of each name in `net/netfilter/nft_*.c`).

use std::sync::Arc;

/// A 32-bit register, 0 to 15; longer values take the following ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Reg(pub(crate) u8);

/// Register `n`.
#[allow(non_snake_case, reason = "reads like the kernel's register names in tables of rules")]
pub(crate) const fn R(n: u8) -> Reg {
    Reg(n)
}

/// A rule: expressions from left to right; one that does not match ends the rule.
pub(crate) type Rule = Vec<Expr>;

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Arc<str>),
    Goto(Arc<str>),
}

/// One expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expr {
    /// Loads what the kernel knows of a packet beside its bytes.
    Meta { key: MetaKey, to: Reg },
    /// Sets the packet's mark.
    SetMark { from: Reg },
    /// Loads bytes of a header.
    Payload { base: PayloadBase, offset: u32, len: u32, to: Reg },
    /// Goes on if the register compares so.
    Cmp { reg: Reg, op: CmpOp, value: Vec<u8> },
    /// `to = (from & mask) ^ xor`.
    Bitwise { from: Reg, to: Reg, mask: Vec<u8>, xor: Vec<u8> },
    /// Loads a constant.
    Load { to: Reg, value: Vec<u8> },
    /// Ends the rule with a verdict.
    Verdict(Verdict),
    /// Goes on if the set has the key (or has it not).
    InSet { set: &'static str, key: Reg, invert: bool },
    /// The same with a set whose name is made at run time.
    InNamedSet { set: Arc<str>, key: Reg, invert: bool },
    /// Loads what the map has for the key; goes on only if there is something.
    Map { map: &'static str, key: Reg, to: Reg },
    /// Takes the verdict that the map has for the key; goes on if there is none.
    VerdictMap { map: &'static str, key: Reg },
    /// Writes an element into a dynamic map, with a time-out.
    Update { map: &'static str, key: Reg, data: Reg, timeout_ms: u64 },
    /// A random number below `modulus`, plus `offset`.
    Random { modulus: u32, offset: u32, to: Reg },
    /// Looks the destination (or source with the packet's own link) up in the routing table.
    Fib { result: FibResult, source: bool, to: Reg },
    /// Loads what connection tracking knows.
    Ct { key: CtKey, to: Reg },
    /// Rewrites an address, and a port if given, for the whole connection. `address` is four registers for IPv6.
    Nat { kind: NatKind, address: Reg, port: Option<Reg> },
    /// Rewrites the source to the address of the link that the packet leaves by, with a random port.
    Masquerade,
    /// Answers with a refusal.
    Reject(Reject),
    /// The connection is not tracked.
    NoTrack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MetaKey {
    Mark = 3,
    InName = 6,
    OutName = 7,
    L4Proto = 16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum PayloadBase {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum CmpOp {
    Eq = 0,
    Ne = 1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum FibResult {
    /// Index of the link that the route leads to, 0 without a route.
    Link = 1,
    /// `RTN_*`: 2 is local.
    AddressType = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum CtKey {
    /// Bits: 1 invalid, 2 established, 4 related, 8 new, 64 untracked.
    State = 0,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum NatKind {
    Source = 0,
    Destination = 1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reject {
    TcpReset,
    /// ICMP destination unreachable, port unreachable.
    PortUnreachable,
}

/// Where a base chain is hooked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// A base chain's place; its policy is always accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BaseChain {
    /// `filter` or `nat`.
    pub(crate) kind: &'static str,
    pub(crate) hook: Hook,
    pub(crate) priority: i32,
}

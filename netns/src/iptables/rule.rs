//! Rules of iptables as values, and as lines of `iptables-restore`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::model::Protocol;

/// A rule: all of `matches`, then `target`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rule {
    pub(crate) matches: Vec<Match>,
    pub(crate) target: Target,
}

/// What a packet must be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Match {
    Source(IpNet),
    Destination(IpNet),
    SourceRange(IpAddr, IpAddr),
    DestinationRange(IpAddr, IpAddr),
    Protocol(u8),
    /// Source port; a protocol stands before it.
    FromPort(Protocol, u16),
    /// Destination ports, both ends inside; a protocol stands before it.
    Ports(Protocol, u16, u16),
    /// The destination is an address of the host.
    ToHost,
    /// Name of the link it came by, or its beginning.
    From(String),
    /// Name of the link it leaves by, or its beginning.
    By(String),
    /// There is no way back to the sender by the link it came by.
    Spoofed,
    Mark(u32),
    NewConnection,
    KnownConnection,
    /// One packet in so many.
    OneIn(usize),
    /// The sender is in a list and was there so many seconds ago at most.
    Recent {
        list: String,
        seconds: u32,
    },
    /// The sender is put into a list.
    Remember {
        list: String,
    },
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    Jump(String),
    Goto(String),
    Return,
    Drop,
    Refuse { tcp: bool, six: bool },
    SetMark(u32),
    ClearMark(u32),
    To(SocketAddr),
    Masquerade,
    SourceIs(IpAddr),
    NoTrack,
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(net) => write!(f, "-s {net}"),
            Self::Destination(net) => write!(f, "-d {net}"),
            Self::SourceRange(low, high) => write!(f, "-m iprange --src-range {low}-{high}"),
            Self::DestinationRange(low, high) => write!(f, "-m iprange --dst-range {low}-{high}"),
            Self::Protocol(number) => write!(f, "-p {number}"),
            Self::FromPort(protocol, port) => write!(f, "-m {} --sport {port}", name(*protocol)),
            Self::Ports(protocol, low, high) if low == high => write!(f, "-m {} --dport {low}", name(*protocol)),
            Self::Ports(protocol, low, high) => write!(f, "-m {} --dport {low}:{high}", name(*protocol)),
            Self::ToHost => f.write_str("-m addrtype --dst-type LOCAL"),
            Self::From(link) => write!(f, "-i {link}+"),
            Self::By(link) => write!(f, "-o {link}+"),
            Self::Spoofed => f.write_str("-m rpfilter --invert"),
            Self::Mark(bits) => write!(f, "-m mark --mark {bits:#x}/{bits:#x}"),
            Self::NewConnection => f.write_str("-m conntrack --ctstate NEW"),
            Self::KnownConnection => f.write_str("-m conntrack --ctstate ESTABLISHED,RELATED"),
            Self::OneIn(count) => {
                #[allow(clippy::cast_precision_loss, reason = "a Service has fewer than 2^16 endpoints")]
                let probability = 1.0 / *count as f64;
                write!(f, "-m statistic --mode random --probability {probability:.10}")
            }
            Self::Recent { list, seconds } => {
                write!(f, "-m recent --name {list} --rcheck --seconds {seconds} --reap --rsource")
            }
            Self::Remember { list } => write!(f, "-m recent --name {list} --set --rsource"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Goto(chain) => write!(f, "-g {chain}"),
            Self::Return => f.write_str("-j RETURN"),
            Self::Drop => f.write_str("-j DROP"),
            Self::Refuse { tcp: true, .. } => f.write_str("-j REJECT --reject-with tcp-reset"),
            Self::Refuse { six: false, .. } => f.write_str("-j REJECT --reject-with icmp-port-unreachable"),
            Self::Refuse { six: true, .. } => f.write_str("-j REJECT --reject-with icmp6-port-unreachable"),
            Self::SetMark(bits) => write!(f, "-j MARK --or-mark {bits:#x}"),
            Self::ClearMark(bits) => write!(f, "-j MARK --and-mark {:#x}", !bits),
            Self::To(endpoint) => write!(f, "-j DNAT --to-destination {endpoint}"),
            Self::Masquerade => f.write_str("-j MASQUERADE --random-fully"),
            Self::SourceIs(address) => write!(f, "-j SNAT --to-source {address}"),
            Self::NoTrack => f.write_str("-j CT --notrack"),
        }
    }
}

/// The name of a protocol's match.
fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

impl Rule {
    pub(crate) fn new(matches: impl IntoIterator<Item = Match>, target: Target) -> Self {
        Self { matches: matches.into_iter().collect(), target }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.matches.iter().try_for_each(|wanted| write!(f, "{wanted} "))?;
        write!(f, "{}", self.target)
    }
}

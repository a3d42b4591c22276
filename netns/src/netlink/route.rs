//! The rtnetlink messages that we send (rtnetlink(7)): links, addresses, routes, neighbours.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;

use super::{Batch, NetlinkError, Socket, find};
use crate::Family;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWQDISC: u16 = 36;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const REPLACE: u16 = 0x100;
const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET_CONF: u16 = 1;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// `IFA_F_NODAD | IFA_F_NOPREFIXROUTE`: usable at once, no route of its own.
const ADDRESS_FLAGS: u32 = 0x02 | 0x200;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTNH_F_ONLINK: u32 = 4;
/// Our mark on routes (`rtm_protocol`), not taken in iproute2's list.
pub(crate) const ROUTE_PROTOCOL: u8 = 67;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 2;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TC_H_ROOT: u32 = u32::MAX;

/// `IPV4_DEVCONF_*` of `linux/ip.h`.
#[derive(Clone, Copy)]
#[repr(u16)]
pub(crate) enum Inet4Setting {
    Forwarding = 1,
    SendRedirects = 6,
    RpFilter = 8,
    RouteLocalnet = 26,
}

/// A hardware address.
pub(crate) type Mac = [u8; 6];

/// `AF_INET` or `AF_INET6`.
pub(super) fn family_byte(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The bytes of an address in network order.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// `struct ifinfomsg`.
fn link_header(index: u32, up: bool) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        header[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
        header[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    }
    header
}

/// One end of a veth pair.
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Mac,
}

/// Makes a veth pair, both ends down as the kernel wants it: `here` with the interface index `index` in the socket's namespace, `there` in `namespace`.
pub(crate) fn add_veth(
    batch: &mut Batch,
    index: u32,
    mtu: u32,
    here: &VethEnd<'_>,
    there: &VethEnd<'_>,
    namespace: BorrowedFd<'_>,
) {
    let fd = u32::try_from(namespace.as_raw_fd()).expect("a file descriptor is not negative");
    batch.push(
        "make the pod's link",
        RTM_NEWLINK,
        REQUEST | ACK | CREATE | EXCLUSIVE,
        &link_header(index, false),
        |a| {
            a.text(IFLA_IFNAME, here.name).bytes(IFLA_ADDRESS, &here.mac).u32(IFLA_MTU, mtu);
            a.nest(IFLA_LINKINFO, |a| {
                a.text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |a| {
                    a.wrap(VETH_INFO_PEER, &link_header(0, false), |a| {
                        a.text(IFLA_IFNAME, there.name)
                            .bytes(IFLA_ADDRESS, &there.mac)
                            .u32(IFLA_MTU, mtu)
                            .u32(IFLA_NET_NS_FD, fd);
                    });
                });
            });
        },
    );
}

/// Makes a bridge without ports: a link to hold addresses, as dummy links are not in every kernel.
pub(crate) fn add_bridge(batch: &mut Batch, name: &str, mac: Mac, mtu: u32) {
    batch.push("make the node's link", RTM_NEWLINK, REQUEST | ACK | CREATE | EXCLUSIVE, &link_header(0, true), |a| {
        a.text(IFLA_IFNAME, name).bytes(IFLA_ADDRESS, &mac).u32(IFLA_MTU, mtu).nest(IFLA_LINKINFO, |a| {
            a.text(IFLA_INFO_KIND, "bridge");
        });
    });
}

/// Makes a VXLAN link that learns nothing: its peers are told by [`add_forwarding`].
pub(crate) fn add_vxlan(batch: &mut Batch, name: &str, mac: Mac, mtu: u32, vni: u32, port: u16, local: Option<IpAddr>) {
    batch.push("make the VXLAN link", RTM_NEWLINK, REQUEST | ACK | CREATE | EXCLUSIVE, &link_header(0, true), |a| {
        a.text(IFLA_IFNAME, name).bytes(IFLA_ADDRESS, &mac).u32(IFLA_MTU, mtu).nest(IFLA_LINKINFO, |a| {
            a.text(IFLA_INFO_KIND, "vxlan").nest(IFLA_INFO_DATA, |a| {
                a.u32(IFLA_VXLAN_ID, vni).bytes(IFLA_VXLAN_LEARNING, &[0]).bytes(IFLA_VXLAN_PORT, &port.to_be_bytes());
                if let Some(IpAddr::V4(local)) = local {
                    a.bytes(IFLA_VXLAN_LOCAL, &local.octets());
                }
            });
        });
    });
}

/// Makes a WireGuard link; its key and peers are set over generic netlink.
pub(crate) fn add_wireguard(batch: &mut Batch, name: &str, mtu: u32) {
    batch.push(
        "make the WireGuard link",
        RTM_NEWLINK,
        REQUEST | ACK | CREATE | EXCLUSIVE,
        &link_header(0, false),
        |a| {
            a.text(IFLA_IFNAME, name).u32(IFLA_MTU, mtu).nest(IFLA_LINKINFO, |a| {
                a.text(IFLA_INFO_KIND, "wireguard");
            });
        },
    );
}

/// Brings a link up.
pub(crate) fn set_up(batch: &mut Batch, index: u32) {
    batch.push("bring a link up", RTM_NEWLINK, REQUEST | ACK, &link_header(index, true), |_| ());
}

/// Brings a link up with IPv4 settings, those of `/proc/sys/net/ipv4/conf/LINK`.
pub(crate) fn set_inet4(batch: &mut Batch, index: u32, settings: &[(Inet4Setting, u32)]) {
    batch.push("set a link's IPv4 settings", RTM_NEWLINK, REQUEST | ACK, &link_header(index, true), |a| {
        a.nest(IFLA_AF_SPEC, |a| {
            a.nest(u16::from(family_byte(Family::V4)), |a| {
                a.nest(IFLA_INET_CONF, |a| {
                    for (setting, value) in settings {
                        a.u32(*setting as u16, *value);
                    }
                });
            });
        });
    });
}

/// Deletes a link by name; the other end of a veth goes with it.
pub(crate) fn delete_link(batch: &mut Batch, name: &str) {
    batch.push("delete a link", RTM_DELLINK, REQUEST | ACK, &link_header(0, false), |a| {
        a.text(IFLA_IFNAME, name);
    });
}

/// The group of links about to be deleted ("cora").
const DOOMED_GROUP: u32 = 0x636f_7261;

/// Puts a link into the group that [`delete_doomed`] deletes.
pub(crate) fn set_doomed(batch: &mut Batch, name: &str) {
    batch.push("give a link up", RTM_NEWLINK, REQUEST | ACK, &link_header(0, false), |a| {
        a.text(IFLA_IFNAME, name).u32(IFLA_GROUP, DOOMED_GROUP);
    });
}

/// Deletes all links given up, at once.
pub(crate) fn delete_doomed(batch: &mut Batch) {
    batch.push("delete links", RTM_DELLINK, REQUEST | ACK, &link_header(0, false), |a| {
        a.u32(IFLA_GROUP, DOOMED_GROUP);
    });
}

/// Gives a link an address with a full-length prefix: no neighbour is thought to be on the link.
pub(crate) fn add_address(batch: &mut Batch, index: u32, address: IpAddr) {
    let bytes = octets(address);
    let prefix = u8::try_from(bytes.len() * 8).expect("an address has at most 128 bits");
    let mut header = [family_byte(Family::of(address)), prefix, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    batch.push("add an address", RTM_NEWADDR, REQUEST | ACK | CREATE | REPLACE, &header, |a| {
        a.bytes(IFA_LOCAL, &bytes).bytes(IFA_ADDRESS, &bytes).u32(IFA_FLAGS, ADDRESS_FLAGS);
    });
}

/// A route of ours in the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) destination: IpNet,
    pub(crate) link: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
    /// The gateway is on the link although no route says so.
    pub(crate) onlink: bool,
    pub(crate) source: Option<IpAddr>,
}

/// Adds or replaces a route.
pub(crate) fn add_route(batch: &mut Batch, route: &Route) {
    push_route(batch, "add a route", RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, route);
}

/// Deletes a route of ours to a destination.
pub(crate) fn delete_route(batch: &mut Batch, destination: IpNet) {
    let route = Route { destination, link: None, gateway: None, onlink: false, source: None };
    push_route(batch, "delete a route", RTM_DELROUTE, REQUEST | ACK, &route);
}

fn push_route(batch: &mut Batch, step: &'static str, kind: u16, flags: u16, route: &Route) {
    let family = Family::of(route.destination.addr());
    // A scope of nowhere (255) lets a deletion match any scope.
    let scope = match (kind, route.gateway, family) {
        (RTM_DELROUTE, ..) => 255,
        (_, None, Family::V4) => RT_SCOPE_LINK,
        _ => RT_SCOPE_UNIVERSE,
    };
    let mut header = [
        family_byte(family),
        route.destination.prefix_len(),
        0,
        0,
        RT_TABLE_MAIN,
        ROUTE_PROTOCOL,
        scope,
        if kind == RTM_DELROUTE { 0 } else { RTN_UNICAST },
        0,
        0,
        0,
        0,
    ];
    if route.onlink {
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    batch.push(step, kind, flags, &header, |a| {
        if route.destination.prefix_len() > 0 {
            a.bytes(RTA_DST, &octets(route.destination.network()));
        }
        if let Some(gateway) = route.gateway {
            a.bytes(RTA_GATEWAY, &octets(gateway));
        }
        if let Some(link) = route.link {
            a.u32(RTA_OIF, link);
        }
        if let Some(source) = route.source {
            a.bytes(RTA_PREFSRC, &octets(source));
        }
    });
}

/// Tells the hardware address of a neighbour for good, so that nobody has to ask for it.
pub(crate) fn add_neighbour(batch: &mut Batch, index: u32, address: IpAddr, mac: Mac) {
    let mut header = [0; 12];
    header[0] = family_byte(Family::of(address));
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    batch.push("add a neighbour", RTM_NEWNEIGH, REQUEST | ACK | CREATE | REPLACE, &header, |a| {
        a.bytes(NDA_DST, &octets(address)).bytes(NDA_LLADDR, &mac);
    });
}

/// Tells (or forgets) the host behind which a VXLAN link finds a hardware address.
pub(crate) fn set_forwarding(batch: &mut Batch, index: u32, mac: Mac, host: IpAddr, present: bool) {
    const AF_BRIDGE: u8 = 7;
    let mut header = [0; 12];
    header[0] = AF_BRIDGE;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    header[10] = NTF_SELF;
    let (kind, flags) =
        if present { (RTM_NEWNEIGH, REQUEST | ACK | CREATE | REPLACE) } else { (RTM_DELNEIGH, REQUEST | ACK) };
    batch.push("set a VXLAN peer", kind, flags, &header, |a| {
        a.bytes(NDA_DST, &octets(host)).bytes(NDA_LLADDR, &mac);
    });
}

/// Limits what a link sends with a token bucket (tc-tbf(8)): `rate` bytes a second, `burst` bytes at once.
pub(crate) fn add_token_bucket(batch: &mut Batch, index: u32, rate: u64, burst: u32) {
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_RATE64: u16 = 4;
    const TCA_TBF_BURST: u16 = 6;
    /// Longest a packet waits in the queue.
    const LATENCY_MS: u64 = 25;
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[12..16].copy_from_slice(&TC_H_ROOT.to_ne_bytes());
    let capped = u32::try_from(rate).unwrap_or(u32::MAX);
    let limit = u32::try_from(rate * LATENCY_MS / 1000).unwrap_or(u32::MAX).saturating_add(burst);
    // struct tc_tbf_qopt: rate, peak rate (struct tc_ratespec each), limit, buffer, mtu. The kernel takes buffer as time in ticks of 64 ns, which
    // the burst in bytes (TCA_TBF_BURST) replaces.
    let mut options = [0; 36];
    options[1] = 1; // TC_LINKLAYER_ETHERNET
    options[8..12].copy_from_slice(&capped.to_ne_bytes());
    options[24..28].copy_from_slice(&limit.to_ne_bytes());
    batch.push("limit a link's bandwidth", RTM_NEWQDISC, REQUEST | ACK | CREATE | REPLACE, &header, |a| {
        a.text(TCA_KIND, "tbf").nest(TCA_OPTIONS, |a| {
            a.bytes(TCA_TBF_PARMS, &options).u32(TCA_TBF_BURST, burst);
            if rate > u64::from(u32::MAX) {
                a.bytes(TCA_TBF_RATE64, &rate.to_ne_bytes());
            }
        });
    });
}

/// A link as the kernel tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mtu: u32,
    pub(crate) mac: Option<Mac>,
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let attributes = payload.get(16..)?;
    let name = find(attributes, IFLA_IFNAME)?;
    Some(Link {
        index: number(payload, 4)?,
        name: String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned(),
        mtu: find(attributes, IFLA_MTU).and_then(|value| number(value, 0)).unwrap_or_default(),
        mac: find(attributes, IFLA_ADDRESS).and_then(|value| value.try_into().ok()),
    })
}

/// The link of a name.
pub(crate) fn link_by_name(socket: &mut Socket, name: &str) -> Result<Link, NetlinkError> {
    let mut batch = Batch::default();
    batch.push("find a link", RTM_GETLINK, REQUEST | ACK, &link_header(0, false), |a| {
        a.text(IFLA_IFNAME, name);
    });
    let mut found = None;
    socket.request(&batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            found = parse_link(payload);
        }
    })?;
    found.ok_or(NetlinkError::Refused { step: "find a link", errno: nix::errno::Errno::ENODEV })
}

/// Whether a link sends: up, with a carrier, its queue in place (`IF_OPER_UP`). Since Linux 6.9 the question itself makes the kernel put the queue in place
/// if the carrier has come; before, it takes its own short time.
pub(crate) fn is_operational(socket: &mut Socket, index: u32) -> Result<bool, NetlinkError> {
    const IF_OPER_UP: u8 = 6;
    let mut batch = Batch::default();
    batch.push("ask for a link's state", RTM_GETLINK, REQUEST | ACK, &link_header(index, false), |_| ());
    let mut up = false;
    socket.request(&batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            up = payload.get(16..).and_then(|attributes| find(attributes, IFLA_OPERSTATE)) == Some(&[IF_OPER_UP]);
        }
    })?;
    Ok(up)
}

/// The name of the link that an event says is up, with a carrier.
pub(crate) fn came_up(kind: u16, payload: &[u8]) -> Option<String> {
    const IFF_LOWER_UP: u32 = 1 << 16;
    let wanted = IFF_UP | IFF_LOWER_UP;
    let up = kind == RTM_NEWLINK && number(payload, 8)? & wanted == wanted;
    up.then(|| parse_link(payload)).flatten().map(|link| link.name)
}

/// All links of the namespace.
pub(crate) fn links(socket: &mut Socket) -> Result<Vec<Link>, NetlinkError> {
    let mut batch = Batch::default();
    batch.push("list the links", RTM_GETLINK, REQUEST | DUMP, &link_header(0, false), |_| ());
    let mut all = Vec::new();
    socket.request(&batch, |kind, payload| {
        if kind == RTM_NEWLINK {
            all.extend(parse_link(payload));
        }
    })?;
    Ok(all)
}

/// A route of the main table as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KnownRoute {
    pub(crate) protocol: u8,
    pub(crate) route: Route,
}

fn parse_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

fn parse_route(payload: &[u8]) -> Option<KnownRoute> {
    let header = payload.get(..12)?;
    let family = match header[0] {
        2 => Family::V4,
        10 => Family::V6,
        _ => return None,
    };
    let attributes = &payload[12..];
    let table = find(attributes, RTA_TABLE).and_then(|value| number(value, 0)).unwrap_or(u32::from(header[4]));
    if table != u32::from(RT_TABLE_MAIN) || header[7] != RTN_UNICAST {
        return None;
    }
    let address = |kind| find(attributes, kind).and_then(parse_address);
    let destination = address(RTA_DST).unwrap_or(family.unspecified());
    Some(KnownRoute {
        protocol: header[5],
        route: Route {
            destination: IpNet::new(destination, header[1]).ok()?,
            link: find(attributes, RTA_OIF).and_then(|value| number(value, 0)),
            gateway: address(RTA_GATEWAY),
            onlink: number(header, 8)? & RTNH_F_ONLINK != 0,
            source: address(RTA_PREFSRC),
        },
    })
}

/// The routes of the main table of a family.
pub(crate) fn routes(socket: &mut Socket, family: Family) -> Result<Vec<KnownRoute>, NetlinkError> {
    let mut header = [0; 12];
    header[0] = family_byte(family);
    let mut batch = Batch::default();
    batch.push("list the routes", RTM_GETROUTE, REQUEST | DUMP, &header, |_| ());
    let mut all = Vec::new();
    socket.request(&batch, |kind, payload| {
        if kind == RTM_NEWROUTE {
            all.extend(parse_route(payload));
        }
    })?;
    Ok(all)
}

/// Reads the messages of a datagram as whatever they may be, for fuzzers.
pub(crate) fn parse_any(bytes: &[u8]) {
    for message in super::messages(bytes) {
        parse_link(message.payload);
        parse_route(message.payload);
    }
}

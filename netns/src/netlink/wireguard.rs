//! WireGuard devices over generic netlink (`linux/wireguard.h`): our key, the peers, and which addresses are behind each.

use std::net::SocketAddr;

use ipnet::IpNet;

use super::route::{family_byte, octets};
use super::{Batch, NetlinkError, Socket, attributes, find};
use crate::Family;

/// A public or private key.
pub(crate) type Key = [u8; 32];

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

/// The family that knows the numbers of the others (`linux/genetlink.h`).
const CONTROL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// Bytes of `struct genlmsghdr`.
const HEADER_BYTES: usize = 4;

const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;
const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;
const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// The WireGuard part of the kernel, in the network namespace of the thread that opened it.
pub(crate) struct WireGuard {
    socket: Socket,
    family: u16,
}

/// A device as the kernel tells it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) public: Key,
    pub(crate) peers: Vec<Key>,
}

/// `struct genlmsghdr`.
fn header(command: u8) -> [u8; HEADER_BYTES] {
    [command, 1, 0, 0]
}

impl WireGuard {
    /// Fails where the kernel has no WireGuard.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::generic()?;
        let mut batch = Batch::default();
        batch.push("find WireGuard in the kernel", CONTROL, REQUEST | ACK, &header(CTRL_CMD_GETFAMILY), |a| {
            a.text(CTRL_ATTR_FAMILY_NAME, "wireguard");
        });
        let mut family = None;
        socket.request(&batch, |_, payload| {
            let id = payload.get(HEADER_BYTES..).and_then(|attributes| find(attributes, CTRL_ATTR_FAMILY_ID));
            family = id.and_then(|id| Some(u16::from_ne_bytes(id.try_into().ok()?))).or(family);
        })?;
        let family = family.ok_or(NetlinkError::Refused {
            step: "find WireGuard in the kernel",
            errno: nix::errno::Errno::EOPNOTSUPP,
        })?;
        Ok(Self { socket, family })
    }

    /// Gives a device its key and port; peers stay.
    pub(crate) fn set_key(&mut self, link: u32, private: &Key, port: u16) -> Result<(), NetlinkError> {
        let mut batch = Batch::default();
        batch.push("set a WireGuard key", self.family, REQUEST | ACK, &header(WG_CMD_SET_DEVICE), |a| {
            a.u32(WGDEVICE_A_IFINDEX, link).bytes(WGDEVICE_A_PRIVATE_KEY, private);
            a.bytes(WGDEVICE_A_LISTEN_PORT, &port.to_ne_bytes());
        });
        self.socket.execute(&batch)
    }

    /// Tells where a peer is and which addresses are behind it; another peer that had one of them has it no longer.
    pub(crate) fn set_peer(
        &mut self,
        link: u32,
        peer: &Key,
        endpoint: SocketAddr,
        behind: &[IpNet],
    ) -> Result<(), NetlinkError> {
        self.change_peer("set a WireGuard peer", link, peer, WGPEER_F_REPLACE_ALLOWEDIPS, |a| {
            a.bytes(WGPEER_A_ENDPOINT, &socket_address(endpoint)).nest(WGPEER_A_ALLOWEDIPS, |a| {
                for net in behind {
                    a.nest(0, |a| {
                        let family = u16::from(family_byte(Family::of(net.addr())));
                        a.bytes(WGALLOWEDIP_A_FAMILY, &family.to_ne_bytes());
                        a.bytes(WGALLOWEDIP_A_IPADDR, &octets(net.network()));
                        a.bytes(WGALLOWEDIP_A_CIDR_MASK, &[net.prefix_len()]);
                    });
                }
            });
        })
    }

    /// Forgets a peer; one that is not there is no error.
    pub(crate) fn remove_peer(&mut self, link: u32, peer: &Key) -> Result<(), NetlinkError> {
        self.change_peer("remove a WireGuard peer", link, peer, WGPEER_F_REMOVE_ME, |_| ())
    }

    fn change_peer(
        &mut self,
        step: &'static str,
        link: u32,
        peer: &Key,
        flags: u32,
        fill: impl FnOnce(&mut super::Attributes<'_>),
    ) -> Result<(), NetlinkError> {
        let mut batch = Batch::default();
        batch.push(step, self.family, REQUEST | ACK, &header(WG_CMD_SET_DEVICE), |a| {
            a.u32(WGDEVICE_A_IFINDEX, link).nest(WGDEVICE_A_PEERS, |a| {
                a.nest(0, |a| {
                    a.bytes(WGPEER_A_PUBLIC_KEY, peer).u32(WGPEER_A_FLAGS, flags);
                    fill(a);
                });
            });
        });
        self.socket.execute(&batch)
    }

    /// A device's public key and peers.
    pub(crate) fn device(&mut self, link: u32) -> Result<Device, NetlinkError> {
        let mut batch = Batch::default();
        batch.push("read a WireGuard device", self.family, REQUEST | ACK | DUMP, &header(WG_CMD_GET_DEVICE), |a| {
            a.u32(WGDEVICE_A_IFINDEX, link);
        });
        let mut device = Device::default();
        self.socket.request(&batch, |_, payload| parse(payload, &mut device))?;
        Ok(device)
    }
}

/// Adds what a message says of a device; one with many peers comes in several.
fn parse(payload: &[u8], device: &mut Device) {
    let Some(of_device) = payload.get(HEADER_BYTES..) else { return };
    if let Some(public) = find(of_device, WGDEVICE_A_PUBLIC_KEY).and_then(|key| key.try_into().ok()) {
        device.public = public;
    }
    let peers = attributes(find(of_device, WGDEVICE_A_PEERS).unwrap_or_default());
    let keys = peers.filter_map(|(_, peer)| find(peer, WGPEER_A_PUBLIC_KEY)?.try_into().ok());
    // A peer whose addresses fill a message is continued in the next under its key.
    for key in keys {
        if device.peers.last() != Some(&key) {
            device.peers.push(key);
        }
    }
}

/// `struct sockaddr_in` or `struct sockaddr_in6`.
fn socket_address(address: SocketAddr) -> Vec<u8> {
    let mut bytes = u16::from(family_byte(Family::of(address.ip()))).to_ne_bytes().to_vec();
    bytes.extend(address.port().to_be_bytes());
    // The flow comes before an address of version 6, and padding or the scope after.
    bytes.extend(vec![0; if address.is_ipv6() { 4 } else { 0 }]);
    bytes.extend(octets(address.ip()));
    bytes.extend(vec![0; if address.is_ipv6() { 4 } else { 8 }]);
    bytes
}

/// Reads a message as whatever it may be, for fuzzers.
pub(crate) fn parse_any(bytes: &[u8]) {
    super::messages(bytes).for_each(|message| parse(message.payload, &mut Device::default()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_kernels_layout() {
        let bytes = |text: &str| socket_address(text.parse().expect("an address"));
        assert_eq!(bytes("192.0.2.1:258"), [2, 0, 1, 2, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        let six = bytes("[fd00::1]:258");
        assert_eq!((six.len(), &six[..10], six[23]), (28, &[10, 0, 1, 2, 0, 0, 0, 0, 0xfd, 0][..], 1));
    }

    #[test]
    fn a_device_is_read_from_several_messages() {
        let message = |peers: &[Key]| {
            let mut batch = Batch::default();
            batch.push("test", 99, 0, &header(0), |a| {
                a.bytes(WGDEVICE_A_PUBLIC_KEY, &[7; 32]).nest(WGDEVICE_A_PEERS, |a| {
                    for peer in peers {
                        a.nest(0, |a| {
                            a.bytes(WGPEER_A_PUBLIC_KEY, peer);
                        });
                    }
                });
            });
            batch.bytes
        };
        let mut device = Device::default();
        for bytes in [message(&[[1; 32], [2; 32]]), message(&[[2; 32], [3; 32]])] {
            super::super::messages(&bytes).for_each(|message| parse(message.payload, &mut device));
        }
        assert_eq!(device, Device { public: [7; 32], peers: vec![[1; 32], [2; 32], [3; 32]] });
    }
}

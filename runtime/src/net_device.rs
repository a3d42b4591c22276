//! `linux.netDevices`: interfaces of the runtime's network namespace that move into the container's, with the addresses
//! that somebody gave them for good (netlink messages of rtnetlink(7)).

use crate::error::{Error, Result, Step, StepResult};
use coracle_sys::{Errno, namespace};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// An interface to move: its name here and the one it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetDevice {
    pub name: CString,
    pub new_name: CString,
}

/// Names of the kernel end before this many bytes.
const NAME_BYTES: usize = 16;
/// One answer of the kernel; a dump comes in as many as it needs.
const ANSWER_BYTES: usize = 32 * 1024;
/// An interface with more addresses than this is refused.
const MAX_ADDRESSES: usize = 4096;

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE_EXCL: u16 = 0x600;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_FLAGS: u16 = 8;
const IFA_F_PERMANENT: u32 = 0x80;
/// `struct ifaddrmsg` and `struct ifinfomsg`.
const ADDRESS_BYTES: usize = 8;
const LINK_BYTES: usize = 16;

impl NetDevice {
    pub(crate) fn new(name: &str, new_name: Option<&str>) -> Result<Self> {
        let field = format!("linux.netDevices.{name}");
        let check = |text: &str| {
            let fits = !text.is_empty()
                && text.len() < NAME_BYTES
                && ![".", ".."].contains(&text)
                && !text.contains(['/', ':', '%'])
                && !text.contains(char::is_whitespace);
            if fits {
                crate::plan::c_string(&field, text)
            } else {
                Err(Error::config(&field, format!("{text:?} is not the name of an interface")))
            }
        };
        let new_name = new_name.filter(|text| !text.is_empty()).unwrap_or(name);
        Ok(Self { name: check(name)?, new_name: check(new_name)? })
    }
}

/// Moves all of them into the network namespace behind `target`.
pub(crate) fn move_all(devices: &[NetDevice], target: BorrowedFd<'_>) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let here = open()?;
    let there = within(target, open)??;
    devices.iter().try_for_each(|device| move_one(device, target, &here, &there))
}

fn move_one(device: &NetDevice, target: BorrowedFd<'_>, here: &OwnedFd, there: &OwnedFd) -> Result<()> {
    let (name, new_name) = (device.name.to_string_lossy(), device.new_name.to_string_lossy());
    let index = index(here, &device.name).step(Step::NetDevice, &name)?;
    let addresses = addresses(here, index).step(Step::NetDevice, &name)?;
    let mut request = link(index, 0);
    attribute(&mut request, IFLA_NET_NS_FD, &target.as_raw_fd().to_ne_bytes());
    attribute(&mut request, IFLA_IFNAME, device.new_name.to_bytes_with_nul());
    ask(here, RTM_NEWLINK, NLM_F_ACK, &request, |_, _| {}).step(Step::NetDevice, &name)?;
    let index = self::index(there, &device.new_name).step(Step::NetDevice, &new_name)?;
    for mut address in addresses {
        address[4..8].copy_from_slice(&index.to_ne_bytes());
        match ask(there, RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE_EXCL, &address, |_, _| {}) {
            Err(Errno::EEXIST) => {}
            other => other.step(Step::NetDevice, format!("{new_name} (its addresses)"))?,
        }
    }
    ask(there, RTM_NEWLINK, NLM_F_ACK, &link(index, libc::IFF_UP as u32), |_, _| {}).step(Step::NetDevice, &new_name)
}

/// Runs `work` in another network namespace and comes back.
fn within<T>(target: BorrowedFd<'_>, work: impl FnOnce() -> T) -> Result<T> {
    let own = coracle_sys::path::open(c"/proc/thread-self/ns/net", libc::O_RDONLY)
        .step(Step::OpenNamespace, "net of the runtime itself")?;
    namespace::setns(target, libc::CLONE_NEWNET).step(Step::JoinNamespace, "net")?;
    let done = work();
    namespace::setns(own.as_fd(), libc::CLONE_NEWNET).step(Step::JoinNamespace, "net of the runtime itself")?;
    Ok(done)
}

fn open() -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
        .step(Step::NetDevice, "(a netlink socket)")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).step(Step::NetDevice, "(a netlink socket)")?;
    Ok(socket)
}

fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut bytes = vec![0; LINK_BYTES];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(((value.len() + 4) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The attributes behind a message's fixed part.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn index(socket: &OwnedFd, name: &CString) -> coracle_sys::Result<u32> {
    let mut request = link(0, 0);
    attribute(&mut request, IFLA_IFNAME, name.to_bytes_with_nul());
    let mut found = 0;
    ask(socket, RTM_GETLINK, NLM_F_ACK, &request, |kind, body| {
        if let (RTM_NEWLINK, Some(index)) = (kind, body.get(4..8)) {
            found = u32::from_ne_bytes(index.try_into().unwrap_or_default());
        }
    })?;
    if found == 0 { Err(Errno::ENODEV) } else { Ok(found) }
}

/// The lasting addresses that reach beyond the link, as the requests that make them anew.
fn addresses(socket: &OwnedFd, index: u32) -> coracle_sys::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    ask(socket, RTM_GETADDR, NLM_F_DUMP, &[0; ADDRESS_BYTES], |kind, body| {
        let Some(fixed) = body.get(..ADDRESS_BYTES).filter(|_| kind == RTM_NEWADDR) else { return };
        let mut flags = u32::from(fixed[2]);
        let mut request = fixed.to_vec();
        for (kind, value) in attributes(&body[ADDRESS_BYTES..]) {
            match kind {
                IFA_FLAGS => flags = value.try_into().map_or(flags, u32::from_ne_bytes),
                // Address, local address, broadcast; labels carry the old name, the rest is what the kernel found out.
                1 | 2 | 4 => attribute(&mut request, kind, value),
                _ => {}
            }
        }
        let global = fixed[3] == libc::RT_SCOPE_UNIVERSE;
        if fixed[4..8] == index.to_ne_bytes() && global && flags & IFA_F_PERMANENT != 0 {
            found.push(request);
        }
    })?;
    if found.len() > MAX_ADDRESSES { Err(Errno::E2BIG) } else { Ok(found) }
}

/// Sends one request and hands every answer to `take`, until the kernel says that it is done.
fn ask(
    socket: &OwnedFd,
    kind: u16,
    flags: u16,
    body: &[u8],
    mut take: impl FnMut(u16, &[u8]),
) -> coracle_sys::Result<()> {
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= HEADER_BYTES {
            let size = rest[..4].try_into().map_or(0, u32::from_ne_bytes) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            let body = rest.get(HEADER_BYTES..size).ok_or(Errno::EBADMSG)?;
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
                    return if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) };
                }
                _ => take(kind, body),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_interfaces() {
        assert!(NetDevice::new("eth1", None).is_ok_and(|device| device.new_name == device.name));
        assert!(NetDevice::new("eth1", Some("data0")).is_ok());
        for (name, new) in [("", None), ("a/b", None), ("eth1", Some("sixteen-letters-")), ("eth1", Some("a b"))] {
            assert!(NetDevice::new(name, new).is_err(), "{name:?} {new:?}");
        }
    }

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let mut bytes = Vec::new();
        attribute(&mut bytes, 3, b"eth0\0");
        attribute(&mut bytes, 28, &7_u32.to_ne_bytes());
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (28, &7_u32.to_ne_bytes()[..])]);
        assert_eq!(attributes(&[9, 0, 1, 0, 5]).count(), 0, "one that ends too early is none");
    }
}

//! Netlink, spoken directly: several messages a send, every answer read (netlink(7), `Documentation/userspace-api/netlink`).

mod message;
pub(crate) mod route;
mod socket;
pub(crate) mod wireguard;

pub(crate) use message::{Attributes, Batch, attributes, find, messages};
pub use socket::NetlinkError;
pub(crate) use socket::{LinkEvents, Socket};

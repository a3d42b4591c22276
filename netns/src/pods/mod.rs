//! Pods' networks: addresses, namespaces, links; what is on record and what the kernel has are kept the same.

mod identity;
mod ipam;
mod link;
mod namespace;
mod pod;
mod record;

pub(crate) use identity::{check_uid, host_link, mac};
pub(crate) use ipam::Addresses;
pub use ipam::IpamError;
pub(crate) use link::{Host, host_links, make, remove, remove_links};
pub(crate) use namespace::{enter, unpin};
pub use pod::{HostPort, PodKey, PodNet, PodNetwork};
pub(crate) use record::{Record, Records};

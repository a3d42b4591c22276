//! Address arithmetic.

use std::net::IpAddr;

/// First usable address of a range such as `10.43.0.0/16`: the service `kubernetes` has it.
pub(crate) fn first_address(cidr: &str) -> Option<IpAddr> {
    match cidr.split(',').next()?.split_once('/')?.0.parse().ok()? {
        IpAddr::V4(base) => Some(std::net::Ipv4Addr::from(u32::from(base).checked_add(1)?).into()),
        IpAddr::V6(base) => Some(std::net::Ipv6Addr::from(u128::from(base).checked_add(1)?).into()),
    }
}

//! Address arithmetic.

use std::net::IpAddr;

/// First usable address of a range such as `10.43.0.0/16`: the service `kubernetes` has it.
pub(crate) fn first_address(cidr: &str) -> Option<IpAddr> {
    match cidr.split(',').next()?.split_once('/')?.0.parse().ok()? {
        IpAddr::V4(base) => Some(std::net::Ipv4Addr::from(u32::from(base).checked_add(1)?).into()),
        IpAddr::V6(base) => Some(std::net::Ipv6Addr::from(u128::from(base).checked_add(1)?).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_follows_the_network() {
        assert_eq!(first_address("10.43.0.0/16"), "10.43.0.1".parse().ok());
        assert_eq!(first_address("fd00:43::/112,10.43.0.0/16"), "fd00:43::1".parse().ok());
    }
}

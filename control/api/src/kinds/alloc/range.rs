//! Ranges of service addresses.

use std::net::IpAddr;

use ipnet::IpNet;

/// A range such as `10.43.0.0/16` or `fd00:43::/112`: the addresses of it that services may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Range {
    net: IpNet,
    first: u128,
    size: u128,
}

impl Range {
    /// `None` where the text is no range, or one without an address to give: the first of a network is its own, and in
    /// IPv4 the last is for broadcasts.
    pub(super) fn parse(cidr: &str) -> Option<Self> {
        let net: IpNet = cidr.trim().parse().ok()?;
        let (first, last) = (number(net.network()), number(net.broadcast()));
        let last = if is_v6(net.addr()) { last } else { last.saturating_sub(1) };
        let size = last.checked_sub(first).filter(|size| *size > 0)?;
        Some(Self { net, first: first + 1, size })
    }

    /// Whether services may have this address.
    pub(super) fn contains(self, ip: IpAddr) -> bool {
        is_v6(ip) == self.is_v6() && (self.first..self.first + self.size).contains(&number(ip))
    }

    pub(super) fn is_v6(self) -> bool {
        is_v6(self.net.addr())
    }

    /// All its addresses, from a place in the upper part on that `random`, a number below 1, tells. The lower part comes
    /// last: people choose addresses of it by number (KEP-3070).
    pub(super) fn addresses(self, random: f64) -> impl Iterator<Item = IpAddr> {
        let low = if self.size <= 16 { 0 } else { (self.size / 16).clamp(16, 256) };
        let upper = self.size - low;
        // Any place will do, so the precision of a float does.
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a place"
        )]
        let start = ((upper as f64 * random) as u128).min(upper - 1);
        let offsets = (start..upper).chain(0..start).map(move |place| low + place).chain(0..low);
        offsets.map(move |offset| self.at(offset))
    }

    fn at(self, offset: u128) -> IpAddr {
        let number = self.first + offset;
        match u32::try_from(number) {
            Ok(number) if !self.is_v6() => IpAddr::V4(number.into()),
            _ => IpAddr::V6(number.into()),
        }
    }
}

fn is_v6(ip: IpAddr) -> bool {
    ip.is_ipv6()
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn range(text: &str) -> Range {
        Range::parse(text).expect("a range")
    }

    #[test]
    fn ranges_leave_network_and_broadcast_out() {
        let has = |cidr: &str, ip: &str| range(cidr).contains(ip.parse().expect("an address"));
        assert!(!has("10.43.0.0/16", "10.43.0.0") && !has("10.43.0.0/16", "10.43.255.255"));
        assert!(has("10.43.0.0/16", "10.43.0.1") && has("10.43.0.0/16", "10.43.255.254"));
        assert!(!has("fd00::/112", "fd00::") && has("fd00::/112", "fd00::ffff") && !has("fd00::/112", "::1"));
        for none in ["10.0.0.0/33", "10.0.0.0/31", "10.0.0.1/32", "fd00::/128", "x"] {
            assert_eq!(Range::parse(none), None, "{none}");
        }
    }

    #[test]
    fn the_lower_part_is_given_last() {
        let first = |text: &str, random| range(text).addresses(random).next().map(|ip| ip.to_string());
        assert_eq!(first("10.43.0.0/16", 0.0).as_deref(), Some("10.43.1.1"));
        assert_eq!(first("10.43.0.0/28", 0.0).as_deref(), Some("10.43.0.1"));
        assert_eq!(first("fd00::/64", 0.0).as_deref(), Some("fd00::101"));
    }

    proptest! {
        #[test]
        fn every_address_is_offered_once(length in 20_u8..31, random in 0.0..1.0) {
            let range = range(&format!("10.0.0.0/{length}"));
            let all: Vec<IpAddr> = range.addresses(random).collect();
            prop_assert!(all.iter().all(|ip| range.contains(*ip)));
            prop_assert_eq!(all.len() as u128, range.size);
            prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        }
    }
}

//! Which addresses of the node's pod range are taken. Pure: the records of pods are what survives.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;

/// Addresses of an IPv6 range that are given out: as many as fit into an IPv4 /12, more than a node has pods by far.
const RANGE_MAX_ADDRESSES: u128 = 1 << 20;
/// The first address that pods get: 0 is the network, 1 the node.
const FIRST: u128 = 2;

/// An address cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// All are taken.
    #[error("no address is left in the pod range {0}: give the node a larger range")]
    Full(IpNet),
    /// The range has no room for a pod at all.
    #[error("the pod range {0} is too small: it needs at least 4 addresses")]
    TooSmall(IpNet),
}

/// The addresses of one range. They are given out going up and around, so that an address freed a moment ago, which peers may still talk to, is
/// the last to be given again.
#[derive(Debug)]
pub(crate) struct Addresses {
    range: IpNet,
    /// Places after the last, which for IPv4 is the broadcast address.
    end: u128,
    next: u128,
    taken: HashSet<IpAddr>,
}

impl Addresses {
    /// The range with what is on record; the next address follows the highest taken one.
    pub(crate) fn new(range: IpNet, taken: impl IntoIterator<Item = IpAddr>) -> Result<Self, IpamError> {
        let bits = u32::from(range.max_prefix_len() - range.prefix_len());
        let size = 1_u128.checked_shl(bits).unwrap_or(u128::MAX).min(RANGE_MAX_ADDRESSES);
        let end = size - 1;
        if end <= FIRST {
            return Err(IpamError::TooSmall(range));
        }
        let taken: HashSet<IpAddr> = taken.into_iter().filter(|address| range.contains(address)).collect();
        let mut this = Self { range, end, next: FIRST, taken };
        this.next = this.taken.iter().filter_map(|address| this.place(*address)).max().map_or(FIRST, |place| place + 1);
        Ok(this)
    }

    /// Takes a free address.
    pub(crate) fn take(&mut self) -> Result<IpAddr, IpamError> {
        let count = self.end - FIRST;
        let start = if (FIRST..self.end).contains(&self.next) { self.next } else { FIRST };
        // At most one more than are taken need to be looked at.
        let tries = count.min(self.taken.len() as u128 + 1);
        let free = (0..tries)
            .map(|step| FIRST + (start - FIRST + step) % count)
            .find(|place| !self.taken.contains(&self.address(*place)));
        let place = free.ok_or(IpamError::Full(self.range))?;
        let address = self.address(place);
        self.next = place + 1;
        self.taken.insert(address);
        Ok(address)
    }

    /// Gives an address back.
    pub(crate) fn release(&mut self, address: IpAddr) {
        self.taken.remove(&address);
    }

    fn address(&self, place: u128) -> IpAddr {
        match self.range.network() {
            IpAddr::V4(base) => {
                let offset = u32::try_from(place).expect("a place is below 2^20");
                IpAddr::V4((u32::from(base) + offset).into())
            }
            IpAddr::V6(base) => IpAddr::V6((u128::from(base) + place).into()),
        }
    }

    fn place(&self, address: IpAddr) -> Option<u128> {
        match (address, self.range.network()) {
            (IpAddr::V4(address), IpAddr::V4(base)) => u32::from(address).checked_sub(u32::from(base)).map(u128::from),
            (IpAddr::V6(address), IpAddr::V6(base)) => u128::from(address).checked_sub(u128::from(base)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_freed_address_is_the_last_to_return() {
        let mut addresses = Addresses::new("10.42.0.0/29".parse().unwrap(), []).unwrap();
        let first: Vec<IpAddr> = (0..2).map(|_| addresses.take().unwrap()).collect();
        assert_eq!(first, ["10.42.0.2".parse::<IpAddr>().unwrap(), "10.42.0.3".parse().unwrap()]);
        addresses.release(first[0]);
        let rest: Vec<String> = (0..4).map(|_| addresses.take().unwrap().to_string()).collect();
        assert_eq!(rest, ["10.42.0.4", "10.42.0.5", "10.42.0.6", "10.42.0.2"]);
        assert_eq!(addresses.take(), Err(IpamError::Full("10.42.0.0/29".parse().unwrap())));
    }

    #[test]
    fn ranges_without_room_are_refused() {
        for range in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/128"] {
            assert!(Addresses::new(range.parse().unwrap(), []).is_err(), "{range}");
        }
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice(ops in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..400), six in any::<bool>()) {
            let range: IpNet = if six { "fd00:42::/122" } else { "10.42.7.0/26" }.parse().unwrap();
            let mut addresses = Addresses::new(range, []).unwrap();
            let mut model: Vec<IpAddr> = Vec::new();
            for (take, index) in ops {
                if take {
                    match addresses.take() {
                        Ok(address) => {
                            prop_assert!(range.hosts().any(|host| host == address) && !model.contains(&address));
                            prop_assert_ne!(Some(address), range.hosts().next());
                            model.push(address);
                        }
                        Err(_) => prop_assert_eq!(model.len(), 61),
                    }
                } else if !model.is_empty() {
                    addresses.release(model.swap_remove(index.index(model.len())));
                }
                // What a restart would know is the same.
                let again = Addresses::new(range, model.iter().copied()).unwrap();
                prop_assert_eq!(&again.taken, &addresses.taken);
            }
        }
    }
}

//! Names and hardware addresses of a pod's links, derived from its UID: the same pod always gets the same, so nothing is made twice.

use crate::netlink::route::Mac;

/// Characters of a link's name after the prefix; 36^11 is 2^56.8.
const NAME_CHARS: usize = 11;
/// Longest UID: that of a file name, with room.
const UID_MAX_BYTES: usize = 128;

/// FNV-1a of 64 bits: spread is all that is asked of it; a clash is an error at link creation, not a mix-up.
fn hash(seed: u8, text: &str) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    std::iter::once(seed).chain(text.bytes()).fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// Whether a UID is fit to be a file name.
pub(crate) fn check_uid(uid: &str) -> bool {
    !uid.is_empty()
        && uid.len() <= UID_MAX_BYTES
        && !uid.starts_with('.')
        && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

/// The name of the host's end of a pod's link.
pub(crate) fn host_link(prefix: &str, uid: &str) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut rest = hash(0, uid);
    let digits = (0..NAME_CHARS).map(|_| {
        let digit = DIGITS[usize::try_from(rest % 36).expect("less than 36")];
        rest /= 36;
        char::from(digit)
    });
    prefix.chars().chain(digits).collect()
}

/// A locally administered unicast hardware address; `end` tells the two ends of a link apart.
pub(crate) fn mac(end: u8, uid: &str) -> Mac {
    let bytes = hash(end, uid).to_be_bytes();
    [(bytes[2] & 0xfc) | 0x02, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let uids: Vec<String> = (0..20_000).map(|n| format!("a0b1c2d3-0000-4000-8000-{n:012}")).collect();
        let names: HashSet<String> = uids.iter().map(|uid| host_link("cor", uid)).collect();
        assert_eq!(names.len(), uids.len());
        assert!(names.iter().all(|name| name.len() < 16));
        assert!(uids.iter().all(|uid| mac(1, uid) != mac(2, uid) && mac(1, uid)[0] & 3 == 2));
    }

    #[test]
    fn uids_that_are_no_file_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a\0b", "ä", &"x".repeat(129)] {
            assert!(!check_uid(bad), "{bad:?}");
        }
        assert!(check_uid("a0b1c2d3-0000-4000-8000-000000000001"));
    }
}

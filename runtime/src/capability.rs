//! Capability sets of the specification as the kernel's bit sets.

use coracle_sys::identity::Capabilities;
use oci_spec::runtime::{Capability, LinuxCapabilities};

/// Names in the order of their numbers (linux/capability.h), without `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Every capability by name with the prefix, for `features`.
pub fn names() -> impl Iterator<Item = String> {
    NAMES.iter().map(|name| format!("CAP_{name}"))
}

/// The number of a capability from its name, with or without `CAP_`, in any case.
pub fn number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|known| *known == bare).map(|position| position as u32)
}

/// Ambient capabilities that the kernel would refuse.
pub fn left_out(wanted: Option<&LinuxCapabilities>) -> Vec<String> {
    let Some(wanted) = wanted else { return Vec::new() };
    let has =
        |set: &Option<std::collections::HashSet<Capability>>, one| set.as_ref().is_some_and(|set| set.contains(one));
    let mut names: Vec<String> = wanted
        .ambient()
        .iter()
        .flatten()
        .filter(|one| !has(wanted.permitted(), one) || !has(wanted.inheritable(), one))
        .map(|one| format!("CAP_{one}"))
        .collect();
    names.sort();
    names
}

/// The kernel's sets. What the host's kernel or this process cannot give is left out, as the specification asks
/// ("must not fail"): a set never contains more than `available`.
pub(crate) fn sets(wanted: Option<&LinuxCapabilities>, available: u64) -> Capabilities {
    let Some(wanted) = wanted else { return Capabilities::default() };
    let bits = |set: &Option<std::collections::HashSet<Capability>>| {
        set.iter()
            .flatten()
            .filter_map(|capability| number(&capability.to_string()))
            .fold(0_u64, |bits, number| bits | 1 << number)
            & available
    };
    let permitted = bits(wanted.permitted());
    let inheritable = bits(wanted.inheritable());
    Capabilities {
        bounding: bits(wanted.bounding()),
        effective: bits(wanted.effective()) & permitted,
        permitted,
        inheritable,
        // The kernel refuses an ambient capability that is not permitted and inheritable.
        ambient: bits(wanted.ambient()) & permitted & inheritable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_with_the_kernel() {
        assert_eq!(number("CAP_CHOWN"), Some(0));
        assert_eq!(number("cap_sys_admin"), Some(21));
        assert_eq!(number("CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(number("CAP_NOTHING"), None);
        assert_eq!(Capability::SysTtyConfig.to_string(), "SYS_TTY_CONFIG");
    }

    #[test]
    fn ambient_is_kept_within_permitted_and_inheritable() {
        let wanted: LinuxCapabilities = serde_json::from_value(serde_json::json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_KILL"],
        }))
        .expect("capabilities");
        let sets = sets(Some(&wanted), u64::MAX);
        assert_eq!((sets.bounding, sets.effective, sets.permitted), (0b10_0001, 0b10_0000, 0b10_0000));
        assert_eq!((sets.inheritable, sets.ambient), (1, 0));
    }
}

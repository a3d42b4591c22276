//! Which ids of the host stand behind the users of pods with user namespaces of their own (`hostUsers: false`, KEP-127): one
//! range a pod, never the same for two.
//!
//! Nothing is written down: a range is in use as long as its pod has a sandbox, and the sandbox's record holds it.

use std::collections::HashMap;
use std::fs;
use std::io;

use parking_lot::Mutex;

use crate::cri::{IdMapping, SandboxStatus};

/// Ids of one pod (`userNamespaces.idsPerPod`).
const IDS_PER_POD: u32 = 65_536;
/// Whose subordinate ids are taken where they are set apart, as a kubelet does.
const OWNER: &str = "kubelet";

/// The ranges of a node.
pub struct IdRanges {
    first: u32,
    count: u32,
    /// By the pod's UID; ranges may be of other settings, or of another kubelet that uses our runtime.
    taken: Mutex<HashMap<String, IdMapping>>,
}

impl IdRanges {
    /// The ranges for `max_pods` pods: those that `/etc/subuid` and `/etc/subgid` give to the user `kubelet`, or else those
    /// from 65536 on. What the sandboxes have stays theirs.
    ///
    /// # Errors
    /// When one of the files cannot be read, or gives ids that no pod can have.
    pub fn open(max_pods: u32, sandboxes: &[SandboxStatus]) -> io::Result<Self> {
        let read = |path: &str| match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other.map_err(|error| io::Error::new(error.kind(), format!("read {path}: {error}"))),
        };
        let (first, count) =
            settings(max_pods, &read("/etc/subuid")?, &read("/etc/subgid")?).map_err(io::Error::other)?;
        let of_sandbox = |sandbox: &SandboxStatus| {
            Some((sandbox.config.pod.as_ref()?.uid.clone(), *sandbox.config.id_mappings.first()?))
        };
        Ok(Self { first, count, taken: Mutex::new(sandboxes.iter().filter_map(of_sandbox).collect()) })
    }

    /// The range of a pod: always the same one until it is released.
    ///
    /// # Errors
    /// When all are taken.
    pub fn take(&self, uid: &str) -> Result<IdMapping, String> {
        let mut taken = self.taken.lock();
        if let Some(known) = taken.get(uid) {
            return Ok(*known);
        }
        let ranges = (0..self.count).map(|index| IdMapping {
            container_id: 0,
            host_id: self.first + index * IDS_PER_POD,
            length: IDS_PER_POD,
        });
        let is_free = |range: &IdMapping| !taken.values().any(|other| overlap(range, other));
        let free = { ranges }.find(is_free).ok_or_else(|| {
            format!(
                "all {} ranges of ids for pods with hostUsers: false are taken (from id {} on): give the user {OWNER} more in /etc/subuid and /etc/subgid",
                self.count, self.first
            )
        })?;
        taken.insert(uid.to_owned(), free);
        Ok(free)
    }

    /// Gives a range back; the pod's sandbox must be gone.
    pub fn release(&self, uid: &str) {
        self.taken.lock().remove(uid);
    }
}

fn overlap(a: &IdMapping, b: &IdMapping) -> bool {
    let end = |range: &IdMapping| u64::from(range.host_id) + u64::from(range.length);
    u64::from(a.host_id) < end(b) && u64::from(b.host_id) < end(a)
}

/// The first id of the first range, and how many ranges there are.
fn settings(max_pods: u32, users: &str, groups: &str) -> Result<(u32, u32), String> {
    let of_owner = |text: &str| -> Result<Option<(u32, u32)>, String> {
        let Some(line) = text.lines().find(|line| line.split(':').next() == Some(OWNER)) else { return Ok(None) };
        let numbers: Vec<u32> = line.split(':').skip(1).filter_map(|number| number.trim().parse().ok()).collect();
        match numbers[..] {
            [first, count] => Ok(Some((first, count))),
            _ => Err(format!("{line:?} in /etc/subuid or /etc/subgid is not of the form user:first:count")),
        }
    };
    let (users, groups) = (of_owner(users)?, of_owner(groups)?);
    if users != groups {
        return Err(format!("/etc/subuid and /etc/subgid must give the user {OWNER} the same ids"));
    }
    let Some((first, ids)) = users else {
        return Ok((IDS_PER_POD, max_pods.min(u32::MAX / IDS_PER_POD - 1)));
    };
    // The ids of the host itself lie below; a range that begins elsewhere would be cut short at its end.
    if first < IDS_PER_POD
        || !first.is_multiple_of(IDS_PER_POD)
        || ids < IDS_PER_POD
        || first.checked_add(ids).is_none()
    {
        return Err(format!(
            "the ids of the user {OWNER} in /etc/subuid ({first}, {ids} of them) must begin at a multiple of {IDS_PER_POD} and be as many at least"
        ));
    }
    Ok((first, max_pods.min(ids / IDS_PER_POD)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_from_the_kubelets_own_ids_or_the_usual_ones() {
        let of = |users: &str, groups: &str| settings(110, users, groups);
        assert_eq!(of("", ""), Ok((65_536, 110)));
        assert_eq!(of("me:100000:65536\n", "me:100000:65536\n"), Ok((65_536, 110)));
        let own = "me:1:2\nkubelet:131072:196608\n";
        assert_eq!(of(own, own), Ok((131_072, 3)));
        for (users, groups) in [
            (own, ""),
            (own, "kubelet:131072:65536"),
            ("kubelet:1000:65536", "kubelet:1000:65536"),
            ("kubelet:65536:1000", "kubelet:65536:1000"),
            ("kubelet:x:65536", "kubelet:x:65536"),
            ("kubelet:4294901760:4294901760", "kubelet:4294901760:4294901760"),
        ] {
            assert!(of(users, groups).is_err(), "{users} {groups}");
        }
        assert_eq!(
            settings(u32::MAX, "", "").map(|(first, count)| first.checked_add(count * IDS_PER_POD).is_some()),
            Ok(true)
        );
    }

    #[test]
    fn no_two_pods_have_an_id_in_common() {
        // Another kubelet has given one that lies across two of ours.
        let theirs = IdMapping { container_id: 0, host_id: 100_000, length: 65_536 };
        let taken = Mutex::new(HashMap::from([("theirs".to_owned(), theirs)]));
        let ranges = IdRanges { first: 65_536, count: 4, taken };
        let host_id = |uid: &str| ranges.take(uid).map(|range| range.host_id);
        assert_eq!(host_id("a"), Ok(3 * 65_536));
        assert_eq!(host_id("b"), Ok(4 * 65_536));
        assert_eq!(host_id("a"), Ok(3 * 65_536), "a pod keeps its own");
        assert!(host_id("c").expect_err("none left").contains("/etc/subuid"));
        ranges.release("theirs");
        assert_eq!(host_id("c"), Ok(65_536));
    }
}

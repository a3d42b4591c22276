//! What the runtime reads beside a configuration: a seccomp profile, the limits of an update, id maps, its own state. Any JSON, no
//! panic; and a compiled filter is one that the kernel would take the length of, as are the values of limits.
#![no_main]

use coracle_runtime::state::State;
use coracle_runtime::{cgroup, device, seccomp};
use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::{LinuxIdMapping, LinuxResources, LinuxSeccomp};
use std::collections::BTreeMap;

/// `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;

fuzz_target!(|data: &[u8]| {
    if let Ok(profile) = serde_json::from_slice::<LinuxSeccomp>(data)
        && let Ok(filter) = seccomp::compile(&profile)
    {
        assert!(!filter.program.is_empty() && filter.program.len() <= MAX_INSTRUCTIONS);
    }
    if let Ok(resources) = serde_json::from_slice::<LinuxResources>(data) {
        for known in [true, false] {
            for setting in cgroup::settings(&resources, |_| known).into_iter().flatten() {
                assert!(!setting.file.contains('/'), "{setting:?} would be written elsewhere");
            }
        }
        if let Ok(rules) = device::rules(resources.devices().as_deref().unwrap_or_default()) {
            let _ = device::compile(&rules);
        }
    }
    if let Ok(mappings) = serde_json::from_slice::<Vec<LinuxIdMapping>>(data)
        && let Ok(text) = coracle_runtime::fuzz::id_map(&mappings)
    {
        let mut ids = BTreeMap::new();
        for mapping in &mappings {
            assert!(ids.insert(mapping.container_id(), mapping.size()).is_none(), "two begin at one id: {text}");
        }
        let ends: Vec<_> = ids.iter().map(|(start, size)| u64::from(*start) + u64::from(*size)).collect();
        assert!(ids.keys().skip(1).zip(&ends).all(|(next, end)| u64::from(*next) >= *end), "an overlap: {text}");
        assert_eq!(text.lines().count(), mappings.len());
    }
    if let Ok(state) = serde_json::from_slice::<State>(data) {
        let again: State = serde_json::from_slice(&serde_json::to_vec(&state).expect("writes")).expect("reads");
        assert_eq!((again.id, again.pid, again.cgroup), (state.id, state.pid, state.cgroup));
    }
});

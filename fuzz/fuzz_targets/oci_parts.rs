//! What the runtime reads beside a configuration: a seccomp profile, the limits of an update, its own state. Any JSON, no
//! panic; and a compiled filter is one that the kernel would take the length of, as are the values of limits.
#![no_main]

use coracle_runtime::state::State;
use coracle_runtime::{cgroup, device, seccomp};
use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp};

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
    if let Ok(state) = serde_json::from_slice::<State>(data) {
        let again: State = serde_json::from_slice(&serde_json::to_vec(&state).expect("writes")).expect("reads");
        assert_eq!((again.id, again.pid, again.cgroup), (state.id, state.pid, state.cgroup));
    }
});

//! Resources of the specification, which are worded for version 1, as files of version 2.

use crate::error::{Error, Result};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

/// One value to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub controller: String,
    pub file: String,
    pub value: String,
    /// Left out where the kernel lacks the file, because another setting covers it.
    pub optional: bool,
    /// Refused when it is below what is used now.
    pub check_usage: bool,
}

impl Setting {
    fn new(file: impl Into<String>, value: impl ToString) -> Self {
        let file = file.into();
        let controller = file.split('.').next().unwrap_or_default().to_string();
        Self { controller, file, value: value.to_string(), optional: false, check_usage: false }
    }
}

impl Setting {
    /// Whether this is how a cgroup is without being told: engines write defaults out, and nothing is lost where the
    /// controller is missing.
    pub fn is_default(&self) -> bool {
        self.value == "max" || (self.file == "cpu.weight" && self.value == "100")
    }
}

/// All values to write, in order. `exists` tells whether the cgroup has a file.
pub fn settings(resources: &LinuxResources, exists: impl Fn(&str) -> bool) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    // First, for it says for which processors and nodes the rest holds.
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &exists, &mut settings)?;
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        // Zero is what an absent limit looks like in the specification's JSON.
        match pids.limit() {
            0 => {}
            limit => settings.push(Setting::new("pids.max", limit_text(limit))),
        }
    }
    if let Some(io) = resources.block_io() {
        io_settings(io, &exists, &mut settings)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if size.is_empty() || size.contains(['/', '.']) {
            return Err(Error::config(
                "linux.resources.hugepageLimits.pageSize",
                format!("{size:?} is not a page size"),
            ));
        }
        settings.push(Setting::new(format!("hugetlb.{size}.max"), limit_text(limit.limit())));
        let reserved = Setting::new(format!("hugetlb.{size}.rsvd.max"), limit_text(limit.limit()));
        settings.push(Setting { optional: true, ..reserved });
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let part = |name: &str, value: Option<u32>| value.map(|value| format!(" {name}={value}")).unwrap_or_default();
        let value =
            format!("{device}{}{}", part("hca_handle", limit.hca_handles()), part("hca_object", limit.hca_objects()));
        settings.push(Setting::new("rdma.max", value));
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return Err(Error::unsupported("linux.resources.network", "version 2 of cgroups has no network controllers"));
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') {
            return Err(Error::config("linux.resources.unified", format!("{file:?} is not a file of a cgroup")));
        }
        settings.push(Setting::new(file.clone(), value));
    }
    Ok(settings)
}

/// A limit of the specification: negative is none.
fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

fn memory_settings(memory: &LinuxMemory, settings: &mut Vec<Setting>) -> Result<()> {
    let unsupported = |field: &str| {
        Err(Error::unsupported(format!("linux.resources.memory.{field}"), "version 2 of cgroups does not have it"))
    };
    if memory.disable_oom_killer() == Some(true) {
        return unsupported("disableOOMKiller");
    }
    if memory.swappiness().is_some() {
        return unsupported("swappiness");
    }
    if memory.kernel_tcp().is_some_and(|limit| limit > 0) {
        return unsupported("kernelTCP");
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // Version 1 counts memory and swap together, version 2 swap alone.
        let value = match limit {
            _ if swap < 0 => "max".to_string(),
            Some(limit) if limit >= 0 && swap >= limit => (swap - limit).to_string(),
            Some(limit) if limit >= 0 => {
                return Err(Error::config(
                    "linux.resources.memory.swap",
                    "is less than the memory limit that it contains",
                ));
            }
            _ => return Err(Error::config("linux.resources.memory.swap", "needs a memory limit")),
        };
        // A kernel without swap accounting has no such file; then there is no swap to limit to nothing.
        let setting = Setting::new("memory.swap.max", &value);
        settings.push(Setting { optional: value == "0" || value == "max", ..setting });
    } else if limit.is_some_and(|limit| limit < 0) {
        settings.push(Setting { optional: true, ..Setting::new("memory.swap.max", "max") });
    }
    if let Some(limit) = limit {
        let check_usage = memory.check_before_update() == Some(true);
        settings.push(Setting { check_usage, ..Setting::new("memory.max", limit_text(limit)) });
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        settings.push(Setting::new("memory.low", limit_text(reservation)));
    }
    Ok(())
}

/// The weight (1 to 10,000, 100 by default) for shares (2 to 262,144, 1,024 by default): a curve through the ends and
/// the defaults of both scales, log10(weight) = (l² + 125 l) / 612 − 7 / 34 with l = log2(shares).
pub(crate) fn weight_of_shares(shares: u64) -> u64 {
    const MIN_SHARES: u64 = 2;
    const MAX_SHARES: u64 = 262_144;
    const MAX_WEIGHT: u64 = 10_000;
    match shares {
        0 => 0,
        1..=MIN_SHARES => 1,
        MAX_SHARES.. => MAX_WEIGHT,
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10_f64.powf(exponent).ceil() as u64
        }
    }
}

fn cpu_settings(cpu: &LinuxCpu, exists: &impl Fn(&str) -> bool, settings: &mut Vec<Setting>) -> Result<()> {
    const DEFAULT_PERIOD_US: u64 = 100_000;
    if cpu.realtime_runtime().is_some_and(|value| value != 0) || cpu.realtime_period().is_some_and(|value| value != 0) {
        return Err(Error::unsupported("linux.resources.cpu.realtime*", "version 2 of cgroups does not have it"));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            settings.push(Setting::new(file, list));
        }
    }
    if let Some(idle) = cpu.idle() {
        settings.push(Setting::new("cpu.idle", idle));
    }
    // An idle group has no weight of its own.
    if cpu.idle() != Some(1)
        && let Some(shares) = cpu.shares().filter(|shares| *shares != 0)
    {
        settings.push(Setting::new("cpu.weight", weight_of_shares(shares)));
    }
    let burst = cpu.burst().map(|burst| Setting::new("cpu.max.burst", burst));
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let maximum = (quota.is_some() || cpu.period().is_some_and(|period| period != 0)).then(|| {
        let quota = quota.filter(|quota| *quota > 0).map_or("max".to_string(), |quota| quota.to_string());
        let period = cpu.period().filter(|period| *period != 0).unwrap_or(DEFAULT_PERIOD_US);
        Setting::new("cpu.max", format!("{quota} {period}"))
    });
    // The kernel refuses a burst above the quota: a burst that shrinks must come first, one that grows last.
    match burst {
        Some(burst) if burst.value == "0" && exists("cpu.max.burst") => {
            settings.push(burst);
            settings.extend(maximum);
        }
        burst => {
            settings.extend(maximum);
            settings.extend(burst);
        }
    }
    Ok(())
}

/// The weight of version 2 (1 to 10,000) for one of version 1 (10 to 1,000).
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).max(10) - 10) * 9_999 / 990
}

fn io_settings(io: &LinuxBlockIo, exists: &impl Fn(&str) -> bool, settings: &mut Vec<Setting>) -> Result<()> {
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(Error::unsupported("linux.resources.blockIO.leafWeight", "version 2 of cgroups does not have it"));
    }
    // The BFQ scheduler takes the old scale in a file of its own.
    let bfq = exists("io.bfq.weight");
    let weight = |weight: u16, device: &str| {
        if bfq {
            Setting::new("io.bfq.weight", format!("{device}{weight}"))
        } else {
            Setting::new(
                "io.weight",
                format!("{}{}", if device.is_empty() { "default " } else { device }, io_weight(weight)),
            )
        }
    };
    if let Some(value) = io.weight().filter(|value| *value != 0) {
        settings.push(weight(value, ""));
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(value) = device.weight().filter(|value| *value != 0) {
            settings.push(weight(value, &format!("{}:{} ", device.major(), device.minor())));
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".to_string() } else { device.rate().to_string() };
            settings.push(Setting::new("io.max", format!("{}:{} {key}={rate}", device.major(), device.minor())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(json: serde_json::Value) -> Vec<(String, String)> {
        let resources: LinuxResources = serde_json::from_value(json).expect("resources");
        settings(&resources, |_| false).expect("settings").into_iter().map(|s| (s.file, s.value)).collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(file, value)| ((*file).into(), (*value).into())).collect()
    }

    #[test]
    fn shares_become_weights_on_the_curve_of_the_defaults() {
        assert_eq!([2, 1024, 262_144, 0].map(weight_of_shares), [1, 100, 10_000, 0]);
        assert!((3..262_144).step_by(997).map(weight_of_shares).is_sorted());
    }

    #[test]
    fn swap_is_counted_without_memory() {
        let got = compile(serde_json::json!({"memory": {"limit": 100, "swap": 150, "reservation": -1}}));
        assert_eq!(got, pairs(&[("memory.swap.max", "50"), ("memory.max", "100"), ("memory.low", "max")]));
        let got = compile(serde_json::json!({"memory": {"limit": -1}}));
        assert_eq!(got, pairs(&[("memory.swap.max", "max"), ("memory.max", "max")]));
    }

    #[test]
    fn every_resource_has_its_file() {
        let got = compile(serde_json::json!({
            "cpu": {"shares": 1024, "quota": 50000, "burst": 10000, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 7},
            "blockIO": {"weight": 1000, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
            "rdma": {"mlx5": {"hcaHandles": 3}},
            "unified": {"memory.high": "9"},
        }));
        assert_eq!(
            got,
            pairs(&[
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpu.max.burst", "10000"),
                ("pids.max", "7"),
                ("io.weight", "default 10000"),
                ("io.max", "8:0 rbps=5"),
                ("hugetlb.2MB.max", "4"),
                ("hugetlb.2MB.rsvd.max", "4"),
                ("rdma.max", "mlx5 hca_handle=3"),
                ("memory.high", "9"),
            ])
        );
    }

    #[test]
    fn what_version_2_lacks_is_refused() {
        for json in [
            serde_json::json!({"memory": {"disableOOMKiller": true}}),
            serde_json::json!({"memory": {"swap": 5}}),
            serde_json::json!({"cpu": {"realtimeRuntime": 5}}),
            serde_json::json!({"network": {"classID": 5}}),
            serde_json::json!({"unified": {"../x.y": "1"}}),
        ] {
            let resources: LinuxResources = serde_json::from_value(json.clone()).expect("resources");
            assert!(settings(&resources, |_| true).is_err(), "{json}");
        }
    }
}

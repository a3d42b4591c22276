//! The Node's status as a value computed from settings, facts and health.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;

use super::{Facts, Health};
use crate::Config;
use crate::names::{RUNTIME_NAME, WIREGUARD_KEY};

/// Images named in the status (`nodeStatusMaxImages`).
const MAX_IMAGES: usize = 50;
/// The version of Kubernetes whose behaviour this node has.
pub const KUBELET_VERSION: &str = concat!("v1.36.0+coracle-", env!("CARGO_PKG_VERSION"));

/// What the node's annotations tell: the controllers of volumes how it mounts, and the other nodes its key.
pub(super) fn annotations(config: &Config) -> BTreeMap<String, String> {
    let folder = super::local_volumes::folder(&config.layout).to_string_lossy().into_owned();
    let mut annotations = BTreeMap::from([
        ("volumes.kubernetes.io/controller-managed-attach-detach".to_owned(), "true".to_owned()),
        (super::local_volumes::FOLDER.to_owned(), folder),
    ]);
    annotations.extend(config.wireguard_key.map(|key| (WIREGUARD_KEY.to_owned(), BASE64.encode(key))));
    annotations
}

/// The object of a node that registers itself.
pub(super) fn first(config: &Config, facts: &Facts) -> Node {
    let taints = config.register_with_taints.iter().map(|(key, value, effect)| Taint {
        key: key.clone(),
        value: Some(value.clone()).filter(|value| !value.is_empty()),
        effect: effect.clone(),
        time_added: None,
    });
    let taints: Vec<_> = taints.collect();
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(facts.labels(config)),
            annotations: Some(annotations(config)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec { taints: (!taints.is_empty()).then_some(taints), ..NodeSpec::default() }),
        status: Some(NodeStatus {
            conditions: Some(vec![condition("Ready", "False", "KubeletNotReady", "the node agent is starting")]),
            ..facts_only(config, facts)
        }),
    }
}

/// What the node says of itself now.
pub(super) fn of(config: &Config, facts: &Facts, health: &dyn Health) -> NodeStatus {
    let mut conditions = vec![
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
    ];
    for own in health.conditions() {
        match conditions.iter_mut().find(|usual| usual.type_ == own.type_) {
            Some(usual) => *usual = own,
            None => conditions.push(own),
        }
    }
    let images = health.images().into_iter().take(MAX_IMAGES);
    let in_use = health.volumes_in_use();
    let mut facts = facts_only(config, facts);
    for (name, capacity, allocatable) in health.devices() {
        let amounts = [(&mut facts.capacity, capacity), (&mut facts.allocatable, allocatable)];
        for (amounts, amount) in amounts {
            amounts.get_or_insert_default().insert(name.clone(), Quantity(amount.to_string()));
        }
    }
    NodeStatus {
        conditions: Some(conditions),
        images: Some(
            images.map(|(names, size)| ContainerImage { names: Some(names), size_bytes: Some(size) }).collect(),
        ),
        // Also when there are none: what a patch leaves out stays.
        volumes_in_use: Some(in_use),
        ..facts
    }
}

fn facts_only(config: &Config, facts: &Facts) -> NodeStatus {
    let mut addresses: Vec<_> =
        config.node_ips.iter().map(|ip| NodeAddress { type_: "InternalIP".into(), address: ip.to_string() }).collect();
    addresses.push(NodeAddress { type_: "Hostname".into(), address: config.node_name.clone() });
    let mut capacity: BTreeMap<String, Quantity> = [
        ("cpu", (facts.cpu_millis / 1000).to_string()),
        ("memory", format!("{}Ki", facts.memory_bytes / 1024)),
        ("ephemeral-storage", format!("{}Ki", facts.disk_bytes / 1024)),
        ("pods", config.max_pods.to_string()),
    ]
    .map(|(name, amount)| (name.to_owned(), Quantity(amount)))
    .into();
    for (size, bytes) in &facts.huge_pages {
        capacity.insert(format!("hugepages-{}", binary(*size)), Quantity(binary(*bytes)));
    }
    let mut allocatable = capacity.clone();
    let huge: u64 = facts.huge_pages.iter().map(|(_, bytes)| bytes).sum();
    let memory = facts.memory_bytes.saturating_sub(config.reserved_memory_bytes + huge);
    allocatable.insert("memory".into(), Quantity(format!("{}Ki", memory / 1024)));
    let cpu = facts.cpu_millis.saturating_sub(config.reserved_cpu_millis);
    let cpu = if cpu.is_multiple_of(1000) { (cpu / 1000).to_string() } else { format!("{cpu}m") };
    allocatable.insert("cpu".into(), Quantity(cpu));
    NodeStatus {
        addresses: Some(addresses),
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: config.port.into() }),
        }),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(true) }),
        runtime_handlers: Some(
            crate::native::HANDLERS
                .map(|name| NodeRuntimeHandler {
                    name: Some(name.into()),
                    features: Some(NodeRuntimeHandlerFeatures {
                        recursive_read_only_mounts: Some(true),
                        user_namespaces: Some(crate::native::namespaces::user_namespaces_work()),
                    }),
                })
                .into(),
        ),
        node_info: Some(NodeSystemInfo {
            architecture: facts.architecture.into(),
            boot_id: facts.boot_id.clone(),
            container_runtime_version: format!("{RUNTIME_NAME}://{}", env!("CARGO_PKG_VERSION")),
            kernel_version: facts.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: KUBELET_VERSION.into(),
            machine_id: facts.machine_id.clone(),
            operating_system: "linux".into(),
            os_image: facts.os_image.clone(),
            system_uuid: facts.system_uuid.clone(),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    }
}

/// A byte count in the largest binary unit that divides it, as quantities are written.
fn binary(bytes: u64) -> String {
    let units = ["", "Ki", "Mi", "Gi", "Ti"];
    let mut amount = bytes;
    let mut unit = 0;
    while amount > 0 && amount.is_multiple_of(1024) && unit + 1 < units.len() {
        amount /= 1024;
        unit += 1;
    }
    format!("{amount}{}", units[unit])
}

/// A condition without times, which [`merged`] fills in.
pub fn condition(type_: &str, status: &str, reason: &str, message: &str) -> NodeCondition {
    NodeCondition {
        type_: type_.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        ..NodeCondition::default()
    }
}

/// Extended resources follow what others say of the node's capacity: what is to be allocatable, or (`None`) no longer is.
/// Those of this node's own plugins are not others'.
pub(super) fn extended(held: &NodeStatus, wanted: &NodeStatus) -> BTreeMap<String, Option<Quantity>> {
    let empty = BTreeMap::new();
    let own = wanted.capacity.as_ref().unwrap_or(&empty);
    let others =
        |name: &&String| name.contains('/') && !name.contains("kubernetes.io/") && !own.contains_key(name.as_str());
    let capacity = held.capacity.as_ref().unwrap_or(&empty);
    let allocatable = held.allocatable.as_ref().unwrap_or(&empty);
    let names = capacity.keys().chain(allocatable.keys()).filter(others);
    let differing = names.filter(|name| capacity.get(*name) != allocatable.get(*name));
    differing.map(|name| (name.clone(), capacity.get(name).cloned())).collect()
}

/// What is to be written: the wanted status with the heartbeat's time, and the transition times that still hold.
pub(super) fn merged(before: NodeStatus, mut wanted: NodeStatus) -> NodeStatus {
    let now = Timestamp::now();
    let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
    for condition in wanted.conditions.iter_mut().flatten() {
        let same = before
            .conditions
            .iter()
            .flatten()
            .find(|held| held.type_ == condition.type_ && held.status == condition.status);
        condition.last_transition_time =
            same.and_then(|held| held.last_transition_time.clone()).or_else(|| Some(now.clone()));
        condition.last_heartbeat_time = Some(now.clone());
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_in_the_largest_unit() {
        assert_eq!(
            ["0", "2Mi", "1Gi", "1500"],
            [binary(0), binary(2 << 20), binary(1 << 30), binary(1500)].each_ref().map(String::as_str)
        );
    }

    #[test]
    fn transition_times_move_only_with_the_status() {
        let since = Time(Timestamp::from_second(1).expect("a time"));
        let held = NodeCondition {
            last_transition_time: Some(since.clone()),
            ..condition("Ready", "True", "KubeletReady", "")
        };
        let before = NodeStatus { conditions: Some(vec![held]), ..NodeStatus::default() };
        let now =
            |status| NodeStatus { conditions: Some(vec![condition("Ready", status, "", "")]), ..NodeStatus::default() };
        let transition = |status| {
            merged(before.clone(), now(status)).conditions.expect("conditions")[0].last_transition_time.clone()
        };
        assert_eq!(transition("True"), Some(since.clone()));
        assert_ne!(transition("False"), Some(since));
    }

    #[test]
    fn reservations_and_huge_pages_are_not_allocatable() {
        let config = Config { reserved_cpu_millis: 250, reserved_memory_bytes: 1 << 20, ..Config::new("n") };
        let facts = Facts {
            cpu_millis: 2000,
            memory_bytes: 10 << 20,
            huge_pages: vec![(2 << 20, 4 << 20)],
            ..Facts::default()
        };
        let status = facts_only(&config, &facts);
        let allocatable = status.allocatable.expect("allocatable");
        assert_eq!((allocatable["cpu"].0.as_str(), allocatable["memory"].0.as_str()), ("1750m", "5120Ki"));
        assert_eq!(status.capacity.expect("capacity")["hugepages-2Mi"].0, "4Mi");
    }

    #[test]
    fn extended_resources_follow_their_capacity() {
        let status = |value| serde_json::from_value::<NodeStatus>(value).expect("a status");
        let held = status(serde_json::json!({
            "capacity": {"cpu": "4", "example.com/dongle": "5", "example.com/same": "1", "example.com/own": "4"},
            "allocatable": {"cpu": "3", "example.com/same": "1", "example.com/gone": "2", "example.com/own": "3"},
        }));
        let wanted = status(serde_json::json!({"capacity": {"cpu": "4", "example.com/own": "4"}}));
        let changes = extended(&held, &wanted);
        assert_eq!(changes["example.com/dongle"], Some(Quantity("5".into())));
        assert_eq!(changes["example.com/gone"], None);
        assert_eq!(changes.len(), 2, "a plugin of the node says itself how many of its devices are well");
    }
}

//! In-place resize (KEP-1287): what a pod was given, what it now asks for, and the way from one to the other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde::{Deserialize, Serialize};

use super::admit::lacking;
use super::amounts::amount;
use super::context::Context;
use super::resolved;
use super::table::PodEntry;
use crate::cri::{ContainerState, ContainerStatus, Resources};
use crate::names::PodKey;
use crate::volumes::{Allocatable, Quantity};

/// Resources that can be changed while a container runs.
const RESIZABLE: [&str; 2] = ["cpu", "memory"];

/// What the node has given to a pod: requests and limits of each container by name, and of the pod under the empty name.
/// Kept on disk, since the API holds only what is asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Allocation(BTreeMap<String, ResourceRequirements>);

/// Why a resize waits or goes on, as the pod's conditions tell it: type, reason, message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) type_: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) message: String,
}

impl Progress {
    fn pending(reason: &'static str, message: String) -> Self {
        Self { type_: "PodResizePending", reason: Some(reason), message }
    }

    pub(super) fn failing(message: String) -> Self {
        Self { type_: "PodResizeInProgress", reason: Some("Error"), message }
    }
}

/// What is to be done to a container that runs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Nothing,
    /// New limits of its cgroup.
    Update(Resources),
    /// Its resize policy wants a restart.
    Restart,
}

fn path(context: &Context, key: &PodKey) -> PathBuf {
    context.config.layout.pod(&key.uid).join("allocated.json")
}

fn containers(pod: &mut Pod) -> impl Iterator<Item = &mut Container> {
    let spec = pod.spec.iter_mut();
    spec.flat_map(|spec| spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()))
}

impl Allocation {
    /// What the pod asks for.
    pub(super) fn wanted(pod: &Pod) -> Self {
        let mut pod = pod.clone();
        let mut given: BTreeMap<String, ResourceRequirements> = containers(&mut pod)
            .map(|container| (container.name.clone(), container.resources.clone().unwrap_or_default()))
            .collect();
        if let Some(own) = pod.spec.and_then(|spec| spec.resources) {
            given.insert(String::new(), own);
        }
        Self(given)
    }

    /// What an earlier worker noted; `None` when there is nothing.
    pub(super) fn load(context: &Context, key: &PodKey) -> Option<Self> {
        serde_json::from_slice(&fs::read(path(context, key)).ok()?).ok()
    }

    pub(super) fn save(&self, context: &Context, key: &PodKey) -> io::Result<()> {
        let path = path(context, key);
        fs::create_dir_all(context.config.layout.pod(&key.uid))?;
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, path)
    }

    /// The pod as if it asked for what it was given.
    pub(super) fn applied_to(&self, pod: &Pod) -> Pod {
        let mut pod = pod.clone();
        for container in containers(&mut pod) {
            if let Some(given) = self.0.get(&container.name) {
                container.resources = Some(given.clone());
            }
        }
        if let (Some(spec), Some(given)) = (&mut pod.spec, self.0.get("")) {
            spec.resources = Some(given.clone());
        }
        pod
    }
}

/// Whether the node can give what is asked for: never, not now, or now.
pub(super) fn judge(allocatable: &Allocatable, others: &[Arc<PodEntry>], pod: &Pod) -> Option<Progress> {
    if let Some((name, wanted, _, capacity)) = lacking(allocatable, &[], pod) {
        let message = format!("Node didn't have enough capacity: {name}, requested: {wanted}, capacity: {capacity}");
        return Some(Progress::pending("Infeasible", message));
    }
    lacking(allocatable, others, pod).map(|(name, wanted, used, capacity)| {
        let message = format!(
            "Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}"
        );
        Progress::pending("Deferred", message)
    })
}

/// What brings a running container to `given`, which its pod was given; `policy` comes from the container.
pub(super) fn change(pod: &Pod, container: &Container, status: &ContainerStatus, memory_bytes: u64) -> Change {
    if status.state != ContainerState::Running {
        return Change::Nothing;
    }
    let given = resolved::resources(pod, container.resources.as_ref(), memory_bytes);
    let held = &status.config.resources;
    // The score of the OOM killer is a process's from its start on.
    let given = Resources { oom_score_adj: held.oom_score_adj, unified: held.unified.clone(), ..given };
    if given == *held {
        return Change::Nothing;
    }
    let differs = |name: &str| match name {
        "cpu" => (given.cpu_shares, given.cpu_quota) != (held.cpu_shares, held.cpu_quota),
        _ => given.memory_limit_in_bytes != held.memory_limit_in_bytes,
    };
    let restarts = |name: &str| {
        let policies = container.resize_policy.iter().flatten();
        policies.into_iter().any(|policy| policy.resource_name == name && policy.restart_policy == "RestartContainer")
    };
    if RESIZABLE.into_iter().any(|name| differs(name) && restarts(name)) {
        return Change::Restart;
    }
    Change::Update(given)
}

/// Whether a change of requests alone asks for a restart, which no limit would show.
pub(super) fn requests_want_restart(before: &Pod, after: &Pod, name: &str) -> bool {
    let of = |pod: &Pod| -> Option<Container> {
        let spec = pod.spec.as_ref()?;
        let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        all.find(|container| container.name == name).cloned()
    };
    let (Some(before), Some(after)) = (of(before), of(after)) else { return false };
    let read = |container: &Container, resource: &str| {
        let resources = container.resources.clone().unwrap_or_default();
        [resources.requests, resources.limits].map(|list| amount(list.as_ref(), resource).map(Quantity::milli))
    };
    after.resize_policy.iter().flatten().any(|policy| {
        policy.restart_policy == "RestartContainer"
            && read(&before, &policy.resource_name) != read(&after, &policy.resource_name)
    })
}

/// Whether two lists of requirements say the same in different words.
pub(super) fn same(one: &Allocation, other: &Allocation) -> bool {
    let read = |list: &Allocation| -> Vec<(String, String, i128)> {
        let all = list.0.iter().flat_map(|(name, resources)| {
            let lists = [("limits", &resources.limits), ("requests", &resources.requests)];
            lists.into_iter().flat_map(move |(kind, list)| {
                list.iter().flatten().map(move |(resource, amount)| {
                    let milli = amount.0.parse::<Quantity>().map(Quantity::milli).unwrap_or_default();
                    (name.clone(), format!("{kind}.{resource}"), milli)
                })
            })
        });
        all.collect()
    };
    read(one) == read(other)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cri::ContainerConfig;
    use crate::names::ContainerId;

    fn pod(resources: serde_json::Value, policy: &str) -> Pod {
        let policies = json!([{"resourceName": "memory", "restartPolicy": policy}]);
        let containers = json!([{"name": "a", "resources": resources, "resizePolicy": policies}]);
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "p"}, "spec": {"containers": containers}}))
            .expect("a pod")
    }

    fn running(pod: &Pod) -> ContainerStatus {
        let container = &pod.spec.as_ref().expect("spec").containers[0];
        let resources = resolved::resources(pod, container.resources.as_ref(), 1 << 30);
        ContainerStatus {
            id: ContainerId::derive("p", "a", 0),
            sandbox: ContainerId::derive("p", "", 0),
            pod: resolved::key(pod),
            config: ContainerConfig { name: "a".into(), resources, ..ContainerConfig::default() },
            state: ContainerState::Running,
            pid: None,
            created_at: 1,
            started_at: 1,
            exit: None,
            message: String::new(),
            user: Default::default(),
        }
    }

    #[test]
    fn limits_change_in_place_unless_the_policy_wants_a_restart() {
        let small = json!({"limits": {"cpu": "100m", "memory": "10Mi"}});
        let fast = json!({"limits": {"cpu": "200m", "memory": "10Mi"}});
        let large = json!({"limits": {"cpu": "100m", "memory": "20Mi"}});
        let before = running(&pod(small.clone(), "NotRequired"));
        let to = |resources: &serde_json::Value, policy: &str| {
            let wanted = pod(resources.clone(), policy);
            change(&wanted, &wanted.spec.as_ref().expect("spec").containers[0], &before, 1 << 30)
        };
        assert_eq!(to(&small, "NotRequired"), Change::Nothing);
        assert!(matches!(to(&fast, "RestartContainer"), Change::Update(new) if new.cpu_quota == 20_000));
        assert!(matches!(to(&large, "NotRequired"), Change::Update(new) if new.memory_limit_in_bytes == 20 << 20));
        assert_eq!(to(&large, "RestartContainer"), Change::Restart);
        // A limit that was taken away is lifted.
        assert!(matches!(to(&json!({}), "NotRequired"), Change::Update(new) if new.memory_limit_in_bytes == -1));
    }

    #[test]
    fn what_the_node_can_never_give_is_infeasible_and_what_others_hold_is_deferred() {
        let allocatable = Allocatable { cpu_millis: 1000, memory_bytes: 1 << 30, ephemeral_storage_bytes: 0 };
        let asking = |cpu: &str| pod(json!({"requests": {"cpu": cpu}}), "NotRequired");
        let other = PodEntry {
            key: resolved::key(&asking("500m")),
            pod: Arc::new(asking("500m")),
            sandbox: None,
            containers: Vec::new(),
        };
        let judged = |cpu: &str| {
            judge(&allocatable, &[Arc::new(other.clone())], &asking(cpu)).and_then(|progress| progress.reason)
        };
        assert_eq!([judged("500m"), judged("600m"), judged("2")], [None, Some("Deferred"), Some("Infeasible")]);
    }

    #[test]
    fn an_allocation_stands_in_for_what_is_asked() {
        let given = Allocation::wanted(&pod(json!({"requests": {"cpu": "0.5"}}), "NotRequired"));
        let asked = pod(json!({"requests": {"cpu": "2"}}), "NotRequired");
        let seen = given.applied_to(&asked);
        assert!(same(&Allocation::wanted(&seen), &given));
        let spelled = Allocation::wanted(&pod(json!({"requests": {"cpu": "500m"}}), "NotRequired"));
        assert!(same(&spelled, &given) && !same(&Allocation::wanted(&asked), &given));
    }
}

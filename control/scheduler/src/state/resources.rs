//! Amounts of resources: CPU in thousandths, the rest in whole units (bytes, pods, devices).

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::schema::quantity::Quantity as Exact;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// What a container without a CPU request counts as when nodes are scored (thousandths).
const DEFAULT_CPU_MILLIS: i64 = 100;
/// What a container without a memory request counts as when nodes are scored (bytes).
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// Amounts by resource.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub(crate) struct Resources {
    pub(crate) cpu_millis: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) ephemeral_bytes: i64,
    /// Huge pages and extended resources.
    pub(crate) others: BTreeMap<Arc<str>, i64>,
}

/// Whole units of a quantity, rounded up; malformed ones, which validation never lets in, count as nothing.
pub(crate) fn units(quantity: &Quantity) -> i64 {
    quantity.0.parse::<Exact>().map_or(0, |exact| exact.value())
}

/// Thousandths of a quantity, rounded up.
pub(crate) fn millis(quantity: &Quantity) -> i64 {
    quantity.0.parse::<Exact>().map_or(0, |exact| exact.millis())
}

impl Resources {
    /// Amounts from a list of quantities.
    pub(crate) fn from_list(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let mut resources = Self::default();
        for (name, amount) in list.into_iter().flatten() {
            match name.as_str() {
                "cpu" => resources.cpu_millis = millis(amount),
                "memory" => resources.memory_bytes = units(amount),
                "ephemeral-storage" => resources.ephemeral_bytes = units(amount),
                "pods" => {}
                _ => {
                    resources.others.insert(name.as_str().into(), units(amount));
                }
            }
        }
        resources
    }

    /// Adds `times` × the other amounts; -1 takes them away.
    pub(crate) fn add(&mut self, other: &Self, times: i64) {
        self.cpu_millis += times * other.cpu_millis;
        self.memory_bytes += times * other.memory_bytes;
        self.ephemeral_bytes += times * other.ephemeral_bytes;
        for (name, amount) in &other.others {
            *self.others.entry(name.clone()).or_default() += times * amount;
        }
    }

    /// Raises each amount to the other's where that is larger.
    pub(crate) fn raise(&mut self, other: &Self) {
        self.cpu_millis = self.cpu_millis.max(other.cpu_millis);
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
        self.ephemeral_bytes = self.ephemeral_bytes.max(other.ephemeral_bytes);
        for (name, amount) in &other.others {
            let own = self.others.entry(name.clone()).or_default();
            *own = (*own).max(*amount);
        }
    }

    /// The amount of one resource.
    pub(crate) fn get(&self, name: &str) -> i64 {
        match name {
            "cpu" => self.cpu_millis,
            "memory" => self.memory_bytes,
            "ephemeral-storage" => self.ephemeral_bytes,
            name => self.others.get(name).copied().unwrap_or_default(),
        }
    }

    /// What a pod asks for (component-helpers `PodRequests`): the sum of its containers and sidecars, or what an init
    /// container needs beside the sidecars started before it, whichever is larger; pod-level requests take the place of
    /// the sum; plus overhead. With `defaults`, containers without requests count as small ones. A container under resize
    /// counts with the largest of what it wants, was promised and has.
    pub(crate) fn of_pod(pod: &Pod, defaults: bool) -> Self {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let status = pod.status.as_ref();
        let request = |container: &Container| {
            let list = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            let mut amounts = Self::from_list(list);
            let statuses = status.map(|status| [&status.container_statuses, &status.init_container_statuses]);
            let own = statuses.into_iter().flatten().flatten().flatten().find(|status| status.name == container.name);
            if let Some(own) = own {
                amounts.raise(&Self::from_list(own.allocated_resources.as_ref()));
                amounts.raise(&Self::from_list(own.resources.as_ref().and_then(|has| has.requests.as_ref())));
            }
            if defaults {
                if !list.is_some_and(|list| list.contains_key("cpu")) {
                    amounts.cpu_millis = DEFAULT_CPU_MILLIS;
                }
                if !list.is_some_and(|list| list.contains_key("memory")) {
                    amounts.memory_bytes = DEFAULT_MEMORY_BYTES;
                }
            }
            amounts
        };
        let mut total = Self::default();
        for container in &spec.containers {
            total.add(&request(container), 1);
        }
        let mut sidecars = Self::default();
        let mut peak = Self::default();
        for container in spec.init_containers.iter().flatten() {
            let amounts = request(container);
            if container.restart_policy.as_deref() == Some("Always") {
                sidecars.add(&amounts, 1);
                total.add(&amounts, 1);
                peak.raise(&sidecars);
            } else {
                let mut beside = sidecars.clone();
                beside.add(&amounts, 1);
                peak.raise(&beside);
            }
        }
        total.raise(&peak);
        if let Some(list) = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()) {
            let pod = Self::from_list(Some(list));
            if list.contains_key("cpu") {
                total.cpu_millis = pod.cpu_millis;
            }
            if list.contains_key("memory") {
                total.memory_bytes = pod.memory_bytes;
            }
            for (name, amount) in pod.others {
                total.others.insert(name, amount);
            }
        }
        total.add(&Self::from_list(spec.overhead.as_ref()), 1);
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_containers_count_by_their_peak() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [
                {"name": "i1", "resources": {"requests": {"cpu": "500m"}}},
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "200m"}}},
                {"name": "i2", "resources": {"requests": {"cpu": "1500m"}}},
            ],
            "overhead": {"cpu": "10m"},
        }}))
        .expect("a pod");
        assert_eq!(Resources::of_pod(&pod, false).cpu_millis, 1710);
    }

    #[test]
    fn pod_level_requests_replace_sums_and_resizes_count_by_their_largest() {
        let mut pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}}],
            "resources": {"requests": {"cpu": "3"}},
        }}))
        .expect("a pod");
        let asked = Resources::of_pod(&pod, false);
        assert_eq!((asked.cpu_millis, asked.memory_bytes), (3000, 1 << 30));
        let status = serde_json::json!({"containerStatuses": [{
            "name": "a", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "resources": {"requests": {"memory": "2Gi"}},
        }]});
        pod.status = Some(serde_json::from_value(status).expect("a status"));
        assert_eq!(Resources::of_pod(&pod, false).memory_bytes, 2 << 30);
    }
}

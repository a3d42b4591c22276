//! What a pod asks for and may use as a whole, by the rules of `PodRequests` and `PodLimits` of k8s.io/component-helpers.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use super::resolved::is_sidecar;
use crate::volumes::Quantity;

type List = BTreeMap<String, ApiQuantity>;

/// The amount of one resource in a list.
pub(crate) fn amount(list: Option<&List>, name: &str) -> Option<Quantity> {
    list?.get(name)?.0.parse().ok()
}

/// The sum over containers that run together, or the most that one init container needs beside the sidecars before it.
fn largest(pod: &Pod, of: impl Fn(&Container) -> i128) -> i128 {
    let Some(spec) = &pod.spec else { return 0 };
    let (mut sidecars, mut setup) = (0, 0);
    for container in spec.init_containers.iter().flatten() {
        let own = of(container);
        setup = setup.max(own + sidecars);
        if is_sidecar(container) {
            sidecars += own;
        }
    }
    setup.max(sidecars + spec.containers.iter().map(of).sum::<i128>())
}

fn overhead(pod: &Pod, name: &str) -> i128 {
    amount(pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref()), name).map_or(0, Quantity::milli)
}

fn pod_level(pod: &Pod) -> Option<&ResourceRequirements> {
    pod.spec.as_ref()?.resources.as_ref()
}

/// What the pod requests of a resource, in thousandths.
pub(crate) fn requested(pod: &Pod, name: &str) -> i128 {
    let own = amount(pod_level(pod).and_then(|resources| resources.requests.as_ref()), name).map(Quantity::milli);
    let sum = || {
        largest(pod, |container| {
            let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            amount(requests, name).map_or(0, Quantity::milli)
        })
    };
    own.unwrap_or_else(sum) + overhead(pod, name)
}

/// The most that the pod may use of a resource, in thousandths; `None` if some container has no limit.
pub(crate) fn limited(pod: &Pod, name: &str) -> Option<i128> {
    let limit = |resources: Option<&ResourceRequirements>| {
        amount(resources.and_then(|resources| resources.limits.as_ref()), name)
            .map(Quantity::milli)
            .filter(|limit| *limit > 0)
    };
    if let Some(own) = limit(pod_level(pod)) {
        return Some(own + overhead(pod, name));
    }
    let spec = pod.spec.as_ref()?;
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    if !all.into_iter().all(|container| limit(container.resources.as_ref()).is_some()) {
        return None;
    }
    Some(largest(pod, |container| limit(container.resources.as_ref()).unwrap_or_default()) + overhead(pod, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"spec": spec})).expect("a pod")
    }

    #[test]
    fn sums_follow_the_documentation() {
        let cpu = |cpu: &str| serde_json::json!({"requests": {"cpu": cpu}, "limits": {"cpu": cpu}});
        let whole = pod(serde_json::json!({
            "initContainers": [
                {"name": "a", "resources": cpu("100m")},
                {"name": "b", "restartPolicy": "Always", "resources": cpu("200m")},
                {"name": "c", "resources": cpu("500m")},
            ],
            "containers": [{"name": "d", "resources": cpu("300m")}, {"name": "e", "resources": cpu("50m")}],
            "overhead": {"cpu": "10m"},
        }));
        // The third init container beside the sidecar needs more than both containers beside it.
        assert_eq!((requested(&whole, "cpu"), limited(&whole, "cpu")), (710, Some(710)));
        let some = pod(serde_json::json!({"containers": [{"name": "a", "resources": cpu("1")}, {"name": "b"}]}));
        assert_eq!((requested(&some, "cpu"), limited(&some, "cpu")), (1000, None));
        let of_pod = pod(serde_json::json!({"containers": [{"name": "a"}], "resources": cpu("2")}));
        assert_eq!((requested(&of_pod, "cpu"), limited(&of_pod, "cpu")), (2000, Some(2000)));
    }
}

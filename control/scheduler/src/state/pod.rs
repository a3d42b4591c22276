//! A pod as filters read it: requests summed up once.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::ResourceExt;

use super::Resources;

/// A host port: protocol, address, number.
pub(crate) type HostPort = (String, String, i32);

/// A pod and what is computed from it once.
#[derive(Debug)]
pub(crate) struct PodState {
    pub(crate) pod: Arc<Pod>,
    pub(crate) requests: Resources,
    /// Requests with defaults for containers that have none, for scores.
    pub(crate) scored_requests: Resources,
    pub(crate) host_ports: Vec<HostPort>,
}

impl PodState {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let sidecars = spec
            .init_containers
            .iter()
            .flatten()
            .filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let host_ports = spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(|container| container.ports.iter().flatten())
            .filter_map(|port| {
                let number = port.host_port.filter(|number| *number > 0)?;
                let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
                let address = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
                Some((protocol, address, number))
            })
            .collect();
        Self {
            requests: Resources::of_pod(spec, false),
            scored_requests: Resources::of_pod(spec, true),
            host_ports,
            pod,
        }
    }

    pub(crate) fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }

    pub(crate) fn uid(&self) -> String {
        self.pod.uid().unwrap_or_default()
    }
}

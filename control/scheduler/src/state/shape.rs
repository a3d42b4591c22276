//! All of a pod that plug-ins read. Pods of one template have equal shapes, and those are kept once: a verdict about one
//! pod holds for every pod of its shape.

use std::collections::{HashMap, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Weak};

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaimVolumeSource, Pod, PodAffinityTerm, PodResourceClaim, PodSpec, Toleration,
    TopologySpreadConstraint, Volume,
};
use kube::ResourceExt;

use super::Resources;
use super::selector::{Labels, NodeTerm, Selector};

/// The `schedulerName` of pods that name none.
pub(crate) const DEFAULT_SCHEDULER: &str = "default-scheduler";

/// A host port: protocol, address, number.
pub(crate) type HostPort = (String, String, i32);

/// What the plug-ins know of a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Shape {
    pub(crate) namespace: Arc<str>,
    pub(crate) labels: Labels,
    pub(crate) scheduler: String,
    pub(crate) priority: i32,
    pub(crate) never_preempts: bool,
    pub(crate) requests: Resources,
    /// Requests with defaults for containers that have none, for scores.
    pub(crate) scored_requests: Resources,
    pub(crate) host_ports: Vec<HostPort>,
    pub(crate) node_selector: Selector,
    /// Terms of the required node affinity; `None` requires nothing.
    pub(crate) node_terms: Option<Vec<NodeTerm>>,
    pub(crate) preferred_nodes: Vec<(i64, NodeTerm)>,
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) pods: PodTerms,
    pub(crate) spread: Vec<SpreadConstraint>,
    pub(crate) images: Vec<String>,
    /// Only volumes that can keep the pod from a node.
    pub(crate) volumes: Vec<Volume>,
    /// Names of the claims of its volumes: in the namespace of the pod, with whether they are made for the pod.
    pub(crate) volume_claims: Vec<(String, bool)>,
    /// Claims for devices by the pod's name of them, with their own names once they exist.
    pub(crate) device_claims: Vec<(String, Option<String>)>,
    /// Of a pod with claims for devices; otherwise empty.
    pub(crate) uid: Arc<str>,
    /// Controller of the pod (kind, name), for the default spreading.
    pub(crate) owner: Option<(String, String)>,
}

/// Affinity between pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PodTerms {
    pub(crate) required: Vec<PodTerm>,
    pub(crate) forbidden: Vec<PodTerm>,
    /// With weights; negative ones are of anti-affinity.
    pub(crate) preferred: Vec<(i64, PodTerm)>,
}

impl PodTerms {
    pub(crate) fn is_empty(&self) -> bool {
        self.required.is_empty() && self.forbidden.is_empty() && self.preferred.is_empty()
    }
}

/// One term of affinity between pods.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodTerm {
    pub(crate) topology_key: Arc<str>,
    namespaces: Vec<String>,
    namespace_selector: Option<Selector>,
    /// `None` selects nothing.
    selector: Option<Selector>,
}

impl PodTerm {
    fn new(term: &PodAffinityTerm, namespace: &str, labels: &Labels) -> Self {
        let mut selector = term.label_selector.as_ref().map(Selector::new);
        if let Some(selector) = &mut selector {
            for (keys, wanted) in [(&term.match_label_keys, true), (&term.mismatch_label_keys, false)] {
                for key in keys.iter().flatten() {
                    if let Some(value) = labels.get(key) {
                        selector.narrow(key, value, wanted);
                    }
                }
            }
        }
        let mut namespaces = term.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.push(namespace.to_owned());
        }
        Self {
            topology_key: term.topology_key.as_str().into(),
            namespaces,
            namespace_selector: term.namespace_selector.as_ref().map(Selector::new),
            selector,
        }
    }

    /// Whether the term selects pods of this shape; `namespace_labels` are those of the shape's namespace.
    pub(crate) fn selects(&self, shape: &Shape, namespace_labels: &Labels) -> bool {
        let Some(selector) = &self.selector else {
            return false;
        };
        (self.namespaces.iter().any(|name| **name == *shape.namespace)
            || self.namespace_selector.as_ref().is_some_and(|selector| selector.matches(namespace_labels)))
            && selector.matches(&shape.labels)
    }
}

/// One topology spread constraint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SpreadConstraint {
    pub(crate) topology_key: Arc<str>,
    pub(crate) max_skew: i32,
    pub(crate) min_domains: i32,
    /// `DoNotSchedule`
    pub(crate) hard: bool,
    /// `None` selects nothing.
    pub(crate) selector: Option<Selector>,
    pub(crate) honors_affinity: bool,
    pub(crate) honors_taints: bool,
}

impl SpreadConstraint {
    pub(crate) fn new(constraint: &TopologySpreadConstraint, labels: &Labels) -> Self {
        let mut selector = constraint.label_selector.as_ref().map(Selector::new);
        if let Some(selector) = &mut selector {
            for key in constraint.match_label_keys.iter().flatten() {
                if let Some(value) = labels.get(key) {
                    selector.narrow(key, value, true);
                }
            }
        }
        Self {
            topology_key: constraint.topology_key.as_str().into(),
            max_skew: constraint.max_skew,
            min_domains: constraint.min_domains.unwrap_or(1),
            hard: constraint.when_unsatisfiable == "DoNotSchedule",
            selector,
            honors_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            honors_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
        }
    }
}

/// Whether a volume can keep its pod from a node.
fn matters(volume: &Volume) -> bool {
    volume.persistent_volume_claim.is_some()
        || volume.ephemeral.is_some()
        || volume.csi.is_some()
        || volume.gce_persistent_disk.is_some()
        || volume.aws_elastic_block_store.is_some()
        || volume.iscsi.is_some()
        || volume.rbd.is_some()
}

/// The claim behind a volume: its name and whether it is made for the pod.
fn claim_of(volume: &Volume, pod: &str) -> Option<(String, bool)> {
    match &volume.persistent_volume_claim {
        Some(PersistentVolumeClaimVolumeSource { claim_name, .. }) => Some((claim_name.clone(), false)),
        None => volume.ephemeral.as_ref().map(|_| (format!("{pod}-{}", volume.name), true)),
    }
}

/// A claim for devices and its name; `None` if the pod's template asks for none after all.
fn device_claim(entry: &PodResourceClaim, pod: &Pod) -> Option<(String, Option<String>)> {
    if let Some(name) = &entry.resource_claim_name {
        return Some((entry.name.clone(), Some(name.clone())));
    }
    let mut made = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    match made.find(|made| made.name == entry.name) {
        Some(made) => made.resource_claim_name.clone().map(|name| (entry.name.clone(), Some(name))),
        None => Some((entry.name.clone(), None)),
    }
}

impl Shape {
    pub(crate) fn new(pod: &Pod) -> Self {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let namespace: Arc<str> = pod.metadata.namespace.as_deref().unwrap_or_default().into();
        let labels = pod.labels().clone();
        let affinity = spec.affinity.as_ref();
        let node_affinity = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
        let term = |term: &PodAffinityTerm| PodTerm::new(term, &namespace, &labels);
        let mut pods = PodTerms::default();
        if let Some(affinity) = affinity.and_then(|affinity| affinity.pod_affinity.as_ref()) {
            let (required, preferred) = (
                &affinity.required_during_scheduling_ignored_during_execution,
                &affinity.preferred_during_scheduling_ignored_during_execution,
            );
            pods.required = required.iter().flatten().map(term).collect();
            pods.preferred =
                preferred.iter().flatten().map(|w| (i64::from(w.weight), term(&w.pod_affinity_term))).collect();
        }
        if let Some(affinity) = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref()) {
            let (required, preferred) = (
                &affinity.required_during_scheduling_ignored_during_execution,
                &affinity.preferred_during_scheduling_ignored_during_execution,
            );
            pods.forbidden = required.iter().flatten().map(term).collect();
            pods.preferred
                .extend(preferred.iter().flatten().map(|w| (-i64::from(w.weight), term(&w.pod_affinity_term))));
        }
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let host_ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
        let host_ports = host_ports.filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
            let address = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some((protocol, address, number))
        });
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let volumes = || spec.volumes.iter().flatten();
        let owner = pod.owner_references().iter().find(|owner| owner.controller == Some(true));
        let required =
            node_affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
        let preferred = node_affinity.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
        let device_claims = spec.resource_claims.iter().flatten().filter_map(|entry| device_claim(entry, pod));
        let device_claims: Vec<_> = device_claims.collect();
        Self {
            scheduler: spec.scheduler_name.clone().unwrap_or_else(|| DEFAULT_SCHEDULER.into()),
            priority: spec.priority.unwrap_or_default(),
            never_preempts: spec.preemption_policy.as_deref() == Some("Never"),
            requests: Resources::of_pod(pod, false),
            scored_requests: Resources::of_pod(pod, true),
            host_ports: host_ports.collect(),
            node_selector: Selector::of_map(spec.node_selector.iter().flatten()),
            node_terms: required.map(|required| required.node_selector_terms.iter().map(NodeTerm::new).collect()),
            preferred_nodes: preferred
                .into_iter()
                .flatten()
                .map(|term| (i64::from(term.weight), NodeTerm::new(&term.preference)))
                .collect(),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            spread: spec
                .topology_spread_constraints
                .iter()
                .flatten()
                .map(|constraint| SpreadConstraint::new(constraint, &labels))
                .collect(),
            images: containers.filter_map(|container| container.image.clone()).collect(),
            volumes: volumes().filter(|volume| matters(volume)).cloned().collect(),
            volume_claims: volumes().filter_map(|volume| claim_of(volume, name)).collect(),
            uid: device_claims.iter().filter_map(|_| pod.metadata.uid.as_deref()).next().unwrap_or_default().into(),
            device_claims,
            owner: owner.map(|owner| (owner.kind.clone(), owner.name.clone())),
            namespace,
            labels,
            pods,
        }
    }

    /// The names of the only nodes that can take the pod, if it names them.
    pub(crate) fn pinned(&self) -> Option<Vec<&str>> {
        let terms = self.node_terms.as_ref()?;
        let mut names = Vec::new();
        for term in terms {
            names.extend(term.names()?.iter().map(String::as_str));
        }
        names.sort_unstable();
        names.dedup();
        Some(names)
    }

    /// Whether pods of equal shape may get different verdicts: their claims for devices are their own.
    pub(crate) fn is_singular(&self) -> bool {
        !self.device_claims.is_empty()
    }

    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.namespace, &self.labels, self.priority, &self.requests, &self.images).hash(&mut hasher);
        (&self.node_selector, &self.node_terms, &self.owner).hash(&mut hasher);
        hasher.finish()
    }
}

/// The shapes in use, each kept once.
#[derive(Debug, Default)]
pub(crate) struct Shapes {
    known: HashMap<u64, Vec<Weak<Shape>>>,
    /// Swept when there are twice as many entries as the last sweep left.
    sweep_at: usize,
}

/// Entries below which sweeping is not worth it.
const SWEEP_LEAST: usize = 1024;

impl Shapes {
    /// The shape of a pod, shared with all pods that have the same.
    pub(crate) fn of(&mut self, pod: &Pod) -> Arc<Shape> {
        let shape = Shape::new(pod);
        if self.known.len() > self.sweep_at.max(SWEEP_LEAST) {
            self.known.retain(|_, alike| {
                alike.retain(|shape| shape.strong_count() > 0);
                !alike.is_empty()
            });
            self.sweep_at = 2 * self.known.len();
        }
        let alike = self.known.entry(shape.hash()).or_default();
        if let Some(known) = alike.iter().filter_map(Weak::upgrade).find(|known| **known == shape) {
            return known;
        }
        alike.retain(|shape| shape.strong_count() > 0);
        let shape = Arc::new(shape);
        alike.push(Arc::downgrade(&shape));
        shape
    }
}

//! On which nodes a daemon's pod belongs, and the pod that is bound to one of them by node affinity.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodTemplateSpec, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

use crate::common::pods;

/// Taints that daemons bear: they are what a node's own agents have to run through.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];
/// Borne by daemons in the host's network, which may be what makes the network.
const TOLERATED_ON_HOST_NETWORK: (&str, &str) = ("node.kubernetes.io/network-unavailable", "NoSchedule");
const NAME_FIELD: &str = "metadata.name";

/// Whether pods of the set belong on a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fit {
    pub(super) should_run: bool,
    /// Whether one that is there already may stay.
    pub(super) may_stay: bool,
}

/// What a template asks of a node.
pub(super) struct Wants {
    node_name: Option<String>,
    selector: BTreeMap<String, String>,
    required: Option<NodeSelector>,
    tolerations: Vec<Toleration>,
}

fn tolerations(template: &PodTemplateSpec) -> Vec<Toleration> {
    let spec = template.spec.as_ref();
    let mut all = spec.and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
    let host_network = spec.and_then(|spec| spec.host_network) == Some(true);
    for (key, effect) in TOLERATED.into_iter().chain(host_network.then_some(TOLERATED_ON_HOST_NETWORK)) {
        let same = |one: &Toleration| {
            one.key.as_deref() == Some(key)
                && one.effect.as_deref() == Some(effect)
                && one.operator.as_deref() == Some("Exists")
        };
        if !all.iter().any(same) {
            all.push(Toleration {
                key: Some(key.into()),
                effect: Some(effect.into()),
                operator: Some("Exists".into()),
                ..Toleration::default()
            });
        }
    }
    all
}

impl Wants {
    pub(super) fn of(template: &PodTemplateSpec) -> Self {
        let spec = template.spec.as_ref();
        let affinity = spec.and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
        Self {
            node_name: spec.and_then(|spec| spec.node_name.clone()).filter(|name| !name.is_empty()),
            selector: spec.and_then(|spec| spec.node_selector.clone()).unwrap_or_default(),
            required: affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.clone()),
            tolerations: tolerations(template),
        }
    }

    pub(super) fn fit(&self, node: &Node) -> Fit {
        let name = node.name_any();
        let place = self.node_name.as_ref().is_none_or(|wanted| *wanted == name)
            && self.selector.iter().all(|(key, value)| node.labels().get(key) == Some(value))
            && self.required.as_ref().is_none_or(|required| {
                required.node_selector_terms.iter().any(|term| term_matches(term, node.labels(), &name))
            });
        if !place {
            return Fit { should_run: false, may_stay: false };
        }
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        let borne = |effects: &[&str]| {
            let hard = taints.iter().filter(|taint| effects.contains(&taint.effect.as_str()));
            hard.into_iter().all(|taint| self.tolerations.iter().any(|toleration| tolerates(toleration, taint)))
        };
        Fit { should_run: borne(&["NoSchedule", "NoExecute"]), may_stay: borne(&["NoExecute"]) }
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let any = |wanted: Option<String>, have: &str| wanted.is_none_or(|wanted| wanted == have);
    any(given(&toleration.effect), &taint.effect)
        && any(given(&toleration.key), &taint.key)
        && match toleration.operator.as_deref().unwrap_or_default() {
            "Exists" => true,
            "" | "Equal" => {
                toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
            }
            order @ ("Lt" | "Gt") => {
                let number = |text: &Option<String>| text.as_deref().and_then(|text| text.parse::<i64>().ok());
                match (number(&taint.value), number(&toleration.value)) {
                    (Some(have), Some(bound)) => (order == "Lt" && have < bound) || (order == "Gt" && have > bound),
                    _ => false,
                }
            }
            _ => false,
        }
}

fn term_matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, name: &str) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    // An empty term selects nothing.
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|one| requirement_holds(one, labels.get(&one.key).map(String::as_str)))
        && fields.iter().all(|one| one.key == NAME_FIELD && requirement_holds(one, Some(name)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|listed| listed == value));
    let compared = |holds: fn(i64, i64) -> bool| {
        let bound = values.first().and_then(|bound| bound.parse().ok());
        value.and_then(|value| value.parse().ok()).zip(bound).is_some_and(|(value, bound)| holds(value, bound))
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared(|value, bound| value > bound),
        "Lt" => compared(|value, bound| value < bound),
        _ => false,
    }
}

/// The node that a pod is on, or that its affinity binds it to.
pub(super) fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(name) = spec.node_name.as_deref().filter(|name| !name.is_empty()) {
        return Some(name);
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let mut fields = terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let named = fields.find(|field| field.key == NAME_FIELD && field.operator == "In")?;
    named.values.as_ref()?.first().map(String::as_str)
}

/// The pod of the template for one node: the scheduler binds it, to there alone.
pub(super) fn pod_for(template: &PodTemplateSpec, set: &str, owner: OwnerReference, node: &str) -> Pod {
    let mut pod = pods::from_template(template, set, owner);
    let spec = pod.spec.get_or_insert_default();
    spec.tolerations = Some(tolerations(template));
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(vec![NodeSelectorRequirement {
                key: NAME_FIELD.into(),
                operator: "In".into(),
                values: Some(vec![node.into()]),
            }]),
        }],
    });
    pod
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wants(spec: serde_json::Value) -> Wants {
        Wants::of(&serde_json::from_value(json!({"spec": spec})).expect("a template"))
    }

    fn node(spec: serde_json::Value) -> Node {
        let meta = json!({"name": "a", "labels": {"disk": "ssd", "size": "4"}});
        serde_json::from_value(json!({"metadata": meta, "spec": spec})).expect("a node")
    }

    #[test]
    fn a_node_fits_by_selector_affinity_and_taints() {
        let plain = json!({"containers": []});
        let fit = |pod: &serde_json::Value, on: serde_json::Value| {
            let Fit { should_run, may_stay } = wants(pod.clone()).fit(&node(on));
            (should_run, may_stay)
        };
        let taint = |key: &str, effect: &str| json!({"taints": [{"key": key, "effect": effect}]});
        assert_eq!(fit(&plain, json!({})), (true, true));
        assert_eq!(fit(&plain, taint("dedicated", "NoSchedule")), (false, true), "may stay");
        assert_eq!(fit(&plain, taint("dedicated", "NoExecute")), (false, false));
        assert_eq!(fit(&plain, taint("node.kubernetes.io/unschedulable", "NoSchedule")), (true, true));
        assert_eq!(fit(&plain, taint("node.kubernetes.io/network-unavailable", "NoSchedule")), (false, true));
        let host = json!({"containers": [], "hostNetwork": true});
        assert_eq!(fit(&host, taint("node.kubernetes.io/network-unavailable", "NoSchedule")), (true, true));
        assert_eq!(fit(&json!({"containers": [], "nodeSelector": {"disk": "hdd"}}), json!({})), (false, false));
        let affinity = |operator: &str, values: serde_json::Value| {
            json!({"containers": [], "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [{"key": "size", "operator": operator, "values": values}]}]}}}})
        };
        assert_eq!(fit(&affinity("Gt", json!(["3"])), json!({})), (true, true));
        assert_eq!(fit(&affinity("Lt", json!(["3"])), json!({})), (false, false));
        assert_eq!(fit(&affinity("NotIn", json!(["4"])), json!({})), (false, false));
    }

    #[test]
    fn a_pod_knows_its_node_before_it_is_bound() {
        let template: PodTemplateSpec =
            serde_json::from_value(json!({"spec": {"containers": []}})).expect("a template");
        let pod = pod_for(&template, "d", OwnerReference::default(), "n7");
        assert_eq!(node_of(&pod), Some("n7"));
        assert_eq!(pod.spec.and_then(|spec| spec.tolerations).map(|all| all.len()), Some(6));
    }
}

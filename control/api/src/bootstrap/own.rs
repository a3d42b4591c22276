//! What a cluster of this product has beyond what every cluster has: the rules by which nodes join, and the default class of
//! volumes.

use serde_json::{Value, json};

const RBAC: &str = "rbac.authorization.k8s.io";

/// Bindings by which a host with a bootstrap token becomes a node and renews its certificates, as kubeadm makes them: name,
/// cluster role, group.
const JOINING: [(&str, &str, &str); 3] = [
    ("coracle:node-bootstrap", "system:node-bootstrapper", "system:bootstrappers"),
    (
        "coracle:node-autoapprove-bootstrap",
        "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
        "system:bootstrappers",
    ),
    (
        "coracle:node-autoapprove-renewal",
        "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
        "system:nodes",
    ),
];

/// Rules that the built-in controllers need beyond those of Kubernetes: role, service account of `kube-system`, rules.
fn rules() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        (
            "coracle:kubelet-serving-approver",
            "certificate-controller",
            json!([{"apiGroups": ["certificates.k8s.io"], "resources": ["signers"],
                "resourceNames": ["kubernetes.io/kubelet-serving"], "verbs": ["approve"]}]),
        ),
        (
            "coracle:local-volumes",
            "persistent-volume-binder",
            json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]),
        ),
        (
            "coracle:token-secrets",
            "service-account-token-controller",
            json!([
                {"apiGroups": [""], "resources": ["serviceaccounts"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
                {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "update", "delete"]},
            ]),
        ),
        (
            "coracle:service-addresses",
            "service-cidrs-controller",
            json!([
                {"apiGroups": ["networking.k8s.io"], "resources": ["ipaddresses"], "verbs": ["delete"]},
                {"apiGroups": [""], "resources": ["services"], "verbs": ["get"]},
            ]),
        ),
    ]
}

fn binding(name: &str, role: &str, subject: &Value) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}, "subjects": [subject]})
}

/// The default class of volumes.
pub(super) fn local_class() -> Value {
    json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
        "metadata": {"name": "coracle-local", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "coracle.io/local", "reclaimPolicy": "Delete", "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": true})
}

/// The objects, with group and resource.
pub(super) fn objects() -> Vec<(&'static str, &'static str, Value)> {
    let mut all = Vec::new();
    for (name, role, group) in JOINING {
        let subject = json!({"apiGroup": RBAC, "kind": "Group", "name": group});
        all.push((RBAC, "clusterrolebindings", binding(name, role, &subject)));
    }
    for (name, account, rules) in rules() {
        let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": name}, "rules": rules});
        let subject = json!({"kind": "ServiceAccount", "name": account, "namespace": "kube-system"});
        all.push((RBAC, "clusterroles", role));
        all.push((RBAC, "clusterrolebindings", binding(name, name, &subject)));
    }
    all
}

//! The Node authoriser: a node reads what the pods bound to it refer to, and nothing else of that kind.
//!
//! Source: `plugin/pkg/auth/authorizer/node`. Its rules for everything else are those of the cluster role `system:node`, which
//! is bound to nobody; to them come the rules of the parts that a Coracle node has built in: service rules, network policies
//! and DNS.

use std::sync::{Arc, OnceLock, Weak};

use k8s_openapi::api::core::v1::{Container, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, Volume};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use serde_json::{Value, json};

use crate::authz::rbac::Rule;
use crate::authz::{Attributes, Authorizer, Decision};
use crate::informer::{Index, Informer};
use crate::server::ApiServer;
use crate::user::UserInfo;

/// The caches that the authoriser looks into; pods by their node.
struct Caches {
    pods: Index<Pod>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
    attachments: Arc<Informer<VolumeAttachment>>,
}

/// The authoriser of nodes.
pub struct Nodes {
    api: Weak<ApiServer>,
    caches: OnceLock<Caches>,
    rules: Vec<Rule>,
}

/// What a node's own service rules, policies and DNS read.
fn built_in_parts() -> [Value; 3] {
    [
        json!({"verbs": ["get", "list", "watch"], "apiGroups": [""], "resources": ["endpoints", "services", "nodes", "namespaces"]}),
        json!({"verbs": ["get", "list", "watch"], "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"]}),
        json!({"verbs": ["get", "list", "watch"], "apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies", "servicecidrs"]}),
    ]
}

impl Nodes {
    pub fn new(api: &Arc<ApiServer>) -> Self {
        let mut rules = crate::bootstrap::role("system:node").map(|r| Rule::parse_all(&r)).unwrap_or_default();
        rules.extend(built_in_parts().iter().map(Rule::parse));
        Nodes { api: Arc::downgrade(api), caches: OnceLock::new(), rules }
    }

    fn caches(&self) -> Option<&Caches> {
        let api = self.api.upgrade()?;
        Some(
            self.caches.get_or_init(|| Caches {
                pods: api
                    .informer::<Pod>()
                    .index(|p| p.spec.as_ref().and_then(|s| s.node_name.clone()).into_iter().collect()),
                claims: api.informer(),
                volumes: api.informer(),
                attachments: api.informer(),
            }),
        )
    }

    /// Whether any pod of the node is taken by `f`, which gets namespace, name and spec.
    fn any_pod(&self, node: &str, mut f: impl FnMut(&str, &str, &PodSpec) -> bool) -> bool {
        let Some(caches) = self.caches() else { return false };
        caches.pods.get(node).any(|p| {
            let (ns, name) =
                (p.metadata.namespace.as_deref().unwrap_or_default(), p.metadata.name.as_deref().unwrap_or_default());
            p.spec.as_ref().is_some_and(|s| f(ns, name, s))
        })
    }

    /// Whether the driver of one of the pod's persistent volumes is to be given the secret on the node.
    fn of_volumes(&self, namespace: &str, pod: &str, spec: &PodSpec, a: &Attributes<'_>) -> bool {
        let Some(caches) = self.caches() else { return false };
        claims(pod, spec).any(|claim| {
            let claim = caches.claims.get(namespace, &claim);
            let volume = claim.and_then(|claim| caches.volumes.get("", claim.spec.as_ref()?.volume_name.as_deref()?));
            let csi = volume.as_ref().and_then(|volume| volume.spec.as_ref()?.csi.as_ref());
            let given =
                csi.map(|csi| [&csi.node_stage_secret_ref, &csi.node_publish_secret_ref, &csi.node_expand_secret_ref]);
            given.into_iter().flatten().flatten().any(|secret| {
                secret.name.as_deref() == Some(a.name)
                    && secret.namespace.as_deref().unwrap_or(namespace) == a.namespace
            })
        })
    }

    /// Whether a pod of the node claims devices by this claim.
    fn claims_devices(&self, node: &str, a: &Attributes<'_>) -> bool {
        let Some(caches) = self.caches() else { return false };
        let mut pods = caches.pods.get(node);
        pods.any(|pod| {
            if pod.metadata.namespace.as_deref() != Some(a.namespace) {
                return false;
            }
            let named = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
            let made = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
            named.filter_map(|entry| entry.resource_claim_name.as_deref()).any(|name| name == a.name)
                || made.filter_map(|made| made.resource_claim_name.as_deref()).any(|name| name == a.name)
        })
    }

    fn refers(&self, node: &str, a: &Attributes<'_>) -> bool {
        match a.resource {
            "secrets" => self.any_pod(node, |ns, pod, s| {
                (ns == a.namespace && secrets(s, a.name)) || self.of_volumes(ns, pod, s, a)
            }),
            "configmaps" => self.any_pod(node, |ns, _, s| ns == a.namespace && config_maps(s, a.name)),
            "persistentvolumeclaims" => {
                self.any_pod(node, |ns, pod, s| ns == a.namespace && claims(pod, s).any(|c| c == a.name))
            }
            "persistentvolumes" => {
                let Some(caches) = self.caches() else { return false };
                self.any_pod(node, |ns, pod, s| {
                    claims(pod, s).any(|c| {
                        caches
                            .claims
                            .get(ns, &c)
                            .is_some_and(|c| c.spec.as_ref().and_then(|s| s.volume_name.as_deref()) == Some(a.name))
                    })
                })
            }
            "serviceaccounts" => self.any_pod(node, |ns, _, s| {
                ns == a.namespace && s.service_account_name.as_deref().unwrap_or("default") == a.name
            }),
            "resourceclaims" => self.claims_devices(node, a),
            "volumeattachments" => {
                self.caches().and_then(|c| c.attachments.get("", a.name)).is_some_and(|v| v.spec.node_name == node)
            }
            _ => false,
        }
    }
}

fn containers(s: &PodSpec) -> impl Iterator<Item = &Container> {
    s.containers.iter().chain(s.init_containers.iter().flatten())
}

fn volumes(s: &PodSpec) -> impl Iterator<Item = &Volume> {
    s.volumes.iter().flatten()
}

fn secrets(s: &PodSpec, name: &str) -> bool {
    let pull = s.image_pull_secrets.iter().flatten().any(|r| r.name == name);
    let env = containers(s).any(|c| {
        let from = c.env_from.iter().flatten().any(|f| f.secret_ref.as_ref().is_some_and(|r| r.name == name));
        from || c
            .env
            .iter()
            .flatten()
            .any(|e| e.value_from.as_ref().and_then(|v| v.secret_key_ref.as_ref()).is_some_and(|r| r.name == name))
    });
    pull || env
        || volumes(s).any(|v| {
            v.secret.as_ref().is_some_and(|x| x.secret_name.as_deref() == Some(name))
                || v.projected.as_ref().is_some_and(|p| {
                    p.sources.iter().flatten().any(|x| x.secret.as_ref().is_some_and(|r| r.name == name))
                })
                || v.csi.as_ref().and_then(|c| c.node_publish_secret_ref.as_ref()).is_some_and(|r| r.name == name)
        })
}

fn config_maps(s: &PodSpec, name: &str) -> bool {
    let env =
        containers(s).any(|c| {
            let from = c.env_from.iter().flatten().any(|f| f.config_map_ref.as_ref().is_some_and(|r| r.name == name));
            from || c.env.iter().flatten().any(|e| {
                e.value_from.as_ref().and_then(|v| v.config_map_key_ref.as_ref()).is_some_and(|r| r.name == name)
            })
        });
    env || volumes(s).any(|v| {
        v.config_map.as_ref().is_some_and(|x| x.name == name)
            || v.projected.as_ref().is_some_and(|p| {
                p.sources.iter().flatten().any(|x| x.config_map.as_ref().is_some_and(|r| r.name == name))
            })
    })
}

/// Claims of a pod, those of its ephemeral volumes included.
fn claims<'a>(pod: &'a str, s: &'a PodSpec) -> impl Iterator<Item = String> + 'a {
    volumes(s).filter_map(move |v| match (&v.persistent_volume_claim, &v.ephemeral) {
        (Some(c), _) => Some(c.claim_name.clone()),
        (None, Some(_)) => Some(format!("{pod}-{}", v.name)),
        (None, None) => None,
    })
}

impl Authorizer for Nodes {
    fn authorize(&self, a: &Attributes<'_>) -> Decision {
        let no = || Decision::NoOpinion(String::new());
        let Some(node) = node_of(a.user) else { return no() };
        if !a.is_resource {
            return if a.path == crate::node::TUNNEL_PATH { Decision::Allow(String::new()) } else { no() };
        }
        let limited = match (a.group, a.resource) {
            ("", "secrets" | "configmaps" | "persistentvolumes" | "persistentvolumeclaims" | "serviceaccounts") => true,
            ("storage.k8s.io", "volumeattachments") | ("resource.k8s.io", "resourceclaims") => true,
            ("coordination.k8s.io", "leases") => {
                let own =
                    a.namespace == "kube-node-lease" && (a.name == node || (a.verb == "create" && a.name.is_empty()));
                if !own {
                    return Decision::NoOpinion(format!(
                        "can only access node lease with the same name as the requesting node {node:?}"
                    ));
                }
                false
            }
            ("storage.k8s.io", "csinodes") => {
                if a.name != node && !(a.verb == "create" && a.name.is_empty()) {
                    return Decision::NoOpinion(format!(
                        "can only access CSINode with the same name as the requesting node {node:?}"
                    ));
                }
                false
            }
            _ => false,
        };
        if !self.rules.iter().any(|r| r.allows(a)) {
            return no();
        }
        if !limited {
            return Decision::Allow(String::new());
        }
        if a.name.is_empty() {
            return Decision::NoOpinion("No Object name found".into());
        }
        if self.refers(node, a) {
            Decision::Allow(String::new())
        } else {
            Decision::NoOpinion(format!("no relationship found between node '{node}' and this object"))
        }
    }
}

/// The node that a user is, if it is one.
pub fn node_of(user: &UserInfo) -> Option<&str> {
    if user.is_in("system:nodes") { user.name.strip_prefix("system:node:") } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_a_pod() {
        let spec: PodSpec = serde_json::from_value(json!({
            "containers": [{"name": "c", "envFrom": [{"secretRef": {"name": "env"}}],
                "env": [{"name": "K", "valueFrom": {"configMapKeyRef": {"name": "key", "key": "k"}}}]}],
            "imagePullSecrets": [{"name": "pull"}],
            "volumes": [{"name": "s", "secret": {"secretName": "vol"}}, {"name": "e", "ephemeral": {}},
                {"name": "p", "projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}]}},
                {"name": "d", "persistentVolumeClaim": {"claimName": "data"}}],
        }))
        .expect("a pod spec");
        for s in ["env", "pull", "vol"] {
            assert!(secrets(&spec, s), "{s}");
        }
        assert!(!secrets(&spec, "other") && config_maps(&spec, "key") && config_maps(&spec, "kube-root-ca.crt"));
        assert_eq!(claims("web", &spec).collect::<Vec<_>>(), ["web-e", "data"]);
    }
}

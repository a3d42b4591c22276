//! Aggregated cluster roles: a role with an aggregation rule has the rules of every role that its selectors match, so that
//! whoever extends the API extends `view`, `edit` and `admin` by a label.

use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::{Api, ResourceExt};

use crate::common::selector;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

pub(crate) struct Aggregation {
    host: Host,
    roles: Arc<Informer<ClusterRole>>,
}

impl Aggregation {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { roles: host.informer(), host }
    }
}

/// The rules of the roles that match, by name of the role, each once.
fn rules(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Vec<PolicyRule> {
    let selectors = role.aggregation_rule.iter().flat_map(|rule| rule.cluster_role_selectors.iter().flatten());
    let selectors: Vec<_> = selectors.collect();
    let mut gathered: Vec<PolicyRule> = Vec::new();
    // The cache lists by name.
    for other in all.iter().filter(|other| other.metadata.name != role.metadata.name) {
        if selectors.iter().any(|wanted| selector::matches(wanted, other.metadata.labels.as_ref())) {
            for rule in other.rules.iter().flatten() {
                if !gathered.contains(rule) {
                    gathered.push(rule.clone());
                }
            }
        }
    }
    gathered
}

impl Controller for Aggregation {
    const NAME: &'static str = "clusterrole-aggregation-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.roles, |this, _, queue| {
            for role in this.roles.list().filter(|role| role.aggregation_rule.is_some()) {
                queue.add(Key::of(&*role));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(role) = self.roles.get("", &key.name) else { return Ok(Outcome::Done) };
        if role.aggregation_rule.is_none() {
            return Ok(Outcome::Done);
        }
        let wanted = rules(&role, &self.roles.list().collect::<Vec<_>>());
        if role.rules.as_deref().unwrap_or_default() != wanted {
            let patch = serde_json::json!({"metadata": {"resourceVersion": role.resource_version()}, "rules": wanted});
            self.host.patch(&Api::<ClusterRole>::all(self.host.client.clone()), &key.name, patch).await?;
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_are_gathered_once_each_and_never_from_itself() {
        let role = |name: &str, label: &str, resources: &[&str]| -> Arc<ClusterRole> {
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": {"name": name, "labels": {"to": label}},
                    "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "view"}}]},
                    "rules": resources.iter().map(|r| json!({"apiGroups": [""], "resources": [r], "verbs": ["get"]})).collect::<Vec<_>>(),
                }))
                .expect("a role"),
            )
        };
        let all = [
            role("a", "view", &["x", "y"]),
            role("b", "view", &["y", "z"]),
            role("c", "edit", &["w"]),
            role("view", "view", &["old"]),
        ];
        let resources: Vec<_> =
            rules(&all[3], &all).into_iter().flat_map(|rule| rule.resources.unwrap_or_default()).collect();
        assert_eq!(resources, ["x", "y", "z"]);
    }
}

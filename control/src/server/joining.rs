//! What hosts find when they join: the authority, readable by anybody who knows its hash; the right to ask for a
//! certificate; the settings that all nodes share.

use std::sync::Arc;

use anyhow::Context;
use coracle_api::bootstrap;
use coracle_api::server::ApiServer;
use coracle_api::user::{SYSTEM_ANONYMOUS, SYSTEM_AUTHENTICATED, UserInfo};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::{self, Cluster};
use crate::token;

const MANAGER: &str = "coracle";

/// Makes the objects that joining needs, and brings those up to date that follow from settings.
pub(super) async fn prepare(api: &Arc<ApiServer>, cluster: &Cluster, own_token: Option<&str>) -> anyhow::Result<()> {
    for (resource, object) in rights() {
        let made = bootstrap::create(api.store.as_ref(), "rbac.authorization.k8s.io", resource, object).await;
        made.map_err(|status| anyhow::anyhow!("{status}")).with_context(|| format!("make the {resource}"))?;
    }
    let client = api.client(UserInfo::apiserver());
    let url = format!("https://{}", api.config.advertise);
    let settings = serde_json::to_string(cluster)?;
    for (namespace, name, member, text) in [
        (token::INFO_NAMESPACE, token::INFO_NAME, token::INFO_MEMBER, token::info(&api.pki.ca_pem, &url)),
        (cluster::NAMESPACE, cluster::NAME, cluster::MEMBER, settings),
    ] {
        let map = ConfigMap {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            data: Some([(member.to_owned(), text)].into()),
            ..ConfigMap::default()
        };
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let parameters = PatchParams::apply(MANAGER).force();
        maps.patch(name, &parameters, &Patch::Apply(map)).await.with_context(|| format!("write {namespace}/{name}"))?;
    }
    if let Some(own) = own_token {
        let secret = token::Bootstrap::parse(own)?.secret("given to the server by --token", None);
        let name = secret.metadata.name.clone().unwrap_or_default();
        let secrets: Api<Secret> = Api::namespaced(client, token::NAMESPACE);
        let parameters = PatchParams::apply(MANAGER).force();
        secrets.patch(&name, &parameters, &Patch::Apply(secret)).await.context("write the server's --token")?;
    }
    Ok(())
}

/// Roles and bindings by resource. Joining hosts may ask for their first certificate, nodes for the next one.
fn rights() -> Vec<(&'static str, Value)> {
    const VERSION: &str = "rbac.authorization.k8s.io/v1";
    let subject =
        |kind: &str, name: &str| json!([{"kind": kind, "apiGroup": "rbac.authorization.k8s.io", "name": name}]);
    let role_ref =
        |kind: &str, name: &str| json!({"kind": kind, "apiGroup": "rbac.authorization.k8s.io", "name": name});
    let cluster_wide = [
        ("coracle:join", "system:node-bootstrapper", "system:bootstrappers"),
        (
            "coracle:approve-joining-nodes",
            "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
            "system:bootstrappers",
        ),
        (
            "coracle:approve-renewing-nodes",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            "system:nodes",
        ),
    ];
    // Without a token the authority is asked for; with one, whether the token is good.
    let anybody = json!([
        {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": SYSTEM_ANONYMOUS},
        {"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": SYSTEM_AUTHENTICATED},
    ]);
    let one_map = [
        (token::INFO_NAMESPACE, token::INFO_NAME, anybody),
        (cluster::NAMESPACE, cluster::NAME, subject("Group", "system:nodes")),
    ];
    let mut all: Vec<_> = cluster_wide
        .into_iter()
        .map(|(name, role, group)| {
            let binding = json!({"apiVersion": VERSION, "kind": "ClusterRoleBinding", "metadata": {"name": name},
                "subjects": subject("Group", group), "roleRef": role_ref("ClusterRole", role)});
            ("clusterrolebindings", binding)
        })
        .collect();
    for (namespace, map, who) in one_map {
        let metadata = json!({"name": format!("coracle:{map}"), "namespace": namespace});
        let rule = json!({"verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [map]});
        let role = json!({"apiVersion": VERSION, "kind": "Role", "metadata": metadata, "rules": [rule]});
        let binding = json!({"apiVersion": VERSION, "kind": "RoleBinding", "metadata": metadata,
            "subjects": who, "roleRef": role_ref("Role", &format!("coracle:{map}"))});
        all.extend([("roles", role), ("rolebindings", binding)]);
    }
    all
}

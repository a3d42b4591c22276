//! ServiceAccount: every pod has one, and its token is mounted unless somebody opted out.

use serde_json::{Value, json};

use crate::admission::plugin::{Plugin, forbid, look, new_pod};
use crate::context::Context;
use crate::kinds::edit::{child, each, empty, list, put, text};
use crate::kinds::names;
use crate::status::Status;

/// Where containers find the token.
const MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Seconds that a mounted token asks for: an hour and a little, so that servers tell it apart from others.
const TOKEN_SECONDS: u32 = 3607;
/// Letters of random suffixes: no vowels, nothing that looks alike.
pub const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

pub static PLUGIN: Plugin = Plugin {
    name: "ServiceAccount",
    handles: new_pod,
    admit: Some(|ctx, pod, _| Box::pin(async move { admit(ctx, pod).await })),
    validate: Some(|ctx, pod, _| {
        Box::pin(async move {
            if is_mirror(pod) {
                return mirror(ctx, pod);
            }
            account(ctx, pod).await.map(|_| ())
        })
    }),
};

fn is_mirror(pod: &Value) -> bool {
    pod.pointer("/metadata/annotations").and_then(|a| a.get("kubernetes.io/config.mirror")).is_some()
}

/// Mirror pods stand for files on a node and may not refer to what the API keeps.
fn mirror(ctx: &Context, pod: &Value) -> Result<(), Status> {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    if !text(spec, "serviceAccountName").is_empty() {
        return Err(forbid(ctx, pod, "a mirror pod may not reference service accounts"));
    }
    for v in list(spec, "volumes") {
        let tokens = v.pointer("/projected/sources").and_then(Value::as_array).into_iter().flatten();
        if tokens.into_iter().any(|s| s.get("serviceAccountToken").is_some()) {
            return Err(forbid(ctx, pod, "a mirror pod may not use ServiceAccountToken volume projections"));
        }
    }
    Ok(())
}

async fn account(ctx: &Context, pod: &Value) -> Result<Value, Status> {
    let name = pod.pointer("/spec/serviceAccountName").and_then(Value::as_str).unwrap_or_default();
    match look(ctx, "", "serviceaccounts", &ctx.namespace, name).await? {
        Some(sa) => Ok(sa),
        None => Err(forbid(
            ctx,
            pod,
            format!("error looking up service account {}/{name}: serviceaccount {name:?} not found", ctx.namespace),
        )),
    }
}

async fn admit(ctx: &Context, pod: &mut Value) -> Result<(), Status> {
    if is_mirror(pod) {
        return mirror(ctx, pod);
    }
    let spec = child(pod, "spec");
    empty(spec, "serviceAccountName", "default");
    let name = text(spec, "serviceAccountName").to_owned();
    put(spec, "serviceAccount", name);
    let sa = account(ctx, pod).await?;
    let wanted = pod
        .pointer("/spec/automountServiceAccountToken")
        .or_else(|| sa.get("automountServiceAccountToken"))
        .and_then(Value::as_bool)
        .unwrap_or(true);
    let spec = child(pod, "spec");
    if wanted {
        mount_token(spec);
    }
    if list(spec, "imagePullSecrets").is_empty()
        && let Some(secrets) = sa.get("imagePullSecrets").filter(|s| s.as_array().is_some_and(|a| !a.is_empty()))
    {
        put(spec, "imagePullSecrets", secrets.clone());
    }
    if sa.pointer("/metadata/annotations").is_some_and(|a| text(a, "kubernetes.io/enforce-mountable-secrets") == "true")
    {
        mountable(ctx, pod, &sa)?;
    }
    Ok(())
}

/// Accounts that enforce it limit pods to the secrets that they list.
fn mountable(ctx: &Context, pod: &Value, sa: &Value) -> Result<(), Status> {
    let allowed: Vec<&str> = list(sa, "secrets").iter().map(|s| text(s, "name")).collect();
    for v in list(pod.get("spec").unwrap_or(&Value::Null), "volumes") {
        if let Some(name) = v.pointer("/secret/secretName").and_then(Value::as_str)
            && !allowed.contains(&name)
        {
            return Err(forbid(
                ctx,
                pod,
                format!(
                    "volume with secret.secretName={name:?} is not allowed because service account {} does not reference that secret",
                    crate::object::name(sa)
                ),
            ));
        }
    }
    Ok(())
}

/// Five random letters, as generated names end with.
pub fn suffix() -> String {
    (0..5).map(|_| char::from(SUFFIX_LETTERS[rand::random_range(0..SUFFIX_LETTERS.len())])).collect()
}

fn mount_token(spec: &mut Value) {
    // A volume of the kind that somebody has already put there is used again.
    let volumes = list(spec, "volumes");
    let present =
        volumes.iter().map(|v| text(v, "name")).find(|n| n.starts_with("kube-api-access-")).map(str::to_owned);
    let name = present.clone().unwrap_or_else(|| format!("kube-api-access-{}", suffix()));
    debug_assert!(names::dns1123_label(&name).is_empty());
    let mut used = false;
    for containers in ["initContainers", "containers"] {
        each(spec, containers, |c| {
            if list(c, "volumeMounts").iter().any(|m| text(m, "mountPath") == MOUNT) {
                return;
            }
            used = true;
            let mut mounts = list(c, "volumeMounts").to_vec();
            mounts.push(json!({"name": name, "readOnly": true, "mountPath": MOUNT}));
            put(c, "volumeMounts", mounts);
        });
    }
    if used && present.is_none() {
        let mut volumes = list(spec, "volumes").to_vec();
        volumes.push(json!({"name": name, "projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}}));
        put(spec, "volumes", volumes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_mounted_once() {
        let mut spec =
            json!({"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "x", "mountPath": MOUNT}]}]});
        mount_token(&mut spec);
        assert_eq!(spec["volumes"].as_array().map(Vec::len), Some(1));
        assert_eq!(spec["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"], 3607);
        assert_eq!(spec["containers"][0]["volumeMounts"][0]["name"], spec["volumes"][0]["name"]);
        assert_eq!(spec["containers"][1]["volumeMounts"].as_array().map(Vec::len), Some(1));
        let again = spec.clone();
        mount_token(&mut spec);
        assert_eq!(spec, again);
    }
}

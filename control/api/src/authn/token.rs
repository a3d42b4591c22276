//! Tokens: issuing those of service accounts, verifying theirs and those of OpenID Connect issuers.

use std::sync::Arc;

use coracle_schema::FieldError;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::keys::{Keys, Signed};
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// Shortest life of a token.
const SHORTEST_S: i64 = 600;
/// Longest life of a token.
const LONGEST_S: i64 = 1 << 32;
/// Life when none is asked for.
const USUAL_S: i64 = 3600;
/// Tokens of pods that ask for this life get a year, and a warning in the audit log after it
/// (`--service-account-extend-token-expiration`).
const EXTENDED_FROM_S: i64 = 3607;
/// That year.
const EXTENDED_S: i64 = 365 * 24 * 3600;
/// Label of a token's secret: the day of its last use (KEP-2799).
pub const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
/// Label of a token's secret: the day since when it holds no longer.
pub const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";
/// Clocks may differ by this much.
const LEEWAY_S: i64 = 60;

/// Answers a TokenRequest.
pub(super) async fn issue(
    keys: &Keys,
    api: &Arc<ApiServer>,
    account: &Value,
    mut request: Value,
    now: Timestamp,
) -> Result<Value, Status> {
    let (namespace, name) = (object::namespace(account), object::name(account));
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(USUAL_S);
    let invalid = |error| Err(Status::invalid_kind("authentication.k8s.io", "TokenRequest", "", &[error]));
    if seconds < SHORTEST_S {
        return invalid(FieldError::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration less than 10 minutes",
        ));
    }
    if seconds > LONGEST_S {
        return invalid(FieldError::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration larger than 2^32 seconds",
        ));
    }
    let audiences: Vec<String> = request
        .pointer("/spec/audiences")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect();
    let audiences = if audiences.is_empty() { vec![keys.issuer.clone()] } else { audiences };
    let mut private = json!({
        "namespace": namespace,
        "serviceaccount": {"name": name, "uid": object::uid(account)},
    });
    let bound = request.pointer("/spec/boundObjectRef").filter(|bound| bound.is_object()).cloned();
    let mut life = seconds;
    if let Some(bound) = &bound {
        bind(api, namespace, name, bound, &mut private).await?;
        if seconds == EXTENDED_FROM_S && audiences.contains(&keys.issuer) && object::text(bound, "/kind") == "Pod" {
            private["warnafter"] = (now.as_second() + seconds).into();
            life = EXTENDED_S;
        }
    }
    let issued = now.as_second();
    let claims = json!({
        "aud": audiences, "exp": issued + life, "iat": issued, "nbf": issued, "iss": keys.issuer,
        "jti": uuid::Uuid::new_v4().to_string(), "kubernetes.io": private,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    });
    let token = keys.sign(&claims).map_err(Status::internal)?;
    let end = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
    let spec = object::members(object::members(&mut request).entry("spec").or_insert_with(|| json!({})));
    spec.insert("audiences".into(), json!(audiences));
    spec.insert("expirationSeconds".into(), seconds.into());
    spec.entry("boundObjectRef").or_insert(Value::Null);
    request["status"] = json!({"token": token, "expirationTimestamp": crate::time::seconds(end)});
    let metadata = object::metadata(&mut request);
    metadata.insert("name".into(), name.into());
    metadata.insert("namespace".into(), namespace.into());
    metadata.insert("creationTimestamp".into(), crate::time::seconds(now).into());
    Ok(request)
}

/// Writes the object that a token is bound to into its claims.
async fn bind(
    api: &Arc<ApiServer>,
    namespace: &str,
    account: &str,
    bound: &Value,
    private: &mut Value,
) -> Result<(), Status> {
    let (kind, name, uid) = (object::text(bound, "/kind"), object::text(bound, "/name"), object::text(bound, "/uid"));
    let (resource, scope) = match kind {
        "Pod" => ("pods", namespace),
        "Secret" => ("secrets", namespace),
        "Node" => ("nodes", ""),
        other => {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to object type {other:?}"
            )));
        }
    };
    let row = api.kind("", "v1", resource).ok_or_else(Status::no_such_resource)?;
    let object = api.get(&row, scope, name).await?.ok_or_else(|| Status::not_found(&row, name))?;
    let found = object::uid(&object);
    if !uid.is_empty() && uid != found {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict(&row, name, &why));
    }
    if kind == "Pod" {
        let runs_as = object::text(&object, "/spec/serviceAccountName");
        if runs_as != account {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
            )));
        }
        let node = object::text(&object, "/spec/nodeName");
        if !node.is_empty() {
            let nodes = api.kind("", "v1", "nodes").ok_or_else(Status::no_such_resource)?;
            private["node"] = match api.get(&nodes, "", node).await? {
                Some(found) => json!({"name": node, "uid": object::uid(&found)}),
                None => json!({"name": node}),
            };
        }
    }
    private[kind.to_lowercase()] = json!({"name": name, "uid": found});
    Ok(())
}

/// The user of a signed token, and for which of `audiences` it holds (the server's own when none are asked for).
pub(super) async fn verify(
    authn: &super::Authenticator,
    api: &Arc<ApiServer>,
    token: &str,
    audiences: &[String],
) -> Result<(Arc<UserInfo>, Vec<String>), Status> {
    let keys = &authn.keys;
    let token = Signed::parse(token).ok_or_else(Status::unauthorized)?;
    let claims = &token.claims;
    let now = Timestamp::now().as_second();
    let time = |claim: &str| claims.get(claim).and_then(Value::as_i64);
    if time("exp").is_none_or(|end| end < now) || time("nbf").is_some_and(|start| start > now + LEEWAY_S) {
        return Err(Status::unauthorized());
    }
    let issuer = object::text(claims, "/iss");
    if issuer != keys.issuer {
        let trusted = authn.settings.issuers.iter().find(|one| one.url() == issuer);
        let user = trusted.ok_or_else(Status::unauthorized)?.user(api, &token).await.map_err(|why| {
            tracing::info!(issuer, %why, "a token was refused");
            Status::unauthorized()
        })?;
        return authn.agnostic(Arc::new(user), audiences);
    }
    if object::text(&token.header, "/alg") != "ES256" || !keys.is_ours(token.text.as_bytes(), &token.signature) {
        return Err(Status::unauthorized());
    }
    let holds: Vec<&str> = match claims.get("aud") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let own = [keys.issuer.clone()];
    let wanted = if audiences.is_empty() { &own[..] } else { audiences };
    let shared: Vec<String> = wanted.iter().filter(|one| holds.contains(&one.as_str())).cloned().collect();
    if shared.is_empty() {
        return Err(Status::unauthorized());
    }
    service_account(api, claims).await.map(|user| (Arc::new(user), shared))
}

/// Refuses a token whose secret is marked as invalid; notes in the secret that the token was used today.
async fn use_secret(api: &Arc<ApiServer>, namespace: &str, name: &str) -> Result<(), Status> {
    let row = api.kind("", "v1", "secrets").ok_or_else(Status::no_such_resource)?;
    let secret = api.get(&row, namespace, name).await?.ok_or_else(Status::unauthorized)?;
    let label =
        |label: &str| secret.pointer("/metadata/labels").and_then(|labels| labels.get(label)).and_then(Value::as_str);
    if let Some(since) = label(INVALID_SINCE) {
        tracing::info!(
            namespace,
            name,
            since,
            "a token was refused that is marked as invalid: take the label {INVALID_SINCE} away to allow it"
        );
        return Err(Status::unauthorized());
    }
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date().to_string();
    if label(LAST_USED) != Some(&*today) {
        let patch = json!({"metadata": {"uid": object::uid(&secret), "labels": {LAST_USED: today}}});
        let secrets: kube::Api<k8s_openapi::api::core::v1::Secret> =
            kube::Api::namespaced(api.client(UserInfo::apiserver()), namespace);
        let written =
            secrets.patch_metadata(name, &kube::api::PatchParams::default(), &kube::api::Patch::Merge(patch)).await;
        // The token is good whether or not its use could be noted; the next use notes it.
        if let Err(error) = written {
            tracing::warn!(namespace, name, %error, "the use of a token was not noted in its secret");
        }
    }
    Ok(())
}

/// The service account of claims, when it and what the token is bound to still exist.
async fn service_account(api: &Arc<ApiServer>, claims: &Value) -> Result<UserInfo, Status> {
    let private = claims.get("kubernetes.io").ok_or_else(Status::unauthorized)?;
    let namespace = object::text(private, "/namespace");
    let name = object::text(private, "/serviceaccount/name");
    let uid = object::text(private, "/serviceaccount/uid");
    let exists = async |resource: &str, scope: &str, name: &str, uid: &str| -> Result<bool, Status> {
        let Some(row) = api.kind("", "v1", resource) else { return Ok(false) };
        let found = api.get(&row, scope, name).await?;
        Ok(found.is_some_and(|object| object::uid(&object) == uid))
    };
    if !exists("serviceaccounts", namespace, name, uid).await? {
        return Err(Status::unauthorized());
    }
    let mut user = UserInfo::new(
        format!("system:serviceaccount:{namespace}:{name}"),
        &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")],
    );
    user.uid = uid.to_owned();
    for (claim, resource, scope) in
        [("pod", "pods", namespace), ("secret", "secrets", namespace), ("node", "nodes", "")]
    {
        let Some(bound) = private.get(claim) else { continue };
        let (name, uid) = (object::text(bound, "/name"), object::text(bound, "/uid"));
        // The node of a pod is written down for information; only a token bound to the node itself ends with it.
        let informative = claim == "node" && private.get("pod").is_some();
        if !informative && !exists(resource, scope, name, uid).await? {
            return Err(Status::unauthorized());
        }
        if claim == "secret" {
            use_secret(api, namespace, name).await?;
        } else {
            user.extra.insert(format!("authentication.kubernetes.io/{claim}-name"), vec![name.to_owned()]);
            if !uid.is_empty() {
                user.extra.insert(format!("authentication.kubernetes.io/{claim}-uid"), vec![uid.to_owned()]);
            }
        }
    }
    let id = object::text(claims, "/jti");
    if !id.is_empty() {
        user.extra.insert("authentication.kubernetes.io/credential-id".into(), vec![format!("JTI={id}")]);
    }
    Ok(user)
}

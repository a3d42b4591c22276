//! Bootstrap tokens, and the review kinds that ask who somebody is.

use std::sync::Arc;

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use crate::context::Context;
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// The user of a bootstrap token (`abcdef.0123456789abcdef`), kept as a secret in `kube-system`.
pub(super) async fn bootstrap_token(api: &Arc<ApiServer>, token: &str) -> Result<Option<UserInfo>, Status> {
    let Some((id, secret)) = token.split_once('.') else { return Ok(None) };
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if id.len() != 6 || secret.len() != 16 || !plain(id) || !plain(secret) {
        return Ok(None);
    }
    let Some(row) = api.kind("", "v1", "secrets") else { return Ok(None) };
    let Some(object) = api.get(&row, "kube-system", &format!("bootstrap-token-{id}")).await? else { return Ok(None) };
    let data = |member: &str| {
        let text = object.get("data").and_then(|data| data.get(member)).and_then(Value::as_str)?;
        String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text).ok()?).ok()
    };
    let right = data("token-secret").is_some_and(|known| bool::from(known.as_bytes().ct_eq(secret.as_bytes())))
        && data("token-id").as_deref() == Some(id)
        && data("usage-bootstrap-authentication").as_deref() == Some("true")
        && object::text(&object, "/type") == "bootstrap.kubernetes.io/token"
        && object.pointer("/metadata/deletionTimestamp").is_none()
        && data("expiration").is_none_or(|end| end.parse::<Timestamp>().is_ok_and(|end| end > Timestamp::now()));
    if !right {
        return Ok(None);
    }
    let mut user = UserInfo::new(format!("system:bootstrap:{id}"), &["system:bootstrappers"]);
    for group in data("auth-extra-groups").unwrap_or_default().split(',').map(str::trim) {
        if group.starts_with("system:bootstrappers:") {
            user.groups.push(group.to_owned());
        }
    }
    Ok(Some(user))
}

/// Answers SelfSubjectReview and TokenReview.
pub(crate) async fn review(ctx: &Context, mut object: Value) -> Result<Value, Status> {
    let metadata = object::metadata(&mut object);
    metadata.insert("creationTimestamp".into(), ctx.now_text().into());
    if ctx.kind.resource == "selfsubjectreviews" {
        object["status"] = json!({"userInfo": user_value(&ctx.user)});
        return Ok(object);
    }
    let token = object::text(&object, "/spec/token").to_owned();
    if token.is_empty() {
        return Err(Status::bad_request("token is required for TokenReview in authentication"));
    }
    let audiences: Vec<String> = object
        .pointer("/spec/audiences")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect();
    object["status"] = match ctx.api.authn.token_user(&ctx.api, &token, &audiences).await {
        Ok((user, audiences)) => {
            let mut status = json!({"authenticated": true, "user": user_value(&user)});
            if !audiences.is_empty() {
                status["audiences"] = json!(audiences);
            }
            status
        }
        Err(status) if status.code == 401 => json!({"user": {}, "error": "[invalid bearer token]"}),
        Err(status) => return Err(status),
    };
    Ok(object)
}

/// `authentication.k8s.io/v1` UserInfo.
pub(crate) fn user_value(user: &UserInfo) -> Value {
    let mut value = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        value["uid"] = user.uid.clone().into();
    }
    if !user.extra.is_empty() {
        value["extra"] = json!(user.extra);
    }
    value
}

//! ServiceAccount tokens through TokenRequest, renewed before they end.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ServiceAccount, ServiceAccountTokenProjection};
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::error::VolumeError;
use super::plugin::Context;

/// A token's life where the pod does not say: one hour.
const DEFAULT_EXPIRATION_S: i64 = 3600;
/// A token is renewed when this share of its life is over: 80 %.
const RENEW_AT_PERCENT: u32 = 80;
/// … and no later than after a day.
const RENEW_AFTER_AT_MOST: Duration = Duration::from_secs(24 * 3600);
/// When the server does not answer, how soon it is asked again while the old token lives.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Tokens held.
const MAX_TOKENS: usize = 20_000;

/// Which token: pod UID, volume, path.
type Key = (String, String, String);

/// A token that lives.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) token: String,
    pub(super) renew_at: Instant,
    pub(super) expires_at: jiff::Timestamp,
    ends_at: Instant,
}

/// The tokens in use, so that a volume set up again for another reason keeps its token.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<Key, Held>>);

impl Tokens {
    /// The token for a projection.
    pub(super) async fn get(
        &self,
        context: &Context<'_>,
        source: &ServiceAccountTokenProjection,
    ) -> Result<Held, VolumeError> {
        let key: Key = (context.uid.to_owned(), context.volume.name.clone(), source.path.clone());
        let held = self.0.lock().get(&key).cloned();
        let now = Instant::now();
        if let Some(held) = held.as_ref().filter(|held| now < held.renew_at) {
            return Ok(held.clone());
        }
        match request(context, source).await {
            Ok(fresh) => {
                let mut tokens = self.0.lock();
                if tokens.len() >= MAX_TOKENS {
                    return Err(VolumeError::TooMany { what: "number of service account tokens", limit: MAX_TOKENS });
                }
                tokens.insert(key, fresh.clone());
                Ok(fresh)
            }
            // An old token is better than none while it lives.
            Err(error) => match held.filter(|held| now < held.ends_at) {
                Some(held) => {
                    tracing::warn!(pod = context.uid, volume = %context.volume.name, %error, "cannot renew service account token");
                    Ok(Held { renew_at: now + RETRY_AFTER, ..held })
                }
                None => Err(error),
            },
        }
    }

    /// Forgets a pod's tokens.
    pub(super) fn forget(&self, uid: &str) {
        self.0.lock().retain(|(pod, _, _), _| pod != uid);
    }
}

async fn request(context: &Context<'_>, source: &ServiceAccountTokenProjection) -> Result<Held, VolumeError> {
    let spec = context.pod.spec.as_ref();
    let account =
        spec.and_then(|spec| spec.service_account_name.as_deref()).filter(|name| !name.is_empty()).unwrap_or("default");
    let seconds = source.expiration_seconds.unwrap_or(DEFAULT_EXPIRATION_S);
    let wanted = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: source.audience.clone().filter(|audience| !audience.is_empty()).map(|audience| vec![audience]),
            expiration_seconds: Some(seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: context.pod.metadata.name.clone(),
                uid: context.pod.metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let failed =
        |reason: String| VolumeError::Api { kind: "token of serviceaccount", name: account.to_owned(), reason };
    let api: Api<ServiceAccount> = Api::namespaced(context.manager.objects.client().clone(), context.namespace);
    let asked_at = Instant::now();
    let answer = api
        .create_token_request(account, &PostParams::default(), &wanted)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let status = answer.status.ok_or_else(|| failed("the answer holds no token".into()))?;
    let token =
        status.token.filter(|token| !token.is_empty()).ok_or_else(|| failed("the answer holds no token".into()))?;
    let asked_for = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let expires_at = status.expiration_timestamp.map(|end| end.0);
    let life = expires_at.map_or(asked_for, |end| {
        // Already over by our clock: then the clocks differ, and the length that was asked for is the best guess.
        Duration::try_from(end.duration_since(jiff::Timestamp::now())).unwrap_or(asked_for)
    });
    let renew_at = asked_at + (life * RENEW_AT_PERCENT / 100).min(RENEW_AFTER_AT_MOST);
    let expires_at = expires_at.unwrap_or_else(|| jiff::Timestamp::now() + life);
    Ok(Held { token, renew_at, expires_at, ends_at: asked_at + life })
}

//! Authentication: client certificates, tokens, impersonation.

mod keys;
mod oidc;
mod request;

mod impersonate;
mod settings;
mod token;

use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use subtle::ConstantTimeEq as _;

use crate::http::Response;
use crate::pki::{Pki, PkiError};
use crate::server::{ApiServer, Config};
use crate::status::Status;
use crate::user::{SYSTEM_AUTHENTICATED, UserInfo};

pub(crate) use impersonate::{Acting, impersonate};
pub use oidc::Issuer;
pub(crate) use request::{review, user_value};
pub use settings::{Anonymous, AnonymousPath, Settings, SettingsError};
pub use token::{INVALID_SINCE, LAST_USED};

/// Who is who.
pub struct Authenticator {
    keys: keys::Keys,
    static_tokens: Vec<(Vec<u8>, Arc<UserInfo>)>,
    settings: Settings,
    anonymous: Arc<UserInfo>,
}

impl Authenticator {
    pub(crate) fn new(config: &Config, pki: &Pki) -> Result<Self, PkiError> {
        let keys = keys::Keys::new(config, pki)?;
        let static_tokens = config
            .authn
            .tokens
            .iter()
            .map(|(token, user)| (token.as_bytes().to_vec(), Arc::new(user.clone())))
            .collect();
        Ok(Self { keys, static_tokens, settings: config.authn.clone(), anonymous: Arc::new(UserInfo::anonymous()) })
    }

    /// The user of a request: by certificate, else by bearer token, else anonymous.
    pub(crate) async fn authenticate(
        &self,
        api: &Arc<ApiServer>,
        certificate: Option<Arc<UserInfo>>,
        headers: &HeaderMap,
        path: &str,
    ) -> Result<Arc<UserInfo>, Status> {
        if let Some(user) = certificate {
            return Ok(user);
        }
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim().to_owned())
            .or_else(|| websocket_bearer(headers));
        match bearer {
            Some(token) if !token.is_empty() => self.token_user(api, &token, &[]).await.map(|(user, _)| user),
            _ if headers.contains_key(AUTHORIZATION) => Err(Status::unauthorized()),
            _ if self.settings.anonymous.admits(path) => Ok(self.anonymous.clone()),
            _ => Err(Status::unauthorized()),
        }
    }

    /// The user of a token and the audiences for which it holds; 401 when it is nobody's.
    pub(crate) async fn token_user(
        &self,
        api: &Arc<ApiServer>,
        token: &str,
        audiences: &[String],
    ) -> Result<(Arc<UserInfo>, Vec<String>), Status> {
        let given = token.as_bytes();
        if let Some((_, user)) = self.static_tokens.iter().find(|(known, _)| bool::from(known.as_slice().ct_eq(given)))
        {
            return self.agnostic(user.clone(), audiences);
        }
        if token.matches('.').count() == 2 {
            return token::verify(self, api, token, audiences).await;
        }
        if let Some(user) = request::bootstrap_token(api, token).await? {
            return self.agnostic(Arc::new(user), audiences);
        }
        Err(Status::unauthorized())
    }

    /// Credentials without audiences of their own hold for this server, and for nobody else.
    fn agnostic(&self, user: Arc<UserInfo>, audiences: &[String]) -> Result<(Arc<UserInfo>, Vec<String>), Status> {
        let own = &self.keys.issuer;
        if audiences.is_empty() || audiences.contains(own) {
            return Ok((user, vec![own.clone()]));
        }
        Err(Status::unauthorized())
    }

    /// OIDC discovery of the service account issuer.
    pub(crate) fn discovery(&self, api: &ApiServer, path: &str) -> Option<Response> {
        self.keys.discovery(api, path)
    }

    /// Answers a TokenRequest for a service account.
    pub(crate) async fn request_token(
        &self,
        api: &Arc<ApiServer>,
        account: &serde_json::Value,
        request: serde_json::Value,
        now: jiff::Timestamp,
    ) -> Result<serde_json::Value, Status> {
        token::issue(&self.keys, api, account, request, now).await
    }
}

/// Browsers cannot set headers: `Sec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io.<token>`.
fn websocket_bearer(headers: &HeaderMap) -> Option<String> {
    use base64::Engine as _;
    const PREFIX: &str = "base64url.bearer.authorization.k8s.io.";
    let list = headers.get("sec-websocket-protocol")?.to_str().ok()?;
    let encoded = list.split(',').find_map(|one| one.trim().strip_prefix(PREFIX))?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(encoded.trim_end_matches('=')).ok()?;
    String::from_utf8(bytes).ok()
}

/// Adds the group of everyone with a name.
pub(crate) fn with_authenticated(mut user: UserInfo) -> UserInfo {
    if !user.is_in(SYSTEM_AUTHENTICATED) {
        user.groups.push(SYSTEM_AUTHENTICATED.into());
    }
    user
}

//! Secrets of type `kubernetes.io/service-account-token`: each is filled with a token of its account, the authority and the
//! namespace, and goes with the account.

use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, ResourceExt};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

const TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
pub(super) const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
/// The longest life that a token may have: such tokens end with their secret, not with time.
const LIFE_S: i64 = 1 << 32;

pub(crate) struct TokenSecrets {
    host: Host,
    secrets: Arc<Informer<Secret>>,
    accounts: Arc<Informer<ServiceAccount>>,
    authority_pem: String,
}

impl TokenSecrets {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { secrets: host.informer(), accounts: host.informer(), authority_pem: api.pki.ca_pem.clone(), host }
    }

    async fn token(&self, key: &Key, account: &str, secret: &Secret) -> Result<String, Error> {
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                expiration_seconds: Some(LIFE_S),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Secret".into()),
                    name: secret.metadata.name.clone(),
                    uid: secret.metadata.uid.clone(),
                }),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let answer = api.create_token_request(account, &PostParams::default(), &request).await;
        let answer = answer.map_err(Error::at("ask for a token"))?;
        answer.status.and_then(|status| status.token).ok_or_else(|| Error::Invalid("the answer holds no token".into()))
    }
}

pub(super) fn account_of(secret: &Secret) -> Option<&String> {
    secret.annotations().get(ACCOUNT_NAME).filter(|_| secret.type_.as_deref() == Some(TYPE))
}

impl Controller for TokenSecrets {
    const NAME: &'static str = "service-account-token-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.secrets, |_, delta, queue| {
            if let Some(secret) = delta.new.as_ref().filter(|secret| account_of(secret).is_some()) {
                queue.add(Key::of(&**secret));
            }
        });
        sources.watch(&self.accounts, |this, delta, queue| {
            let Some(account) = delta.new.as_ref().or(delta.old.as_ref()) else { return };
            let uid = |account: &Option<Arc<ServiceAccount>>| account.as_ref().and_then(|account| account.uid());
            if uid(&delta.old) != uid(&delta.new) {
                for secret in this.secrets.list_ns(&account.namespace().unwrap_or_default()) {
                    if account_of(&secret).is_some_and(|name| *name == account.name_any()) {
                        queue.add(Key::of(&*secret));
                    }
                }
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(secret) = self.secrets.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        let Some(name) = account_of(&secret).filter(|_| secret.metadata.deletion_timestamp.is_none()) else {
            return Ok(Outcome::Done);
        };
        let api: Api<Secret> = Api::namespaced(self.host.client.clone(), &key.namespace);
        let accounts: Api<ServiceAccount> = Api::namespaced(self.host.client.clone(), &key.namespace);
        // Removal rests on what the API says, not on a cache that may be behind.
        let account = match self.accounts.get(&key.namespace, name) {
            Some(account) => Some((*account).clone()),
            None => accounts.get_opt(name).await.map_err(Error::at("look for the account"))?,
        };
        let held = secret.annotations().get(ACCOUNT_UID).filter(|uid| !uid.is_empty());
        let Some(account) = account.filter(|account| held.is_none_or(|uid| account.uid().as_ref() == Some(uid))) else {
            self.host.delete(&api, &*secret).await?;
            return Ok(Outcome::Done);
        };
        let data = secret.data.clone().unwrap_or_default();
        let is = |field: &str, value: &str| data.get(field).is_some_and(|held| held.0 == value.as_bytes());
        let has_token = data.get("token").is_some_and(|token| !token.0.is_empty());
        if held.is_some() && has_token && is("ca.crt", &self.authority_pem) && is("namespace", &key.namespace) {
            return Ok(Outcome::Done);
        }
        let mut changed = (*secret).clone();
        changed.annotations_mut().insert(ACCOUNT_UID.into(), account.uid().unwrap_or_default());
        let filled = changed.data.get_or_insert_default();
        if !has_token {
            let token = self.token(key, name, &secret).await?;
            filled.insert("token".into(), ByteString(token.into_bytes()));
        }
        filled.insert("ca.crt".into(), ByteString(self.authority_pem.clone().into_bytes()));
        filled.insert("namespace".into(), ByteString(key.namespace.as_bytes().to_vec()));
        self.host.replace(&api, &changed).await?;
        Ok(Outcome::Done)
    }
}

//! Bootstrap tokens that have expired go.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::Api;

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

const NAMESPACE: &str = "kube-system";
const TYPE: &str = "bootstrap.kubernetes.io/token";

pub(crate) struct BootstrapTokens {
    host: Host,
    secrets: Arc<Informer<Secret>>,
}

impl BootstrapTokens {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { secrets: host.informer(), host }
    }
}

/// When the token expires: never without a time, at once with one that nobody can read, which lets nobody in either.
fn expires(secret: &Secret) -> Option<Timestamp> {
    let time = &secret.data.as_ref()?.get("expiration").filter(|_| secret.type_.as_deref() == Some(TYPE))?.0;
    let read = std::str::from_utf8(time).ok().and_then(|time| time.parse().ok());
    Some(read.unwrap_or(Timestamp::UNIX_EPOCH))
}

impl Controller for BootstrapTokens {
    const NAME: &'static str = "token-cleaner";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.secrets, |_, delta, queue| {
            let ours = |secret: &&Arc<Secret>| secret.metadata.namespace.as_deref() == Some(NAMESPACE);
            if let Some(secret) = delta.new.as_ref().filter(ours).filter(|secret| expires(secret).is_some()) {
                queue.add(Key::of(&**secret));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let secret = self.secrets.get(&key.namespace, &key.name);
        let Some((secret, end)) = secret.and_then(|secret| Some((secret.clone(), expires(&secret)?))) else {
            return Ok(Outcome::Done);
        };
        let left = end.duration_since(Timestamp::now());
        if left.is_positive() {
            return Ok(Outcome::After(Duration::try_from(left).unwrap_or_default()));
        }
        self.host.delete(&Api::namespaced(self.host.client.clone(), &key.namespace), &*secret).await?;
        Ok(Outcome::Done)
    }
}

//! ServiceAccounts: each namespace has one named `default`.

use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

const DEFAULT: &str = "default";

pub(crate) struct Accounts {
    host: Host,
    namespaces: Arc<Informer<Namespace>>,
    accounts: Arc<Informer<ServiceAccount>>,
}

impl Accounts {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { namespaces: host.informer(), accounts: host.informer(), host }
    }
}

/// Whether objects may still be made in a namespace.
pub(super) fn is_live(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_none()
}

impl Controller for Accounts {
    const NAME: &'static str = "service-account-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.namespaces, own);
        sources.watch(&self.accounts, |_, delta, queue| {
            if let (Some(gone), None) = (&delta.old, &delta.new) {
                queue.add(Key::new("", gone.metadata.namespace.as_deref().unwrap_or_default()));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let live = self.namespaces.get("", &key.name).is_some_and(|namespace| is_live(&namespace));
        if !live || self.accounts.get(&key.name, DEFAULT).is_some() {
            return Ok(Outcome::Done);
        }
        let api: Api<ServiceAccount> = Api::namespaced(self.host.client.clone(), &key.name);
        let account = ServiceAccount {
            metadata: ObjectMeta {
                name: Some(DEFAULT.into()),
                namespace: Some(key.name.to_string()),
                ..ObjectMeta::default()
            },
            ..ServiceAccount::default()
        };
        self.host.create(&api, &account).await?;
        Ok(Outcome::Done)
    }
}

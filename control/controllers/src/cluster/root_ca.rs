//! Root CA: each namespace holds the authority that signs the API's certificate, for pods to trust.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;

use super::accounts::is_live;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

/// Name of the ConfigMap, which service account volumes project.
const NAME: &str = "kube-root-ca.crt";
const FILE: &str = "ca.crt";
const ABOUT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

pub(crate) struct RootCa {
    host: Host,
    namespaces: Arc<Informer<Namespace>>,
    maps: Arc<Informer<ConfigMap>>,
    authority_pem: String,
}

impl RootCa {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { namespaces: host.informer(), maps: host.informer(), authority_pem: api.pki.ca_pem.clone(), host }
    }
}

impl Controller for RootCa {
    const NAME: &'static str = "root-ca-cert-publisher";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.namespaces, own);
        sources.watch(&self.maps, |_, delta, queue| {
            if let Some(map) = delta.new.as_ref().or(delta.old.as_ref())
                && map.metadata.name.as_deref() == Some(NAME)
            {
                queue.add(Key::new("", map.metadata.namespace.as_deref().unwrap_or_default()));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        if !self.namespaces.get("", &key.name).is_some_and(|namespace| is_live(&namespace)) {
            return Ok(Outcome::Done);
        }
        let data = BTreeMap::from([(FILE.to_owned(), self.authority_pem.clone())]);
        let api: Api<ConfigMap> = Api::namespaced(self.host.client.clone(), &key.name);
        match self.maps.get(&key.name, NAME) {
            Some(map) if map.data.as_ref() == Some(&data) => {}
            Some(map) => {
                let changed = ConfigMap { data: Some(data), ..(*map).clone() };
                self.host.replace(&api, &changed).await?;
            }
            None => {
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(NAME.into()),
                        namespace: Some(key.name.to_string()),
                        annotations: Some(BTreeMap::from([("kubernetes.io/description".to_owned(), ABOUT.to_owned())])),
                        ..ObjectMeta::default()
                    },
                    data: Some(data),
                    ..ConfigMap::default()
                };
                self.host.create(&api, &map).await?;
            }
        }
        Ok(Outcome::Done)
    }
}

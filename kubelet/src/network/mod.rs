//! What the API says about the network, told to the node's network: Services, their endpoints, pods, policies, nodes.
//!
//! Each kind is followed by a watch of its own and translated object by object ([`translate`]); a watch that breaks lists
//! again and tells what vanished meanwhile. The network takes changes in any order.

mod translate;

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use coracle_netns::Network;
use coracle_netns::model::{Change, ObjectKey};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

/// Keeps the network up to date until the future is dropped.
pub async fn follow(client: Client, network: Arc<Network>) {
    let mut tasks = JoinSet::new();
    tasks.spawn(kind::<Service>(client.clone(), network.clone(), translate::service));
    tasks.spawn(kind::<EndpointSlice>(client.clone(), network.clone(), translate::slice));
    tasks.spawn(kind::<Pod>(client.clone(), network.clone(), translate::pod));
    tasks.spawn(kind::<Namespace>(client.clone(), network.clone(), translate::namespace));
    tasks.spawn(kind::<NetworkPolicy>(client.clone(), network.clone(), translate::policy));
    tasks.spawn(kind::<Node>(client, network, translate::node));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a watch for the network ended");
        }
    }
}

/// Follows all objects of a kind.
async fn kind<K>(client: Client, network: Arc<Network>, translate: fn(&ObjectKey, Option<&K>) -> Change)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut events = watcher(Api::<K>::all(client), watcher::Config::default()).default_backoff().boxed();
    let mut known: HashSet<ObjectKey> = HashSet::new();
    let mut listed: HashSet<ObjectKey> = HashSet::new();
    loop {
        let event = match events.try_next().await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(kind = %K::kind(&()), %error, "watching again");
                continue;
            }
        };
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(object) => {
                let key = key(&object);
                network.update(translate(&key, Some(&object)));
                known.insert(key.clone());
                listed.insert(key);
            }
            watcher::Event::InitDone => {
                for gone in known.extract_if(|key| !listed.contains(key)) {
                    network.update(translate(&gone, None));
                }
                listed.clear();
            }
            watcher::Event::Apply(object) => {
                let key = key(&object);
                network.update(translate(&key, Some(&object)));
                known.insert(key);
            }
            watcher::Event::Delete(object) => {
                let key = key(&object);
                known.remove(&key);
                network.update(translate(&key, None));
            }
        }
    }
}

fn key<K: Resource>(object: &K) -> ObjectKey {
    let meta = object.meta();
    ObjectKey::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

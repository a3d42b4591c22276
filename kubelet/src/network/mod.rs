//! What the API says about the network, told to the node's network: Services, their endpoints, pods, policies, nodes.
//!
//! Each kind is followed by a watch of its own and translated object by object ([`translate`]); one loop hands the changes
//! on, as many at once as have come while it was busy. The first hand-over holds the full listing of every kind, for it
//! replaces the rules of an earlier daemon. A watch that breaks lists again and tells what vanished meanwhile.

mod translate;

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use coracle_netns::Network;
use coracle_netns::model::{Change, ObjectKey};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Changes that wait for the network; a watch that is faster waits itself.
const QUEUE_CHANGES: usize = 4096;
/// Pause before rules are tried again that the kernel refused.
const RETRY: Duration = Duration::from_secs(1);

enum Message {
    Change(Change),
    /// A kind has been listed for the first time.
    Listed,
}

/// Keeps the network up to date until the future is dropped.
pub async fn follow(client: Client, network: Arc<Network>) {
    let (sender, mut receiver) = mpsc::channel(QUEUE_CHANGES);
    let mut kinds = JoinSet::new();
    kinds.spawn(kind::<Service>(client.clone(), sender.clone(), translate::service));
    kinds.spawn(kind::<EndpointSlice>(client.clone(), sender.clone(), translate::slice));
    kinds.spawn(kind::<Pod>(client.clone(), sender.clone(), translate::pod));
    kinds.spawn(kind::<Namespace>(client.clone(), sender.clone(), translate::namespace));
    kinds.spawn(kind::<NetworkPolicy>(client.clone(), sender.clone(), translate::policy));
    kinds.spawn(kind::<Node>(client, sender, translate::node));
    let mut unlisted = kinds.len();
    let mut changes = Vec::new();
    while let Some(message) = receiver.recv().await {
        let mut next = Some(message);
        while let Some(message) = next {
            match message {
                Message::Change(change) => changes.push(change),
                Message::Listed => unlisted -= 1,
            }
            next = receiver.try_recv().ok();
        }
        // Changes are whole objects, so repeating them is safe.
        while unlisted == 0 && !changes.is_empty() {
            match network.update(changes.clone()).await {
                Ok(()) => changes.clear(),
                Err(error) => {
                    tracing::error!(%error, "the network does not take a change, trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

/// Follows all objects of a kind.
async fn kind<K>(client: Client, changes: mpsc::Sender<Message>, translate: fn(&ObjectKey, Option<&K>) -> Change)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut events = watcher(Api::<K>::all(client), watcher::Config::default()).default_backoff().boxed();
    let mut known: HashSet<ObjectKey> = HashSet::new();
    let mut listed: HashSet<ObjectKey> = HashSet::new();
    let mut first = true;
    loop {
        let mut messages = Vec::new();
        match events.try_next().await {
            Ok(Some(watcher::Event::Init)) => listed.clear(),
            Ok(Some(watcher::Event::InitApply(object))) => {
                let key = key(&object);
                messages.push(Message::Change(translate(&key, Some(&object))));
                known.insert(key.clone());
                listed.insert(key);
            }
            Ok(Some(watcher::Event::InitDone)) => {
                let gone = known.extract_if(|key| !listed.contains(key));
                messages.extend(gone.map(|key| Message::Change(translate(&key, None))));
                listed.clear();
                if std::mem::take(&mut first) {
                    messages.push(Message::Listed);
                }
            }
            Ok(Some(watcher::Event::Apply(object))) => {
                let key = key(&object);
                messages.push(Message::Change(translate(&key, Some(&object))));
                known.insert(key);
            }
            Ok(Some(watcher::Event::Delete(object))) => {
                let key = key(&object);
                known.remove(&key);
                messages.push(Message::Change(translate(&key, None)));
            }
            Ok(None) => return,
            Err(error) => tracing::debug!(kind = %K::kind(&()), %error, "watching again"),
        }
        for message in messages {
            if changes.send(message).await.is_err() {
                return;
            }
        }
    }
}

fn key<K: Resource>(object: &K) -> ObjectKey {
    let meta = object.meta();
    ObjectKey::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

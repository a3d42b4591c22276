//! Who has which node port: one key of the store for each port, made before the service is written. Of several servers on one
//! store only one can make it. What a crash leaves behind is found by comparing with the services themselves.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_store::{Draft, Error, ListOptions, Precondition, Store};
use serde_json::{Value, json};

use super::port;
use crate::server::ApiServer;
use crate::status::Status;

/// Beside the objects of the API, which `/registry/` holds.
const SCOPE: &str = "/coracle/nodeports/";
/// Time between two looks. A claim without a service that both see is nobody's: no request takes as long.
const LOOK: Duration = Duration::from_secs(180);

fn key(port: u16) -> String {
    format!("{SCOPE}{port}")
}

/// Takes a port for a service; `false`: another has it.
pub(super) async fn take(store: &dyn Store, port: u16, namespace: &str, name: &str) -> Result<bool, Status> {
    let claim = json!({"metadata": {"namespace": namespace, "name": name}});
    let draft = Draft::encode(&claim).map_err(Status::internal)?;
    match store.put(&key(port), draft, Precondition::Absent).await {
        Ok(_) => Ok(true),
        Err(Error::Conflict { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether nobody has a port.
pub(super) async fn is_free(store: &dyn Store, port: u16) -> Result<bool, Status> {
    Ok(store.get(&key(port)).await?.is_none())
}

/// Gives a port back. What stays behind when the store fails is found later.
pub(super) async fn free(store: &dyn Store, port: u16) {
    match store.delete(&key(port), Precondition::Any).await {
        Ok(_) | Err(Error::Conflict { .. }) => {}
        Err(error) => tracing::warn!(port, %error, "could not give a node port back"),
    }
}

/// All ports that are taken, with the revision that took them.
pub(super) async fn all(store: &dyn Store) -> Result<HashMap<u16, u64>, Status> {
    let listing = store.list(SCOPE, ListOptions::default()).await?;
    let port = |key: &str| key.strip_prefix(SCOPE)?.parse().ok();
    Ok(listing.entries.iter().filter_map(|entry| Some((port(&entry.key)?, entry.revision))).collect())
}

/// Claims that had no service at the last look, with their revisions.
#[derive(Debug, Default)]
struct Suspects(BTreeMap<u16, u64>);

impl Suspects {
    /// Makes the claims that services lack, as those of an older version do, and removes those that nobody has used twice in a row.
    async fn look(
        &mut self,
        store: &dyn Store,
        services: impl Future<Output = Result<Vec<Value>, Status>> + Send,
    ) -> Result<(), Status> {
        // In this order: the service of a claim that is seen is either seen, too, or not written yet.
        let claims = all(store).await?;
        let mut used = HashSet::new();
        for service in services.await? {
            for number in service.get("spec").map(port::ports).unwrap_or_default() {
                used.insert(number);
                if !claims.contains_key(&number) {
                    let (namespace, name) = (crate::object::namespace(&service), crate::object::name(&service));
                    take(store, number, namespace, name).await?;
                }
            }
        }
        let unused: BTreeMap<u16, u64> = claims.into_iter().filter(|(number, _)| !used.contains(number)).collect();
        for (number, revision) in unused.iter().filter(|(number, revision)| self.0.get(number) == Some(revision)) {
            match store.delete(&key(*number), Precondition::Revision(*revision)).await {
                Ok(_) | Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.0 = unused;
        Ok(())
    }
}

/// Compares claims with services now, and again and again until the server ends.
pub(crate) async fn keep(api: &Arc<ApiServer>) -> Result<(), Status> {
    let Some(kind) = api.kind("", "v1", "services") else { return Ok(()) };
    let mut suspects = Suspects::default();
    suspects.look(api.store.as_ref(), api.list(&kind, "")).await?;
    let (api, shutdown) = (Arc::downgrade(api), api.shutdown.clone());
    tokio::spawn(async move {
        while tokio::time::timeout(LOOK, shutdown.cancelled()).await.is_err() {
            let Some(api) = api.upgrade() else { return };
            if let Err(error) = suspects.look(api.store.as_ref(), api.list(&kind, "")).await {
                tracing::warn!(%error, "could not compare node ports with services");
            }
        }
    });
    Ok(())
}

/// The ports of a service that a store holds, if it is there.
pub(super) async fn held(api: &ApiServer, namespace: &str, name: &str) -> Result<Value, Status> {
    let Some(kind) = api.kind("", "v1", "services") else { return Ok(Value::Null) };
    Ok(api
        .get(&kind, namespace, name)
        .await?
        .and_then(|mut service| service.get_mut("spec").map(Value::take))
        .unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use coracle_store::{Embedded, EmbeddedOptions};

    use super::*;

    fn service(name: &str, port: u16) -> Value {
        json!({"metadata": {"namespace": "n", "name": name}, "spec": {"type": "NodePort", "ports": [{"nodePort": port}]}})
    }

    async fn look(suspects: &mut Suspects, store: &Embedded, services: &[Value]) {
        suspects.look(store, std::future::ready(Ok(services.to_vec()))).await.expect("a look");
    }

    #[tokio::test]
    async fn claims_follow_services_after_a_crash() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Embedded::open(folder.path().join("store"), EmbeddedOptions::default()).expect("a store");
        let take = async |port| take(&store, port, "n", "s").await.expect("an answer");
        assert!(take(30_000).await && !take(30_000).await && take(30_001).await && take(30_002).await);
        let mut suspects = Suspects::default();
        // A server died between claim and service; another is about to write one; the third has its service.
        let services = [service("old", 30_003), service("kept", 30_002)];
        look(&mut suspects, &store, &services).await;
        let ports = async || all(&store).await.expect("a list").into_keys().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(ports().await, [30_000, 30_001, 30_002, 30_003].into(), "a service without claim has one now");
        // Given back and taken by somebody else meanwhile: another claim.
        free(&store, 30_001).await;
        assert!(take(30_001).await);
        look(&mut suspects, &store, &services).await;
        assert_eq!(ports().await, [30_001, 30_002, 30_003].into());
        assert!(take(30_000).await && !is_free(&store, 30_002).await.expect("an answer"));
    }
}

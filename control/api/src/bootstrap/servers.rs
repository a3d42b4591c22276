//! Where the servers of a cluster listen: the endpoints of the service `kubernetes`.
//!
//! Servers that share a store each hold a Lease that names their address. Each renews its own, and writes the endpoints of all that
//! are alive. A Lease is dead when it has not been seen to change for a while, so clocks of hosts are not compared.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use coracle_store::{ListOptions, Precondition, Store};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{complete, kind_of, write};
use crate::kinds::edit::put;
use crate::server::ApiServer;
use crate::status::Status;

const NAMESPACE: &str = "kube-system";
/// Label of the Leases, and its value.
const LABEL: (&str, &str) = ("apiserver.kubernetes.io/identity", "coracle");
/// Annotation that holds the address.
const ADDRESS: &str = "coracle.io/advertise-address";
/// A server whose Lease has not changed for so long is gone.
const DURATION: Duration = Duration::from_secs(15);
/// Time between two renewals.
const RENEW: Duration = Duration::from_secs(5);

/// One server's view of all of them.
pub struct Servers {
    store: Arc<dyn Store>,
    own: SocketAddr,
    seen: Seen,
}

/// Leases by key: the revision last seen and when it was first seen.
type Seen = HashMap<String, (u64, Instant)>;

impl Servers {
    pub(crate) fn new(api: &ApiServer) -> Self {
        Self { store: api.store.clone(), own: api.config.advertise, seen: Seen::new() }
    }

    /// Renews the own Lease and writes who is alive.
    pub(crate) async fn round(&mut self) -> Result<(), Status> {
        self.renew().await?;
        let leases = kind_of("coordination.k8s.io", "leases")?;
        let listing = self.store.list(&leases.key_prefix(NAMESPACE), ListOptions::default()).await?;
        let mut held = HashMap::new();
        for entry in listing.entries {
            let lease: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
            if lease["metadata"]["labels"][LABEL.0] == LABEL.1 {
                let address = lease["metadata"]["annotations"][ADDRESS].as_str().and_then(|text| text.parse().ok());
                held.extend(address.map(|address| (entry.key.to_string(), (entry.revision, address))));
            }
        }
        let (alive, dead) = sort(&mut self.seen, &held, Instant::now());
        for key in dead {
            match self.store.delete(&key, Precondition::Revision(held[&key].0)).await {
                // It lives after all, or another server was faster.
                Ok(_) | Err(coracle_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        publish(self.store.as_ref(), &alive).await
    }

    /// Keeps all of it up to date until dropped.
    pub async fn keep(mut self) {
        loop {
            tokio::time::sleep(RENEW).await;
            if let Err(error) = self.round().await {
                tracing::warn!(%error, "the addresses of the servers could not be written, trying again");
            }
        }
    }

    async fn renew(&self) -> Result<(), Status> {
        let micros = |time: Timestamp| time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let name = format!("apiserver-{}", self.own.to_string().replace([':', '.', '[', ']'], "-"));
        let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {LABEL.0: LABEL.1},
                "annotations": {ADDRESS: self.own.to_string()}},
            "spec": {"holderIdentity": self.own.to_string(), "leaseDurationSeconds": DURATION.as_secs(),
                "renewTime": micros(Timestamp::now())}});
        let (key, mut lease) = complete("coordination.k8s.io", "leases", lease)?;
        match self.store.get(&key).await? {
            None => write(self.store.as_ref(), &key, &lease, Precondition::Absent).await.map(drop),
            Some(entry) => {
                let have: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
                put(&mut lease, "metadata", have["metadata"].clone());
                write(self.store.as_ref(), &key, &lease, Precondition::Revision(entry.revision)).await.map(drop)
            }
        }
    }
}

/// Sorts Leases into the addresses of those that live and the keys of the dead.
fn sort(
    seen: &mut Seen,
    held: &HashMap<String, (u64, SocketAddr)>,
    now: Instant,
) -> (BTreeSet<SocketAddr>, Vec<String>) {
    seen.retain(|key, _| held.contains_key(key));
    let (mut alive, mut dead) = (BTreeSet::new(), Vec::new());
    for (key, (revision, address)) in held {
        let (known, since) = seen.entry(key.clone()).or_insert((*revision, now));
        if known != revision {
            (*known, *since) = (*revision, now);
        }
        if now.duration_since(*since) < DURATION {
            alive.insert(*address);
        } else {
            dead.push(key.clone());
        }
    }
    (alive, dead)
}

/// Points the service `kubernetes` at these servers, which share one family; a port is a subset of its own.
pub(super) async fn publish(store: &dyn Store, servers: &BTreeSet<SocketAddr>) -> Result<(), Status> {
    let ports: BTreeSet<u16> = servers.iter().map(SocketAddr::port).collect();
    let port = |number: u16| json!([{"name": "https", "port": number, "protocol": "TCP"}]);
    let of = |number: u16| servers.iter().filter(move |server| server.port() == number).map(|server| server.ip());
    let subsets: Vec<Value> = ports
        .iter()
        .map(|number| json!({"addresses": of(*number).map(|ip| json!({"ip": ip})).collect::<Vec<_>>(), "ports": port(*number)}))
        .collect();
    let endpoints = json!({"apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": subsets});
    replace(store, "", "endpoints", endpoints, &["subsets"]).await?;
    let prefix = kind_of("discovery.k8s.io", "endpointslices")?.key("default", "kubernetes");
    let mut wanted = BTreeSet::new();
    for (place, number) in ports.iter().enumerate() {
        // Servers have one port as a rule, and then the slice has the name that everybody knows.
        let name = if place == 0 { "kubernetes".to_owned() } else { format!("kubernetes-{number}") };
        let family = if of(*number).all(|ip| ip.is_ipv6()) { "IPv6" } else { "IPv4" };
        let addresses = of(*number).filter(|ip| ip.is_ipv6() == (family == "IPv6"));
        let endpoints: Vec<Value> =
            addresses.map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family, "endpoints": endpoints, "ports": port(*number)});
        wanted.insert(
            replace(store, "discovery.k8s.io", "endpointslices", slice, &["endpoints", "ports", "addressType"]).await?,
        );
    }
    for entry in store.list(&format!("{prefix}-"), ListOptions::default()).await?.entries {
        let ours = entry.key.rsplit('-').next().is_some_and(|end| end.parse::<u16>().is_ok());
        if ours && !wanted.contains(&*entry.key) {
            match store.delete(&entry.key, Precondition::Revision(entry.revision)).await {
                Ok(_) | Err(coracle_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Makes these members of an object be as given; the key.
async fn replace(
    store: &dyn Store,
    group: &str,
    resource: &str,
    object: Value,
    members: &[&str],
) -> Result<String, Status> {
    let (key, object) = complete(group, resource, object)?;
    let Some(entry) = store.get(&key).await? else {
        write(store, &key, &object, Precondition::Absent).await?;
        return Ok(key);
    };
    let mut have: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
    if members.iter().any(|member| have.get(*member) != object.get(*member)) {
        for member in members {
            put(&mut have, member, object[*member].clone());
        }
        write(store, &key, &have, Precondition::Revision(entry.revision)).await?;
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_nobody_renews_is_dead() {
        let address = |n: u8| SocketAddr::from(([10, 0, 0, n], 6443));
        let held =
            |a: u64, b: u64| HashMap::from([("a".to_owned(), (a, address(1))), ("b".to_owned(), (b, address(2)))]);
        let (mut seen, start) = (Seen::new(), Instant::now());
        assert_eq!(sort(&mut seen, &held(1, 1), start).0, BTreeSet::from([address(1), address(2)]));
        assert_eq!(sort(&mut seen, &held(2, 1), start + DURATION / 2).1, Vec::<String>::new());
        let (alive, dead) = sort(&mut seen, &held(3, 1), start + DURATION);
        assert_eq!((alive, dead), (BTreeSet::from([address(1)]), vec!["b".to_owned()]));
        // One that comes back lives.
        assert_eq!(sort(&mut seen, &held(3, 2), start + DURATION).0.len(), 2);
    }

    #[tokio::test]
    async fn servers_of_one_store_stand_side_by_side() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = coracle_store::Embedded::open(folder.path(), coracle_store::EmbeddedOptions::default());
        let store: Arc<dyn Store> = Arc::new(store.expect("a store"));
        let server =
            |n: u8| Servers { store: store.clone(), own: SocketAddr::from(([10, 0, 0, n], 6443)), seen: Seen::new() };
        let addresses = async || {
            let mut all = Vec::new();
            for (group, resource, list) in
                [("", "endpoints", "/subsets/0/addresses"), ("discovery.k8s.io", "endpointslices", "/endpoints")]
            {
                let key = kind_of(group, resource).expect("a kind").key("default", "kubernetes");
                let entry = store.get(&key).await.expect("the store answers").expect("an object");
                let object: Value = serde_json::from_slice(&entry.value).expect("JSON");
                all.push(object.pointer(list).and_then(Value::as_array).map_or(0, Vec::len));
            }
            all
        };
        let (mut a, mut b) = (server(1), server(2));
        a.round().await.expect("a round");
        assert_eq!(addresses().await, [1, 1]);
        b.round().await.expect("a round");
        a.round().await.expect("a round");
        assert_eq!(addresses().await, [2, 2]);
        // The second falls silent, and comes back.
        let long_ago = Instant::now().checked_sub(DURATION).expect("the clock has run longer");
        let of_b = a.seen.iter_mut().filter(|(key, _)| key.contains("10-0-0-2"));
        of_b.for_each(|(_, (_, since))| *since = long_ago);
        a.round().await.expect("a round");
        assert_eq!(addresses().await, [1, 1]);
        b.round().await.expect("a round");
        assert_eq!(addresses().await, [2, 2]);
    }
}

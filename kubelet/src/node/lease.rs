//! The node's Lease: renewed every few seconds, it says that the agent lives (KEP-589).

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};

use crate::Config;

const NAMESPACE: &str = "kube-node-lease";
/// `spec.leaseDurationSeconds`, four renewals.
const RENEWALS: u64 = 4;
/// Pause after a failed renewal.
const RETRY: Duration = Duration::from_secs(1);

/// Renews the Lease until the future is dropped.
pub(super) async fn keep(config: &Config, client: &Client) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let mut known = None;
    loop {
        match renew(config, client, &leases, known.take()).await {
            Ok(lease) => {
                known = Some(lease);
                tokio::time::sleep(config.lease_renew_interval).await;
            }
            Err(error) => {
                tracing::debug!(%error, "the node's Lease is not renewed, trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn renew(
    config: &Config,
    client: &Client,
    leases: &Api<Lease>,
    known: Option<Lease>,
) -> Result<Lease, kube::Error> {
    let name = &config.node_name;
    let known = match known {
        Some(known) => Some(known),
        None => leases.get_opt(name).await?,
    };
    let duration = config.lease_renew_interval.as_secs() * RENEWALS;
    let spec = LeaseSpec {
        holder_identity: Some(name.clone()),
        lease_duration_seconds: i32::try_from(duration).ok(),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    };
    match known {
        Some(lease) => leases.replace(name, &PostParams::default(), &Lease { spec: Some(spec), ..lease }).await,
        None => {
            // Owned by the node, so that it goes with it.
            let node = Api::<Node>::all(client.clone()).get(name).await?;
            let owner = OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.clone(),
                uid: node.metadata.uid.unwrap_or_default(),
                ..OwnerReference::default()
            };
            let metadata =
                ObjectMeta { name: Some(name.clone()), owner_references: Some(vec![owner]), ..ObjectMeta::default() };
            leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
        }
    }
}

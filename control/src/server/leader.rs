//! One leader among several servers on one etcd: whoever holds the Lease runs the controllers and the scheduler
//! (the same Lease protocol as client-go's leader election).

use std::time::Duration;

use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::time::Instant;

const NAMESPACE: &str = "kube-system";
const NAME: &str = "coracle-control-plane";
/// A Lease that has not been seen to change for so long may be taken over; with the time between two tries on either side, another
/// leads within 15 s.
const DURATION: Duration = Duration::from_secs(12);
/// A leader that could not renew for so long stops, well before another may take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(8);
/// Time between two tries to renew or take over.
const RETRY: Duration = Duration::from_secs(1);

/// What one candidate has seen.
struct Candidate {
    leases: Api<Lease>,
    identity: String,
    /// The Lease as last seen, and when it was first seen like this: clocks of hosts are not compared.
    seen: Option<(Lease, Instant)>,
}

/// Runs `work` whenever this process is the leader; drops it when it is no longer.
pub(super) async fn lead<F: Future<Output = ()>>(api: &ApiServer, identity: String, work: impl Fn() -> F) {
    let client = api.client(UserInfo::new("system:kube-controller-manager", &[]));
    let mut candidate = Candidate { leases: Api::namespaced(client, NAMESPACE), identity, seen: None };
    loop {
        while !candidate.try_hold().await {
            tokio::time::sleep(RETRY).await;
        }
        tracing::info!(identity = %candidate.identity, "leading: controllers and scheduler run here");
        tokio::select! {
            () = work() => {}
            () = candidate.renew() => tracing::warn!(identity = %candidate.identity, "no longer leading"),
        }
    }
}

impl Candidate {
    /// Renews the Lease until that has failed for too long.
    async fn renew(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            tokio::time::sleep(RETRY).await;
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            if tokio::time::timeout(left, self.try_hold()).await == Ok(true) {
                renewed = Instant::now();
            }
        }
    }

    /// Takes or renews the Lease; false when another holds it or the API does not answer.
    async fn try_hold(&mut self) -> bool {
        match self.hold().await {
            Ok(held) => held,
            Err(error) => {
                tracing::debug!(%error, "the leader's Lease could not be written");
                false
            }
        }
    }

    async fn hold(&mut self) -> Result<bool, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let Some(lease) = self.leases.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() },
                spec: Some(self.spec(&now, &now, 0)),
            };
            self.leases.create(&PostParams::default(), &lease).await?;
            return Ok(true);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let ours = spec.holder_identity.as_deref() == Some(&self.identity);
        let changed = self.seen.as_ref().is_none_or(|(seen, _)| seen.spec != lease.spec);
        if changed {
            self.seen = Some((lease.clone(), Instant::now()));
        }
        let silent = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let free = spec.holder_identity.as_deref().unwrap_or_default().is_empty();
        if !ours && !free && silent < DURATION {
            return Ok(false);
        }
        let transitions = spec.lease_transitions.unwrap_or_default() + i32::from(!ours);
        let acquired = if ours { spec.acquire_time.unwrap_or_else(|| now.clone()) } else { now.clone() };
        let held = Lease { spec: Some(self.spec(&acquired, &now, transitions)), ..lease };
        // The revision in the metadata makes this a compare-and-swap.
        self.leases.replace(NAME, &PostParams::default(), &held).await?;
        Ok(true)
    }

    fn spec(&self, acquired: &MicroTime, renewed: &MicroTime, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(acquired.clone()),
            renew_time: Some(renewed.clone()),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

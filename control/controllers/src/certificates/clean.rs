//! Removal of certificate requests that are answered, refused, or were left lying.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt};

use super::holds;
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

/// Time that a request with an answer stays.
const ANSWERED: SignedDuration = SignedDuration::from_hours(1);
/// Time that a request without an answer stays.
const PENDING: SignedDuration = SignedDuration::from_hours(24);

pub(crate) struct Cleaner {
    host: Host,
    requests: Arc<Informer<CertificateSigningRequest>>,
}

impl Cleaner {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { requests: host.informer(), host }
    }
}

/// When a request may go.
fn goes_at(request: &CertificateSigningRequest) -> Option<Timestamp> {
    let conditions = request.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let answered = conditions
        .filter(|condition| ["Approved", "Denied", "Failed"].contains(&condition.type_.as_str()))
        .filter_map(|condition| condition.last_update_time.as_ref().map(|time| time.0))
        .max();
    let issued = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    match answered {
        Some(at) if issued || holds(request, "Denied") || holds(request, "Failed") => at.checked_add(ANSWERED).ok(),
        // Approved for a signer that never came.
        _ => request.creation_timestamp()?.0.checked_add(PENDING).ok(),
    }
}

impl Controller for Cleaner {
    const NAME: &'static str = "certificate-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.requests, own);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(request) = self.requests.get("", &key.name) else { return Ok(Outcome::Done) };
        let Some(at) = goes_at(&request) else { return Ok(Outcome::Done) };
        let left = at.duration_since(Timestamp::now());
        if left.is_positive() {
            return Ok(Outcome::After(Duration::try_from(left).unwrap_or_default()));
        }
        self.host.delete(&Api::all(self.host.client.clone()), &*request).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answered_requests_stay_an_hour_and_others_a_day() {
        let request = |status: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"request": "", "signerName": "example.com/a"},
                "status": status,
            }))
            .expect("a request")
        };
        let condition = |type_: &str| serde_json::json!([{"type": type_, "status": "True", "lastUpdateTime": "2026-01-01T02:00:00Z"}]);
        let at = |status| goes_at(&request(status)).map(|at| at.to_string());
        let day = Some("2026-01-02T00:00:00Z".to_owned());
        let hour = Some("2026-01-01T03:00:00Z".to_owned());
        assert_eq!(at(serde_json::json!({})), day);
        assert_eq!(at(serde_json::json!({"conditions": condition("Approved")})), day);
        assert_eq!(at(serde_json::json!({"conditions": condition("Approved"), "certificate": "YQ=="})), hour);
        assert_eq!(at(serde_json::json!({"conditions": condition("Denied")})), hour);
    }
}

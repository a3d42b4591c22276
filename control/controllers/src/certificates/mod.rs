//! Controllers of certificate requests (certificates.k8s.io): who may have one, signing, cleaning up.

pub(crate) mod approve;
pub(crate) mod clean;
mod kubelet;
pub(crate) mod sign;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// Whether a condition of a request holds.
fn holds(request: &CertificateSigningRequest, condition: &str) -> bool {
    request
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|held| held.type_ == condition && held.status == "True")
}

/// Now, in whole seconds.
fn now() -> Time {
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

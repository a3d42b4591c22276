//! Signing of approved requests with the cluster's authority, for the signers of Kubernetes.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::CertificateRequest;
use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use kube::Api;

use super::{holds, kubelet, now};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

/// Life of a certificate unless a shorter one is asked for (`--cluster-signing-duration`).
const LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// The shortest life: twice what certificates are backdated.
const LIFE_LEAST: Duration = Duration::from_secs(600);

type Check = fn(&CertificateRequest, &[String]) -> Result<(), String>;

/// Signers, and what each signs.
const SIGNERS: [(&str, Check); 4] = [
    ("kubernetes.io/kube-apiserver-client", check_client),
    ("kubernetes.io/kube-apiserver-client-kubelet", kubelet::check_client),
    ("kubernetes.io/kubelet-serving", kubelet::check_serving),
    ("kubernetes.io/legacy-unknown", |_, _| Ok(())),
];

fn check_client(_: &CertificateRequest, usages: &[String]) -> Result<(), String> {
    const USAGES: [&str; 3] = ["digital signature", "key encipherment", "client auth"];
    if let Some(other) = usages.iter().find(|usage| !USAGES.contains(&usage.as_str())) {
        return Err(format!("invalid usage for client certificate: {other}"));
    }
    if !usages.iter().any(|usage| usage == "client auth") {
        return Err("missing required usage for client certificate: client auth".into());
    }
    Ok(())
}

fn life(seconds: Option<i32>) -> Duration {
    let asked = seconds.map_or(LIFE, |seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or_default()));
    asked.clamp(LIFE_LEAST, LIFE)
}

pub(crate) struct Signer {
    host: Host,
    api: Arc<ApiServer>,
    requests: Arc<Informer<CertificateSigningRequest>>,
}

impl Signer {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { requests: host.informer(), api: api.clone(), host }
    }

    fn sign(&self, request: &CertificateSigningRequest, check: Check) -> Result<String, String> {
        let spec = &request.spec;
        let asked = CertificateRequest::parse(&spec.request.0).map_err(|error| error.to_string())?;
        let usages = spec.usages.as_deref().unwrap_or_default();
        check(&asked, usages)?;
        self.api.pki.sign(&asked, usages, life(spec.expiration_seconds)).map_err(|error| error.to_string())
    }
}

impl Controller for Signer {
    const NAME: &'static str = "certificate-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.requests, own);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(request) = self.requests.get("", &key.name) else { return Ok(Outcome::Done) };
        let Some((_, check)) = SIGNERS.iter().find(|(name, _)| *name == request.spec.signer_name) else {
            return Ok(Outcome::Done);
        };
        let signed = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
        let denied = holds(&request, "Denied") || holds(&request, "Failed");
        if signed || denied || !holds(&request, "Approved") {
            return Ok(Outcome::Done);
        }
        let mut changed = (*request).clone();
        let status = changed.status.get_or_insert_default();
        match self.sign(&request, *check) {
            Ok(certificate) => status.certificate = Some(ByteString(certificate.into_bytes())),
            Err(message) => {
                status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
                    type_: "Failed".into(),
                    status: "True".into(),
                    reason: Some("SignerValidationFailure".into()),
                    message: Some(message),
                    last_update_time: Some(now()),
                    last_transition_time: Some(now()),
                });
            }
        }
        self.host.replace_status(&Api::all(self.host.client.clone()), &changed).await?;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn life_is_what_was_asked_within_bounds() {
        assert_eq!(life(None), LIFE);
        assert_eq!(life(Some(3600)), Duration::from_secs(3600));
        assert_eq!(life(Some(1)), LIFE_LEAST);
        assert_eq!(life(Some(i32::MAX)), LIFE);
    }

    #[test]
    fn clients_do_not_get_certificates_of_servers() {
        let usages = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let request = CertificateRequest::default();
        assert!(check_client(&request, &usages(&["client auth", "digital signature"])).is_ok());
        assert!(check_client(&request, &usages(&["client auth", "server auth"])).is_err());
        assert!(check_client(&request, &usages(&["digital signature"])).is_err());
    }
}

//! Approval of the certificates of nodes: of client certificates when the RBAC rules allow the asker to have one (as
//! `certificatesigningrequests/nodeclient` and `/selfnodeclient`), of serving certificates when a node asks for itself and for
//! names and addresses that its Node object announces.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::CertificateRequest;
use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::api::core::v1::Node;
use kube::api::PostParams;
use kube::{Api, ResourceExt};

use super::{holds, kubelet, now};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

const CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING: &str = "kubernetes.io/kubelet-serving";
/// Approvals of client certificates: the subresource whose `create` is asked for, and the words of the condition.
const CLIENTS: [(&str, &str); 2] = [
    ("selfnodeclient", "Auto approving self kubelet client certificate after SubjectAccessReview."),
    ("nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview."),
];
const SERVED: &str = "Auto approving kubelet serving certificate for the addresses of its node.";
/// How soon to look again whether a node announces the addresses that its certificate is asked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

pub(crate) struct Approver {
    host: Host,
    requests: Arc<Informer<CertificateSigningRequest>>,
    nodes: Arc<Informer<Node>>,
}

impl Approver {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { requests: host.informer(), nodes: host.informer(), host }
    }

    /// Whether RBAC lets the asker create `certificatesigningrequests/SUBRESOURCE`.
    async fn may(&self, request: &CertificateSigningRequest, subresource: &str) -> Result<bool, Error> {
        let spec = &request.spec;
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: spec.username.clone(),
                uid: spec.uid.clone(),
                groups: spec.groups.clone(),
                extra: spec.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some("certificates.k8s.io".into()),
                    resource: Some("certificatesigningrequests".into()),
                    subresource: Some(subresource.into()),
                    verb: Some("create".into()),
                    version: Some("*".into()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.host.client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(Error::at("review access"))?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    async fn approve(&self, request: &CertificateSigningRequest, message: &str) -> Result<(), Error> {
        let mut changed = request.clone();
        changed.status.get_or_insert_default().conditions.get_or_insert_default().push(
            CertificateSigningRequestCondition {
                type_: "Approved".into(),
                status: "True".into(),
                reason: Some("AutoApproved".into()),
                message: Some(message.into()),
                last_update_time: Some(now()),
                last_transition_time: Some(now()),
            },
        );
        let path = format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{}/approval", request.name_any());
        let body = serde_json::to_vec(&changed).map_err(|error| Error::Invalid(error.to_string()))?;
        let put = http::Request::put(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        self.host.client.request::<CertificateSigningRequest>(put).await.map_err(Error::at("approve"))?;
        Ok(())
    }

    async fn client(&self, request: &CertificateSigningRequest, asked: &CertificateRequest) -> Result<(), Error> {
        let for_itself = request.spec.username.as_deref() == Some(&asked.common_name);
        for (subresource, message) in CLIENTS {
            if (for_itself || subresource != "selfnodeclient") && self.may(request, subresource).await? {
                return self.approve(request, message).await;
            }
        }
        Ok(())
    }

    async fn serving(&self, request: &CertificateSigningRequest, asked: &CertificateRequest) -> Result<Outcome, Error> {
        if request.spec.username.as_deref() != Some(&asked.common_name) {
            return Ok(Outcome::Done);
        }
        let node = kubelet::node_name(asked).and_then(|name| self.nodes.get("", name));
        if !node.is_some_and(|node| announces(&node, asked)) {
            return Ok(Outcome::After(LOOK_AGAIN));
        }
        self.approve(request, SERVED).await?;
        Ok(Outcome::Done)
    }
}

/// Whether a node announces every name and address that a certificate is asked for.
fn announces(node: &Node, asked: &CertificateRequest) -> bool {
    let announced: Vec<&str> = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten())
        .map(|address| address.address.as_str())
        .collect();
    let is_name = |name: &String| *name == node.name_any() || announced.contains(&name.as_str());
    asked.dns_names.iter().all(is_name)
        && asked.addresses.iter().all(|address| {
            announced.iter().any(|text| text.parse().is_ok_and(|announced: std::net::IpAddr| announced == *address))
        })
}

impl Controller for Approver {
    const NAME: &'static str = "certificate-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.requests, own);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(request) = self.requests.get("", &key.name) else { return Ok(Outcome::Done) };
        let spec = &request.spec;
        let decided = holds(&request, "Approved") || holds(&request, "Denied") || holds(&request, "Failed");
        if decided || ![CLIENT, SERVING].contains(&spec.signer_name.as_str()) {
            return Ok(Outcome::Done);
        }
        let Ok(asked) = CertificateRequest::parse(&spec.request.0) else { return Ok(Outcome::Done) };
        let usages = spec.usages.as_deref().unwrap_or_default();
        if spec.signer_name == CLIENT && kubelet::check_client(&asked, usages).is_ok() {
            self.client(&request, &asked).await?;
        } else if spec.signer_name == SERVING && kubelet::check_serving(&asked, usages).is_ok() {
            return self.serving(&request, &asked).await;
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_gets_certificates_for_its_own_addresses_alone() {
        let node: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": "a.example"}]},
        }))
        .expect("a node");
        let asked = |names: &[&str], addresses: &[&str]| CertificateRequest {
            dns_names: names.iter().map(|name| (*name).to_owned()).collect(),
            addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
            ..CertificateRequest::default()
        };
        assert!(announces(&node, &asked(&["a", "a.example"], &["192.0.2.1"])));
        assert!(!announces(&node, &asked(&["b"], &["192.0.2.1"])));
        assert!(!announces(&node, &asked(&["a"], &["192.0.2.2"])));
    }
}

//! Asks the API for a certificate, keeps it with its key in one file, and asks again before it ends.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use super::NodeCertificate;

/// How long a request may wait to be approved and signed before another is made.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Pause before another request after one that failed.
const RETRY: Duration = Duration::from_secs(10);
/// Clocks are set and hosts sleep: the time of renewal is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// A certificate is renewed when 70 to 90 hundredths of its life are over, so that the nodes of a cluster do not come together.
const RENEW_AFTER_PERCENT: u64 = 70;
const RENEW_SPREAD_PERCENT: u64 = 20;

/// What keeps a node from its certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A key or request could not be made, or what came back is no certificate for it.
    #[error("{step}: {reason}")]
    Crypto {
        /// What was done.
        step: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// The file of certificate and key.
    #[error("{step} {}: {source}", path.display())]
    File {
        /// What was done.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// A call to the API.
    #[error("{step} the certificate request: {reason}")]
    Api {
        /// What was done.
        step: &'static str,
        /// The answer.
        reason: String,
    },
    /// Somebody or something said no.
    #[error("the certificate request {name} was refused: {message}")]
    Refused {
        /// `metadata.name`.
        name: String,
        /// Reason and message of the condition.
        message: String,
    },
    /// Nobody approved it.
    #[error("the certificate request {name} is not signed yet: kubectl certificate approve {name}")]
    Unsigned {
        /// `metadata.name`.
        name: String,
    },
}

fn crypto(step: &'static str) -> impl FnOnce(&dyn std::fmt::Display) -> CertificateError {
    move |reason| CertificateError::Crypto { step, reason: reason.to_string() }
}

/// What the certificate is for.
#[derive(Clone, Debug)]
pub enum Use {
    /// The node as a client of the API.
    Client,
    /// The node's own API, at these names and addresses.
    Serving(Vec<String>),
}

/// One certificate of the node.
pub struct Manager {
    node: String,
    purpose: Use,
    file: PathBuf,
    certificate: Arc<NodeCertificate>,
    /// Beginning and renewal of what is in use, in seconds since 1970.
    renewal_s: parking_lot::Mutex<Option<u64>>,
}

impl Manager {
    /// The certificate of a node in `file`; what is there is used if it is good for `purpose` and has not ended.
    pub fn open(node: &str, purpose: Use, file: PathBuf) -> Arc<Self> {
        let this = Self {
            node: node.into(),
            purpose,
            file,
            certificate: Arc::default(),
            renewal_s: parking_lot::Mutex::default(),
        };
        match fs::read_to_string(&this.file) {
            Ok(pem) => {
                if let Err(error) = this.take(&pem) {
                    tracing::warn!(file = %this.file.display(), %error, "the node's certificate cannot be used; asking for another");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(file = %this.file.display(), %error, "the node's certificate cannot be read"),
        }
        Arc::new(this)
    }

    /// What TLS shows.
    pub fn certificate(&self) -> Arc<NodeCertificate> {
        self.certificate.clone()
    }

    /// Asks for a certificate, waits for it and puts it to use.
    ///
    /// # Errors
    /// When the API refuses, nobody signs, or the file cannot be written.
    pub async fn obtain(&self, client: &Client) -> Result<(), CertificateError> {
        let key = KeyPair::generate().map_err(|error| crypto("make a key")(&error))?;
        let request = self.request(&key)?;
        let api: Api<CertificateSigningRequest> = Api::all(client.clone());
        let failed =
            |step| move |error: &dyn std::fmt::Display| CertificateError::Api { step, reason: error.to_string() };
        let made = api.create(&PostParams::default(), &request).await.map_err(|error| failed("send")(&error))?;
        let name = made.name_any();
        let decided = |object: Option<&CertificateSigningRequest>| {
            object.is_none_or(|object| signed(object).is_some() || refusal(object).is_some())
        };
        let object = tokio::time::timeout(PATIENCE, await_condition(api, &name, decided))
            .await
            .map_err(|_| CertificateError::Unsigned { name: name.clone() })?
            .map_err(|error| failed("wait for")(&error))?
            .ok_or_else(|| failed("wait for")(&"it was deleted"))?;
        if let Some(message) = refusal(&object) {
            return Err(CertificateError::Refused { name, message });
        }
        let chain = signed(&object).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default();
        let pem = format!("{}\n{}", chain.trim_end(), key.serialize_pem());
        self.take(&pem)?;
        save(&self.file, &pem)
    }

    /// Has a certificate from now on, and renews it before it ends, until the future is dropped.
    pub async fn keep(self: Arc<Self>, client: Client) {
        loop {
            let now = unix_seconds(SystemTime::now());
            let left = self.renewal_s.lock().map_or(0, |renewal| renewal.saturating_sub(now));
            if left > 0 {
                tokio::time::sleep(Duration::from_secs(left).min(LOOK_INTERVAL)).await;
                continue;
            }
            match self.obtain(&client).await {
                Ok(()) => tracing::info!(purpose = ?self.purpose, "the node has a new certificate"),
                Err(error) => {
                    tracing::warn!(purpose = ?self.purpose, %error, "no new certificate, trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Puts certificate and key to use.
    fn take(&self, pem: &str) -> Result<(), CertificateError> {
        let reject = crypto("read the node's certificate");
        let (_, first) = match x509_parser::pem::parse_x509_pem(pem.as_bytes()) {
            Ok(parsed) => parsed,
            Err(error) => return Err(reject(&error)),
        };
        let parsed = match first.parse_x509() {
            Ok(parsed) => parsed,
            Err(error) => return Err(reject(&error)),
        };
        let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        if name != Some(&*self.user()) {
            return Err(reject(&format!("it is not for {}", self.user())));
        }
        if let Use::Serving(names) = &self.purpose
            && let Some(missing) = names.iter().find(|wanted| !names_of(&parsed).contains(wanted))
        {
            return Err(reject(&format!("it does not name {missing}")));
        }
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or_default();
        let (from, until) = (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
        if until <= unix_seconds(SystemTime::now()) {
            return Err(reject(&"it has ended"));
        }
        let seed = first.contents.last().copied().unwrap_or_default();
        self.certificate.set(pem.as_bytes(), pem.as_bytes()).map_err(|error| reject(&error))?;
        *self.renewal_s.lock() = Some(renewal(from, until, seed));
        Ok(())
    }

    fn user(&self) -> String {
        format!("system:node:{}", self.node)
    }

    fn request(&self, key: &KeyPair) -> Result<CertificateSigningRequest, CertificateError> {
        let (signer, usage, names): (_, _, &[String]) = match &self.purpose {
            Use::Client => ("kubernetes.io/kube-apiserver-client-kubelet", "client auth", &[]),
            Use::Serving(names) => ("kubernetes.io/kubelet-serving", "server auth", names),
        };
        let mut params =
            CertificateParams::new(names).map_err(|error| crypto("name the node in a certificate request")(&error))?;
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, self.user());
        params.distinguished_name = subject;
        let request = params.serialize_request(key).and_then(|request| request.pem());
        let request = request.map_err(|error| crypto("make a certificate request")(&error))?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta { generate_name: Some("csr-".into()), ..ObjectMeta::default() },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.into_bytes()),
                signer_name: signer.into(),
                usages: Some(vec!["digital signature".into(), usage.into()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        })
    }
}

/// When a certificate is to be renewed, in seconds since 1970. `seed` spreads the nodes.
fn renewal(from_s: u64, until_s: u64, seed: u8) -> u64 {
    let percent = RENEW_AFTER_PERCENT + RENEW_SPREAD_PERCENT * u64::from(seed) / u64::from(u8::MAX);
    from_s + until_s.saturating_sub(from_s) * percent / 100
}

fn signed(object: &CertificateSigningRequest) -> Option<&[u8]> {
    let certificate = object.status.as_ref()?.certificate.as_ref()?;
    Some(certificate.0.as_slice()).filter(|bytes| !bytes.is_empty())
}

/// Why a request was refused, if it was.
fn refusal(object: &CertificateSigningRequest) -> Option<String> {
    let conditions = object.status.as_ref()?.conditions.iter().flatten();
    let refused = conditions.into_iter().find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"))?;
    let said = [refused.reason.as_deref(), refused.message.as_deref()].into_iter().flatten().collect::<Vec<_>>();
    Some(said.join(": "))
}

/// Names and addresses that a certificate is good for.
fn names_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| std::net::IpAddr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| std::net::IpAddr::from(bytes).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(text).collect()
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Writes a file that only root may read, whole or not at all.
fn save(path: &Path, text: &str) -> Result<(), CertificateError> {
    let new = path.with_extension("new");
    let at = |step| move |source| CertificateError::File { step, path: path.to_owned(), source };
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(at("create"))?;
    file.write_all(text.as_bytes()).map_err(at("write"))?;
    file.sync_all().map_err(at("flush"))?;
    fs::rename(&new, path).map_err(at("rename"))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use k8s_openapi::api::certificates::v1::CertificateSigningRequestStatus;
    use kube::client::Body;
    use rcgen::{BasicConstraints, CertificateSigningRequestParams, IsCa, Issuer};
    use serde_json::json;

    use super::*;

    /// An API that signs, or refuses, each request that is posted.
    fn api(refuse: bool) -> Client {
        let known = Arc::new(parking_lot::Mutex::new(CertificateSigningRequest::default()));
        let answer = move |request: http::Request<Body>| {
            let known = known.clone();
            async move {
                let posted = *request.method() == http::Method::POST;
                let body = request.into_body().collect_bytes().await.expect("a body");
                if posted {
                    let mut object: CertificateSigningRequest = serde_json::from_slice(&body).expect("a request");
                    object.metadata.name = Some("csr-1".into());
                    object.metadata.resource_version = Some("1".into());
                    *known.lock() = object;
                }
                let mut object = known.lock().clone();
                if !posted {
                    object.status = Some(decide(&object, refuse));
                    let list = json!({"kind": "CertificateSigningRequestList", "apiVersion": "certificates.k8s.io/v1",
                        "metadata": {"resourceVersion": "1"}, "items": [object]});
                    return Ok::<_, Infallible>(http::Response::new(Body::from(list.to_string().into_bytes())));
                }
                Ok(http::Response::new(Body::from(serde_json::to_vec(&object).expect("JSON"))))
            }
        };
        Client::new(tower::service_fn(answer), "default")
    }

    fn decide(object: &CertificateSigningRequest, refuse: bool) -> CertificateSigningRequestStatus {
        if refuse {
            let status =
                json!({"conditions": [{"type": "Denied", "status": "True", "reason": "NotYours", "message": "no"}]});
            return serde_json::from_value(status).expect("a status");
        }
        let key = KeyPair::generate().expect("a key");
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = Issuer::from_params(&ca, &key);
        let pem = String::from_utf8(object.spec.request.0.clone()).expect("PEM");
        let request = CertificateSigningRequestParams::from_pem(&pem).expect("a request");
        let certificate = request.signed_by(&issuer).expect("signed").pem();
        CertificateSigningRequestStatus {
            certificate: Some(ByteString(certificate.into_bytes())),
            ..CertificateSigningRequestStatus::default()
        }
    }

    #[tokio::test]
    async fn a_certificate_is_asked_for_kept_and_found_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("serving.pem");
        let names = vec!["n1".to_owned(), "10.0.0.1".to_owned()];
        let manager = Manager::open("n1", Use::Serving(names.clone()), file.clone());
        assert!(!manager.certificate().is_set());
        manager.obtain(&api(false)).await.expect("a certificate");
        assert!(manager.certificate().is_set());
        let again = |node: &str, names: &[String]| Manager::open(node, Use::Serving(names.into()), file.clone());
        assert!(again("n1", &names).certificate().is_set());
        // Another node's, or one that lacks an address, is not used.
        assert!(!again("n2", &names).certificate().is_set());
        assert!(!again("n1", &["10.0.0.2".to_owned()]).certificate().is_set());
    }

    #[tokio::test]
    async fn a_refused_request_says_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let manager = Manager::open("n1", Use::Client, folder.path().join("client.pem"));
        let error = manager.obtain(&api(true)).await.expect_err("refused");
        assert_eq!(error.to_string(), "the certificate request csr-1 was refused: NotYours: no");
        assert!(!manager.certificate().is_set());
    }

    #[test]
    fn renewal_comes_well_before_the_end() {
        assert_eq!((renewal(100, 1100, 0), renewal(100, 1100, 255)), (800, 1000));
    }
}

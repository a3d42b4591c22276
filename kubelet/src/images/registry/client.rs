//! The HTTP side: endpoints of a registry, TLS per host, authentication, redirects, documents and blobs.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, LOCATION, RANGE, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;

use super::super::blobs::MAX_DOCUMENT_BYTES;
use super::super::error::{ImageError, IoContext};
use super::super::reference::Reference;
use super::challenge::{self, Challenge};
use super::config::{RegistryConfig, TlsConfig};
use super::credentials::Credentials;

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 5;
/// Error text of a registry that is passed on.
const MAX_ERROR_BYTES: usize = 16 << 10;
/// Until the headers of an answer must be there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Until a connection must stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Lifetime of a token whose issuer does not say: docker's specification.
const DEFAULT_TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// Tokens kept.
const MAX_TOKENS: usize = 1024;
/// HTTP clients kept, one per TLS setting.
const MAX_CLIENTS: usize = 64;
/// Manifest types that we understand.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

type Http = HyperClient<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// One place where a repository may be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::images) struct Endpoint {
    /// `https://host:port/v2`
    base: String,
    /// `host:port`
    pub(in crate::images) host: String,
    /// The registry's own name, told to mirrors as `ns`.
    namespace: Option<String>,
}

impl Endpoint {
    fn url(&self, repository: &str, what: &str) -> String {
        let mut url = format!("{}/{repository}/{what}", self.base);
        if let Some(namespace) = &self.namespace {
            url.push_str("?ns=");
            url.push_str(namespace);
        }
        url
    }
}

/// A request's target.
pub(in crate::images) struct Fetch<'a> {
    pub(in crate::images) endpoint: &'a Endpoint,
    pub(in crate::images) repository: &'a str,
    pub(in crate::images) credentials: Option<&'a Credentials>,
}

struct Token {
    value: String,
    until: Instant,
}

/// A client of registries; holds connections and tokens.
pub(in crate::images) struct Client {
    config: RegistryConfig,
    clients: Mutex<HashMap<String, Http>>,
    tokens: Mutex<HashMap<String, Token>>,
}

impl Client {
    pub(in crate::images) fn new(config: RegistryConfig) -> Result<Self, ImageError> {
        for endpoint in config.mirrors.values().flat_map(|mirror| &mirror.endpoint) {
            endpoint_of(endpoint, None)?;
        }
        Ok(Self { config, clients: Mutex::default(), tokens: Mutex::default() })
    }

    /// Where to look for a reference, in order.
    pub(in crate::images) fn endpoints(&self, reference: &Reference) -> Result<Vec<Endpoint>, ImageError> {
        let mirror = self.config.mirrors.get(&reference.registry).or_else(|| self.config.mirrors.get("*"));
        let mut endpoints = Vec::new();
        for url in mirror.iter().flat_map(|mirror| &mirror.endpoint) {
            let mut endpoint = endpoint_of(url, None)?;
            if endpoint.host != reference.host() {
                endpoint.namespace = Some(reference.registry.clone());
            }
            endpoints.push(endpoint);
        }
        if !mirror.is_some_and(|mirror| mirror.only) {
            let own = endpoint_of(&format!("https://{}", reference.host()), None)?;
            if !endpoints.iter().any(|endpoint| endpoint.host == own.host) {
                endpoints.push(own);
            }
        }
        Ok(endpoints)
    }

    /// The credentials that the configuration holds for an endpoint.
    pub(in crate::images) fn configured_credentials(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
    ) -> Option<Credentials> {
        self.config.credentials(&endpoint.host).or_else(|| self.config.credentials(&reference.registry))
    }

    /// A manifest or index.
    pub(in crate::images) async fn manifest(&self, fetch: &Fetch<'_>, selector: &str) -> Result<Bytes, ImageError> {
        let url = fetch.endpoint.url(fetch.repository, &format!("manifests/{selector}"));
        let response = self.get(fetch, &url, Some(MANIFEST_TYPES), None).await?;
        let limit = usize::try_from(MAX_DOCUMENT_BYTES).unwrap_or(usize::MAX);
        let body = Limited::new(response.into_body(), limit)
            .collect()
            .await
            .map_err(|error| transport(fetch.endpoint, error))?;
        Ok(body.to_bytes())
    }

    /// A blob from byte `offset` on; the answer's status is 206 if the registry honours the offset, else 200.
    pub(in crate::images) async fn blob(
        &self,
        fetch: &Fetch<'_>,
        digest: &str,
        offset: u64,
    ) -> Result<Response<Incoming>, ImageError> {
        let url = fetch.endpoint.url(fetch.repository, &format!("blobs/{digest}"));
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        self.get(fetch, &url, None, range.as_deref()).await
    }

    async fn get(
        &self,
        fetch: &Fetch<'_>,
        url: &str,
        accept: Option<&str>,
        range: Option<&str>,
    ) -> Result<Response<Incoming>, ImageError> {
        let endpoint = fetch.endpoint;
        let scope = format!("repository:{}:pull", fetch.repository);
        let mut authorization = self.known_token(fetch, &scope);
        // At most one round of authentication: a token just issued and refused will not get better.
        for attempt in 0..2 {
            let response = self.follow(endpoint, url, accept, range, authorization.as_deref()).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let challenges: Vec<String> = response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok().map(str::to_owned))
                .collect();
            let refused = |reason: String| ImageError::Unauthorized {
                host: endpoint.host.clone(),
                repository: fetch.repository.to_owned(),
                reason,
            };
            if status == StatusCode::UNAUTHORIZED && attempt == 0 {
                authorization = match challenge::parse(challenges.iter().map(String::as_str)) {
                    Some(Challenge::Basic) => match fetch.credentials.and_then(Credentials::basic) {
                        Some(basic) => Some(basic),
                        None => {
                            return Err(refused("the registry wants a user name and password".into()));
                        }
                    },
                    Some(Challenge::Bearer { realm, service, scope: asked }) => {
                        let scope = asked.unwrap_or_else(|| scope.clone());
                        Some(self.token(fetch, &realm, service.as_deref(), &scope).await?)
                    }
                    None => {
                        return Err(refused("the registry wants an authentication that we do not know".into()));
                    }
                };
                continue;
            }
            let message = error_message(response).await;
            if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
                return Err(refused(message));
            }
            return Err(answered(endpoint, url, status, message));
        }
        Err(ImageError::Unauthorized {
            host: endpoint.host.clone(),
            repository: fetch.repository.to_owned(),
            reason: "the registry refused the credentials".into(),
        })
    }

    /// Sends a GET and follows redirects; credentials go only to the host they are for.
    async fn follow(
        &self,
        endpoint: &Endpoint,
        url: &str,
        accept: Option<&str>,
        range: Option<&str>,
        authorization: Option<&str>,
    ) -> Result<Response<Incoming>, ImageError> {
        let mut uri: Uri = url.parse().map_err(|error| transport(endpoint, error))?;
        let origin = uri.authority().cloned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::builder().method(Method::GET).uri(uri.clone());
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            if let Some(authorization) = authorization.filter(|_| uri.authority() == origin.as_ref()) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let request = request.body(Full::default()).map_err(|error| transport(endpoint, error))?;
            let response = self.send(endpoint, &uri, request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let target = target.ok_or_else(|| transport(endpoint, "a redirect without a location"))?;
            let next =
                absolute(&uri, target).ok_or_else(|| transport(endpoint, format!("a redirect to {target:?}")))?;
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(transport(endpoint, "a redirect from HTTPS to plain HTTP was refused"));
            }
            uri = next;
        }
        Err(transport(endpoint, format!("more than {MAX_REDIRECTS} redirects")))
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        uri: &Uri,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, ImageError> {
        let host = uri.authority().map(ToString::to_string).unwrap_or_default();
        let client = self.http(&host)?;
        match tokio::time::timeout(ANSWER_TIMEOUT, client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(transport(endpoint, Chain(&error))),
            Err(_) => Err(transport(endpoint, format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    }

    fn http(&self, host: &str) -> Result<Http, ImageError> {
        let tls = self.config.host(host).and_then(|config| config.tls.clone());
        // Hosts without settings of their own share a client, and with it the certificates it trusts.
        let key = if tls.is_some() { host } else { "" };
        if let Some(client) = self.clients.lock().get(key) {
            return Ok(client.clone());
        }
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(&tls.unwrap_or_default(), host)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = HyperClient::builder(TokioExecutor::new()).build(https);
        let mut clients = self.clients.lock();
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(key.to_owned(), client.clone());
        Ok(client)
    }

    fn known_token(&self, fetch: &Fetch<'_>, scope: &str) -> Option<String> {
        let tokens = self.tokens.lock();
        let token = tokens.get(&token_key(fetch, scope))?;
        (token.until > Instant::now()).then(|| token.value.clone())
    }

    /// Gets a token from the token server that the registry names.
    async fn token(
        &self,
        fetch: &Fetch<'_>,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<String, ImageError> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let endpoint = fetch.endpoint;
        let plain = endpoint.base.starts_with("http://");
        if !(realm.starts_with("https://") || plain && realm.starts_with("http://")) {
            return Err(transport(endpoint, format!("its token server {realm:?} is not reached by HTTPS")));
        }
        let mut query = vec![("scope", scope)];
        query.extend(service.map(|service| ("service", service)));
        let request = match fetch.credentials {
            Some(Credentials::Identity(token)) => {
                query.extend([("grant_type", "refresh_token"), ("client_id", "coracle"), ("refresh_token", token)]);
                Request::post(realm)
                    .header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(Full::from(form(&query)))
            }
            credentials => {
                let joint = if realm.contains('?') { '&' } else { '?' };
                let mut request = Request::get(format!("{realm}{joint}{}", form(&query)));
                if let Some(basic) = credentials.and_then(Credentials::basic) {
                    request = request.header(AUTHORIZATION, basic);
                }
                request.body(Full::default())
            }
        }
        .map_err(|error| transport(endpoint, error))?;
        let uri = request.uri().clone();
        let response = self.send(endpoint, &uri, request).await?;
        let status = response.status();
        if !status.is_success() {
            let reason = format!("the token server answered {status}: {}", error_message(response).await);
            return Err(ImageError::Unauthorized {
                host: endpoint.host.clone(),
                repository: fetch.repository.into(),
                reason,
            });
        }
        let body = Limited::new(response.into_body(), MAX_ERROR_BYTES * 4)
            .collect()
            .await
            .map_err(|error| transport(endpoint, error))?;
        // The parser's message could quote the token.
        let answer: Answer = serde_json::from_slice(&body.to_bytes())
            .map_err(|_| transport(endpoint, "its token server's answer is not JSON"))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        let value = format!("Bearer {}", token.ok_or_else(|| transport(endpoint, "its token server gave no token"))?);
        let lifetime = answer.expires_in.map_or(DEFAULT_TOKEN_LIFETIME, |s| Duration::from_secs(s.clamp(60, 86_400)));
        let mut tokens = self.tokens.lock();
        if tokens.len() >= MAX_TOKENS {
            tokens.clear();
        }
        let until = Instant::now() + lifetime * 9 / 10;
        tokens.insert(token_key(fetch, scope), Token { value: value.clone(), until });
        Ok(value)
    }
}

/// Tokens belong to whose credentials got them.
fn token_key(fetch: &Fetch<'_>, scope: &str) -> String {
    use sha2::Digest;
    let who = match fetch.credentials {
        Some(Credentials::Password { username, password }) => {
            hex::encode(sha2::Sha256::digest(format!("{username}:{password}")))
        }
        Some(Credentials::Identity(token)) => hex::encode(sha2::Sha256::digest(token)),
        None => String::new(),
    };
    format!("{} {scope} {who}", fetch.endpoint.base)
}

fn endpoint_of(url: &str, namespace: Option<String>) -> Result<Endpoint, ImageError> {
    let bad = |reason: String| ImageError::Config { path: url.into(), reason };
    let uri: Uri = url.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"));
    let scheme = scheme.ok_or_else(|| bad("an endpoint begins with http:// or https://".into()))?;
    let host = uri.authority().map(ToString::to_string).ok_or_else(|| bad("an endpoint needs a host".into()))?;
    let path = uri.path().trim_end_matches('/');
    let base = if path.is_empty() { format!("{scheme}://{host}/v2") } else { format!("{scheme}://{host}{path}") };
    Ok(Endpoint { base, host, namespace })
}

fn tls_config(tls: &TlsConfig, host: &str) -> Result<rustls::ClientConfig, ImageError> {
    let bad = |reason: String| ImageError::Transport { host: host.to_owned(), reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?;
    let builder = if tls.insecure_skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Trusting(provider)))
    } else {
        let mut roots = rustls::RootCertStore::empty();
        match &tls.ca_file {
            Some(path) => {
                let pem = fs::read(path).step("read", path)?;
                for certificate in CertificateDer::pem_slice_iter(&pem) {
                    let certificate = certificate.map_err(|error| bad(format!("{}: {error}", path.display())))?;
                    roots.add(certificate).map_err(|error| bad(format!("{}: {error}", path.display())))?;
                }
            }
            None => {
                let native = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(native.certs);
            }
        }
        builder.with_root_certificates(roots)
    };
    match (&tls.cert_file, &tls.key_file) {
        (Some(certificate), Some(key)) => {
            let pem = fs::read(certificate).step("read", certificate)?;
            let chain = CertificateDer::pem_slice_iter(&pem)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| bad(error.to_string()))?;
            let pem = fs::read(key).step("read", key)?;
            let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| bad(error.to_string()))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| bad(error.to_string()))
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(bad("cert_file and key_file go together".into())),
    }
}

/// Trusts every certificate: `insecure_skip_verify`.
#[derive(Debug)]
struct Trusting(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A location relative to where it was found.
fn absolute(base: &Uri, target: &str) -> Option<Uri> {
    if target.starts_with("http://") || target.starts_with("https://") {
        return target.parse().ok();
    }
    let path = target.starts_with('/').then_some(target)?;
    format!("{}://{}{path}", base.scheme_str()?, base.authority()?).parse().ok()
}

/// `application/x-www-form-urlencoded`
fn form(pairs: &[(&str, &str)]) -> String {
    let encode = |text: &str| {
        text.bytes().fold(String::new(), |mut encoded, byte| {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
                _ => encoded.push_str(&format!("%{byte:02X}")),
            }
            encoded
        })
    };
    pairs.iter().map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect::<Vec<_>>().join("&")
}

fn transport(endpoint: &Endpoint, reason: impl ToString) -> ImageError {
    ImageError::Transport { host: endpoint.host.clone(), reason: reason.to_string() }
}

fn answered(endpoint: &Endpoint, url: &str, status: StatusCode, message: String) -> ImageError {
    let path = url.parse::<Uri>().map(|uri| uri.path().to_owned()).unwrap_or_default();
    ImageError::Registry { host: endpoint.host.clone(), method: "GET".into(), path, status: status.as_u16(), message }
}

/// The registry's own words: `{"errors":[{"code":…,"message":…}]}`, else the status's.
async fn error_message(response: Response<Incoming>) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        code: Option<String>,
        message: Option<String>,
    }
    let status = response.status();
    let fallback = status.canonical_reason().unwrap_or("unknown status").to_owned();
    let Ok(body) = Limited::new(response.into_body(), MAX_ERROR_BYTES).collect().await else {
        return fallback;
    };
    match serde_json::from_slice::<Errors>(&body.to_bytes()) {
        Ok(parsed) => match parsed.errors.into_iter().next() {
            Some(Entry { code, message }) => {
                [code, message].into_iter().flatten().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(": ")
            }
            None => fallback,
        },
        Err(_) => fallback,
    }
}

/// An error with its causes: hyper's own words alone say little.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(out, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

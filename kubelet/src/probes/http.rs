//! HTTP probes: any status from 200 to 399 is well; redirects on the same host are followed; certificates are not checked,
//! as documented for `scheme: HTTPS`.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::header::{ACCEPT, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::check::no_port;
use super::{Answer, Target};

/// Redirects followed.
const MAX_REDIRECTS: usize = 10;
/// Bytes of a body that are read; the rest is left.
const BODY_LIMIT_BYTES: usize = 10 << 10;

/// Asks by HTTP.
pub(super) async fn get(action: &HTTPGetAction, target: &Target) -> Answer {
    let Some(port) = target.port(&action.port) else { return no_port(&action.port) };
    let secure = action.scheme.as_deref() == Some("HTTPS");
    let host = action.host.clone().filter(|host| !host.is_empty()).unwrap_or_else(|| bracketed(&target.ip.to_string()));
    let scheme = if secure { "https" } else { "http" };
    let path = action.path.clone().filter(|path| !path.is_empty()).unwrap_or_else(|| "/".into());
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut url = format!("{scheme}://{host}:{port}{slash}{path}");
    for _ in 0..=MAX_REDIRECTS {
        let response = match request(&url, action).await {
            Ok(response) => response,
            Err(error) => return Answer::Failure(format!("Get \"{url}\": {error}")),
        };
        let code = response.status().as_u16();
        if !(200..400).contains(&code) {
            return Answer::Failure(format!("HTTP probe failed with statuscode: {code}"));
        }
        let next = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        match next.filter(|_| (300..400).contains(&code)).and_then(|location| same_host(&url, location)) {
            Some(next) => url = next,
            None => return Answer::Success(format!("HTTP probe succeeded with statuscode: {code}")),
        }
    }
    Answer::Failure(format!("stopped after {MAX_REDIRECTS} redirects"))
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Where a redirect leads, if to the same host.
fn same_host(url: &str, location: &str) -> Option<String> {
    let base: Uri = url.parse().ok()?;
    if location.starts_with('/') && !location.starts_with("//") {
        return Some(format!("{}://{}{location}", base.scheme_str()?, base.authority()?));
    }
    let next: Uri = location.parse().ok()?;
    (next.host()? == base.host()?).then(|| location.to_owned())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn request(url: &str, action: &HTTPGetAction) -> Result<Response<Incoming>, Failure> {
    let uri: Uri = url.parse()?;
    let host = uri.host().ok_or("the URL names no host")?.trim_matches(['[', ']']).to_owned();
    let secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::get(path).header(HOST, authority);
    let headers = request.headers_mut().ok_or("the request is malformed")?;
    headers.insert(USER_AGENT, HeaderValue::from_static("kube-probe/1.36"));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    for header in action.http_headers.iter().flatten() {
        let name: HeaderName = header.name.parse()?;
        if name == HOST || name == ACCEPT || name == USER_AGENT {
            headers.remove(&name);
        }
        if !(header.value.is_empty() && (name == ACCEPT || name == USER_AGENT)) {
            headers.append(name, header.value.parse()?);
        }
    }
    let request = request.body(Empty::<Bytes>::new())?;
    if secure {
        let name = ServerName::try_from(host)?;
        exchange(connector()?.connect(name, stream).await?, request).await
    } else {
        exchange(stream, request).await
    }
}

async fn exchange<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // The connection lives as long as this call: it is driven beside the exchange and dropped with it.
    let answered = async {
        let mut response = sender.send_request(request).await?;
        // Servers log a reset when the body is not read; how it ends does not matter.
        let _ = Limited::new(response.body_mut(), BODY_LIMIT_BYTES).collect().await;
        Ok::<_, hyper::Error>(response)
    };
    tokio::pin!(answered, connection);
    tokio::select! {
        response = &mut answered => Ok(response?),
        ended = &mut connection => {
            ended?;
            Ok(answered.await?)
        }
    }
}

/// TLS that takes any certificate.
fn connector() -> Result<TlsConnector, Failure> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config.clone().into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(CONFIG.get_or_init(|| Arc::new(config)).clone().into())
}

/// Accepts what the pod shows, and still checks that it holds the key to it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_redirects_to_the_same_host_are_followed() {
        let url = "http://10.0.0.1:80/a";
        assert_eq!(same_host(url, "/b").as_deref(), Some("http://10.0.0.1:80/b"));
        assert_eq!(same_host(url, "https://10.0.0.1/b").as_deref(), Some("https://10.0.0.1/b"));
        assert_eq!(same_host(url, "http://example.com/"), None);
        assert_eq!(same_host(url, "//example.com/"), None);
    }
}

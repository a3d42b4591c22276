//! Keys and certificates: the cluster's CA, the serving certificate, client certificates, the key that signs tokens.
//!
//! Everything lies in one folder (mode 0700, keys 0600). What is there is used, what is missing or about to expire is made;
//! the CA and the token key are never replaced, since others hold what they signed.

pub(crate) mod request;

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Days that the CA is valid.
const CA_DAYS: u64 = 3650;
/// Days that other certificates are valid.
const LEAF_DAYS: u64 = 365;
/// Days before its end at which a certificate is made anew when the server starts.
const RENEW_DAYS: u64 = 90;
/// Name in the certificate that aggregated APIs trust.
pub(crate) const PROXY_CLIENT: &str = "front-proxy-client";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates begin this long ago, for hosts whose clocks differ.
const BACKDATE: Duration = Duration::from_secs(3600);

/// A step of reading or making keys that failed.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file or folder.
    #[error("{step} {}: {source}", path.display())]
    File {
        /// What was done.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A certificate or key.
    #[error("{step}: {reason}; remove the damaged file to have it made anew")]
    Crypto {
        /// What was done.
        step: String,
        /// What the library said.
        reason: String,
    },
}

fn crypto(step: impl Into<String>) -> impl FnOnce(&dyn std::fmt::Display) -> PkiError {
    let step = step.into();
    move |reason| PkiError::Crypto { step, reason: reason.to_string() }
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub cert_pem: String,
    /// The key; secret.
    pub key_pem: String,
}

impl Identity {
    /// The same as rustls wants it.
    pub fn rustls(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
        let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes()).collect();
        let certs = certs.map_err(|e| crypto("read a certificate")(&e))?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|e| crypto("read a key")(&e))?;
        Ok((certs, key))
    }
}

/// What a certificate is for.
#[derive(Clone, Debug)]
pub enum Purpose {
    /// A TLS server with these names and addresses.
    Server(Vec<String>),
    /// A client: its groups are the organisations.
    Client(Vec<String>),
    /// Both, as kubelets need it.
    Both(Vec<String>, Vec<String>),
}

/// The cluster's keys.
pub struct Pki {
    dir: PathBuf,
    /// Certificate of the CA, PEM.
    pub ca_pem: String,
    ca: Issuer<'static, KeyPair>,
    ca_key_pem: String,
    /// Certificate, PEM, of the CA that vouches for this server's words about users to aggregated APIs. It is another one
    /// than that of clients, so that no client certificate can pass for it.
    pub proxy_ca_pem: String,
    proxy_ca: Issuer<'static, KeyPair>,
    /// Key that signs ServiceAccount tokens: PKCS#8, ECDSA P-256.
    pub(crate) token_key: Arc<Vec<u8>>,
}

impl Pki {
    /// Opens the folder, making what is missing.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
            step: "make the folder",
            path: dir.into(),
            source,
        })?;
        let (ca_pem, ca_key_pem, ca) = authority(dir, "ca", "coracle-ca")?;
        let (proxy_ca_pem, _, proxy_ca) = authority(dir, "front-proxy-ca", "coracle-front-proxy-ca")?;
        let token_path = dir.join("service-account.key");
        if !token_path.exists() {
            let pair = KeyPair::generate().map_err(|e| crypto("make the token key")(&e))?;
            write(&token_path, &pair.serialize_pem(), 0o600)?;
        }
        let pair =
            KeyPair::from_pem(&read(&token_path)?).map_err(|e| crypto(format!("read {}", token_path.display()))(&e))?;
        let dir = dir.into();
        Ok(Self { dir, ca_pem, ca, ca_key_pem, proxy_ca_pem, proxy_ca, token_key: Arc::new(pair.serialize_der()) })
    }

    /// Key of the CA, PEM, for those that sign certificate requests.
    pub fn ca_key_pem(&self) -> &str {
        &self.ca_key_pem
    }

    /// The identity `file` (without suffix) of the folder, made or renewed when needed.
    pub fn identity(&self, file: &str, name: &str, purpose: &Purpose) -> Result<Identity, PkiError> {
        self.kept(file, name, purpose, &self.ca)
    }

    /// The client identity that aggregated APIs take users' names from.
    pub(crate) fn proxy_identity(&self) -> Result<Identity, PkiError> {
        self.kept("front-proxy-client", PROXY_CLIENT, &Purpose::Client(Vec::new()), &self.proxy_ca)
    }

    fn kept(
        &self,
        file: &str,
        name: &str,
        purpose: &Purpose,
        ca: &Issuer<'static, KeyPair>,
    ) -> Result<Identity, PkiError> {
        let (cert, key) = (self.dir.join(format!("{file}.crt")), self.dir.join(format!("{file}.key")));
        if cert.exists() && key.exists() {
            let identity = Identity { cert_pem: read(&cert)?, key_pem: read(&key)? };
            if still_good(&identity.cert_pem, purpose) {
                return Ok(identity);
            }
        }
        let identity = issue(name, purpose, ca)?;
        write(&key, &identity.key_pem, 0o600)?;
        write(&cert, &identity.cert_pem, 0o644)?;
        Ok(identity)
    }

    /// A fresh key with a certificate of the CA.
    pub fn issue(&self, name: &str, purpose: &Purpose) -> Result<Identity, PkiError> {
        issue(name, purpose, &self.ca)
    }

    /// The administrator's client certificate: `system:admin` in `system:masters`.
    pub fn admin(&self) -> Result<Identity, PkiError> {
        self.identity("admin", "system:admin", &Purpose::Client(vec![crate::user::SYSTEM_MASTERS.into()]))
    }

    /// A kubeconfig for an identity of this cluster, as text.
    pub fn kubeconfig(&self, server: &str, user: &Identity) -> String {
        use base64::Engine as _;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: default\n  cluster:\n    server: {server}\n    \
             certificate-authority-data: {}\ncontexts:\n- name: default\n  context:\n    cluster: default\n    user: default\n\
             current-context: default\nusers:\n- name: default\n  user:\n    client-certificate-data: {}\n    \
             client-key-data: {}\n",
            encode(&self.ca_pem),
            encode(&user.cert_pem),
            encode(&user.key_pem),
        )
    }

    /// Writes a kubeconfig with mode 0600, in one step.
    pub fn write_kubeconfig(&self, path: &Path, server: &str, user: &Identity) -> Result<(), PkiError> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|source| PkiError::File {
                step: "make the folder",
                path: parent.into(),
                source,
            })?;
        }
        write(path, &self.kubeconfig(server, user), 0o600)
    }
}

/// Reads an authority, making it when there is none: its certificate, its key and both to sign with.
fn authority(dir: &Path, file: &str, name: &str) -> Result<(String, String, Issuer<'static, KeyPair>), PkiError> {
    let (cert, key) = (dir.join(format!("{file}.crt")), dir.join(format!("{file}.key")));
    if !cert.exists() || !key.exists() {
        let pair = KeyPair::generate().map_err(|e| crypto("make the CA's key")(&e))?;
        let ca = ca_params(name).self_signed(&pair).map_err(|e| crypto("sign the CA")(&e))?;
        write(&key, &pair.serialize_pem(), 0o600)?;
        write(&cert, &ca.pem(), 0o644)?;
    }
    let (cert_pem, key_pem) = (read(&cert)?, read(&key)?);
    let pair = KeyPair::from_pem(&key_pem).map_err(|e| crypto(format!("read {}", key.display()))(&e))?;
    let ca = Issuer::from_ca_cert_pem(&cert_pem, pair).map_err(|e| crypto(format!("read {}", cert.display()))(&e))?;
    Ok((cert_pem, key_pem, ca))
}

fn issue(name: &str, purpose: &Purpose, ca: &Issuer<'static, KeyPair>) -> Result<Identity, PkiError> {
    let pair = KeyPair::generate().map_err(|e| crypto("make a key")(&e))?;
    let cert = leaf_params(name, purpose).signed_by(&pair, ca).map_err(|e| crypto(format!("sign {name}"))(&e))?;
    Ok(Identity { cert_pem: cert.pem(), key_pem: pair.serialize_pem() })
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let made = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    params.distinguished_name = named(&format!("{name}@{made}"), &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, CA_DAYS);
    params
}

fn leaf_params(name: &str, purpose: &Purpose) -> CertificateParams {
    let (sans, organisations): (&[String], &[String]) = match purpose {
        Purpose::Server(sans) => (sans, &[]),
        Purpose::Client(groups) => (&[], groups),
        Purpose::Both(sans, groups) => (sans, groups),
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name, organisations);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = match purpose {
        Purpose::Server(_) => vec![ExtendedKeyUsagePurpose::ServerAuth],
        Purpose::Client(_) => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Purpose::Both(..) => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.subject_alt_names = sans
        .iter()
        .filter_map(|san| match san.parse::<IpAddr>() {
            Ok(address) => Some(SanType::IpAddress(address)),
            Err(_) => san.as_str().try_into().ok().map(SanType::DnsName),
        })
        .collect();
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, LEAF_DAYS);
    params
}

fn named(name: &str, organisations: &[String]) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    for organisation in organisations {
        dn.push(DnType::OrganizationName, organisation.as_str());
    }
    dn.push(DnType::CommonName, name);
    dn
}

fn valid_for(params: &mut CertificateParams, days: u64) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + DAY * u32::try_from(days).expect("a number of days fits")).into();
}

/// Whether a certificate lasts long enough and names everything that is wanted.
fn still_good(cert_pem: &str, purpose: &Purpose) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(cert_pem.as_bytes()) else { return false };
    let Ok(cert) = pem.parse_x509() else { return false };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let renew = i64::try_from(now + RENEW_DAYS * DAY.as_secs()).unwrap_or(i64::MAX);
    if cert.validity().not_after.timestamp() < renew {
        return false;
    }
    let (Purpose::Server(sans) | Purpose::Both(sans, _)) = purpose else { return true };
    let Ok(Some(names)) = cert.subject_alternative_name() else { return sans.is_empty() };
    let has: Vec<String> = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => Some((*name).to_owned()),
            x509_parser::extensions::GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
                _ => <[u8; 16]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            },
            _ => None,
        })
        .collect();
    sans.iter().all(|san| has.contains(san))
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { step: "read", path: path.into(), source })
}

/// Writes a file in one step: a crash leaves the old one or the new one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let temporary = path.with_extension("tmp");
    let fail = |step| {
        let path = path.to_path_buf();
        move |source| PkiError::File { step, path, source }
    };
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail("clear")(error)),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(fail("create"))?;
    file.write_all(text.as_bytes()).map_err(fail("write"))?;
    file.sync_all().map_err(fail("flush"))?;
    fs::rename(&temporary, path).map_err(fail("rename"))
}

/// User of a verified client certificate: the common name, its groups the organisations.
pub(crate) fn certificate_user(der: &[u8]) -> Option<crate::user::UserInfo> {
    let (_, cert) = x509_parser::parse_x509_certificate(der).ok()?;
    let subject = cert.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?;
    if name.is_empty() {
        return None;
    }
    let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
    Some(crate::user::UserInfo::new(name, &groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_and_renew() {
        let dir = tempfile::tempdir().expect("a folder");
        let pki = Pki::open(dir.path()).expect("it opens");
        let server = Purpose::Server(vec!["localhost".into(), "127.0.0.1".into()]);
        let first = pki.identity("serving", "x", &server).expect("an identity");
        let again = Pki::open(dir.path()).expect("it opens again");
        assert_eq!(again.ca_pem, pki.ca_pem);
        assert_eq!(again.identity("serving", "x", &server).expect("an identity").cert_pem, first.cert_pem);
        let more = Purpose::Server(vec!["localhost".into(), "example.com".into()]);
        assert_ne!(again.identity("serving", "x", &more).expect("an identity").cert_pem, first.cert_pem);
        let admin = pki.admin().expect("an identity");
        let (certs, _) = admin.rustls().expect("readable");
        let user = certificate_user(&certs[0]).expect("a user");
        assert_eq!((user.name.as_str(), user.groups[0].as_str()), ("system:admin", "system:masters"));
    }
}

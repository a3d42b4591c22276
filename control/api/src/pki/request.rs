//! PKCS#10 certificate requests: reading them, and signing them with the cluster's authority.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SigningKey as _,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

use super::{Pki, PkiError, crypto};

/// Certificates begin this long ago, for hosts whose clocks differ; below the shortest life that may be asked for.
const BACKDATE: Duration = Duration::from_secs(5 * 60);
/// Certificates with a shorter life than this are not shortened by what they are backdated.
const SHORT: Duration = Duration::from_secs(8 * 3600);
/// Bytes of a serial number (RFC 5280 allows 20).
const SERIAL_BYTES: usize = 16;
const DER_SEQUENCE: u8 = 0x30;
const DER_BIT_STRING: u8 = 0x03;
/// Places of the subject and of its key among the parts of a version 3 certificate (RFC 5280, section 4.1).
const SUBJECT: usize = 5;
const SUBJECT_KEY: usize = 6;

/// Usages by the names of `certificates.k8s.io`.
const KEY_USAGES: &[(&str, KeyUsagePurpose)] = &[
    ("signing", KeyUsagePurpose::DigitalSignature),
    ("digital signature", KeyUsagePurpose::DigitalSignature),
    ("content commitment", KeyUsagePurpose::ContentCommitment),
    ("key encipherment", KeyUsagePurpose::KeyEncipherment),
    ("key agreement", KeyUsagePurpose::KeyAgreement),
    ("data encipherment", KeyUsagePurpose::DataEncipherment),
    ("cert sign", KeyUsagePurpose::KeyCertSign),
    ("crl sign", KeyUsagePurpose::CrlSign),
    ("encipher only", KeyUsagePurpose::EncipherOnly),
    ("decipher only", KeyUsagePurpose::DecipherOnly),
];
const EXTENDED_USAGES: &[(&str, ExtendedKeyUsagePurpose)] = &[
    ("any", ExtendedKeyUsagePurpose::Any),
    ("server auth", ExtendedKeyUsagePurpose::ServerAuth),
    ("client auth", ExtendedKeyUsagePurpose::ClientAuth),
    ("code signing", ExtendedKeyUsagePurpose::CodeSigning),
    ("email protection", ExtendedKeyUsagePurpose::EmailProtection),
    ("s/mime", ExtendedKeyUsagePurpose::EmailProtection),
    ("timestamping", ExtendedKeyUsagePurpose::TimeStamping),
    ("ocsp signing", ExtendedKeyUsagePurpose::OcspSigning),
];

/// What a request asks a certificate for. Its signature has been verified.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CertificateRequest {
    /// Common name of the subject.
    pub common_name: String,
    /// Organisations of the subject.
    pub organizations: Vec<String>,
    /// Alternative names by kind.
    pub dns_names: Vec<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Mail addresses.
    pub emails: Vec<String>,
    /// URIs.
    pub uris: Vec<String>,
    /// The whole subject, DER.
    pub subject_der: Vec<u8>,
    /// The key, DER (SubjectPublicKeyInfo).
    pub key_der: Vec<u8>,
}

impl CertificateRequest {
    /// Reads a PEM block `CERTIFICATE REQUEST`.
    ///
    /// # Errors
    /// When it is none, or is not signed with the key that it holds.
    pub fn parse(pem: &[u8]) -> Result<Self, PkiError> {
        let (_, block) =
            x509_parser::pem::parse_x509_pem(pem).map_err(|e| crypto("read the certificate request")(&e))?;
        let (_, request) = X509CertificationRequest::from_der(&block.contents)
            .map_err(|e| crypto("read the certificate request")(&e))?;
        request.verify_signature().map_err(|e| crypto("verify the certificate request's signature")(&e))?;
        let info = &request.certification_request_info;
        let text = |value: &x509_parser::x509::AttributeTypeAndValue<'_>| value.as_str().ok().map(str::to_owned);
        let mut read = Self {
            common_name: info.subject.iter_common_name().find_map(text).unwrap_or_default(),
            organizations: info.subject.iter_organization().filter_map(text).collect(),
            subject_der: info.subject.as_raw().to_vec(),
            key_der: info.subject_pki.raw.to_vec(),
            ..Self::default()
        };
        let names = request.requested_extensions().into_iter().flatten().filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
        for name in names.flatten() {
            match name {
                GeneralName::DNSName(name) => read.dns_names.push((*name).to_owned()),
                GeneralName::RFC822Name(name) => read.emails.push((*name).to_owned()),
                GeneralName::URI(name) => read.uris.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => read.addresses.push(address(bytes)?),
                other => return Err(crypto("read the certificate request")(&format!("unsupported name {other}"))),
            }
        }
        Ok(read)
    }

    fn alternative_names(&self) -> Result<Vec<SanType>, rcgen::Error> {
        let mut names = Vec::new();
        for name in &self.dns_names {
            names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        for name in &self.emails {
            names.push(SanType::Rfc822Name(name.as_str().try_into()?));
        }
        for name in &self.uris {
            names.push(SanType::URI(name.as_str().try_into()?));
        }
        names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        Ok(names)
    }
}

fn address(bytes: &[u8]) -> Result<IpAddr, PkiError> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Ok(v4.into()),
        (_, Ok(v6)) => Ok(v6.into()),
        _ => Err(crypto("read the certificate request")(&"an address has neither 4 nor 16 bytes")),
    }
}

impl Pki {
    /// A certificate of the cluster's authority for a request, PEM: its subject, key and names are the request's, its usages
    /// and its life (ended by the authority's own at the latest) the caller's.
    ///
    /// # Errors
    /// When a usage is unknown, or a step of signing fails.
    pub fn sign(&self, request: &CertificateRequest, usages: &[String], life: Duration) -> Result<String, PkiError> {
        let failed = || crypto(format!("sign the request of {}", request.common_name));
        let now = SystemTime::now();
        let start = now - BACKDATE;
        let end = if life < SHORT { now + life } else { start + life };
        let mut params = CertificateParams::default();
        params.not_before = start.into();
        params.not_after = std::cmp::min(end, self.ends()?).into();
        params.serial_number = Some(SerialNumber::from_slice(&rand_serial()));
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = request.alternative_names().map_err(|e| failed()(&e))?;
        for usage in usages {
            let key = KEY_USAGES.iter().find(|(name, _)| name == usage);
            let extended = EXTENDED_USAGES.iter().find(|(name, _)| name == usage);
            match (key, extended) {
                (Some((_, usage)), _) if !params.key_usages.contains(usage) => params.key_usages.push(*usage),
                (_, Some((_, usage))) => params.insert_extended_key_usage(usage.clone()),
                (Some(_), _) => {}
                (None, None) => return Err(failed()(&format!("unknown usage {usage:?}"))),
            }
        }
        // The library keeps one organisation of a subject, so it makes the certificate for nobody, and the subject and the
        // key are put in as the request has them.
        let authority = KeyPair::from_pem(&self.ca_key_pem).map_err(|e| failed()(&e))?;
        let model = params.signed_by(&authority, &self.ca).map_err(|e| failed()(&e))?;
        let der = readdress(model.der(), request, |body| authority.sign(body).map_err(|e| failed()(&e)))
            .unwrap_or_else(|| Err(failed()(&"the certificate made is not DER")))?;
        Ok(pem_block("CERTIFICATE", &der))
    }

    /// When the authority's certificate ends.
    fn ends(&self) -> Result<SystemTime, PkiError> {
        let read = || crypto("read the authority's certificate");
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.ca_pem.as_bytes()).map_err(|e| read()(&e))?;
        let seconds = pem.parse_x509().map_err(|e| read()(&e))?.validity().not_after.timestamp();
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default()))
    }
}

fn rand_serial() -> [u8; SERIAL_BYTES] {
    // 122 random bits, never zero.
    let mut serial = *uuid::Uuid::new_v4().as_bytes();
    serial[0] &= 0x7f;
    serial
}

/// The certificate with the subject and key of a request, signed anew; `None` when `model` is no certificate.
fn readdress(
    model: &[u8],
    request: &CertificateRequest,
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, PkiError>,
) -> Option<Result<Vec<u8>, PkiError>> {
    let outer = elements(contents(model)?)?;
    let [body, algorithm, _] = outer.as_slice() else { return None };
    let mut parts = elements(contents(body)?)?;
    *parts.get_mut(SUBJECT)? = &request.subject_der;
    *parts.get_mut(SUBJECT_KEY)? = &request.key_der;
    let body = element(DER_SEQUENCE, &parts.concat());
    Some(sign(&body).map(|signature| {
        let signature = element(DER_BIT_STRING, &[&[0], signature.as_slice()].concat());
        element(DER_SEQUENCE, &[body.as_slice(), algorithm, &signature].concat())
    }))
}

/// Length of a DER element's header and of its contents.
fn lengths(der: &[u8]) -> Option<(usize, usize)> {
    match *der.get(1)? {
        short @ 0..0x80 => Some((2, short.into())),
        long => {
            let bytes = usize::from(long & 0x7f);
            let length = der.get(2..2 + bytes).filter(|_| bytes <= 4)?;
            Some((2 + bytes, length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))))
        }
    }
}

fn contents(der: &[u8]) -> Option<&[u8]> {
    let (header, length) = lengths(der)?;
    der.get(header..header + length)
}

fn elements(mut der: &[u8]) -> Option<Vec<&[u8]>> {
    let mut found = Vec::new();
    while !der.is_empty() {
        let (header, length) = lengths(der)?;
        found.push(der.get(..header + length)?);
        der = &der[header + length..];
    }
    Some(found)
}

fn element(tag: u8, contents: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    if contents.len() < 0x80 {
        der.push(contents.len().to_le_bytes()[0]);
    } else {
        let bytes = contents.len().to_be_bytes();
        let bytes = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
        der.push(0x80 | bytes.len().to_le_bytes()[0]);
        der.extend_from_slice(bytes);
    }
    der.extend_from_slice(contents);
    der
}

fn pem_block(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        // Base64 is ASCII.
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

#[cfg(test)]
mod tests {
    use rcgen::DnType;

    use super::*;

    fn request(key: &KeyPair) -> String {
        let mut params =
            CertificateParams::new(vec!["node.example".to_owned(), "192.0.2.7".to_owned()]).expect("names");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "dev");
        // A second organisation, which the library can say only in this way.
        params.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 10]), "ops");
        params.distinguished_name.push(DnType::CommonName, "jane");
        params.serialize_request(key).expect("a request").pem().expect("PEM")
    }

    #[test]
    fn a_signed_request_says_what_was_asked_and_no_more() {
        let dir = tempfile::tempdir().expect("a folder");
        let pki = Pki::open(dir.path()).expect("it opens");
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).expect("a key");
            let read = CertificateRequest::parse(request(&key).as_bytes()).expect("readable");
            assert_eq!(read.organizations, ["dev", "ops"]);
            assert_eq!(read.dns_names, ["node.example"]);
            let usages = ["digital signature".to_owned(), "client auth".to_owned()];
            let pem = pki.sign(&read, &usages, Duration::from_secs(3600)).expect("signed");
            let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
            let cert = block.parse_x509().expect("a certificate");
            let (_, ca) = x509_parser::pem::parse_x509_pem(pki.ca_pem.as_bytes()).expect("PEM");
            let ca = ca.parse_x509().expect("a certificate");
            cert.verify_signature(Some(ca.public_key())).expect("signed by the authority");
            assert_eq!(cert.subject_pki.raw, read.key_der);
            let user = super::super::certificate_user(&block.contents).expect("a user");
            assert_eq!(user.name, "jane");
            assert!(user.is_in("dev") && user.is_in("ops"));
            let life = cert.validity().not_after.timestamp() - cert.validity().not_before.timestamp();
            assert!((3600..=3900).contains(&life), "{life} s");
            let extended = cert.extended_key_usage().expect("readable").expect("there").value;
            assert!(extended.client_auth && !extended.server_auth && !cert.is_ca());
        }
    }

    #[test]
    fn a_request_that_was_changed_is_refused() {
        let key = KeyPair::generate().expect("a key");
        let pem = request(&key);
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let mut der = block.contents.clone();
        let place = der.windows(4).position(|bytes| bytes == b"jane").expect("the name");
        der[place] = b'k';
        assert!(CertificateRequest::parse(pem_block("CERTIFICATE REQUEST", &der).as_bytes()).is_err());
        assert!(CertificateRequest::parse(b"no PEM").is_err());
    }

    #[test]
    fn life_ends_with_the_authority() {
        let dir = tempfile::tempdir().expect("a folder");
        let pki = Pki::open(dir.path()).expect("it opens");
        let read =
            CertificateRequest::parse(request(&KeyPair::generate().expect("a key")).as_bytes()).expect("readable");
        let pem = pki.sign(&read, &["client auth".to_owned()], Duration::from_secs(100 * 365 * 86400)).expect("signed");
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let ends =
            u64::try_from(block.parse_x509().expect("a certificate").validity().not_after.timestamp()).expect("later");
        assert_eq!(SystemTime::UNIX_EPOCH + Duration::from_secs(ends), pki.ends().expect("an end"));
        assert!(pki.sign(&read, &["flying".to_owned()], Duration::from_secs(3600)).is_err());
    }
}

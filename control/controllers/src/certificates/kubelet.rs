//! What the certificates of node agents must look like (certificates.k8s.io, signers `kubernetes.io/kube-apiserver-client-kubelet`
//! and `kubernetes.io/kubelet-serving`).

use coracle_api::CertificateRequest;

const GROUP: &str = "system:nodes";
const USER_PREFIX: &str = "system:node:";

/// Whether a node's agent may identify itself to the API with such a certificate.
pub(super) fn check_client(request: &CertificateRequest, usages: &[String]) -> Result<(), String> {
    subject(request)?;
    for (name, given) in [
        ("DNS", !request.dns_names.is_empty()),
        ("email", !request.emails.is_empty()),
        ("IP", !request.addresses.is_empty()),
        ("URI", !request.uris.is_empty()),
    ] {
        if given {
            return Err(format!("{name} subjectAltNames are not allowed"));
        }
    }
    only(usages, "client auth")
}

/// Whether a node's agent may serve with such a certificate.
pub(super) fn check_serving(request: &CertificateRequest, usages: &[String]) -> Result<(), String> {
    subject(request)?;
    if !request.emails.is_empty() || !request.uris.is_empty() {
        return Err("email and URI subjectAltNames are not allowed".into());
    }
    if request.dns_names.is_empty() && request.addresses.is_empty() {
        return Err("at least one DNS or IP subjectAltName is required".into());
    }
    only(usages, "server auth")
}

/// The node that a certificate is for.
pub(super) fn node_name(request: &CertificateRequest) -> Option<&str> {
    request.common_name.strip_prefix(USER_PREFIX).filter(|name| !name.is_empty())
}

fn subject(request: &CertificateRequest) -> Result<(), String> {
    if request.organizations != [GROUP] {
        return Err(format!("subject organization is not {GROUP}"));
    }
    node_name(request).map(drop).ok_or_else(|| format!("subject common name does not begin with {USER_PREFIX}"))
}

fn only(usages: &[String], purpose: &str) -> Result<(), String> {
    let allowed = [purpose, "digital signature", "key encipherment"];
    let all = usages.iter().all(|usage| allowed.contains(&usage.as_str()));
    let needed = [purpose, "digital signature"].iter().all(|needed| usages.iter().any(|usage| usage == needed));
    if all && needed {
        Ok(())
    } else {
        Err(format!("usages must be {purpose}, digital signature and, with RSA keys, key encipherment"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(organization: &str, name: &str, addresses: &[&str]) -> CertificateRequest {
        CertificateRequest {
            common_name: name.into(),
            organizations: vec![organization.into()],
            addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
            ..CertificateRequest::default()
        }
    }

    fn usages(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_nodes_get_certificates_of_nodes() {
        let client = usages(&["digital signature", "client auth"]);
        let serving = usages(&["digital signature", "key encipherment", "server auth"]);
        let good = request(GROUP, "system:node:a", &[]);
        assert_eq!(check_client(&good, &client), Ok(()));
        assert!(check_client(&good, &serving).is_err());
        assert!(check_client(&good, &usages(&["client auth"])).is_err());
        assert!(check_client(&request("system:masters", "system:node:a", &[]), &client).is_err());
        assert!(check_client(&request(GROUP, "system:node:", &[]), &client).is_err());
        assert!(check_client(&request(GROUP, "system:node:a", &["192.0.2.1"]), &client).is_err());
        assert_eq!(check_serving(&request(GROUP, "system:node:a", &["192.0.2.1"]), &serving), Ok(()));
        assert!(check_serving(&good, &serving).is_err(), "a server without a name");
    }
}

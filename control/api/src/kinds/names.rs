//! Names: the formats that the API accepts for names, labels, ports and paths, with the words of each refusal.
//!
//! Every check returns the reasons why a value is refused; an empty list means that it is fine.

/// A list of reasons, mostly empty.
pub type Reasons = Vec<String>;
/// A check of one string.
pub type Check = fn(&str) -> Reasons;

pub const LABEL_MAX_BYTES: usize = 63;
pub const SUBDOMAIN_MAX_BYTES: usize = 253;
pub const PORT_NAME_MAX_BYTES: usize = 15;

const LABEL: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";

fn max_len(n: usize) -> String {
    format!("must be no more than {n} bytes")
}

/// `msg (e.g. 'a',  or 'b', regex used for validation is '…')`, the common shape of a format refusal.
pub fn regex_error(msg: &str, regex: &str, examples: &[&str]) -> String {
    let mut out = format!("{msg} (");
    for (i, e) in examples.iter().enumerate() {
        out.push_str(if i == 0 { "e.g. " } else { " or " });
        out.push_str(&format!("'{e}', "));
    }
    out.push_str(&format!("regex used for validation is '{regex}')"));
    out
}

fn edges(b: &[u8], ok: impl Fn(u8) -> bool) -> bool {
    matches!((b.first(), b.last()), (Some(f), Some(l)) if ok(*f) && ok(*l))
}
fn lower_alnum(c: u8) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}
fn is_label(s: &str) -> bool {
    edges(s.as_bytes(), lower_alnum) && s.bytes().all(|c| lower_alnum(c) || c == b'-')
}
fn is_subdomain(s: &str) -> bool {
    s.split('.').all(is_label)
}

pub fn dns1123_label(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > LABEL_MAX_BYTES {
        r.push(max_len(LABEL_MAX_BYTES));
    }
    if !is_label(s) {
        // A dotted name is told apart only by its charset, as the API does.
        r.push(if is_subdomain(s) {
            "must not contain dots".to_owned()
        } else {
            regex_error(
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character",
                LABEL,
                &["my-name", "123-abc"],
            )
        });
    }
    r
}

pub fn dns1123_subdomain(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > SUBDOMAIN_MAX_BYTES {
        r.push(max_len(SUBDOMAIN_MAX_BYTES));
    }
    if !is_subdomain(s) {
        r.push(regex_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            SUBDOMAIN,
            &["example.com"],
        ));
    }
    r
}

pub fn dns1035_label(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > LABEL_MAX_BYTES {
        r.push(max_len(LABEL_MAX_BYTES));
    }
    if !(is_label(s) && s.as_bytes()[0].is_ascii_lowercase()) {
        r.push(regex_error(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character",
            "[a-z]([-a-z0-9]*[a-z0-9])?",
            &["my-name", "abc-123"],
        ));
    }
    r
}

pub fn wildcard_subdomain(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > SUBDOMAIN_MAX_BYTES {
        r.push(max_len(SUBDOMAIN_MAX_BYTES));
    }
    if !s.strip_prefix("*.").is_some_and(is_subdomain) {
        r.push(regex_error(
            "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character",
            &format!("\\*\\.{SUBDOMAIN}"),
            &["*.example.com"],
        ));
    }
    r
}

/// Names of RBAC objects and the like: anything that can stand as one path segment.
pub fn path_segment(s: &str) -> Reasons {
    if s == "." || s == ".." {
        return vec![format!("may not be '{s}'")];
    }
    ["/", "%"].iter().filter(|c| s.contains(**c)).map(|c| format!("may not contain '{c}'")).collect()
}

pub fn qualified_name(s: &str) -> Reasons {
    let mut r = Vec::new();
    let parts: Vec<&str> = s.split('/').collect();
    let name = match parts[..] {
        [n] => n,
        [prefix, n] => {
            if prefix.is_empty() {
                r.push("prefix part must be non-empty".to_owned());
            } else {
                r.extend(dns1123_subdomain(prefix).into_iter().map(|m| format!("prefix part {m}")));
            }
            n
        }
        _ => {
            r.push(format!(
                "a qualified name {} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')",
                regex_error(QUALIFIED_MSG, QUALIFIED, &["MyName", "my.name", "123-abc"])
            ));
            return r;
        }
    };
    if name.is_empty() {
        r.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_MAX_BYTES {
        r.push(format!("name part {}", max_len(LABEL_MAX_BYTES)));
    }
    if !is_qualified_part(name) {
        r.push(format!("name part {}", regex_error(QUALIFIED_MSG, QUALIFIED, &["MyName", "my.name", "123-abc"])));
    }
    r
}

const QUALIFIED: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const QUALIFIED_MSG: &str =
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";

fn is_qualified_part(s: &str) -> bool {
    edges(s.as_bytes(), |c| c.is_ascii_alphanumeric())
        && s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
}

pub fn label_value(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > LABEL_MAX_BYTES {
        r.push(max_len(LABEL_MAX_BYTES));
    }
    if !s.is_empty() && !is_qualified_part(s) {
        r.push(regex_error(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
            "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?",
            &["MyValue", "my_value", "12345"],
        ));
    }
    r
}

/// A finalizer or an annotation key needs a qualified name; a bare finalizer must be one of the API's own.
pub fn fully_qualified_finalizer(s: &str) -> bool {
    s.contains('/') || matches!(s, "orphan" | "foregroundDeletion" | "kubernetes")
}

pub fn port_number(n: i64) -> Reasons {
    if (1..=65535).contains(&n) { vec![] } else { vec!["must be between 1 and 65535, inclusive".to_owned()] }
}

pub fn port_name(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > PORT_NAME_MAX_BYTES {
        r.push(max_len(PORT_NAME_MAX_BYTES));
    }
    if !s.bytes().all(|c| lower_alnum(c) || c == b'-') || s.is_empty() {
        r.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !s.bytes().any(|c| c.is_ascii_lowercase()) {
        r.push("must contain at least one letter (a-z)".to_owned());
    }
    if s.contains("--") {
        r.push("must not contain consecutive hyphens".to_owned());
    }
    if s.starts_with('-') || s.ends_with('-') {
        r.push("must not begin or end with a hyphen".to_owned());
    }
    r
}

/// Environment variable names: printable ASCII without `=`.
pub fn env_var_name(s: &str) -> Reasons {
    if s.bytes().all(|c| (0x20..=0x7e).contains(&c) && c != b'=') && !s.is_empty() {
        return vec![];
    }
    vec!["a valid environment variable name must consist only of printable ASCII characters other than '='".to_owned()]
}

pub fn c_identifier(s: &str) -> Reasons {
    let ok = s.bytes().enumerate().all(|(i, c)| c == b'_' || c.is_ascii_alphabetic() || (i > 0 && c.is_ascii_digit()));
    if ok && !s.is_empty() {
        return vec![];
    }
    vec![regex_error(
        "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_'",
        "[A-Za-z_][A-Za-z0-9_]*",
        &["my_name", "MY_NAME", "MyName"],
    )]
}

pub fn config_map_key(s: &str) -> Reasons {
    let mut r = Vec::new();
    if s.len() > SUBDOMAIN_MAX_BYTES {
        r.push(max_len(SUBDOMAIN_MAX_BYTES));
    }
    if s.is_empty() || !s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.')) {
        r.push(regex_error(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            "[-._a-zA-Z0-9]+",
            &["key.name", "KEY_NAME", "key-name"],
        ));
    }
    if s == "." {
        r.push("must not be '.'".to_owned());
    } else if s == ".." {
        r.push("must not be '..'".to_owned());
    } else if s.starts_with("..") {
        r.push("must not start with '..'".to_owned());
    }
    r
}

pub fn ip_address(s: &str) -> Reasons {
    if s.parse::<std::net::IpAddr>().is_ok() {
        return vec![];
    }
    vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()]
}

/// `prefix` and length; the address must be canonical for networks of the cluster.
pub fn cidr(s: &str) -> Reasons {
    let ok = s.split_once('/').is_some_and(|(ip, len)| {
        !len.starts_with('+')
            && match (ip.parse::<std::net::IpAddr>(), len.parse::<u8>()) {
                (Ok(std::net::IpAddr::V4(_)), Ok(n)) => n <= 32,
                (Ok(std::net::IpAddr::V6(_)), Ok(n)) => n <= 128,
                _ => false,
            }
    });
    if ok { vec![] } else { vec!["must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_refusals() {
        assert_eq!(
            dns1123_subdomain("Bad_Name"),
            [
                "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            ]
        );
        assert_eq!(
            dns1123_label("A"),
            [
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            ]
        );
        assert_eq!(config_map_key("").len(), 1);
        assert_eq!(config_map_key("..a"), ["must not start with '..'"]);
        assert_eq!(port_name("a--b"), ["must not contain consecutive hyphens"]);
    }

    #[test]
    fn good_names_pass() {
        for s in ["a", "a-b", "0", "a.b.c"] {
            assert!(dns1123_subdomain(s).is_empty(), "{s}");
        }
        for s in ["example.com/MyName", "a", "A_b.c"] {
            assert!(qualified_name(s).is_empty(), "{s}");
        }
        assert!(label_value("").is_empty());
        assert!(cidr("10.0.0.0/8").is_empty() && !cidr("10.0.0.0").is_empty());
    }
}

//! URLs, IP addresses, CIDRs, semantic versions.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::rc::Rc;

use super::{Outcome, fail};
use crate::cel::value::{Semver, Url, Val};

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    Some(match (name, args) {
        ("ip", [Val::Text(text)]) => parse_ip(text).map_or_else(
            || fail(format!("IP Address {text:?} parse error during conversion from string")),
            |ip| Ok(Val::Ip(ip)),
        ),
        ("isIP", [Val::Text(text)]) => Ok(Val::Bool(parse_ip(text).is_some())),
        ("ip.isCanonical", [Val::Text(text)]) => match parse_ip(text) {
            Some(ip) => Ok(Val::Bool(ip.to_string() == text.as_ref())),
            None => fail(format!("IP Address {text:?} parse error during conversion from string")),
        },
        ("family", [Val::Ip(ip)]) => Ok(Val::Int(if ip.is_ipv4() { 4 } else { 6 })),
        ("isUnspecified", [Val::Ip(ip)]) => Ok(Val::Bool(ip.is_unspecified())),
        ("isLoopback", [Val::Ip(ip)]) => Ok(Val::Bool(ip.is_loopback())),
        ("isLinkLocalMulticast", [Val::Ip(ip)]) => Ok(Val::Bool(match ip {
            IpAddr::V4(ip) => ip.octets()[..3] == [224, 0, 0],
            IpAddr::V6(ip) => ip.segments()[0] & 0xff0f == 0xff02,
        })),
        ("isLinkLocalUnicast", [Val::Ip(ip)]) => Ok(Val::Bool(match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        })),
        ("isGlobalUnicast", [Val::Ip(ip)]) => Ok(Val::Bool(is_global_unicast(ip))),
        ("cidr", [Val::Text(text)]) => parse_cidr(text).map_or_else(
            || fail(format!("network address parse error during conversion from string: {text:?}")),
            |(ip, bits)| Ok(Val::Cidr(ip, bits)),
        ),
        ("isCIDR", [Val::Text(text)]) => Ok(Val::Bool(parse_cidr(text).is_some())),
        ("ip", [Val::Cidr(ip, _)]) => Ok(Val::Ip(*ip)),
        ("prefixLength", [Val::Cidr(_, bits)]) => Ok(Val::Int((*bits).into())),
        ("masked", [Val::Cidr(ip, bits)]) => Ok(Val::Cidr(mask(*ip, *bits), *bits)),
        ("containsIP", [Val::Cidr(net, bits), other]) => {
            let ip = match other {
                Val::Ip(ip) => *ip,
                Val::Text(text) => parse_ip(text)?,
                _ => return None,
            };
            Ok(Val::Bool(contains(*net, *bits, ip, None)))
        }
        ("containsCIDR", [Val::Cidr(net, bits), other]) => {
            let (ip, inner) = match other {
                Val::Cidr(ip, inner) => (*ip, *inner),
                Val::Text(text) => parse_cidr(text)?,
                _ => return None,
            };
            Ok(Val::Bool(contains(*net, *bits, ip, Some(inner))))
        }
        ("url", [Val::Text(text)]) => parse_url(text).map_or_else(
            || fail(format!("URL parse error during conversion from string: parse {text:?}: invalid URI for request")),
            |url| Ok(Val::Url(Rc::new(url))),
        ),
        ("isURL", [Val::Text(text)]) => Ok(Val::Bool(parse_url(text).is_some())),
        ("getScheme", [Val::Url(url)]) => Ok(Val::text(url.scheme.clone())),
        ("getHost", [Val::Url(url)]) => {
            Ok(Val::text(if url.port.is_empty() { url.host.clone() } else { format!("{}:{}", url.host, url.port) }))
        }
        ("getHostname", [Val::Url(url)]) => Ok(Val::text(url.host.trim_matches(['[', ']']).to_owned())),
        ("getPort", [Val::Url(url)]) => Ok(Val::text(url.port.clone())),
        ("getEscapedPath", [Val::Url(url)]) => Ok(Val::text(url.path.clone())),
        ("getQuery", [Val::Url(url)]) => Ok(query_map(url)),
        ("semver", [Val::Text(text), rest @ ..]) => {
            parse_semver(text, rest).map_or_else(|| fail("invalid semver"), |version| Ok(Val::Semver(Rc::new(version))))
        }
        ("isSemver", [Val::Text(text), rest @ ..]) => Ok(Val::Bool(parse_semver(text, rest).is_some())),
        ("major" | "minor" | "patch", [Val::Semver(version)]) => {
            let at = ["major", "minor", "patch"].iter().position(|own| *own == name)?;
            Ok(Val::Int(i64::try_from(version.numbers[at]).unwrap_or(i64::MAX)))
        }
        ("isLessThan", [Val::Semver(a), Val::Semver(b)]) => Ok(Val::Bool(order(a, b).is_lt())),
        ("isGreaterThan", [Val::Semver(a), Val::Semver(b)]) => Ok(Val::Bool(order(a, b).is_gt())),
        ("compareTo", [Val::Semver(a), Val::Semver(b)]) => Ok(Val::Int(order(a, b) as i64)),
        _ => return None,
    })
}

/// Strict: no zones, no IPv4 inside IPv6.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let ip: IpAddr = text.parse().ok()?;
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => None,
        ip => Some(ip),
    }
}

fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, bits) = text.split_once('/')?;
    let ip = parse_ip(ip)?;
    let plain = bits.bytes().all(|byte| byte.is_ascii_digit()) && (bits == "0" || !bits.starts_with('0'));
    let bits: u8 = bits.parse().ok().filter(|_| plain)?;
    (bits <= if ip.is_ipv4() { 32 } else { 128 }).then_some((ip, bits))
}

fn mask(ip: IpAddr, bits: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) & u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0)).into()),
        IpAddr::V6(ip) => {
            IpAddr::V6((u128::from(ip) & u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)).into())
        }
    }
}

fn contains(net: IpAddr, bits: u8, ip: IpAddr, inner: Option<u8>) -> bool {
    net.is_ipv4() == ip.is_ipv4() && inner.is_none_or(|inner| inner >= bits) && mask(net, bits) == mask(ip, bits)
}

fn is_global_unicast(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            !(v4.is_broadcast() || v4.is_unspecified() || v4.is_loopback() || v4.is_multicast() || v4.is_link_local())
        }
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_loopback() || v6.is_multicast() || v6.is_unicast_link_local()),
    }
}

/// An absolute URI or an absolute path, as Go's `ParseRequestURI` takes it.
fn parse_url(text: &str) -> Option<Url> {
    if text.chars().any(|c| c.is_ascii_control() || c == ' ') {
        return None;
    }
    let (scheme, rest) = match text.split_once(':') {
        Some((scheme, rest))
            if scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')) =>
        {
            (scheme.to_ascii_lowercase(), rest)
        }
        _ => (String::new(), text),
    };
    if !rest.starts_with('/') {
        return None;
    }
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = match before.strip_prefix("//") {
        Some(after) if !scheme.is_empty() || text.starts_with("//") => {
            after.split_at(after.find('/').unwrap_or(after.len()))
        }
        _ => ("", before),
    };
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match host_port.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
        Some((_, port)) if !port.contains(']') => return None,
        _ => (host_port, ""),
    };
    let query = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key), decoded(value))
    });
    Some(Url { scheme, host: host.to_owned(), port: port.to_owned(), path: path.to_owned(), query: query.collect() })
}

/// Percent and plus decoding of a query part.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        let hex = tail
            .get(..2)
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (byte, hex) {
            (b'%', Some(value)) => {
                bytes.push(value);
                rest = &tail[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn query_map<'a>(url: &Url) -> Val<'a> {
    let mut keys: Vec<&String> = url.query.iter().map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    let entries = keys.into_iter().map(|key| {
        let values =
            url.query.iter().filter(|(own, _)| own == key).map(|(_, value)| Val::text(value.clone())).collect();
        (Val::text(key.clone()), Val::list(values))
    });
    Val::Map(Rc::new(entries.collect()))
}

/// `1.2.3-pre+build`; with `true`, leading `v`, missing parts and leading zeros are accepted.
pub(in crate::cel) fn parse_semver(text: &str, rest: &[Val<'_>]) -> Option<Semver> {
    let lenient = matches!(rest, [Val::Bool(true)]);
    let text = if lenient { text.strip_prefix('v').unwrap_or(text) } else { text };
    let (text, _build) = text.split_once('+').unwrap_or((text, ""));
    let (core, pre) = text.split_once('-').unwrap_or((text, ""));
    let mut parts: Vec<&str> = core.split('.').collect();
    while lenient && parts.len() < 3 {
        parts.push("0");
    }
    let [major, minor, patch] = parts.as_slice() else { return None };
    let number = |text: &str| {
        let plain = !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_digit())
            && (lenient || text == "0" || !text.starts_with('0'));
        text.parse::<u64>().ok().filter(|_| plain)
    };
    let pre: Vec<String> = if pre.is_empty() { Vec::new() } else { pre.split('.').map(str::to_owned).collect() };
    let good = pre
        .iter()
        .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    good.then_some(Semver { numbers: [number(major)?, number(minor)?, number(patch)?], pre })
}

fn order(a: &Semver, b: &Semver) -> Ordering {
    a.numbers.cmp(&b.numbers).then_with(|| match (a.pre.is_empty(), b.pre.is_empty()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        _ => {
            let pairs = a.pre.iter().zip(&b.pre).map(|(a, b)| match (a.parse::<u64>(), b.parse::<u64>()) {
                (Ok(a), Ok(b)) => a.cmp(&b),
                (Ok(_), Err(_)) => Ordering::Less,
                (Err(_), Ok(_)) => Ordering::Greater,
                _ => a.cmp(b),
            });
            pairs.into_iter().find(|order| order.is_ne()).unwrap_or_else(|| a.pre.len().cmp(&b.pre.len()))
        }
    })
}

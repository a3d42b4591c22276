//! What the cluster's domain answers. Pure: a question in, an answer out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use ipnet::IpNet;

use super::names::{ServiceNames, names, undashed};
use crate::model::ObjectKey;
use crate::services::proxy::Entry;
use crate::{Config, Family};

/// Seconds that an answer may be kept: short, as endpoints come and go.
pub(super) const TTL_S: u32 = 5;
/// The version of the specification that the names follow.
const SPECIFICATION: &str = "1.1.0";
/// Longest chain of ExternalName Services that lead to each other.
const CNAME_MAX: usize = 8;

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Records; none means that the name exists but has none of the type.
    Records { answers: Vec<Record>, additionals: Vec<Record> },
    /// The name does not exist.
    NoName,
    /// The name is another's outside of the cluster: the records so far, and whose records are to follow.
    Outside { answers: Vec<Record>, name: Name },
    /// The name is not ours to answer.
    NotOurs,
}

/// The names of the cluster.
#[derive(Debug)]
pub(crate) struct Zone {
    domain: Name,
    labels: Vec<String>,
    /// Ranges whose reverse names are ours.
    ranges: Vec<IpNet>,
    services: HashMap<Arc<str>, HashMap<Arc<str>, ServiceNames>>,
    reverse: HashMap<IpAddr, BTreeMap<ObjectKey, String>>,
    serial: u32,
}

impl Zone {
    /// A zone without Services.
    pub(crate) fn new(config: &Config) -> Self {
        let text = config.cluster_domain.trim_end_matches('.').to_ascii_lowercase();
        let labels: Vec<String> = text.split('.').map(str::to_owned).collect();
        let domain = Name::from_ascii(format!("{text}.")).unwrap_or_else(|error| {
            tracing::error!(domain = text, %error, "the cluster domain is no DNS name; names of the cluster are answered under the root");
            Name::root()
        });
        let ranges = config.service_cidrs.iter().chain(&config.cluster_cidrs).copied().collect();
        Self { domain, labels, ranges, services: HashMap::new(), reverse: HashMap::new(), serial: 1 }
    }

    /// Takes in what became of a Service.
    pub(crate) fn set(&mut self, key: &ObjectKey, entry: Option<&Entry>) {
        let old = self.services.get_mut(&key.namespace).and_then(|namespace| namespace.remove(&key.name));
        for address in old.iter().flat_map(addresses_of) {
            if let Some(names) = self.reverse.get_mut(&address) {
                names.remove(key);
                if names.is_empty() {
                    self.reverse.remove(&address);
                }
            }
        }
        let new = entry.and_then(names);
        if let Some(new) = &new {
            let own = format!("{}.{}.svc.", key.name, key.namespace);
            if new.hosts.is_empty() {
                for address in &new.addresses {
                    self.reverse.entry(*address).or_default().insert(key.clone(), own.clone());
                }
            }
            for (host, addresses) in &new.hosts {
                for address in addresses {
                    self.reverse.entry(*address).or_default().insert(key.clone(), format!("{host}.{own}"));
                }
            }
        }
        match new {
            Some(new) => {
                self.services.entry(key.namespace.clone()).or_default().insert(key.name.clone(), new);
            }
            None => {
                if self.services.get(&key.namespace).is_some_and(HashMap::is_empty) {
                    self.services.remove(&key.namespace);
                }
            }
        }
        self.serial = self.serial.wrapping_add(1);
    }

    /// The record that goes with "no such name" and "no such records" (RFC 2308).
    pub(super) fn authority(&self) -> Record {
        let name = |label: &str| self.domain.prepend_label(label).unwrap_or_else(|_| self.domain.clone());
        const REFRESH_S: i32 = 7200;
        const RETRY_S: i32 = 1800;
        const EXPIRE_S: i32 = 86_400;
        let soa = SOA::new(name("ns.dns"), name("hostmaster"), self.serial, REFRESH_S, RETRY_S, EXPIRE_S, TTL_S);
        Record::from_rdata(self.domain.clone(), TTL_S, RData::SOA(soa))
    }

    /// Answers a question of class IN.
    pub(super) fn answer(&self, name: &Name, kind: RecordType) -> Answer {
        let labels: Option<Vec<String>> =
            name.iter().map(|label| std::str::from_utf8(label).ok().map(str::to_ascii_lowercase)).collect();
        let Some(labels) = labels else { return Answer::NotOurs };
        if labels.len() >= 2 && labels[labels.len() - 1] == "arpa" {
            return self.reverse(name, kind);
        }
        let Some(relative) = labels.strip_suffix(self.labels.as_slice()) else { return Answer::NotOurs };
        let relative: Vec<&str> = relative.iter().map(String::as_str).collect();
        self.relative(name, &relative, kind, &mut HashSet::new())
    }

    fn relative(&self, name: &Name, labels: &[&str], kind: RecordType, seen: &mut HashSet<Name>) -> Answer {
        let exists = Answer::Records { answers: Vec::new(), additionals: Vec::new() };
        match labels {
            [] if kind == RecordType::SOA => {
                Answer::Records { answers: vec![self.authority()], additionals: Vec::new() }
            }
            ["dns-version"] if kind == RecordType::TXT => {
                let text = RData::TXT(TXT::new(vec![SPECIFICATION.to_owned()]));
                Answer::Records {
                    answers: vec![Record::from_rdata(name.clone(), TTL_S, text)],
                    additionals: Vec::new(),
                }
            }
            [] | ["svc" | "pod" | "dns-version"] => exists,
            [namespace, "svc"] => {
                if self.services.contains_key(*namespace) {
                    exists
                } else {
                    Answer::NoName
                }
            }
            [_, "pod"] => exists,
            [address, _, "pod"] => match undashed(address) {
                Some(address) => addresses(name, kind, &[address]),
                None => Answer::NoName,
            },
            [rest @ .., service, namespace, "svc"] => {
                let Some(names) = self.services.get(*namespace).and_then(|namespace| namespace.get(*service)) else {
                    return Answer::NoName;
                };
                if let Some(external) = &names.external {
                    return if rest.is_empty() { self.external(name, external, kind, seen) } else { Answer::NoName };
                }
                match rest {
                    [] => addresses(name, kind, &names.addresses),
                    [protocol @ ("_tcp" | "_udp" | "_sctp")] if names.ports.keys().any(|(p, _)| p == protocol) => {
                        exists
                    }
                    [port, protocol] => match names.ports.iter().find(|((p, name), _)| p == protocol && name == port) {
                        Some((_, targets)) => self.targets(name, kind, service, namespace, names, targets),
                        None => Answer::NoName,
                    },
                    [host] => match names.hosts.get(*host) {
                        Some(found) => addresses(name, kind, found),
                        None => Answer::NoName,
                    },
                    _ => Answer::NoName,
                }
            }
            _ => Answer::NoName,
        }
    }

    fn external(&self, name: &Name, external: &str, kind: RecordType, seen: &mut HashSet<Name>) -> Answer {
        let Ok(target) = Name::from_ascii(format!("{external}.")) else { return Answer::NoName };
        let mut answers = vec![Record::from_rdata(name.clone(), TTL_S, RData::CNAME(CNAME(target.clone())))];
        if kind == RecordType::CNAME || !seen.insert(name.clone()) || seen.len() > CNAME_MAX {
            return Answer::Records { answers, additionals: Vec::new() };
        }
        let labels: Vec<String> = external.split('.').map(str::to_owned).collect();
        let Some(relative) = labels.strip_suffix(self.labels.as_slice()) else {
            return Answer::Outside { answers, name: target };
        };
        let relative: Vec<&str> = relative.iter().map(String::as_str).collect();
        match self.relative(&target, &relative, kind, seen) {
            Answer::Records { answers: more, additionals } => {
                answers.extend(more);
                Answer::Records { answers, additionals }
            }
            Answer::Outside { answers: more, name } => {
                answers.extend(more);
                Answer::Outside { answers, name }
            }
            Answer::NoName | Answer::NotOurs => Answer::Records { answers, additionals: Vec::new() },
        }
    }

    fn targets<'a>(
        &self,
        name: &Name,
        kind: RecordType,
        service: &str,
        namespace: &str,
        names: &ServiceNames,
        targets: impl IntoIterator<Item = &'a super::names::Target, IntoIter: ExactSizeIterator>,
    ) -> Answer {
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        let targets = targets.into_iter();
        if kind == RecordType::SRV || kind == RecordType::ANY {
            const WHOLE_WEIGHT: usize = 100;
            let weight = u16::try_from(WHOLE_WEIGHT / targets.len().max(1)).unwrap_or(1).max(1);
            for target in targets {
                let prefix = target.host.iter().map(|host| format!("{host}.")).collect::<String>();
                let Some(host) = self.name(&format!("{prefix}{service}.{namespace}.svc.")) else { continue };
                let found = target.host.as_ref().map_or(Some(&names.addresses), |host| names.hosts.get(host));
                additionals.extend(found.into_iter().flatten().map(|address| record(&host, *address)));
                let srv = SRV::new(0, weight, target.port, host);
                answers.push(Record::from_rdata(name.clone(), TTL_S, RData::SRV(srv)));
            }
        }
        additionals.dedup();
        Answer::Records { answers, additionals }
    }

    fn reverse(&self, name: &Name, kind: RecordType) -> Answer {
        let Some(address) =
            name.parse_arpa_name().ok().filter(|net| net.prefix_len() == net.max_prefix_len()).map(|net| net.addr())
        else {
            return Answer::NotOurs;
        };
        match self.reverse.get(&address) {
            Some(names) if kind == RecordType::PTR || kind == RecordType::ANY => {
                let names = names.values().filter_map(|host| self.name(host));
                let answers =
                    names.map(|host| Record::from_rdata(name.clone(), TTL_S, RData::PTR(PTR(host)))).collect();
                Answer::Records { answers, additionals: Vec::new() }
            }
            Some(_) => Answer::Records { answers: Vec::new(), additionals: Vec::new() },
            None if self.ranges.iter().any(|range| range.contains(&address)) => Answer::NoName,
            None => Answer::NotOurs,
        }
    }

    /// A name below the domain.
    fn name(&self, relative: &str) -> Option<Name> {
        Name::from_ascii(relative).ok().and_then(|mut name| {
            name.set_fqdn(false);
            name.append_domain(&self.domain).ok()
        })
    }
}

fn addresses_of(names: &ServiceNames) -> Vec<IpAddr> {
    names.addresses.iter().chain(names.hosts.values().flatten()).copied().collect()
}

fn record(name: &Name, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    Record::from_rdata(name.clone(), TTL_S, data)
}

fn addresses(name: &Name, kind: RecordType, all: &[IpAddr]) -> Answer {
    let wanted = |address: &&IpAddr| match kind {
        RecordType::A => Family::of(**address) == Family::V4,
        RecordType::AAAA => Family::of(**address) == Family::V6,
        RecordType::ANY => true,
        _ => false,
    };
    Answer::Records {
        answers: all.iter().filter(wanted).map(|address| record(name, *address)).collect(),
        additionals: Vec::new(),
    }
}

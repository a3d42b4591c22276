//! The records of the specification's sections, one test each.

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use proptest::prelude::*;

use super::Metrics;
use super::response::{Step, encode, step};
use super::zone::Zone;
use crate::Config;
use crate::model::{Endpoint, EndpointPort, EndpointSlice, ObjectKey, Protocol, Service, ServicePort};
use crate::services::proxy::Entry;

fn port(name: &str, number: u16) -> ServicePort {
    ServicePort { name: name.into(), port: number, ..ServicePort::default() }
}

fn zone() -> Zone {
    let mut zone = Zone::new(&Config::new("/nowhere", "n"));
    let key = |name| ObjectKey::new("ns", name);
    let mut set = |name, service, slices: Vec<EndpointSlice>| {
        let slices = slices.into_iter().enumerate().map(|(n, slice)| (n.to_string().into(), slice)).collect();
        zone.set(&key(name), Some(&Entry { service: Some(service), slices }));
    };
    let web = Service {
        cluster_ips: vec!["10.43.0.80".parse().unwrap(), "fd00:43::80".parse().unwrap()],
        ports: vec![port("http", 80), port("", 81)],
        ..Service::default()
    };
    set("web", web, Vec::new());
    let named = Endpoint { hostname: Some("db-0".into()), ..Endpoint::ready("10.42.0.5".parse().unwrap(), None) };
    let plain = Endpoint::ready("10.42.0.6".parse().unwrap(), None);
    let late = Endpoint { ready: false, ..Endpoint::ready("10.42.0.7".parse().unwrap(), None) };
    let ports = vec![EndpointPort { name: "sql".into(), protocol: Protocol::Tcp, port: 5432 }];
    let slice = |service| EndpointSlice {
        service: key(service),
        ports: ports.clone(),
        endpoints: vec![named.clone(), plain.clone(), late.clone()],
    };
    let headless = Service { headless: true, ports: vec![port("sql", 5432)], ..Service::default() };
    set("db", headless.clone(), vec![slice("db")]);
    set("all", Service { publish_not_ready: true, ..headless }, vec![slice("all")]);
    let external = |name: &str| Service { external_name: Some(name.into()), ..Service::default() };
    set("out", external("Example.org"), Vec::new());
    set("alias", external("web.ns.svc.cluster.local"), Vec::new());
    set("loop", external("loop.ns.svc.cluster.local"), Vec::new());
    zone
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(hickory_proto::op::Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn ask(zone: &Zone, name: &str, kind: RecordType) -> Message {
    match step(zone, &question(name, kind)) {
        Step::Reply { message, .. } => {
            Message::from_vec(&encode(&message, None, true, &Metrics::default()).unwrap()).unwrap()
        }
        _ => panic!("{name} is not answered here"),
    }
}

/// The code and the sorted data of the answers.
fn data(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
    let message = ask(&zone(), name, kind);
    let mut all: Vec<String> = message.answers.iter().map(|record| record.data.to_string()).collect();
    all.sort();
    assert!(message.metadata.authoritative && (!all.is_empty() || message.authorities.len() == 1));
    (message.metadata.response_code, all)
}

fn found(all: &[&str]) -> (ResponseCode, Vec<String>) {
    (ResponseCode::NoError, all.iter().map(|text| (*text).to_owned()).collect())
}

#[test]
fn section_2_2_schema_version() {
    let (_, text) = data("dns-version.cluster.local.", RecordType::TXT);
    assert_eq!(text, ["1.1.0"]);
}

#[test]
fn section_2_3_cluster_addresses() {
    assert_eq!(data("web.ns.svc.cluster.local.", RecordType::A), found(&["10.43.0.80"]));
    assert_eq!(data("WEB.ns.SVC.cluster.local.", RecordType::AAAA), found(&["fd00:43::80"]));
    assert_eq!(
        data("_http._tcp.web.ns.svc.cluster.local.", RecordType::SRV),
        found(&["0 100 80 web.ns.svc.cluster.local."])
    );
    let srv = ask(&zone(), "_http._tcp.web.ns.svc.cluster.local.", RecordType::SRV);
    assert_eq!(srv.additionals.len(), 2);
    assert_eq!(data("80.0.43.10.in-addr.arpa.", RecordType::PTR), found(&["web.ns.svc.cluster.local."]));
}

#[test]
fn section_2_4_headless() {
    assert_eq!(data("db.ns.svc.cluster.local.", RecordType::A), found(&["10.42.0.5", "10.42.0.6"]));
    assert_eq!(data("all.ns.svc.cluster.local.", RecordType::A), found(&["10.42.0.5", "10.42.0.6", "10.42.0.7"]));
    assert_eq!(data("db-0.db.ns.svc.cluster.local.", RecordType::A), found(&["10.42.0.5"]));
    assert_eq!(
        data("_sql._tcp.db.ns.svc.cluster.local.", RecordType::SRV),
        found(&["0 50 5432 10-42-0-6.db.ns.svc.cluster.local.", "0 50 5432 db-0.db.ns.svc.cluster.local."])
    );
    assert_eq!(data("10-42-0-6.db.ns.svc.cluster.local.", RecordType::A), found(&["10.42.0.6"]));
    let (_, names) = data("5.0.42.10.in-addr.arpa.", RecordType::PTR);
    assert!(names.contains(&"db-0.db.ns.svc.cluster.local.".to_owned()), "{names:?}");
}

#[test]
fn section_2_5_external_names() {
    assert_eq!(data("alias.ns.svc.cluster.local.", RecordType::A), found(&["10.43.0.80", "web.ns.svc.cluster.local."]));
    assert_eq!(data("out.ns.svc.cluster.local.", RecordType::CNAME), found(&["example.org."]));
    assert!(matches!(step(&zone(), &question("out.ns.svc.cluster.local.", RecordType::A)),
        Step::Forward { question, before, .. } if question.name.to_ascii() == "example.org." && before.len() == 1));
    assert_eq!(data("loop.ns.svc.cluster.local.", RecordType::A).0, ResponseCode::NoError);
}

#[test]
fn pods_by_address() {
    assert_eq!(data("10-42-0-9.ns.pod.cluster.local.", RecordType::A), found(&["10.42.0.9"]));
    assert_eq!(data("fd00-42-0-0-0-0-0-9.ns.pod.cluster.local.", RecordType::AAAA), found(&["fd00:42::9"]));
    assert_eq!(data("nonsense.ns.pod.cluster.local.", RecordType::A).0, ResponseCode::NXDomain);
}

#[test]
fn what_exists_without_records_is_told_from_what_does_not_exist() {
    for name in [
        "cluster.local.",
        "svc.cluster.local.",
        "ns.svc.cluster.local.",
        "_tcp.web.ns.svc.cluster.local.",
        "web.ns.svc.cluster.local.",
    ] {
        assert_eq!(data(name, RecordType::MX), found(&[]), "{name}");
    }
    for name in [
        "no.ns.svc.cluster.local.",
        "web.other.svc.cluster.local.",
        "other.svc.cluster.local.",
        "x.web.ns.svc.cluster.local.",
        "x.cluster.local.",
        "_no._tcp.web.ns.svc.cluster.local.",
        "99.0.43.10.in-addr.arpa.",
    ] {
        assert_eq!(data(name, RecordType::A).0, ResponseCode::NXDomain, "{name}");
    }
}

#[test]
fn a_service_that_goes_takes_its_names_along() {
    let mut zone = zone();
    for name in ["web", "db", "all", "out", "alias", "loop"] {
        zone.set(&ObjectKey::new("ns", name), None);
    }
    for name in
        ["web.ns.svc.cluster.local.", "ns.svc.cluster.local.", "80.0.43.10.in-addr.arpa.", "5.0.42.10.in-addr.arpa."]
    {
        assert_eq!(ask(&zone, name, RecordType::A).metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
}

#[test]
fn long_answers_are_cut_for_udp_and_whole_for_tcp() {
    let mut zone = zone();
    let endpoints = (0..200).map(|n| Endpoint::ready([10, 42, 1, n].into(), None)).collect();
    let key = ObjectKey::new("ns", "big");
    let slice = EndpointSlice { service: key.clone(), ports: Vec::new(), endpoints };
    let service = Service { headless: true, ..Service::default() };
    zone.set(&key, Some(&Entry { service: Some(service), slices: vec![("1".into(), slice)] }));
    let Step::Reply { message, .. } = step(&zone, &question("big.ns.svc.cluster.local.", RecordType::A)) else {
        panic!()
    };
    for (edns, udp, limit) in
        [(None, true, 512), (Some(1232), true, 1232), (Some(65_000), true, 1232), (None, false, 65_535)]
    {
        let bytes = encode(&message, edns, udp, &Metrics::default()).unwrap();
        let parsed = Message::from_vec(&bytes).unwrap();
        assert!(bytes.len() <= limit);
        assert_eq!(parsed.metadata.truncation, udp);
        assert_eq!(parsed.answers.len() == 200, !udp);
    }
}

/// The reply to a datagram, if there is one.
fn reply(bytes: &[u8]) -> Option<Message> {
    match step(&zone(), bytes) {
        Step::Reply { message, size } => {
            let bytes = encode(&message, size, true, &Metrics::default()).unwrap();
            assert!(bytes.len() <= 1232);
            Some(Message::from_vec(&bytes).unwrap())
        }
        Step::Forward { .. } | Step::Silence => None,
    }
}

#[test]
fn extensions_are_answered_as_asked() {
    let ask = |version: u8, size: u16| {
        let mut message = Message::from_vec(&question("web.ns.svc.cluster.local.", RecordType::A)).unwrap();
        let mut edns = hickory_proto::op::Edns::new();
        edns.set_version(version).set_max_payload(size);
        message.set_edns(edns);
        reply(&message.to_vec().unwrap()).unwrap()
    };
    assert!(reply(&question("web.ns.svc.cluster.local.", RecordType::A)).unwrap().edns.is_none());
    let answer = ask(0, 4096);
    assert_eq!((answer.answers.len(), answer.edns.unwrap().max_payload()), (1, 1232));
    // One number has two names.
    assert_eq!(u16::from(ask(1, 4096).metadata.response_code), u16::from(ResponseCode::BADVERS));
    // Less than every resolver takes is taken for that.
    assert_eq!(ask(0, 1).answers.len(), 1);
}

#[test]
fn hostile_questions_are_survived() {
    let header = |questions: u16| [[0, 7, 1, 0].as_slice(), &questions.to_be_bytes(), &[0; 6]].concat();
    let with = |questions: u16, body: &[u8]| [header(questions).as_slice(), body].concat();
    let kind = [0, 1, 0, 1];
    let refused = |bytes: &[u8], why: &str| {
        let code = reply(bytes).map(|message| message.metadata.response_code);
        assert_eq!(code, Some(ResponseCode::FormErr), "{why}");
    };
    refused(&with(1, &[[0xc0, 12].as_slice(), &kind].concat()), "a name that is itself");
    refused(&with(1, &[[1, b'a', 0xc0, 12].as_slice(), &kind].concat()), "a name that goes round");
    refused(&with(1, &[[0xc0, 200].as_slice(), &kind].concat()), "a name after the end");
    refused(&with(1, &[[0x41, b'a', 0].as_slice(), &kind].concat()), "a label of a kind that is not in use");
    let label = [[63].as_slice(), &[b'x'; 63]].concat();
    refused(&with(1, &[label.repeat(5).as_slice(), &[0], &kind].concat()), "a name of 320 bytes");
    refused(&with(u16::MAX, &[[0].as_slice(), &kind].concat()), "65,535 questions that are not there");
    let several = [[0].as_slice(), &kind, &[0], &kind].concat();
    refused(&with(2, &several), "two questions");
    refused(&header(0), "no question");
    // An answer is no question: replying to it could go on for ever.
    let mut answer = question("web.ns.svc.cluster.local.", RecordType::A);
    answer[2] |= 0x80;
    assert!(reply(&answer).is_none() && reply(&answer[..11]).is_none() && reply(&[]).is_none());
    // Labels that are no text are somebody else's.
    assert!(reply(&with(1, &[[2, 0xff, 0xfe, 0].as_slice(), &kind].concat())).is_none());
    assert!(reply(&vec![0; 65_535]).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_datagram_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        step(&zone(), &bytes);
    }

    #[test]
    fn damaged_questions_are_survived(at in 0_usize..40, value in any::<u8>()) {
        let mut bytes = question("_sql._tcp.db.ns.svc.cluster.local.", RecordType::SRV);
        let at = at % bytes.len();
        bytes[at] = value;
        if let Step::Reply { message, .. } = step(&zone(), &bytes) {
            encode(&message, Some(512), true, &Metrics::default());
        }
    }
}

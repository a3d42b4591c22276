//! Several stores on one etcd, etcd's own failures, and TLS.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use coracle_store::{Error, EtcdOptions, Event, ListOptions, Precondition, Store, Watch};
use coracle_testkit::assert_eventually_async;

use crate::backends::{Backend as _, Etcd, draft};

async fn next(watch: &mut Watch) -> Result<Vec<Arc<Event>>, Error> {
    let batch = tokio::time::timeout(Duration::from_secs(20), watch.next()).await.expect("something happens");
    batch.map(|batch| batch.events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_stores_are_one() {
    let mut etcd = Etcd::start().await;
    let one = etcd.store();
    let begun = one.revision().await.unwrap();
    let first = one.put("/a", draft("1"), Precondition::Absent).await.unwrap();
    // One that comes later knows what happened before, so that clients of the other can go on with it.
    let two: Arc<dyn Store> = Arc::new(etcd.connect().await.unwrap());
    let mut watch = two.watch("/", begun).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap()[0].entry, first);
    let increments = |store: Arc<dyn Store>| async move {
        let mut done = 0;
        while done < 50 {
            let now = store.get("/a").await.unwrap().unwrap();
            match store.put("/a", draft("x"), Precondition::Revision(now.revision)).await {
                Ok(_) => done += 1,
                Err(Error::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::join!(increments(one.clone()), increments(two.clone()));
    let mut seen = Vec::new();
    while seen.len() < 100 {
        seen.extend(next(&mut watch).await.unwrap());
    }
    for (before, after) in seen.iter().zip(&seen[1..]) {
        assert_eq!(after.prev.as_ref(), Some(&before.entry), "no write is lost or seen twice");
    }
    assert_eq!(one.get("/a").await.unwrap().as_ref(), seen.last().map(|event| &event.entry));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_go_on_when_etcd_comes_back() {
    let mut etcd = Etcd::start().await;
    let store = etcd.store();
    let mut watch = store.watch("/", store.revision().await.unwrap()).await.unwrap();
    let first = store.put("/a", draft("1"), Precondition::Absent).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap()[0].entry, first);
    etcd.stop();
    let failed = tokio::time::timeout(Duration::from_secs(30), store.get("/a")).await.expect("an answer in time");
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
    etcd.start_again();
    assert_eventually_async!(20, store.get("/a").await.is_ok(), "etcd is found again");
    let second = store.put("/a", draft("2"), Precondition::Revision(first.revision)).await.unwrap();
    let events = next(&mut watch).await.unwrap();
    assert_eq!((&events[0].entry, events[0].prev.as_ref()), (&second, Some(&first)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_when_etcd_forgot_what_it_missed() {
    let mut etcd = Etcd::start().await;
    let store = etcd.store();
    let first = store.put("/a", draft("1"), Precondition::Absent).await.unwrap();
    let mut watch = store.watch("/", first.revision).await.unwrap();
    etcd.stop();
    etcd.start_again();
    // Another one writes and compacts while ours has not found its way back: it may also be quick enough.
    let other = etcd.connect().await.unwrap();
    let mut last = first.clone();
    for _ in 0..20 {
        last = other.put("/a", draft("x"), Precondition::Any).await.unwrap();
    }
    other.compact(last.revision).await.unwrap();
    let mut at = first.revision;
    loop {
        match next(&mut watch).await {
            Ok(events) => {
                for event in events {
                    assert_eq!(event.revision(), at + 1, "a gap");
                    at += 1;
                }
                if at == last.revision {
                    break;
                }
            }
            Err(Error::TooSlow { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let listing = store.list("/", ListOptions::default()).await.unwrap();
    assert_eq!(listing.entries, [last]);
    let mut again = store.watch("/", listing.revision).await.unwrap();
    let later = store.put("/b", draft("1"), Precondition::Absent).await.unwrap();
    assert_eq!(next(&mut again).await.unwrap()[0].entry, later);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_and_store_prove_who_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    fs::write(path("ca"), authority.self_signed(&authority_key).unwrap().pem()).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    for name in ["server", "client"] {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        certificate.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        fs::write(path(&format!("{name}.crt")), certificate.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    let [client, peer] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let options = EtcdOptions {
        ca_file: Some(path("ca")),
        cert_file: Some(path("client.crt")),
        key_file: Some(path("client.key")),
        ..EtcdOptions::new(vec![format!("https://{client}")])
    };
    let file = |name: &str| path(name).to_str().unwrap().to_owned();
    let arguments = [
        "--listen-peer-urls".to_owned(),
        format!("http://{peer}"),
        "--client-cert-auth".to_owned(),
        format!("--trusted-ca-file={}", file("ca")),
        format!("--cert-file={}", file("server.crt")),
        format!("--key-file={}", file("server.key")),
    ];
    let data = tempfile::tempdir().unwrap();
    let etcd = Etcd::start_with(options.clone(), arguments.to_vec(), data).await.expect("etcd starts");
    let entry = etcd.store().put("/a", draft("1"), Precondition::Absent).await.unwrap();
    assert_eq!(etcd.store().get("/a").await.unwrap(), Some(entry));
    let anonymous = EtcdOptions { cert_file: None, key_file: None, ..options.clone() };
    coracle_store::Etcd::connect(anonymous).await.expect_err("no certificate");
    let half = EtcdOptions { key_file: None, ..options.clone() };
    let error = coracle_store::Etcd::connect(half).await.expect_err("half a certificate");
    assert!(error.to_string().contains("together"), "{error}");
    let unknown = EtcdOptions { ca_file: None, ..options };
    let error = coracle_store::Etcd::connect(unknown).await.expect_err("no authority");
    assert!(error.to_string().contains("certificate authority"), "{error}");
}

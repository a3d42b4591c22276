//! The DNS server as pods see it.

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::time::Instant;

use coracle_netns::model::{Change, Endpoint, Service};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use support::*;

const DNS: &str = "10.43.0.10:53";

fn question(name: &str) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

fn exchange(socket: &UdpSocket, name: &str) -> Message {
    let request = question(name);
    socket.send(&request.to_vec().unwrap()).unwrap();
    let mut buffer = [0; 4096];
    let len = socket.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..len]).unwrap();
    assert_eq!(answer.metadata.id, request.metadata.id);
    answer
}

fn client() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(DNS).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A resolver that answers every question for an address with 192.0.2.53, and counts.
fn upstream() -> (SocketAddr, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, peer)) = socket.recv_from(&mut buffer) {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let request = Message::from_vec(&buffer[..len]).unwrap();
            let mut answer = Message::response(request.metadata.id, request.metadata.op_code);
            answer.queries = request.queries.clone();
            let data = RData::A(A::new(192, 0, 2, 53));
            answer.answers.push(Record::from_rdata(request.queries[0].name.clone(), 60, data));
            // A forged answer first: another number.
            let mut forged = answer.clone();
            forged.metadata.id = forged.metadata.id.wrapping_add(1);
            for message in [forged, answer] {
                socket.send_to(&message.to_vec().unwrap(), peer).unwrap();
            }
        }
    });
    (address, asked)
}

fn answer(message: &Message) -> (ResponseCode, Vec<String>) {
    (message.metadata.response_code, message.answers.iter().map(|record| record.data.to_string()).collect())
}

#[test]
fn pods_and_host_get_answers_and_changes_are_seen_at_once() {
    on_own_host(|| {
        let (upstream, asked) = upstream();
        let node = Node::start(|config| config.upstreams = vec![upstream]);
        let network = node.network().clone();
        let serving = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::time::timeout(std::time::Duration::from_secs(20), network.serve_dns()).await.ok()
            });
        });
        let pod = node.pod("a");
        node.update(vec![Change::Service(key("web"), Some(service("10.43.0.80")))]);
        let web = "web.default.svc.cluster.local.";
        let socket = inside(&pod.netns, client);
        assert_eq!(answer(&exchange(&socket, web)), (ResponseCode::NoError, vec!["10.43.0.80".into()]));
        assert_eq!(answer(&exchange(&client(), web)).1, ["10.43.0.80"], "from the host");
        assert_eq!(answer(&exchange(&socket, "no.default.svc.cluster.local.")).0, ResponseCode::NXDomain);
        // By TCP, two questions on one connection.
        let tcp = inside(&pod.netns, || {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect_timeout(&socket_address(), PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut answers = Vec::new();
            for _ in 0..2 {
                let bytes = question(web).to_vec().unwrap();
                stream.write_all(&[&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()).unwrap();
                let mut len = [0; 2];
                stream.read_exact(&mut len).unwrap();
                let mut bytes = vec![0; u16::from_be_bytes(len).into()];
                stream.read_exact(&mut bytes).unwrap();
                answers.push(answer(&Message::from_vec(&bytes).unwrap()).1);
            }
            answers
        });
        assert_eq!(tcp, [["10.43.0.80"], ["10.43.0.80"]]);
        // A headless Service follows its endpoints.
        let headless = Service { headless: true, cluster_ips: Vec::new(), ..service("10.43.0.1") };
        node.update(vec![
            Change::Service(key("db"), Some(headless)),
            slice("db", vec![Endpoint::ready(pod.ips[0], None)]),
        ]);
        assert_eq!(answer(&exchange(&socket, "db.default.svc.cluster.local.")).1, ["10.42.0.2"]);
        node.update(vec![slice("db", Vec::new())]);
        assert_eq!(answer(&exchange(&socket, "db.default.svc.cluster.local.")), (ResponseCode::NoError, Vec::new()));
        // Other names: forwarded once, then from the cache; a name outside behind one inside.
        for _ in 0..3 {
            assert_eq!(answer(&exchange(&socket, "example.org.")).1, ["192.0.2.53"]);
        }
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);
        let external = Service { external_name: Some("example.org".into()), ..Service::default() };
        node.update(vec![Change::Service(key("out"), Some(external))]);
        assert_eq!(answer(&exchange(&socket, "out.default.svc.cluster.local.")).1, ["example.org.", "192.0.2.53"]);
        let metrics = node.network().dns_metrics().render();
        assert!(metrics.contains("coracle_dns_cache_total{result=\"hit\"} 3"), "{metrics}");
        // Questions are not tracked as connections.
        let tracked = sh("conntrack -L -p udp --dport 53 2>/dev/null | wc -l");
        assert_eq!(tracked.trim(), "0");
        // How fast, one question after the other.
        let start = Instant::now();
        const QUESTIONS: u32 = 2000;
        for _ in 0..QUESTIONS {
            exchange(&socket, web);
        }
        println!("{:?} a question", start.elapsed() / QUESTIONS);
        node.network().destroy().unwrap();
        drop(serving);
    });
}

#[test]
fn stub_domains_have_resolvers_of_their_own() {
    on_own_host(|| {
        let ((general, asked), (stub, asked_stub)) = (upstream(), upstream());
        let node = Node::start(|config| {
            config.upstreams = vec![general];
            config.stub_domains = vec![("corp.example".into(), vec![stub]), ("example".into(), vec![general])];
        });
        let network = node.network().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = std::thread::spawn(move || {
            runtime().block_on(async {
                tokio::select! {
                    _ = network.serve_dns() => panic!("the server ended"),
                    _ = stopped => {}
                }
            });
        });
        let socket = client();
        let counts = || [&asked, &asked_stub].map(|asked| asked.load(std::sync::atomic::Ordering::SeqCst));
        for name in ["a.corp.example.", "B.CORP.example.", "corp.example."] {
            assert_eq!(answer(&exchange(&socket, name)).1, ["192.0.2.53"], "{name}");
        }
        assert_eq!(counts(), [0, 3]);
        for name in ["notcorp.example.", "example.org."] {
            assert_eq!(answer(&exchange(&socket, name)).1, ["192.0.2.53"], "{name}");
        }
        assert_eq!(counts(), [2, 3]);
        stop.send(()).unwrap();
        serving.join().unwrap();
        node.network().destroy().unwrap();
    });
}

fn socket_address() -> SocketAddr {
    DNS.parse().unwrap()
}

//! Services in the kernel.

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use coracle_netns::model::{Change, Endpoint, EndpointPort, EndpointSlice, Service, ServicePort, TrafficPolicy};
use coracle_netns::{Config, Network, Protocol, ProxyMode};
use support::*;

/// A node with pods a, b, c that serve their names at 8080.
fn three(mode: ProxyMode) -> (Node, Vec<coracle_netns::PodNetwork>) {
    let node = Node::start(|config| config.proxy_mode = Some(mode));
    let pods: Vec<_> = ["a", "b", "c"].iter().map(|name| node.pod(name)).collect();
    for (pod, name) in pods.iter().zip(["a", "b", "c"]) {
        serve(&pod.netns, 8080, name);
    }
    (node, pods)
}

fn endpoints(pods: &[coracle_netns::PodNetwork]) -> Vec<Endpoint> {
    pods.iter().map(|pod| Endpoint::ready(pod.ips[0], Some("node-1"))).collect()
}

fn tally(to: SocketAddr, count: usize) -> HashMap<String, usize> {
    let mut all = HashMap::new();
    for _ in 0..count {
        *all.entry(ask(to, PATIENCE).unwrap().0).or_default() += 1;
    }
    all
}

#[test]
fn a_cluster_address_balances_follows_and_refuses() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let to = socket("10.43.0.80:80");
        node.update(vec![Change::Service(key("web"), Some(service("10.43.0.80")))]);
        assert_eq!(ask(to, PATIENCE).unwrap_err().kind(), ErrorKind::ConnectionRefused, "no endpoints");
        assert_eq!(inside(&pods[0].netns, || ask(to, PATIENCE)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        node.update(vec![slice("web", endpoints(&pods))]);
        let all = tally(to, 60);
        assert!(all.len() == 3 && all.values().all(|count| *count > 5), "{all:?}");
        let from_pod = inside(&pods[0].netns, || tally(to, 60));
        assert_eq!(from_pod.len(), 3, "a pod reaches all, itself too: {from_pod:?}");
        let seen = inside(&pods[0].netns, || {
            (0..60).map(|_| ask(to, PATIENCE).unwrap()).find(|(name, _)| name == "b").unwrap().1
        });
        assert_eq!(seen, pods[0].ips[0], "the sender's address is kept");
        node.update(vec![slice("web", endpoints(&pods[1..2]))]);
        assert_eq!(tally(to, 10), HashMap::from([("b".to_owned(), 10)]));
        assert_eq!(
            ask(socket("10.43.0.80:81"), PATIENCE).unwrap_err().kind(),
            ErrorKind::ConnectionRefused,
            "another port"
        );
        node.update(vec![Change::Service(key("web"), None)]);
        assert_eq!(ask(to, PATIENCE).unwrap_err().kind(), ErrorKind::ConnectionRefused, "gone");
        let listing = sh("nft list ruleset; iptables-save");
        assert!(!listing.contains("balance-") && !listing.contains("CORACLE-B-"), "{listing}");
        node.network().destroy().unwrap();
        assert_no_rules();
    });
}

#[test]
fn affinity_keeps_a_client_until_its_endpoint_goes() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let to = socket("10.43.0.80:80");
        let sticky = Service { affinity_seconds: Some(600), ..service("10.43.0.80") };
        node.update(vec![Change::Service(key("web"), Some(sticky)), slice("web", endpoints(&pods))]);
        let first = ask(to, PATIENCE).unwrap().0;
        assert_eq!(tally(to, 20), HashMap::from([(first.clone(), 20)]));
        let rest: Vec<_> =
            pods.iter().zip(["a", "b", "c"]).filter(|(_, name)| *name != first).map(|(pod, _)| pod.clone()).collect();
        node.update(vec![slice("web", endpoints(&rest))]);
        let second = ask(to, PATIENCE).unwrap().0;
        assert_ne!(second, first);
        assert_eq!(tally(to, 20), HashMap::from([(second, 20)]));
        node.network().destroy().unwrap();
    });
}

/// A network namespace joined to the host by a link: 198.51.100.1 the host, .2 the client.
fn outsider() -> std::path::PathBuf {
    let name = format!("out{}", std::process::id());
    sh(&format!(
        "mount -t tmpfs none /run/netns 2>/dev/null || {{ mkdir -p /run/netns; mount -t tmpfs none /run/netns; }}; ip netns add {name};
         ip link add up0 type veth peer name eth0 netns {name}; ip address add 198.51.100.1/24 dev up0; ip link set up0 up;
         ip -n {name} address add 198.51.100.2/24 dev eth0; ip -n {name} link set eth0 up; ip -n {name} link set lo up;
         ip -n {name} route add default via 198.51.100.1"
    ));
    std::path::Path::new("/run/netns").join(name)
}

#[test]
fn the_world_comes_in_by_node_ports_and_external_addresses() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let client = outsider();
        let web = Service {
            ports: vec![ServicePort { port: 80, node_port: Some(30080), ..ServicePort::default() }],
            external_ips: vec![address("203.0.113.1")],
            load_balancer_ips: vec![address("203.0.113.2")],
            source_ranges: vec!["198.51.100.0/30".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
            ..service("10.43.0.80")
        };
        let remote = Endpoint::ready(address("10.42.9.9"), Some("node-2"));
        let mut all = endpoints(&pods[..1]);
        node.update(vec![Change::Service(key("web"), Some(web.clone())), slice("web", all.clone())]);
        let node_port = socket("198.51.100.1:30080");
        let from_world = |to: &str| inside(&client, || ask(socket(to), IMPATIENCE));
        for to in ["198.51.100.1:30080", "203.0.113.1:80", "203.0.113.2:80", "10.43.0.80:80"] {
            assert_eq!(from_world(to).unwrap(), ("a".into(), address("10.42.0.1")), "{to}: masqueraded");
        }
        assert_eq!(ask(socket("127.0.0.1:30080"), PATIENCE).unwrap().0, "a");
        assert_eq!(inside(&pods[1].netns, || ask(node_port, PATIENCE)).unwrap(), ("a".into(), pods[1].ips[0]));
        // Only local endpoints, the client's address kept; pods and the host still reach all.
        all.push(remote.clone());
        let local = Service { external_policy: TrafficPolicy::Local, ..web.clone() };
        node.update(vec![Change::Service(key("web"), Some(local)), slice("web", all)]);
        for to in ["198.51.100.1:30080", "203.0.113.1:80", "203.0.113.2:80"] {
            for _ in 0..8 {
                assert_eq!(from_world(to).unwrap(), ("a".into(), address("198.51.100.2")), "{to}");
            }
        }
        node.update(vec![slice("web", vec![remote])]);
        assert_eq!(from_world("198.51.100.1:30080").unwrap_err().kind(), ErrorKind::TimedOut, "dropped, not refused");
        // Another source range: the load balancer's address is closed, the others are not.
        let closed = Service { source_ranges: vec!["192.0.2.0/24".parse().unwrap()], ..web };
        node.update(vec![Change::Service(key("web"), Some(closed)), slice("web", endpoints(&pods[..1]))]);
        assert_eq!(from_world("203.0.113.2:80").unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(from_world("203.0.113.1:80").unwrap().0, "a");
        // What leaves the cluster is masqueraded.
        serve(&client, 7070, "world");
        assert_eq!(
            inside(&pods[0].netns, || ask(socket("198.51.100.2:7070"), PATIENCE)).unwrap(),
            ("world".into(), address("198.51.100.1"))
        );
        node.network().destroy().unwrap();
    });
}

#[test]
fn internal_policy_local_stays_on_the_node() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let to = socket("10.43.0.80:80");
        let web = Service { internal_policy: TrafficPolicy::Local, ..service("10.43.0.80") };
        let remote = Endpoint::ready(address("10.42.9.9"), Some("node-2"));
        let mut all = endpoints(&pods[2..]);
        all.push(remote.clone());
        node.update(vec![Change::Service(key("web"), Some(web)), slice("web", all)]);
        assert_eq!(tally(to, 10), HashMap::from([("c".to_owned(), 10)]));
        node.update(vec![slice("web", vec![remote])]);
        assert_eq!(ask(to, IMPATIENCE).unwrap_err().kind(), ErrorKind::TimedOut);
        node.network().destroy().unwrap();
    });
}

#[test]
fn services_go_on_while_the_daemon_starts_again_and_heal_when_emptied() {
    in_both_modes(|mode| {
        let (mut node, pods) = three(mode);
        let to = socket("10.43.0.80:80");
        let all = || vec![Change::Service(key("web"), Some(service("10.43.0.80"))), slice("web", endpoints(&pods))];
        node.update(all());
        node.restart();
        assert_eq!(tally(to, 30).len(), 3, "before the new daemon knows anything");
        let d = node.pod("d");
        serve(&d.netns, 8080, "d");
        assert_eq!(tally(to, 30).len(), 3, "and after it made a pod");
        node.update(all());
        assert_eq!(tally(to, 30).len(), 3);
        let others = match mode {
            ProxyMode::Nftables => "nft flush ruleset",
            ProxyMode::Iptables => {
                "iptables -t nat -A PREROUTING -s 192.0.2.9 -j ACCEPT; iptables -t nat -F CORACLE-CLUSTER; iptables -t nat -D OUTPUT -j CORACLE-OUTPUT"
            }
        };
        sh(others);
        node.update(vec![
            Change::Service(key("other"), Some(service("10.43.0.81"))),
            slice("other", endpoints(&pods[..1])),
        ]);
        assert_eq!(tally(to, 30).len(), 3, "somebody emptied the tables");
        node.network().destroy().unwrap();
        assert!(mode == ProxyMode::Nftables || sh("iptables-save").contains("192.0.2.9"), "rules of others stay");
    });
}

#[test]
fn a_udp_sender_that_never_pauses_follows_the_endpoints() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let udp = |node_port| Service {
            ports: vec![ServicePort { port: 80, protocol: Protocol::Udp, node_port, ..ServicePort::default() }],
            ..service("10.43.0.80")
        };
        let to = |pods: &[coracle_netns::PodNetwork]| {
            let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Udp, port: 8080 }];
            Change::Slice(key("dns-1"), Some(EndpointSlice { service: key("dns"), ports, endpoints: endpoints(pods) }))
        };
        node.update(vec![Change::Service(key("dns"), Some(udp(Some(30053)))), to(&pods[..1])]);
        let senders = ["10.43.0.80:80", "127.0.0.1:30053"].map(|front| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(front).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        });
        let said = || {
            senders.each_ref().map(|sender| {
                sender.send(b"?").unwrap();
                let mut buffer = [0; 64];
                let len = sender.recv(&mut buffer).unwrap();
                char::from(buffer[..len][0])
            })
        };
        assert_eq!(said(), ['a', 'a']);
        node.update(vec![to(&pods[1..2])]);
        assert_eq!(said(), ['b', 'b']);
        node.network().destroy().unwrap();
    });
}

#[test]
fn load_balancers_are_told_whether_the_node_has_endpoints() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let web = Service {
            external_policy: TrafficPolicy::Local,
            health_check_node_port: Some(31000),
            ..service("10.43.0.80")
        };
        let check = || {
            node.runtime.block_on(async {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let mut stream = tokio::net::TcpStream::connect("127.0.0.1:31000").await?;
                stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await?;
                let mut text = String::new();
                stream.read_to_string(&mut text).await?;
                Ok::<_, std::io::Error>(text)
            })
        };
        node.update(vec![Change::Service(key("web"), Some(web)), slice("web", endpoints(&pods))]);
        let text = check().unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.contains("\"localEndpoints\":3"), "{text}");
        node.update(vec![slice("web", vec![Endpoint::ready(address("10.42.9.9"), Some("node-2"))])]);
        let text = check().unwrap();
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"localEndpoints\":0"), "{text}");
        node.update(vec![Change::Service(key("web"), None)]);
        assert!(check().is_err());
        node.network().destroy().unwrap();
    });
}

#[test]
fn affinity_ends_with_its_time() {
    in_both_modes(|mode| {
        let (node, pods) = three(mode);
        let to = socket("10.43.0.80:80");
        let sticky = Service { affinity_seconds: Some(1), ..service("10.43.0.80") };
        node.update(vec![Change::Service(key("web"), Some(sticky)), slice("web", endpoints(&pods))]);
        let first = ask(to, PATIENCE).unwrap().0;
        assert_eq!(tally(to, 5), HashMap::from([(first.clone(), 5)]));
        // Each question makes the time begin anew, so it is asked less often than the time takes.
        let forgotten = || {
            std::thread::sleep(Duration::from_millis(2100));
            ask(to, PATIENCE).unwrap().0 != first
        };
        assert!((0..12).any(|_| forgotten()), "the client is kept for ever");
        node.network().destroy().unwrap();
    });
}

#[test]
fn node_ports_open_at_the_addresses_that_are_asked_for() {
    in_both_modes(|mode| {
        let node = Node::start(|config| {
            config.proxy_mode = Some(mode);
            config.node_port_addresses = vec!["198.51.100.0/24".parse().unwrap()];
        });
        let client = outsider();
        sh("ip address add 192.0.2.7/32 dev lo");
        let pod = node.pod("a");
        serve(&pod.netns, 8080, "a");
        let ports = vec![ServicePort { port: 80, node_port: Some(30080), ..ServicePort::default() }];
        let web = Service { ports, ..service("10.43.0.80") };
        node.update(vec![Change::Service(key("web"), Some(web)), slice("web", endpoints(std::slice::from_ref(&pod)))]);
        for from_world in [true, false] {
            let ask = |to: &str| {
                let ask = || ask(socket(to), PATIENCE);
                if from_world { inside(&client, ask) } else { ask() }
            };
            assert_eq!(ask("198.51.100.1:30080").unwrap().0, "a");
            assert_eq!(ask("192.0.2.7:30080").unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(ask(socket("127.0.0.1:30080"), PATIENCE).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        node.network().destroy().unwrap();
    });
}

/// Services that stand together: in one state all lead to one port of their endpoints, in the other to another.
fn generation(port: u16) -> Vec<Change> {
    let change = |n: u8| {
        let name = format!("s{n}");
        let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port }];
        let endpoints = vec![Endpoint::ready(address("10.42.0.2"), Some("node-1"))];
        let slice = EndpointSlice { service: key(&name), ports, endpoints };
        [
            Change::Service(key(&name), Some(service(&format!("10.43.1.{n}")))),
            Change::Slice(key(&format!("{name}-1")), Some(slice)),
        ]
    };
    (0..200).flat_map(change).collect()
}

/// The daemon that [`a_daemon_killed_during_a_rule_change_leaves_whole_rules`] kills: it changes all Services again and again.
#[test]
#[ignore = "is started by another test"]
fn changing_daemon() {
    let Some(folder) = std::env::var_os("CORACLE_TEST_RUN") else { return };
    let mode = match std::env::var_os("CORACLE_TEST_IPTABLES") {
        Some(_) => ProxyMode::Iptables,
        None => ProxyMode::Nftables,
    };
    let config = Config { proxy_mode: Some(mode), ..Config::new(folder, "node-1") };
    let (network, runtime) = (Network::new(config).unwrap(), runtime());
    for port in [8081, 8082].into_iter().cycle() {
        runtime.block_on(network.update(generation(port))).unwrap();
        println!("changed");
    }
}

#[test]
fn a_daemon_killed_during_a_rule_change_leaves_whole_rules() {
    in_both_modes(|mode| {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..8 {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--ignored", "--exact", "changing_daemon", "--nocapture"])
                .env("CORACLE_TEST_RUN", folder.path());
            if mode == ProxyMode::Iptables {
                command.env("CORACLE_TEST_IPTABLES", "yes");
            }
            let mut daemon = command.stdout(Stdio::piped()).spawn().unwrap();
            let mut said = BufReader::new(daemon.stdout.take().unwrap()).lines();
            // At its first change or the second, some way into the next one.
            let mut heard =
                (0..=round % 2).map(|_| said.find(|line| line.as_ref().is_ok_and(|line| line == "changed")));
            assert!(heard.all(|line| line.is_some()), "the daemon ended by itself");
            std::thread::sleep(Duration::from_millis(3 * round));
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            let rules = match mode {
                ProxyMode::Nftables => sh("nft list map ip coracle endpoints"),
                ProxyMode::Iptables => sh("iptables-save -t nat"),
            };
            let separator = if mode == ProxyMode::Nftables { " . " } else { ":" };
            let led = |port: &str| rules.matches(&format!("10.42.0.2{separator}{port}")).count();
            let (old, new) = (led("8081"), led("8082"));
            assert!((old, new) == (200, 0) || (old, new) == (0, 200), "{old} and {new} Services lead to one port each");
        }
        let node = Network::new(Config { proxy_mode: Some(mode), ..Config::new(folder.path(), "node-1") }).unwrap();
        node.destroy().unwrap();
    });
}

#[test]
fn ten_thousand_services_come_and_go() {
    on_own_host(|| {
        let (node, pods) = three(ProxyMode::Nftables);
        let address = |n: u32| std::net::Ipv4Addr::from(u32::from(std::net::Ipv4Addr::new(10, 43, 16, 0)) + n);
        let come = |n: u32| {
            let name = format!("s{n}");
            let at = service(&address(n).to_string());
            [Change::Service(key(&name), Some(at)), slice(&name, endpoints(&pods))]
        };
        node.update((0..10_000).flat_map(come).collect());
        for n in [0, 4_999, 9_999] {
            assert!(["a", "b", "c"].contains(&ask((address(n), 80).into(), PATIENCE).unwrap().0.as_str()));
        }
        node.update((0..10_000).map(|n| Change::Service(key(&format!("s{n}")), None)).collect());
        assert_eq!(ask((address(4_999), 80).into(), PATIENCE).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let left = sh("for map in services endpoints; do nft list map ip coracle $map; done; nft list chains ip");
        assert!(!left.contains("elements") && !left.contains("balance"), "{left}");
        node.network().destroy().unwrap();
    });
}

//! Pods' networks in the kernel.

mod support;

use std::time::Duration;

use coracle_netns::{HostPort, Overlay, PodNet, Protocol};
use support::*;

#[test]
fn pods_reach_each_other_and_the_host_and_leave_nothing() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        let (a, b) = (node.pod("a"), node.pod("b"));
        assert_eq!((a.ips[0], b.ips[0]), (address("10.42.0.2"), address("10.42.0.3")));
        serve(&b.netns, 8080, "b");
        let to_b = socket("10.42.0.3:8080");
        assert_eq!(inside(&a.netns, || ask(to_b, PATIENCE)).unwrap(), ("b".into(), a.ips[0]));
        assert_eq!(ask(to_b, PATIENCE).unwrap(), ("b".into(), address("10.42.0.1")));
        serve(std::path::Path::new("/proc/thread-self/ns/net"), 9090, "host");
        assert_eq!(inside(&a.netns, || ask(socket("10.42.0.1:9090"), PATIENCE)).unwrap(), ("host".into(), a.ips[0]));
        // The same pod again is the same network.
        assert_eq!(node.pod("a"), a);
        node.network().teardown_pod("uid-a");
        node.network().settle();
        assert!(!a.netns.exists());
        assert!(ask(socket("10.42.0.2:8080"), IMPATIENCE).is_err());
        assert_eq!(node.pod("c").ips[0], address("10.42.0.4"), "an address just freed is not given at once");
        node.network().destroy().unwrap();
        assert_eq!(sh("ip -o link | grep -v ' lo:' || true"), "");
        assert_eq!(sh("ip route"), "");
        assert_eq!(sh("nft list ruleset"), "");
        assert_eq!(std::fs::read_dir(node.folder.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_daemon_after_a_crash_takes_its_pods_over() {
    on_own_host(|| {
        let mut node = Node::start(|_| ());
        let net = PodNet {
            host_ports: vec![HostPort {
                protocol: Protocol::Tcp,
                host_ip: None,
                host_port: 8081,
                container_port: 8080,
            }],
            ..PodNet::default()
        };
        let a = node.pod_with("a", net.clone());
        serve(&a.netns, 8080, "a");
        // Half a pod: on record, but never finished.
        let record = std::fs::read_to_string(node.folder.path().join("pods/uid-a.json")).unwrap();
        let half = record
            .replace("uid-a", "uid-half")
            .replace("10.42.0.2", "10.42.0.9")
            .replace("\"made\":true", "\"made\":false");
        std::fs::write(node.folder.path().join("pods/uid-half.json"), half).unwrap();
        std::fs::write(node.folder.path().join("netns/uid-stray"), "").unwrap();
        node.restart();
        let pods = node.network().pods();
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0].1, a);
        assert!(
            !node.folder.path().join("netns/uid-stray").exists()
                && !node.folder.path().join("pods/uid-half.json").exists()
        );
        assert_eq!(node.pod_with("a", net.clone()), a);
        node.update(Vec::new());
        assert_eq!(ask(socket("127.0.0.1:8081"), PATIENCE).unwrap().0, "a");
        let refused = node.runtime.block_on(node.network().setup_pod(pod_key("b"), net)).unwrap_err();
        assert_eq!(refused.to_string(), "host port 8081/Tcp is taken by pod uid-a");
        assert_eq!(node.pod("b").ips[0], address("10.42.0.3"));
        node.network().destroy().unwrap();
    });
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        let port = |protocol, host_ip, host_port| HostPort { protocol, host_ip, host_port, container_port: 8080 };
        sh("ip address add 192.0.2.7/32 dev lo");
        let all = node.pod_with(
            "all",
            PodNet {
                host_ports: vec![port(Protocol::Tcp, None, 81), port(Protocol::Udp, None, 81)],
                ..PodNet::default()
            },
        );
        let one = PodNet { host_ports: vec![port(Protocol::Tcp, Some(address("127.0.0.1")), 82)], ..PodNet::default() };
        let one = node.pod_with("one", one);
        let other =
            PodNet { host_ports: vec![port(Protocol::Tcp, Some(address("192.0.2.7")), 82)], ..PodNet::default() };
        let other = node.pod_with("other", other);
        for (pod, name) in [(&all, "all"), (&one, "one"), (&other, "other")] {
            serve(&pod.netns, 8080, name);
        }
        assert_eq!(ask(socket("127.0.0.1:81"), PATIENCE).unwrap().0, "all");
        assert_eq!(ask(socket("192.0.2.7:81"), PATIENCE).unwrap().0, "all");
        assert_eq!(ask_udp(socket("192.0.2.7:81"), PATIENCE).unwrap().0, "all");
        assert_eq!(ask(socket("127.0.0.1:82"), PATIENCE).unwrap().0, "one");
        assert_eq!(ask(socket("192.0.2.7:82"), PATIENCE).unwrap().0, "other");
        let from_pod = |to| inside(&one.netns, || ask(to, PATIENCE));
        assert_eq!(from_pod(socket("10.42.0.1:81")).unwrap(), ("all".into(), one.ips[0]));
        assert_eq!(inside(&all.netns, || ask(socket("192.0.2.7:81"), PATIENCE)).unwrap().0, "all", "hairpin");
        // The host's loopback is none of the pods' business.
        serve(std::path::Path::new("/proc/thread-self/ns/net"), 83, "host");
        let smuggled = inside(&one.netns, || {
            sh("ip route add 127.0.0.2/32 via 10.42.0.1 dev eth0 table local 2>/dev/null || true");
            ask(socket("127.0.0.2:83"), IMPATIENCE)
        });
        assert!(smuggled.is_err());
        node.network().teardown_pod("uid-all");
        node.network().settle();
        assert!(ask(socket("127.0.0.1:81"), IMPATIENCE).is_err());
        node.network().destroy().unwrap();
    });
}

#[test]
fn both_families_at_once() {
    on_own_host(|| {
        let node = Node::start(|config| {
            config.pod_cidrs.push("fd00:42::/64".parse().unwrap());
            config.cluster_cidrs.push("fd00:42::/56".parse().unwrap());
            config.service_cidrs.push("fd00:43::/112".parse().unwrap());
        });
        let (a, b) = (node.pod("a"), node.pod("b"));
        serve(&b.netns, 8080, "b");
        for (from, to) in a.ips.iter().zip(&b.ips) {
            assert_eq!(inside(&a.netns, || ask((*to, 8080).into(), PATIENCE)).unwrap(), ("b".into(), *from));
        }
        assert_eq!(a.ips[1], address("fd00:42::2"));
        node.network().destroy().unwrap();
        assert_eq!(sh("nft list ruleset"), "");
        assert_eq!(sh("ip -6 route"), "");
    });
}

#[test]
fn bandwidth_is_limited_as_asked() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        let net = PodNet {
            ingress_bandwidth_bits: Some(80_000_000),
            egress_bandwidth_bits: Some(8_000_000_000_000 / 100),
            ..PodNet::default()
        };
        let pod = node.pod_with("a", net);
        let host = sh("tc qdisc show");
        assert!(host.contains("qdisc tbf") && host.contains("rate 80Mbit"), "{host}");
        let inner = inside(&pod.netns, || sh("tc qdisc show dev eth0"));
        assert!(inner.contains("qdisc tbf") && inner.contains("rate 80Gbit"), "{inner}");
        node.network().destroy().unwrap();
    });
}

#[test]
fn pods_made_and_removed_at_the_same_time_do_not_meet() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        let names: Vec<String> = (0..24).map(|n| format!("p{n}")).collect();
        let networks = node.runtime.block_on(async {
            let all = names.iter().map(|name| {
                let (network, key) = (node.network().clone(), pod_key(name));
                tokio::spawn(async move {
                    let made = network.setup_pod(key.clone(), PodNet::default()).await.unwrap();
                    network.teardown_pod(&key.uid);
                    network.setup_pod(key, PodNet::default()).await.unwrap();
                    made
                })
            });
            let mut networks = Vec::new();
            for task in all.collect::<Vec<_>>() {
                networks.push(task.await.unwrap());
            }
            networks
        });
        let addresses: std::collections::HashSet<_> =
            node.network().pods().into_iter().map(|(_, network)| network.ips[0]).collect();
        assert_eq!((addresses.len(), networks.len()), (24, 24));
        node.network().destroy().unwrap();
        assert_eq!(sh("ip -o link | grep -v ' lo:' || true"), "");
    });
}

#[test]
fn the_first_packets_of_a_pod_are_not_lost() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        serve(std::path::Path::new("/proc/thread-self/ns/net"), 9090, "host");
        // One packet each way, sent once: UDP is not repeated.
        for n in 0..30 {
            let pod = node.pod(&format!("p{n}"));
            let answer = inside(&pod.netns, || ask_udp(socket("10.42.0.1:9090"), PATIENCE));
            assert_eq!(answer.unwrap().1, pod.ips[0]);
            serve(&pod.netns, 8080, "pod");
            assert_eq!(ask_udp((pod.ips[0], 8080).into(), PATIENCE).unwrap().0, "pod");
        }
        node.network().destroy().unwrap();
    });
}

#[test]
fn a_pod_deleted_while_its_network_is_made_leaves_nothing() {
    on_own_host(|| {
        let node = Node::start(|_| ());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        for n in 0..40_u32 {
            let (network, key) = (node.network().clone(), pod_key(&format!("p{n}")));
            let uid = key.uid.clone();
            let making = runtime.spawn(async move { network.setup_pod(key, PodNet::default()).await });
            // From before it has begun until after it is done.
            std::thread::sleep(Duration::from_micros(u64::from(n) * 200));
            node.network().teardown_pod(&uid);
            runtime.block_on(making).unwrap().unwrap();
            node.network().teardown_pod(&uid);
        }
        node.network().settle();
        assert!(node.network().pods().is_empty());
        assert_eq!(sh("ip -o link | grep -Ev ': (lo|coracle0):' || true"), "");
        assert_eq!(sh(&format!("ls {0}/netns {0}/pods | grep uid || true", node.folder.path().display())), "");
        node.network().destroy().unwrap();
    });
}

/// What a pod says about addresses on its link, to whoever believes it.
const GARBAGE: &str = r#"
import os, socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
me = s.getsockname()[4]
ip, ip6 = socket.inet_aton, lambda text: socket.inet_pton(socket.AF_INET6, text)
def arp(claims, target, op=2):
    return b"\xff" * 6 + me + b"\x08\x06\x00\x01\x08\x00\x06\x04" + bytes([0, op]) + me + ip(claims) + b"\xff" * 6 + ip(target)
def advertise(claims):
    body = b"\x88\x00\x00\x00\x20\x00\x00\x00" + ip6(claims) + b"\x02\x01" + me
    pseudo = ip6(claims) + ip6("ff02::1") + len(body).to_bytes(4, "big") + b"\x00\x00\x00\x3a" + body
    total = sum(int.from_bytes(pseudo[n:n + 2], "big") for n in range(0, len(pseudo), 2))
    total = (total & 0xffff) + (total >> 16)
    body = body[:2] + (~(total + (total >> 16)) & 0xffff).to_bytes(2, "big") + body[4:]
    return b"\x33\x33\x00\x00\x00\x01" + me + b"\x86\xdd\x60\x00\x00\x00" + len(body).to_bytes(2, "big") + b"\x3a\xff" + ip6(claims) + ip6("ff02::1") + body
for _ in range(20):
    for claims in ["10.42.0.1", "10.42.0.2", "10.42.0.3", "10.43.0.10"]:
        for op in [1, 2, 77]:
            s.send(arp(claims, "10.42.0.1", op))
            s.send(arp(claims, claims, op))
    for claims in ["fd00:42::1", "fd00:42::2", "fd00:42::3"]:
        s.send(advertise(claims))
    for kind in [b"\x08\x06", b"\x86\xdd", b"\x08\x00"]:
        s.send(b"\xff" * 6 + me + kind + os.urandom(60))
"#;

#[test]
fn a_pod_that_lies_about_addresses_harms_nobody() {
    on_own_host(|| {
        let node = Node::start(|config| {
            config.pod_cidrs.push("fd00:42::/64".parse().unwrap());
            config.cluster_cidrs.push("fd00:42::/56".parse().unwrap());
        });
        let (liar, a, b) = (node.pod("liar"), node.pod("a"), node.pod("b"));
        serve(&b.netns, 8080, "b");
        serve(std::path::Path::new("/proc/thread-self/ns/net"), 9090, "host");
        let neighbours = || sh("ip neigh show nud permanent | sort");
        let before = neighbours();
        coracle_testkit::need("python3", "python3");
        let status = inside(&liar.netns, || std::process::Command::new("python3").args(["-c", GARBAGE]).status());
        assert!(status.unwrap().success());
        assert_eq!(neighbours(), before);
        for (from, to) in a.ips.iter().zip(&b.ips) {
            assert_eq!(inside(&a.netns, || ask((*to, 8080).into(), PATIENCE)).unwrap(), ("b".into(), *from));
            assert_eq!(ask((*to, 8080).into(), PATIENCE).unwrap().0, "b", "from the host");
        }
        assert_eq!(inside(&a.netns, || ask(socket("10.42.0.1:9090"), PATIENCE)).unwrap().1, a.ips[0]);
        // Nor does a packet with another's address get anywhere.
        let forged = inside(&liar.netns, || {
            sh(&format!("ip address add {}/32 dev eth0", a.ips[0]));
            let socket = std::net::UdpSocket::bind((a.ips[0], 0)).unwrap();
            socket.set_read_timeout(Some(IMPATIENCE)).unwrap();
            socket.send_to(b"?", (b.ips[0], 8080)).unwrap();
            socket.recv(&mut [0; 8]).is_ok()
        });
        assert!(!forged);
        node.network().destroy().unwrap();
    });
}

#[test]
fn links_have_the_mtu_of_the_uplink() {
    for (overlay, wanted) in [(Overlay::Routes, 1400), (Overlay::Vxlan { vni: 1, port: 8472 }, 1350)] {
        on_own_host(|| {
            sh("ip link add up0 mtu 1400 type veth peer name p1; ip link set up0 up; ip link set p1 up
                ip address add 198.51.100.1/24 dev up0; ip route add default via 198.51.100.2");
            let node = Node::start(|config| config.overlay = overlay);
            let pod = node.pod("a");
            let links = inside(&pod.netns, || sh("ip -o link show eth0")) + &sh("ip -o link show coracle0");
            assert_eq!(links.matches(&format!("mtu {wanted} ")).count(), 2, "{links}");
            node.network().destroy().unwrap();
        });
    }
}

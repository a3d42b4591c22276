//! Two hosts: network namespaces joined by a bridge, each with a network of its own.

mod support;

use std::fs::File;

use coracle_netns::model::{Change, Endpoint, Node as NodeModel, ObjectKey};
use coracle_netns::{Config, Network, Overlay, PodNet};
use nix::sched::{CloneFlags, setns};
use support::*;

/// Runs a network on each of two hosts and tells each of the other.
fn two_hosts(overlay: Overlay) {
    on_own_host(|| {
        sh("mkdir -p /run/netns; mount -t tmpfs none /run/netns; ip link add sw type bridge; ip link set sw up
            for n in 1 2; do ip netns add h$n; ip link add p$n type veth peer name eth0 netns h$n; ip link set p$n master sw up
            ip -n h$n address add 192.168.7.$n/24 dev eth0; ip -n h$n link set eth0 up; ip -n h$n link set lo up; ip -n h$n route add default dev eth0; done");
        let folder = tempfile::tempdir().unwrap();
        // This thread moves between the hosts; the network that joins them has to stay.
        let _switch = File::open("/proc/thread-self/ns/net").unwrap();
        let mut hosts = Vec::new();
        for n in 1..=2_u8 {
            let path = folder.path().join(n.to_string());
            // The runtime's threads are started from here, so they are on the host too.
            let (network, runtime) = inside(std::path::Path::new(&format!("/run/netns/h{n}")), || {
                let mut config = Config::new(&path, format!("node-{n}"));
                config.pod_cidrs = vec![format!("10.42.{n}.0/24").parse().unwrap()];
                config.node_ips = vec![address(&format!("192.168.7.{n}"))];
                config.overlay = overlay;
                (Network::new(config).unwrap(), runtime())
            });
            hosts.push((network, runtime));
        }
        let node = |n: u8| NodeModel {
            ips: vec![address(&format!("192.168.7.{n}"))],
            pod_cidrs: vec![format!("10.42.{n}.0/24").parse().unwrap()],
            zone: None,
        };
        let mut pods = Vec::new();
        for (n, (network, runtime)) in (1_u8..).zip(&hosts) {
            setns(File::open(format!("/run/netns/h{n}")).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let nodes = (1..=2).map(|n| Change::Node(format!("node-{n}").into(), Some(node(n)))).collect();
            runtime.block_on(network.update(nodes)).unwrap();
            let pod = runtime.block_on(network.setup_pod(pod_key(&format!("p{n}")), PodNet::default())).unwrap();
            serve(&pod.netns, 8080, &format!("p{n}"));
            pods.push(pod);
        }
        let (one, two) = (&pods[0], &pods[1]);
        assert_eq!(
            inside(&one.netns, || ask((two.ips[0], 8080).into(), PATIENCE)).unwrap(),
            ("p2".into(), one.ips[0]),
            "the address is kept"
        );
        assert_eq!(inside(&two.netns, || ask((one.ips[0], 8080).into(), PATIENCE)).unwrap().0, "p1");
        // A Service of one host with an endpoint on the other, from the host itself.
        setns(File::open("/run/netns/h1").unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        let web = Change::Service(ObjectKey::new("default", "web"), Some(service("10.43.0.80")));
        hosts[0]
            .1
            .block_on(hosts[0].0.update(vec![web, slice("web", vec![Endpoint::ready(two.ips[0], Some("node-2"))])]))
            .unwrap();
        assert_eq!(ask(socket("10.43.0.80:80"), PATIENCE).unwrap().0, "p2");
        assert_eq!(inside(&one.netns, || ask(socket("10.43.0.80:80"), PATIENCE)).unwrap(), ("p2".into(), one.ips[0]));
        // A link that was down takes the routes along; they come back with it.
        sh("ip link set eth0 down; ip link set eth0 up");
        hosts[0].1.block_on(async {
            coracle_testkit::assert_eventually_async!(
                5,
                sh("ip route").contains("10.42.2.0/24"),
                "the route comes back"
            );
        });
        assert_eq!(inside(&one.netns, || ask((two.ips[0], 8080).into(), PATIENCE)).unwrap().0, "p2");
        // A node that claims our range gets no route; one that leaves loses its own.
        let thief = NodeModel { pod_cidrs: vec!["10.42.1.0/25".parse().unwrap()], ..node(2) };
        hosts[0].1.block_on(hosts[0].0.update(vec![Change::Node("node-3".into(), Some(thief))])).unwrap();
        assert!(!sh("ip route").contains("10.42.1.0/25"));
        hosts[0].1.block_on(hosts[0].0.update(vec![Change::Node("node-2".into(), None)])).unwrap();
        assert!(!sh("ip route").contains("10.42.2.0/24"));
        for (n, (network, _)) in (1_u8..).zip(&hosts) {
            setns(File::open(format!("/run/netns/h{n}")).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            network.destroy().unwrap();
            assert_eq!(sh("ip -o link | grep -Ev ' (lo|eth0)[:@]' || true"), "");
        }
    });
}

#[test]
fn plain_routes_join_hosts_of_one_network() {
    two_hosts(Overlay::Routes);
}

#[test]
fn vxlan_joins_hosts() {
    two_hosts(Overlay::Vxlan { vni: 42, port: 8472 });
}

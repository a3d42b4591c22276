//! Two hosts: network namespaces joined by a bridge, each with a network of its own.

mod support;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use coracle_netns::model::{Change, Endpoint, Node as NodeModel, ObjectKey};
use coracle_netns::{Config, Network, Overlay, PodNet, WireGuardKey};
use coracle_testkit::assert_eventually;
use nix::sched::{CloneFlags, setns};
use support::*;
use tokio::runtime::Runtime;

/// Runs a network on each of two hosts and tells each of the other.
fn two_hosts(overlay: impl Fn(&Path) -> Overlay + Send + Sync) {
    on_own_host(|| {
        sh("mkdir -p /run/netns; mount -t tmpfs none /run/netns; ip link add sw type bridge; ip link set sw up
            for n in 1 2; do ip netns add h$n; ip link add p$n type veth peer name eth0 netns h$n; ip link set p$n master sw up
            ip -n h$n address add 192.168.7.$n/24 dev eth0; ip -n h$n link set eth0 up; ip -n h$n link set lo up; ip -n h$n route add default dev eth0; done");
        let folder = tempfile::tempdir().unwrap();
        // This thread moves between the hosts; the network that joins them has to stay.
        let switch = File::open("/proc/thread-self/ns/net").unwrap();
        let mut hosts = Vec::new();
        for n in 1..=2_u8 {
            let path = folder.path().join(n.to_string());
            // The runtime's threads are started from here, so they are on the host too.
            let (network, runtime) = inside(Path::new(&format!("/run/netns/h{n}")), || {
                let mut config = Config::new(&path, format!("node-{n}"));
                config.pod_cidrs = vec![format!("10.42.{n}.0/24").parse().unwrap()];
                config.node_ips = vec![address(&format!("192.168.7.{n}"))];
                config.overlay = overlay(&path);
                (Network::new(config).unwrap(), runtime())
            });
            hosts.push((network, runtime));
        }
        let node = |n: u8| NodeModel {
            ips: vec![address(&format!("192.168.7.{n}"))],
            pod_cidrs: vec![format!("10.42.{n}.0/24").parse().unwrap()],
            zone: None,
            wireguard_key: hosts.get(usize::from(n) - 1).and_then(|(network, _)| key_of(network)),
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
        if key_of(&hosts[0].0).is_some() {
            only_sealed_packets_pass(&hosts[0], &node(2), || {
                inside(&one.netns, || ask((two.ips[0], 8080).into(), IMPATIENCE)).is_ok()
            });
        }
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
        // Of two others that claim one range the first by name has it, whoever comes first, until it leaves.
        let reaches = || inside(&one.netns, || ask((two.ips[0], 8080).into(), IMPATIENCE)).is_ok();
        let claims = |name: &str, claims: bool| {
            let node = claims.then(|| NodeModel {
                ips: vec![address("192.168.7.77")],
                wireguard_key: node(2).wireguard_key.map(|_| [u8::try_from(name.len()).unwrap(); 32]),
                ..node(2)
            });
            hosts[0].1.block_on(hosts[0].0.update(vec![Change::Node(name.into(), node)])).unwrap();
        };
        claims("node-4", true);
        assert!(reaches(), "node-2 keeps its range");
        claims("node-1a", true);
        assert!(!reaches(), "node-1a is before it");
        claims("node-1a", false);
        assert_eventually!(10, reaches(), "node-2 has it again");
        claims("node-4", false);
        assert!(reaches());
        // A host that is cut off is reached again once it is healed.
        let switch = |command: &str| {
            thread::scope(|scope| {
                let run = scope.spawn(|| {
                    setns(&switch, CloneFlags::CLONE_NEWNET).unwrap();
                    sh(command);
                });
                run.join().unwrap();
            });
        };
        switch("ip link set p2 down");
        assert!(!reaches(), "cut off");
        switch("ip link set p2 up");
        assert_eventually!(10, reaches(), "healed");
        hosts[0].1.block_on(hosts[0].0.update(vec![Change::Node("node-2".into(), None)])).unwrap();
        assert!(!sh("ip route").contains("10.42.2.0/24"));
        // A node that left while no daemon ran has no route after the next start.
        let before = node(1);
        hosts[0].1.block_on(hosts[0].0.update(vec![Change::Node("node-2".into(), Some(node(2)))])).unwrap();
        let (network, runtime) = hosts.remove(0);
        let config = network.config().clone();
        drop(network);
        let network = Network::new(config).unwrap();
        assert!(sh("ip route").contains("10.42.2.0/24"), "nobody is cut off while the daemon starts");
        runtime.block_on(network.update(vec![Change::Node("node-1".into(), Some(before))])).unwrap();
        assert!(!sh("ip route").contains("10.42.2.0/24"));
        hosts.insert(0, (network, runtime));
        for (n, (network, _)) in (1_u8..).zip(&hosts) {
            setns(File::open(format!("/run/netns/h{n}")).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            network.destroy().unwrap();
            assert_eq!(sh("ip -o link | grep -Ev ' (lo|eth0)[:@]' || true"), "");
        }
    });
}

/// The public key of a host's WireGuard link.
fn key_of(network: &Network) -> Option<[u8; 32]> {
    match network.config().overlay {
        Overlay::WireGuard { key, .. } => Some(key.public()),
        _ => None,
    }
}

/// Nothing reaches the other host when its WireGuard port is closed, or when it has another key than its Node says.
fn only_sealed_packets_pass(first: &(Arc<Network>, Runtime), second: &NodeModel, reaches: impl Fn() -> bool) {
    let (network, runtime) = first;
    let update = |node: NodeModel| {
        runtime.block_on(network.update(vec![Change::Node("node-2".into(), Some(node))])).unwrap();
    };
    sh("nft add table ip closed && nft 'add chain ip closed out { type filter hook output priority -10; }'
        nft add rule ip closed out udp dport 51820 drop");
    assert!(!reaches(), "a packet took another way");
    sh("nft delete table ip closed");
    assert_eventually!(10, reaches(), "the way is open again");
    update(NodeModel { wireguard_key: Some([9; 32]), ..second.clone() });
    assert!(!reaches(), "the key is not the other host's");
    update(NodeModel { wireguard_key: None, ..second.clone() });
    assert!(!reaches(), "nothing goes in the clear");
    update(second.clone());
    assert_eventually!(10, reaches(), "the key is right again");
}

#[test]
fn plain_routes_join_hosts_of_one_network() {
    two_hosts(|_| Overlay::Routes);
}

#[test]
fn vxlan_joins_hosts() {
    two_hosts(|_| Overlay::Vxlan { vni: 42, port: 8472 });
}

/// What [`wireguard_joins_hosts`] runs in its machine.
#[test]
#[ignore = "needs a kernel with WireGuard"]
fn wireguard_joins_hosts_of_this_kernel() {
    two_hosts(|folder| {
        std::fs::create_dir_all(folder).unwrap();
        let key = WireGuardKey::open(&folder.join("wireguard.key")).unwrap();
        assert_eq!(WireGuardKey::open(&folder.join("wireguard.key")).unwrap(), key);
        Overlay::WireGuard { key, port: 51820 }
    });
}

/// Busybox's shell would take its own `ip` for that of iproute2, so the tests get another.
const INIT: &str = "#!/bin/sh
/bin/busybox --install -s /bin
mkdir /own; ln -s /bin/dash /own/sh; export PATH=/own:/bin:/sbin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mount -t tmpfs none /run; mount -t tmpfs none /tmp
for none in iptables-save ip6tables-save; do printf '#!/bin/sh\n' > /own/$none; chmod +x /own/$none; done
inside --ignored --exact wireguard_joins_hosts_of_this_kernel --nocapture && echo all went well
poweroff -f
";

/// This kernel may have no WireGuard, so it is tried in a machine with Debian's.
#[test]
fn wireguard_joins_hosts() {
    const LIMIT: Duration = Duration::from_secs(300);
    const MEMORY_MIB: u32 = 1024;
    let folder = tempfile::tempdir().unwrap();
    let machine = coracle_testkit::Machine::new(folder.path());
    for folder in ["proc", "sys", "dev", "run", "tmp", "var"] {
        std::fs::create_dir_all(machine.root().join(folder)).unwrap();
    }
    std::os::unix::fs::symlink("/run", machine.root().join("var/run")).unwrap();
    for (program, package) in [("dash", "dash"), ("ip", "iproute2"), ("nft", "nftables"), ("conntrack", "conntrack")] {
        machine.add_program(&coracle_testkit::need(program, package), program);
    }
    let stripped = folder.path().join("inside");
    let status =
        std::process::Command::new("strip").arg("-o").arg(&stripped).arg(std::env::current_exe().unwrap()).status();
    assert!(status.unwrap().success());
    machine.add_program(&stripped, "inside");
    machine.add_modules(&["net", "crypto", "lib", "arch/x86/crypto", "drivers/net/veth.ko", "drivers/net/wireguard"]);
    machine.add_script("init", INIT);
    let text = machine.boot(MEMORY_MIB, LIMIT);
    assert!(text.contains("all went well"), "{text}");
}

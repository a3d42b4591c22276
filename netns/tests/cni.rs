//! Pods' networks by CNI plugins: Debian's containernetworking-plugins.

mod support;

use std::path::Path;

use coracle_netns::model::Change;
use coracle_netns::{CniConfig, HostPort, PodNet, Protocol};
use support::*;

const PLUGINS: &str = "/usr/lib/cni";

fn configure(folder: &Path) -> CniConfig {
    let leases = folder.join("leases");
    let list = format!(
        r#"{{"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
              "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "10.88.0.0/24"}}]],
                "routes": [{{"dst": "0.0.0.0/0"}}], "dataDir": "{}"}}}},
            {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}"#,
        leases.display()
    );
    std::fs::write(folder.join("10-pods.conflist"), list).unwrap();
    CniConfig { conf_dir: folder.into(), bin_dirs: vec![PLUGINS.into()] }
}

#[test]
fn plugins_make_check_and_remove_pods() {
    if !Path::new(PLUGINS).join("bridge").exists() {
        panic!("this test needs the plugins in {PLUGINS} (package containernetworking-plugins)");
    }
    coracle_testkit::need("iptables", "iptables");
    on_own_host(|| {
        let folder = tempfile::tempdir().unwrap();
        let cni = configure(folder.path());
        let mut node = Node::start(|config| {
            config.cluster_cidrs = vec!["10.88.0.0/24".parse().unwrap()];
            config.cni = Some(cni);
        });
        node.update(Vec::new());
        let port = HostPort { protocol: Protocol::Tcp, host_ip: None, host_port: 9080, container_port: 8080 };
        let a = node.pod_with("a", PodNet { host_ports: vec![port], ..PodNet::default() });
        let b = node.pod("b");
        assert_eq!(a.ips, [address("10.88.0.2")]);
        serve(&a.netns, 8080, "a");
        assert_eq!(inside(&b.netns, || ask((a.ips[0], 8080).into(), PATIENCE)).unwrap(), ("a".into(), b.ips[0]));
        assert_eq!(ask(socket("127.0.0.1:9080"), PATIENCE).unwrap().0, "a", "portmap opens host ports");
        // A Service leads to it from pods and from the host.
        let endpoints = vec![coracle_netns::model::Endpoint::ready(a.ips[0], Some("node-1"))];
        node.update(vec![Change::Service(key("web"), Some(service("10.43.0.80"))), slice("web", endpoints)]);
        assert_eq!(inside(&b.netns, || ask(socket("10.43.0.80:80"), PATIENCE)).unwrap().0, "a");
        assert_eq!(ask(socket("10.43.0.80:80"), PATIENCE).unwrap().0, "a");
        // Another daemon asks the plugins (CHECK): whole pods stay, broken ones go.
        sh(&format!("nsenter --net={} ip link delete eth0", b.netns.display()));
        node.restart();
        assert_eq!(node.network().pod("uid-a").map(|pod| pod.ips), Some(a.ips.clone()));
        assert!(node.network().pod("uid-b").is_none(), "its link is gone");
        assert_eq!(ask(socket("127.0.0.1:9080"), PATIENCE).unwrap().0, "a");
        node.network().teardown_pod("uid-a");
        node.network().settle();
        let leases = sh(&format!("ls {}", folder.path().join("leases/pods").display()));
        assert!(!leases.contains("10.88."), "{leases}");
        assert!(!sh("iptables-save -t nat; iptables-legacy-save -t nat || true").contains("9080"));
        node.network().destroy().unwrap();
    });
}

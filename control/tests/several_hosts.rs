//! Several hosts: network namespaces joined by a bridge, one daemon in each.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::Instant;

use coracle_testkit::assert_eventually;
use support::{Host, PATIENCE_S, hello};

const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// A pod of the small web server on each node, and a Service over them.
fn manifest() -> String {
    let pod = |node: &&str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: on-{node}\n  labels: {{app: spread}}\nspec:\n  nodeName: {node}\n  \
             containers:\n  - name: web\n    image: hello:1\n    imagePullPolicy: Never\n    readinessProbe:\n      \
             httpGet: {{path: /healthz, port: 8080}}\n      periodSeconds: 1\n---\n"
        )
    };
    let pods: String = NODES.iter().map(pod).collect();
    format!(
        "{pods}apiVersion: v1\nkind: Service\nmetadata:\n  name: spread\nspec:\n  type: NodePort\n  \
         selector: {{app: spread}}\n  ports:\n  - port: 80\n    targetPort: 8080\n    nodePort: 30080\n"
    )
}

/// The pods that answer at an address within some tries, asked from a host.
fn answers(host: &Host, address: &str) -> std::collections::BTreeSet<String> {
    let script = "import sys, urllib.request\nfor _ in range(12):\n  try: print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode().strip())\n  except OSError: pass";
    let output = host.command("python3").args(["-c", script, address]).output().expect("python3 starts");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

fn get_inside(host: &Host, pod: &str, url: &str) -> bool {
    host.kubectl(&["exec", pod, "--", "/hello", "get", url]).status.success()
}

#[test]
fn hosts_join_pods_talk_across_and_links_heal() {
    let switch = Host::new("switch");
    let mut hosts: Vec<Host> = NODES.iter().map(|name| Host::new(name)).collect();
    switch.make_switch();
    for (number, host) in hosts.iter().enumerate() {
        host.plug_into(&switch, number + 1);
        host.import(&hello());
    }
    hosts[0].start();
    let token = hosts[0].coracle(&["token", "create", "--ttl", "10m", "--description", "for the test"]);
    assert!(hosts[0].coracle(&["token", "list"]).contains("for the test"));
    for (name, host) in NODES.iter().zip(&mut hosts).skip(1) {
        host.start_agent(name, "https://10.99.0.1:6443", Some(&token));
    }
    let started = Instant::now();
    for name in &NODES[1..] {
        assert_eventually!(PATIENCE_S, hosts[0].is_ready(name), "{name}:\n{}\n{}", hosts[1].log(), hosts[2].log());
    }
    eprintln!("both agents joined and Ready after {:?}", started.elapsed());

    assert!(hosts[0].apply(&manifest()).status.success(), "apply failed");
    let ready = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
    assert_eventually!(
        PATIENCE_S,
        hosts[0].get(&["get", "pods", "-l", "app=spread", "-o", ready]) == "True True True",
        "{}\n{}\n{}",
        hosts[0].get(&["get", "pods", "-o", "wide"]),
        hosts[1].log(),
        hosts[2].log()
    );
    let service = hosts[0].get(&["get", "service", "spread", "-o", "jsonpath={.spec.clusterIP}"]);
    // The Service spans the hosts, seen from each; its node port is on every host, seen from outside.
    for (number, host) in hosts.iter().enumerate() {
        assert_eventually!(PATIENCE_S, answers(host, &format!("http://{service}/")).len() == 3, "from n{}", number + 1);
        let port = format!("http://10.99.0.{}:30080/", number + 1);
        assert_eventually!(PATIENCE_S, answers(&switch, &port).len() == 3, "at {port}");
    }
    // By its name, inside a pod of another host than the API's; that host's own DNS answers.
    for pod in ["on-n2", "on-n3"] {
        assert_eventually!(PATIENCE_S, get_inside(&hosts[0], pod, "http://spread.default.svc.cluster.local/"), "{pod}");
    }

    // A host that nobody can connect to is reached through the tunnel that it opened.
    coracle_testkit::need("nft", "nftables");
    let closed = hosts[2].command("sh").args(["-c", "nft add table ip closed && nft 'add chain ip closed in { type filter hook input priority -10; }' && nft add rule ip closed in iifname eth0 tcp dport 10250 drop"]).status();
    assert!(closed.expect("nft starts").success());
    assert!(get_inside(&hosts[0], "on-n3", "http://127.0.0.1:8080/"), "exec through the tunnel");
    assert!(hosts[0].kubectl(&["logs", "on-n3"]).status.success(), "logs through the tunnel");

    // A link goes down and comes up again: the routes are there again.
    let flapped = hosts[1]
        .command("sh")
        .args(["-c", "ip link set eth0 down && ip link set eth0 up && ip route replace default via 10.99.0.254"])
        .status();
    assert!(flapped.expect("ip starts").success());
    let on_n3 = hosts[0].get(&["get", "pod", "on-n3", "-o", "jsonpath={.status.podIP}"]);
    assert_eventually!(PATIENCE_S, !answers(&hosts[1], &format!("http://{on_n3}:8080/")).is_empty(), "{on_n3} from n2");

    // An agent that starts again needs no token, and finds its pod running.
    hosts[1].kill_server();
    hosts[1].start_agent("n2", "https://10.99.0.1:6443", None);
    assert_eventually!(PATIENCE_S, get_inside(&hosts[0], "on-n2", "http://127.0.0.1:8080/"), "{}", hosts[1].log());
    assert_eq!(
        hosts[0].get(&["get", "pod", "on-n2", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]),
        "0"
    );

    // A token that was removed, or one of another cluster, lets nobody in.
    let id = token.rsplit("::").next().and_then(|token| token.split('.').next()).expect("a token");
    hosts[0].coracle(&["token", "delete", id]);
    let stranger = Host::new("stranger");
    stranger.plug_into(&switch, 9);
    let error = stranger.agent_error("n9", "https://10.99.0.1:6443", &token);
    assert!(error.contains("the token is not known or has ended"), "{error}");
    let other = token.replacen(&token[3..7], if &token[3..7] == "0000" { "1111" } else { "0000" }, 1);
    let error = stranger.agent_error("n9", "https://10.99.0.1:6443", &other);
    assert!(error.contains("not the one that the token names"), "{error}");

    assert!(hosts[0].kubectl(&["delete", "pods", "--all", "--grace-period=1"]).status.success());
    for host in hosts.iter_mut().rev() {
        let left: Vec<String> = host.take_down().into_iter().filter(|line| !line.contains("eth0")).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// VXLAN between two hosts, both address families of pods and Services; one host carries its rules out by iptables.
#[test]
fn an_overlay_carries_both_families() {
    let switch = Host::new("switch");
    let mut hosts: Vec<Host> = NODES[..2].iter().map(|name| Host::new(name)).collect();
    switch.make_switch();
    for (number, host) in (1..).zip(&mut hosts) {
        host.plug_into(&switch, number);
        host.shell(&format!("ip address add fd00:99::{number}/64 dev eth0 nodad"));
        host.import(&hello());
        host.options = vec![format!("--node-ip=10.99.0.{number},fd00:99::{number}")];
    }
    hosts[0].options.extend(
        [
            "--network-backend=vxlan",
            "--cluster-cidr=10.42.0.0/16,fd00:42::/56",
            "--service-cidr=10.43.0.0/16,fd00:43::/112",
        ]
        .map(str::to_owned),
    );
    hosts[1].options.push("--proxy-mode=iptables".into());
    hosts[0].start();
    let token = hosts[0].coracle(&["token", "create", "--ttl", "10m"]);
    hosts[1].start_agent("n2", "https://10.99.0.1:6443", Some(&token));
    assert_eventually!(PATIENCE_S, hosts[0].is_ready("n2"), "{}", hosts[1].log());
    let applied = hosts[0].apply(&manifest());
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    // The third node is not there, nor is its pod.
    assert!(hosts[0].kubectl(&["delete", "pod", "on-n3", "--force", "--grace-period=0"]).status.success());
    let second = r#"{"spec": {"ipFamilyPolicy": "PreferDualStack"}}"#;
    assert!(hosts[0].kubectl(&["patch", "service", "spread", "-p", second]).status.success());
    let fronts = hosts[0].get(&["get", "service", "spread", "-o", "jsonpath={.spec.clusterIPs[*]}"]);
    let (four, six) = fronts.split_once(' ').expect("two addresses");
    let fronts = [format!("http://{four}/"), format!("http://[{six}]/")];
    for (host, front) in hosts.iter().flat_map(|host| fronts.iter().map(move |front| (host, front))) {
        assert_eventually!(PATIENCE_S, answers(host, front).len() == 2, "{front}\n{}", hosts[1].log());
    }
    for pod in ["on-n1", "on-n2"] {
        for front in &fronts {
            assert_eventually!(PATIENCE_S, get_inside(&hosts[0], pod, front), "{front} from {pod}");
        }
        let ips = || hosts[0].get(&["get", "pod", pod, "-o", "jsonpath={.status.podIPs[*].ip}"]);
        assert_eventually!(PATIENCE_S, ips().split(' ').count() == 2, "{}", ips());
        let (_, six) = ips().split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).expect("two addresses");
        let url = format!("http://[{six}]:8080/");
        for host in &hosts {
            assert_eventually!(PATIENCE_S, !answers(host, &url).is_empty(), "{url}\n{}", hosts[1].log());
        }
    }
    for number in 1..=2 {
        let port = format!("http://10.99.0.{number}:30080/");
        assert_eventually!(PATIENCE_S, answers(&switch, &port).len() == 2, "at {port}");
        let port = format!("http://[fd00:99::{number}]:30080/");
        assert_eventually!(PATIENCE_S, answers(&hosts[2 - number], &port).len() == 2, "at {port}");
        let node = format!("n{number}");
        let addresses = hosts[0].get(&["get", "node", &node, "-o", "jsonpath={.status.addresses[*].address}"]);
        assert_eq!(addresses, format!("10.99.0.{number} fd00:99::{number} {node}"));
    }
    assert!(hosts[0].kubectl(&["delete", "pods", "--all", "--grace-period=1"]).status.success());
    for host in hosts.iter_mut().rev() {
        let left: Vec<String> = host.take_down().into_iter().filter(|line| !line.contains("eth0")).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

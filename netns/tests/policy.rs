//! NetworkPolicy in the kernel.

mod support;

use coracle_netns::model::{Change, Labels, NetworkPolicy, Peer, PolicyPort, PolicyRule, PortMatch, Selector};
use coracle_netns::{PodNet, PodNetwork, Protocol};
use support::*;

fn labels(app: &str) -> Labels {
    Labels::from([("app".into(), app.into())])
}

fn selector(app: &str) -> Selector {
    Selector { match_labels: labels(app), expressions: Vec::new() }
}

fn pod(node: &Node, name: &str) -> PodNetwork {
    let network = node.pod_with(name, PodNet { labels: labels(name), ..PodNet::default() });
    serve(&network.netns, 8080, name);
    serve(&network.netns, 9090, name);
    network
}

fn reaches(from: &PodNetwork, to: &PodNetwork, port: u16) -> bool {
    let to = (to.ips[0], port).into();
    let tcp = inside(&from.netns, || ask(to, IMPATIENCE)).is_ok();
    let udp = inside(&from.netns, || ask_udp(to, IMPATIENCE)).is_ok();
    assert_eq!(tcp, udp);
    tcp
}

fn policy(name: &str, policy: Option<NetworkPolicy>) -> Change {
    Change::Policy(key(name), policy)
}

#[test]
fn what_policies_let_through_and_nothing_else() {
    in_both_modes(|mode| {
        let node = Node::start(|config| config.proxy_mode = Some(mode));
        node.update(Vec::new());
        let (a, b, c) = (pod(&node, "a"), pod(&node, "b"), pod(&node, "c"));
        assert!(reaches(&a, &b, 8080));
        // Nothing comes in to b.
        let deny = NetworkPolicy { pods: selector("b"), ingress: Some(Vec::new()), egress: None };
        node.update(vec![policy("deny", Some(deny))]);
        assert!(!reaches(&a, &b, 8080) && !reaches(&c, &b, 8080) && reaches(&b, &a, 8080) && reaches(&a, &c, 8080));
        assert!(ask((b.ips[0], 8080).into(), PATIENCE).is_ok(), "the node reaches its pods for probes");
        // Policies add up: a may, on one port.
        let ports = |number| {
            [Protocol::Tcp, Protocol::Udp]
                .map(|protocol| PolicyPort { protocol, port: PortMatch::Range(number, number) })
                .into()
        };
        let allow =
            PolicyRule { peers: vec![Peer::Pods { namespaces: None, pods: selector("a") }], ports: ports(8080) };
        let allow = NetworkPolicy { pods: selector("b"), ingress: Some(vec![allow]), egress: None };
        node.update(vec![policy("allow", Some(allow))]);
        assert!(reaches(&a, &b, 8080) && !reaches(&a, &b, 9090) && !reaches(&c, &b, 8080));
        // Out of c only to a block without a's address.
        let block =
            Peer::Block { cidr: "10.42.0.0/24".parse().unwrap(), except: vec!["10.42.0.2/32".parse().unwrap()] };
        let out = NetworkPolicy {
            pods: selector("c"),
            ingress: None,
            egress: Some(vec![PolicyRule { peers: vec![block], ports: Vec::new() }]),
        };
        node.update(vec![policy("deny", None), policy("allow", None), policy("out", Some(out))]);
        assert!(!reaches(&c, &a, 8080) && reaches(&c, &b, 8080) && reaches(&a, &c, 8080));
        // A pod made under a policy is held by it from its first packet.
        let all = NetworkPolicy { pods: Selector::default(), ingress: Some(Vec::new()), egress: Some(Vec::new()) };
        node.update(vec![policy("all", Some(all))]);
        let d = pod(&node, "d");
        assert!(!reaches(&d, &a, 8080) && !reaches(&a, &d, 8080));
        node.update(vec![policy("all", None), policy("out", None)]);
        assert!(reaches(&d, &a, 8080) && reaches(&c, &a, 8080));
        let rules = sh("nft list ruleset; iptables-save");
        assert!(!rules.contains("peers-") && !rules.contains("CORACLE-P-"), "{rules}");
        node.network().destroy().unwrap();
        assert_no_rules();
    });
}

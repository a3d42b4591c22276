//! What the network needs of a host, tried out in a network namespace that is thrown away.

use std::thread;

use nix::sched::{CloneFlags, unshare};

use crate::error::Error;
use crate::netlink::route::{self, VethEnd};
use crate::netlink::{Batch, Socket};
use crate::nft::Table;
use crate::services::layout;
use crate::{Config, Family};

/// Something that the network needs, or can make use of.
#[derive(Debug)]
pub struct Finding {
    /// What was tried.
    pub what: &'static str,
    /// What a host without it cannot do.
    pub costs: &'static str,
    /// Whether nothing works without it.
    pub required: bool,
    /// Why it is lacking.
    pub result: Result<(), Error>,
}

/// Tries out what the network needs. Nothing on the host changes: all happens in a network namespace of a thread that ends.
pub fn check() -> Vec<Finding> {
    let run = || {
        thread::Builder::new().name("network-check".into()).spawn(findings).map_err(|source| Error::Thread { source })
    };
    match run() {
        Ok(thread) => thread.join().expect("the checks do not panic"),
        Err(error) => {
            vec![Finding { what: "thread", costs: "nothing can be checked", required: true, result: Err(error) }]
        }
    }
}

fn findings() -> Vec<Finding> {
    let namespace = unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Unshare { errno });
    if namespace.is_err() {
        return vec![Finding {
            what: "network namespaces",
            costs: "pods cannot run",
            required: true,
            result: namespace,
        }];
    }
    let config = Config::new("/nowhere", "check");
    let mut found =
        vec![Finding { what: "network namespaces", costs: "pods cannot run", required: true, result: namespace }];
    let mut add = |what, costs, required, result| found.push(Finding { what, costs, required, result });
    add("veth links", "pods have no network", true, try_veth());
    add(
        "bridge links",
        "the node has no link for its addresses",
        true,
        try_link(|batch| route::add_bridge(batch, "check0", [2, 0, 0, 0, 0, 1], 1500)),
    );
    add(
        "nftables with NAT, maps and sets (IPv4)",
        "Services, host ports and policies do not work",
        true,
        try_table(&config, Family::V4),
    );
    add(
        "nftables with NAT, maps and sets (IPv6)",
        "dual-stack Services do not work",
        false,
        try_table(&config, Family::V6),
    );
    let vxlan = try_link(|batch| route::add_vxlan(batch, "check1", [2, 0, 0, 0, 0, 2], 1450, 1, 8472, None));
    add("VXLAN links", "nodes must share one network", false, vxlan);
    let wireguard = try_link(|batch| route::add_wireguard(batch, "check4", 1420));
    add("WireGuard links", "what passes between nodes cannot be encrypted", false, wireguard);
    add("token bucket queues", "bandwidth annotations do not work", false, try_limit());
    found
}

fn try_link(make: impl FnOnce(&mut Batch)) -> Result<(), Error> {
    let mut batch = Batch::default();
    make(&mut batch);
    Ok(Socket::route()?.execute(&batch)?)
}

fn try_veth() -> Result<(), Error> {
    use std::os::fd::AsFd;
    let path = std::path::Path::new("/proc/thread-self/ns/net");
    let namespace =
        std::fs::File::open(path).map_err(|source| Error::Path { step: "open", path: path.into(), source })?;
    let (here, there) =
        (VethEnd { name: "check2", mac: [2, 0, 0, 0, 0, 3] }, VethEnd { name: "check3", mac: [2, 0, 0, 0, 0, 4] });
    try_link(|batch| route::add_veth(batch, 0, 1500, &here, &there, namespace.as_fd()))
}

fn try_limit() -> Result<(), Error> {
    /// Loopback.
    const LINK: u32 = 1;
    try_link(|batch| route::add_token_bucket(batch, LINK, 1_000_000, 1_000_000))
}

fn try_table(config: &Config, family: Family) -> Result<(), Error> {
    let table: Table = layout::table(config, family);
    Ok(table.replacement().commit(&mut Socket::netfilter()?)?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_host_has_what_is_needed() {
        let findings = super::check();
        assert!(findings.len() > 5);
        for finding in findings.iter().filter(|finding| finding.required) {
            assert!(finding.result.is_ok(), "{finding:?}");
        }
    }
}

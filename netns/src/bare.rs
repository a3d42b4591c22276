//! The floor under a pod's network, for benchmarks: the netlink messages alone, without addresses to choose, records, rules or policies.

use std::fs::File;
use std::path::Path;

use parking_lot::Mutex;

use crate::error::{Error, PathExt};
use crate::netlink::Socket;
use crate::pods::{self, Host, PodKey, PodNet, Record};
use crate::{Config, Family};

/// Makes pods' links in the network namespace of the calling thread, beside a [`crate::Network`] that has made the node's own link.
pub struct Bare {
    config: Config,
    host: Host,
}

impl Bare {
    /// `config` must name another prefix of links than the network's.
    pub fn new(config: Config, mtu: u32) -> Result<Self, Error> {
        let path = Path::new("/proc/thread-self/ns/net");
        let namespace = File::open(path).at("open", path)?.into();
        Ok(Self { config, host: Host { socket: Mutex::new(Socket::route()?), namespace, mtu } })
    }

    /// Makes the links of a pod that has the `n`th address from the end of the node's range, and pins its namespace at `pin`.
    pub fn make(&self, n: u8, pin: &Path) -> Result<(), Error> {
        let range = self.config.pod_cidr(Family::V4).ok_or(Error::NoRange { family: Family::V4 })?;
        let address = match range.broadcast() {
            std::net::IpAddr::V4(last) => (u32::from(last) - 1 - u32::from(n)).into(),
            std::net::IpAddr::V6(_) => return Err(Error::NoRange { family: Family::V4 }),
        };
        let key = PodKey { uid: format!("bare-{n}"), namespace: String::new(), name: String::new() };
        let ips = vec![std::net::IpAddr::V4(address)];
        let record = Record { key, net: PodNet::default(), ips, made: false, cni: None };
        pods::make(&self.config, &self.host, &record, pin, || Ok(()))
    }

    /// Removes the links of the first pods, as many as there are pins.
    pub fn remove(&self, pins: &[std::path::PathBuf]) -> Result<(), Error> {
        let names: Vec<String> = (0..pins.len()).map(|n| format!("bare-{n}")).collect();
        pods::remove(
            &self.config,
            &self.host,
            names.iter().map(String::as_str).zip(pins.iter().map(|pin| pin.as_path())),
        )
    }
}

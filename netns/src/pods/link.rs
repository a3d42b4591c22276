//! Making and removing a pod's namespace and link.
//!
//! A pod's link is a veth pair with full-length addresses: the host routes to each pod, and every packet, also between two pods of a node, passes
//! the host's routing and rules (docs/decisions/0003-pod-network.md). Neighbours are permanent on both sides, so no ARP or ND is ever spoken.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::errno::Errno;
use parking_lot::Mutex;

use super::identity::{host_link, mac};
use super::namespace::{enter, unpin};
use super::record::Record;
use crate::error::Error;
use crate::netlink::route::{self, Inet4Setting, Route, VethEnd};
use crate::netlink::{Batch, NetlinkError, Socket};
use crate::{Config, Family};

/// The pod's interface; the kernel gives it index 2 after loopback, and we ask for that.
const POD_LINK: &str = "eth0";
const POD_LINK_INDEX: u32 = 2;
const LOOPBACK_INDEX: u32 = 1;
/// How long the pod's end may take to get its carrier, and how often it is asked.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(3);
const CARRIER_PAUSE: Duration = Duration::from_micros(200);
/// A token bucket holds what the rate gives in this time, and no less than the largest packet.
const BURST_MS: u64 = 10;
const BURST_MIN_BYTES: u64 = 256 * 1024;

/// The host's side: a socket in its namespace, and that namespace.
pub(crate) struct Host {
    pub(crate) socket: Mutex<Socket>,
    pub(crate) namespace: OwnedFd,
    pub(crate) mtu: u32,
}

/// Makes namespace, links, addresses and routes of the pod on record; the host's end comes up only after `before_up`, which runs meanwhile, went well.
/// What a killed daemon left of an earlier attempt must be removed before.
pub(crate) fn make(
    config: &Config,
    host: &Host,
    record: &Record,
    pin: &Path,
    before_up: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let uid = &record.key.uid;
    let name = host_link(&config.link_prefix, uid);
    let (host_mac, pod_mac) = (mac(1, uid), mac(2, uid));

    let mut inside = Batch::default();
    let ends = (VethEnd { name: POD_LINK, mac: pod_mac }, VethEnd { name: &name, mac: host_mac });
    route::add_veth(&mut inside, POD_LINK_INDEX, host.mtu, &ends.0, &ends.1, host.namespace.as_fd());
    route::set_up(&mut inside, POD_LINK_INDEX);
    route::set_up(&mut inside, LOOPBACK_INDEX);
    for address in &record.ips {
        let family = Family::of(*address);
        let gateway = config.gateway(family).ok_or(Error::NoRange { family })?;
        route::add_address(&mut inside, POD_LINK_INDEX, *address);
        route::add_neighbour(&mut inside, POD_LINK_INDEX, gateway, host_mac);
        route::add_route(
            &mut inside,
            &Route {
                destination: IpNet::new(family.unspecified(), 0).expect("0 is a prefix length"),
                link: Some(POD_LINK_INDEX),
                gateway: Some(gateway),
                onlink: true,
                source: Some(*address),
            },
        );
    }
    limit(&mut inside, POD_LINK_INDEX, record.net.egress_bandwidth_bits);

    // A thread of its own changes namespace and ends, so no thread of the daemon is ever anywhere else than the others.
    let mut pod_socket = thread::scope(|scope| {
        let worker = thread::Builder::new().name("pod-netns".into()).spawn_scoped(scope, || {
            enter(record.net.namespace.as_deref(), pin)?;
            let mut socket = Socket::route()?;
            socket.execute(&inside)?;
            Ok::<Socket, Error>(socket)
        });
        let worker = worker.map_err(|source| Error::Thread { source })?;
        let ready = before_up();
        let socket = worker.join().expect("the thread does not panic")?;
        ready.map(|()| socket)
    })?;

    let mut socket = host.socket.lock();
    let index = route::link_by_name(&mut socket, &name)?.index;
    let mut outside = Batch::default();
    route::set_inet4(
        &mut outside,
        index,
        &[
            (Inet4Setting::Forwarding, 1),
            // A pod may only send from its own address, which is the only one routed to its link.
            (Inet4Setting::RpFilter, 1),
            (Inet4Setting::SendRedirects, 0),
            // Host ports and node ports are reached at 127.0.0.1 too; rules keep pods from the host's loopback.
            (Inet4Setting::RouteLocalnet, 1),
        ],
    );
    for address in &record.ips {
        route::add_neighbour(&mut outside, index, *address, pod_mac);
        route::add_route(&mut outside, &pod_route(config, *address, index));
    }
    limit(&mut outside, index, record.net.ingress_bandwidth_bits);
    socket.execute(&outside)?;
    drop(socket);
    await_carrier(&mut pod_socket)
}

/// Waits until the pod's end sends. It came up before the host's end did, so its queue is put in place by the kernel's link watch, and what the pod sent
/// before that would be lost: a second of delay for its first connection.
fn await_carrier(pod: &mut Socket) -> Result<(), Error> {
    let deadline = Instant::now() + CARRIER_TIMEOUT;
    while !route::is_operational(pod, POD_LINK_INDEX)? {
        if Instant::now() > deadline {
            return Err(Error::NoCarrier { waited: CARRIER_TIMEOUT });
        }
        // Kernels before 6.9 do not tell when; it is a matter of a millisecond.
        thread::sleep(CARRIER_PAUSE);
    }
    Ok(())
}

fn pod_route(config: &Config, address: IpAddr, link: u32) -> Route {
    Route {
        destination: IpNet::from(address),
        link: Some(link),
        gateway: None,
        onlink: false,
        source: config.gateway(Family::of(address)),
    }
}

fn limit(batch: &mut Batch, link: u32, bits: Option<u64>) {
    if let Some(bits) = bits {
        let rate = (bits / 8).max(1);
        let burst = (rate * BURST_MS / 1000).max(BURST_MIN_BYTES);
        route::add_token_bucket(batch, link, rate, u32::try_from(burst).unwrap_or(u32::MAX));
    }
}

/// Removes the links and namespaces of pods; what is not there is no error. The links go together, as the kernel waits for a grace period each time
/// it is told to delete.
pub(crate) fn remove<'a>(
    config: &Config,
    host: &Host,
    pods: impl Iterator<Item = (&'a str, &'a Path)> + Clone,
) -> Result<(), Error> {
    {
        let mut socket = host.socket.lock();
        let mut batch = Batch::default();
        pods.clone().for_each(|(uid, _)| route::set_doomed(&mut batch, &host_link(&config.link_prefix, uid)));
        absent_is_fine(socket.execute(&batch))?;
        let mut batch = Batch::default();
        route::delete_doomed(&mut batch);
        absent_is_fine(socket.execute(&batch))?;
    }
    pods.map(|(_, pin)| pin).try_for_each(unpin)
}

fn absent_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.is(Errno::ENODEV) => Ok(()),
        result => result,
    }
}

/// The host's ends of pods' links, by name.
pub(crate) fn host_links(config: &Config, host: &Host) -> Result<HashSet<String>, Error> {
    let len = host_link(&config.link_prefix, "").len();
    let links = route::links(&mut host.socket.lock())?;
    Ok(links
        .into_iter()
        .map(|link| link.name)
        .filter(|name| name.starts_with(&config.link_prefix) && name.len() == len)
        .collect())
}

/// Removes links that belong to no pod.
pub(crate) fn remove_links<'a>(host: &Host, names: impl Iterator<Item = &'a String>) -> Result<(), Error> {
    let mut socket = host.socket.lock();
    let mut batch = Batch::default();
    names.for_each(|name| route::set_doomed(&mut batch, name));
    // Those that a killed daemon had given up are among them.
    route::delete_doomed(&mut batch);
    Ok(absent_is_fine(socket.execute(&batch))?)
}

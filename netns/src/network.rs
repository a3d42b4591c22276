//! The network of a node, as the node agent uses it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::cni::{Cni, Subject};
use crate::dns::Server;
use crate::error::{Error, PathExt};
use crate::hosts::Hosts;
use crate::model::Change;
use crate::netlink::{Batch, LinkEvents, Socket, messages, route};
use crate::pods::{self, Addresses, Host, PodKey, PodNet, PodNetwork, Record, Records, check_uid};
use crate::policy::PolicyChange;
use crate::rules::Rules;
use crate::services::health::HealthPorts;
use crate::services::proxy::ProxyChange;
use crate::{Config, HostPort};

/// The loopback link of every network namespace.
const LOOPBACK_INDEX: u32 = 1;
/// Pods whose networks are removed together.
const REMOVED_AT_ONCE: usize = 256;

/// The network of this node: one a daemon.
pub struct Network {
    inner: Arc<Inner>,
    remover: Mutex<Option<(Sender<String>, JoinHandle<()>)>>,
}

struct Inner {
    config: Config,
    cni: Option<Cni>,
    host: Host,
    records: Records,
    pins: PathBuf,
    pods: Mutex<Pods>,
    /// A pod is gone.
    gone: Condvar,
    /// The first update has been taken in.
    known: watch::Sender<bool>,
    rules: Mutex<Rules>,
    hosts: Mutex<Hosts>,
    dns: Server,
    health: Mutex<HealthPorts>,
    /// Heard by a task that the first update starts.
    events: Mutex<Option<LinkEvents>>,
}

/// The pods of this node.
struct Pods {
    all: HashMap<String, Held>,
    addresses: Vec<Addresses>,
    host_ports: HashMap<HostPortKey, String>,
}

type HostPortKey = (crate::Protocol, Option<IpAddr>, u16);

struct Held {
    record: Record,
    /// A thread is at work on it; whoever wants to remove it waits.
    making: bool,
    removing: bool,
}

impl Held {
    fn is_made(&self) -> bool {
        !self.making && !self.removing
    }
}

impl Network {
    /// Opens the network of the calling thread's network namespace: makes the node's link and rules, takes over the pods of an earlier daemon, and
    /// finishes what it left half done.
    pub fn new(config: Config) -> Result<Arc<Self>, Error> {
        let pins = config.run_dir.join("netns");
        let folder = config.run_dir.join("pods");
        for folder in [&pins, &folder] {
            fs::create_dir_all(folder).at("create", folder)?;
        }
        let mut socket = Socket::route()?;
        let hosts = Hosts::prepare(&config, &mut socket)?;
        let namespace = Path::new("/proc/thread-self/ns/net");
        let host = Host {
            namespace: File::open(namespace).at("open", namespace)?.into(),
            mtu: hosts.pod_mtu(),
            socket: Mutex::new(socket),
        };
        let cni = config.cni.as_ref().map(Cni::load).transpose()?;
        let rules = Rules::new(&config, Socket::netfilter()?)?;
        let inner = Inner {
            records: Records::new(folder),
            cni,
            pins,
            host,
            pods: Mutex::new(Pods { all: HashMap::new(), addresses: Vec::new(), host_ports: HashMap::new() }),
            gone: Condvar::new(),
            known: watch::Sender::new(false),
            rules: Mutex::new(rules),
            hosts: Mutex::new(hosts),
            dns: Server::bind(&config)?,
            health: Mutex::new(HealthPorts::default()),
            events: Mutex::new(Some(LinkEvents::open()?)),
            config,
        };
        inner.recover()?;
        let inner = Arc::new(inner);
        let (sender, receiver) = channel();
        let worker = Arc::clone(&inner);
        let thread = std::thread::Builder::new()
            .name("pod-network-gone".into())
            .spawn(move || worker.remove_pods(&receiver))
            .map_err(|source| Error::Thread { source })?;
        Ok(Arc::new(Self { inner, remover: Mutex::new(Some((sender, thread))) }))
    }

    /// Makes a pod's network, or returns the one that it has: safe to repeat after a crash. The rules of its host ports and the policies known
    /// so far hold before its link is up; wait for [`Network::known`] where there are policies.
    pub async fn setup_pod(&self, key: PodKey, net: PodNet) -> Result<PodNetwork, Error> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || inner.setup_pod(key, net))
            .await
            .unwrap_or_else(|error| Err(Error::Thread { source: io::Error::other(error) }))
    }

    /// Removes a pod's network; an unknown pod is no error. Returns at once: the kernel takes its time, and nobody has to wait for it. The pod's
    /// addresses are free once all is gone.
    pub fn teardown_pod(&self, uid: &str) {
        let send = {
            let mut pods = self.inner.pods.lock();
            pods.all.get_mut(uid).is_some_and(|held| !std::mem::replace(&mut held.removing, true))
        };
        if send
            && let Some((sender, _)) = &*self.remover.lock()
            && sender.send(uid.to_owned()).is_err()
        {
            tracing::warn!(uid, "the thread that removes pod networks has ended");
        }
    }

    /// The pods that have a network, those of an earlier daemon included.
    pub fn pods(&self) -> Vec<(PodKey, PodNetwork)> {
        let pods = self.inner.pods.lock();
        let made = pods.all.values().filter(|held| held.is_made());
        made.map(|held| (held.record.key.clone(), self.inner.network_of(&held.record))).collect()
    }

    /// The network of a pod.
    pub fn pod(&self, uid: &str) -> Option<PodNetwork> {
        let pods = self.inner.pods.lock();
        pods.all.get(uid).filter(|held| held.is_made()).map(|held| self.inner.network_of(&held.record))
    }

    /// Takes changes of the cluster in: when this returns, rules and routes say so. The first call must bring all there is, for it replaces the
    /// rules that an earlier daemon left.
    pub async fn update(&self, changes: Vec<Change>) -> Result<(), Error> {
        if let Some(events) = self.inner.events.lock().take() {
            tokio::spawn(follow_links(Arc::downgrade(&self.inner), events));
        }
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || inner.update(changes))
            .await
            .unwrap_or_else(|error| Err(Error::Thread { source: io::Error::other(error) }))
    }

    /// Waits for the first update: from then on a pod that is made is held by every policy.
    pub async fn known(&self) {
        let mut known = self.inner.known.subscribe();
        known.wait_for(|known| *known).await.expect("the sender is ours");
    }

    /// Answers DNS questions until the future is dropped. The server's sockets are bound since [`Network::new`]; only the first call has them.
    pub async fn serve_dns(&self) -> io::Result<()> {
        self.inner.dns.serve().await
    }

    /// What the DNS server has counted.
    pub fn dns_metrics(&self) -> &crate::DnsMetrics {
        self.inner.dns.metrics()
    }

    /// Settings in use.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Waits until the pods that are being removed are gone.
    pub fn settle(&self) {
        let mut pods = self.inner.pods.lock();
        while pods.all.values().any(|held| held.removing) {
            self.inner.gone.wait(&mut pods);
        }
    }

    /// Removes every pod's network, the node's link, routes and rules: nothing of ours is left.
    pub fn destroy(&self) -> Result<(), Error> {
        let all: Vec<String> = self.inner.pods.lock().all.keys().cloned().collect();
        all.iter().for_each(|uid| self.teardown_pod(uid));
        if let Some((sender, thread)) = self.remover.lock().take() {
            drop(sender);
            thread.join().expect("the remover does not panic");
        }
        self.inner.health.lock().clear();
        self.inner.rules.lock().destroy()?;
        self.inner.hosts.lock().destroy(&self.inner.config, &mut self.inner.host.socket.lock())?;
        for folder in [&self.inner.pins, self.inner.records.folder()] {
            fs::remove_dir(folder).at("remove", folder)?;
        }
        Ok(())
    }
}

/// Restores routes when a link of the host comes up, until the network is gone.
async fn follow_links(network: Weak<Inner>, events: LinkEvents) {
    if let Err(error) = try_follow_links(network, events).await {
        tracing::error!(%error, "cannot hear of links; routes are not restored after one was down");
    }
}

async fn try_follow_links(network: Weak<Inner>, events: LinkEvents) -> io::Result<()> {
    let mut events = events.start()?;
    loop {
        let bytes = events.next().await?;
        let Some(inner) = network.upgrade() else { return Ok(()) };
        // Our own links come and go all the time and carry no route to another node.
        let ours = |name: &str| name.starts_with(&inner.config.link_prefix);
        let up = messages(bytes)
            .any(|message| route::came_up(message.kind, message.payload).is_some_and(|name| !ours(&name)));
        if up {
            let restore = move || inner.hosts.lock().restore(&inner.config, &mut inner.host.socket.lock());
            tokio::task::spawn_blocking(restore).await.map_err(io::Error::other)?;
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.remover.lock().take() {
            drop(sender);
            if thread.join().is_err() {
                tracing::error!("the thread that removes pod networks panicked");
            }
        }
    }
}

impl Inner {
    fn pin(&self, uid: &str) -> PathBuf {
        self.pins.join(uid)
    }

    fn network_of(&self, record: &Record) -> PodNetwork {
        PodNetwork { netns: self.pin(&record.key.uid), ips: record.ips.clone() }
    }

    /// Sorts out what an earlier daemon left: whole pods are taken over, halves are removed.
    fn recover(&self) -> Result<(), Error> {
        let known: HashSet<String> = pods::host_links(&self.config, &self.host)?;
        let mut kept = Vec::new();
        for record in self.records.load()? {
            let uid = &record.key.uid;
            let whole = record.made && self.pin(uid).exists() && self.is_linked(&record, &known);
            if whole {
                kept.push(record);
            } else {
                self.remove_links(std::slice::from_ref(&record))?;
                self.records.remove(uid)?;
            }
        }
        let uids: HashSet<&str> = kept.iter().map(|record| record.key.uid.as_str()).collect();
        for entry in fs::read_dir(&self.pins).at("list", &self.pins)? {
            let entry = entry.at("list", &self.pins)?;
            if entry.file_name().to_str().is_none_or(|name| !uids.contains(name)) {
                pods::unpin(&entry.path())?;
            }
        }
        let links: HashSet<String> = uids.iter().map(|uid| pods::host_link(&self.config.link_prefix, uid)).collect();
        pods::remove_links(&self.host, known.difference(&links))?;
        let mut pods = self.pods.lock();
        for range in &self.config.pod_cidrs {
            pods.addresses.push(Addresses::new(*range, kept.iter().flat_map(|record| record.ips.iter().copied()))?);
        }
        let mut rules = self.rules.lock();
        for record in kept {
            rules.set_pod(&record.ips, self.host_ports(&record), true);
            for port in &record.net.host_ports {
                pods.host_ports.insert(host_port_key(port), record.key.uid.clone());
            }
            pods.all.insert(record.key.uid.clone(), Held { record, making: false, removing: false });
        }
        rules.adopt();
        Ok(())
    }

    fn setup_pod(&self, key: PodKey, net: PodNet) -> Result<PodNetwork, Error> {
        if !check_uid(&key.uid) {
            return Err(Error::Uid { uid: key.uid });
        }
        let uid = key.uid.clone();
        let mut record = {
            let mut pods = self.pods.lock();
            loop {
                match pods.all.get(&uid) {
                    None => break,
                    Some(held) if held.is_made() => return Ok(self.network_of(&held.record)),
                    Some(_) => self.gone.wait(&mut pods),
                }
            }
            let record = pods.admit(key, net, self.cni.is_some())?;
            pods.all.insert(uid.clone(), Held { record: record.clone(), making: true, removing: false });
            record
        };
        let result = self.make_pod(&mut record);
        if result.is_err() {
            self.remove_all(std::slice::from_ref(&record));
        } else if let Some(held) = self.pods.lock().all.get_mut(&uid) {
            held.record = record.clone();
            held.making = false;
        }
        self.gone.notify_all();
        result.map(|()| self.network_of(&record))
    }

    /// Whether a pod of an earlier daemon still has its link.
    fn is_linked(&self, record: &Record, known: &HashSet<String>) -> bool {
        match (&self.cni, &record.cni) {
            (Some(_), Some(made)) => {
                let pin = self.pin(&record.key.uid);
                let checked = made.check(&subject(record, &pin));
                checked
                    .inspect_err(|error| tracing::warn!(uid = record.key.uid, %error, "a pod's network is made anew"))
                    .is_ok()
            }
            (None, None) => known.contains(&pods::host_link(&self.config.link_prefix, &record.key.uid)),
            // The settings changed: the pod gets another network.
            _ => false,
        }
    }

    /// The host ports that are ours to open.
    fn host_ports<'a>(&self, record: &'a Record) -> &'a [HostPort] {
        if self.cni.as_ref().is_some_and(Cni::has_host_ports) { &[] } else { &record.net.host_ports }
    }

    fn make_by_cni(&self, cni: &Cni, record: &mut Record) -> Result<(), Error> {
        let pin = self.pin(&record.key.uid);
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().name("pod-netns".into()).spawn_scoped(scope, || {
                pods::enter(record.net.namespace.as_deref(), &pin)?;
                let mut batch = Batch::default();
                route::set_up(&mut batch, LOOPBACK_INDEX);
                Ok::<(), Error>(Socket::route()?.execute(&batch)?)
            });
            let worker = worker.map_err(|source| Error::Thread { source })?;
            worker.join().expect("the thread does not panic")
        })?;
        let made = cni.add(&subject(record, &pin))?;
        record.ips = made.addresses();
        record.cni = Some(made);
        // From here on a crash leaves something to delete.
        self.records.save(record)?;
        let mut rules = self.rules.lock();
        rules.set_pod(&record.ips, self.host_ports(record), true);
        rules.update_policy(vec![PolicyChange::Made(record.clone())]);
        rules.commit()
    }

    fn make_pod(&self, record: &mut Record) -> Result<(), Error> {
        self.records.save(record)?;
        if let Some(cni) = &self.cni {
            self.make_by_cni(cni, record)?;
            record.made = true;
            return self.records.save(record);
        }
        pods::make(&self.config, &self.host, record, &self.pin(&record.key.uid), || {
            let mut rules = self.rules.lock();
            rules.set_pod(&record.ips, &record.net.host_ports, true);
            rules.update_policy(vec![PolicyChange::Made(record.clone())]);
            rules.commit()
        })?;
        record.made = true;
        self.records.save(record)
    }

    /// Removes pods as they are told, as many together as have come, until nobody can tell any more.
    fn remove_pods(&self, receiver: &Receiver<String>) {
        while let Ok(first) = receiver.recv() {
            let uids = std::iter::once(first).chain(receiver.try_iter().take(REMOVED_AT_ONCE - 1));
            let mut records = Vec::new();
            for uid in uids {
                let mut pods = self.pods.lock();
                while pods.all.get(&uid).is_some_and(|held| held.making) {
                    self.gone.wait(&mut pods);
                }
                records.extend(pods.all.get(&uid).map(|held| held.record.clone()));
            }
            self.remove_all(&records);
        }
    }

    fn remove_links(&self, records: &[Record]) -> Result<(), Error> {
        for record in records {
            if let Some(made) = &record.cni {
                made.delete(&subject(record, &self.pin(&record.key.uid)))?;
            }
        }
        let pins: Vec<(&str, PathBuf)> =
            records.iter().map(|record| (record.key.uid.as_str(), self.pin(&record.key.uid))).collect();
        pods::remove(&self.config, &self.host, pins.iter().map(|(uid, pin)| (*uid, pin.as_path())))
    }

    /// Removes all of some pods. What fails is reported and left on record, for the next daemon to finish; the addresses stay taken.
    fn remove_all(&self, records: &[Record]) {
        let result = self.remove_links(records).and_then(|()| {
            let mut rules = self.rules.lock();
            for record in records {
                rules.set_pod(&record.ips, self.host_ports(record), false);
            }
            rules.update_policy(records.iter().map(|record| PolicyChange::Gone(record.key.uid.clone())).collect());
            rules.commit()?;
            records.iter().try_for_each(|record| self.records.remove(&record.key.uid))
        });
        let mut pods = self.pods.lock();
        for record in records {
            pods.all.remove(&record.key.uid);
            if result.is_ok() {
                pods.release(record);
            }
        }
        if let Err(error) = result {
            let uids: Vec<&str> = records.iter().map(|record| record.key.uid.as_str()).collect();
            tracing::error!(?uids, %error, "cannot remove pods' networks; their addresses stay taken until the daemon starts again");
        }
        drop(pods);
        self.gone.notify_all();
    }

    fn update(&self, changes: Vec<Change>) -> Result<(), Error> {
        let mut services = Vec::new();
        let mut policies = Vec::new();
        let mut nodes = Vec::new();
        for change in changes {
            match change {
                Change::Service(key, service) => services.push(ProxyChange::Service(key, service)),
                Change::Slice(key, slice) => services.push(ProxyChange::Slice(key, slice)),
                Change::Pod(key, pod) => policies.push(PolicyChange::Pod(key, pod)),
                Change::Namespace(name, labels) => policies.push(PolicyChange::Namespace(name, labels)),
                Change::Policy(key, policy) => policies.push(PolicyChange::Policy(key, policy)),
                Change::Node(name, node) => {
                    if *name == *self.config.node_name {
                        services.push(ProxyChange::Zone(node.as_ref().and_then(|node| node.zone.clone())));
                    }
                    nodes.push((name, node));
                }
            }
        }
        {
            let mut rules = self.rules.lock();
            rules.known();
            let touched = rules.update_services(services);
            self.dns.update(|zone| touched.iter().for_each(|key| zone.set(key, rules.service(key))));
            let mut health = self.health.lock();
            touched.iter().for_each(|key| health.set(key, rules.health(key)));
            rules.update_policy(policies);
            rules.commit()?;
        }
        self.known.send_replace(true);
        if !nodes.is_empty() {
            self.hosts.lock().update(&self.config, nodes, &mut self.host.socket.lock())?;
        }
        Ok(())
    }
}

impl Pods {
    /// Takes addresses and host ports for a pod.
    fn admit(&mut self, key: PodKey, net: PodNet, by_cni: bool) -> Result<Record, Error> {
        for port in &net.host_ports {
            if let Some(owner) = self.host_port_owner(port) {
                return Err(Error::HostPortTaken { port: *port, owner: owner.clone() });
            }
        }
        let mut ips = Vec::new();
        // CNI plugins give addresses of their own.
        for addresses in self.addresses.iter_mut().filter(|_| !by_cni) {
            match addresses.take() {
                Ok(address) => ips.push(address),
                Err(error) => {
                    ips.iter().for_each(|address| self.addresses.iter_mut().for_each(|all| all.release(*address)));
                    return Err(error.into());
                }
            }
        }
        for port in &net.host_ports {
            self.host_ports.insert(host_port_key(port), key.uid.clone());
        }
        Ok(Record { key, net, ips, made: false, cni: None })
    }

    /// The pod that has a host port: at the same address, or one of the two at every address.
    fn host_port_owner(&self, port: &HostPort) -> Option<&String> {
        let (protocol, address, number) = host_port_key(port);
        match address {
            Some(_) => self
                .host_ports
                .get(&(protocol, address, number))
                .or_else(|| self.host_ports.get(&(protocol, None, number))),
            None => {
                self.host_ports.iter().find(|((p, _, n), _)| *p == protocol && *n == number).map(|(_, owner)| owner)
            }
        }
    }

    fn release(&mut self, record: &Record) {
        for address in &record.ips {
            self.addresses.iter_mut().for_each(|all| all.release(*address));
        }
        for port in &record.net.host_ports {
            self.host_ports.remove(&host_port_key(port));
        }
    }
}

fn subject<'a>(record: &'a Record, pin: &'a Path) -> Subject<'a> {
    Subject { key: &record.key, net: &record.net, namespace: pin }
}

fn host_port_key(port: &HostPort) -> HostPortKey {
    (port.protocol, port.host_ip.filter(|address| !address.is_unspecified()), port.host_port)
}

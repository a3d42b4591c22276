//! The tables of this node and the way they reach the kernel.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};

use crate::conntrack::{self, Stale};
use crate::error::Error;
use crate::model::{ObjectKey, Protocol};
use crate::netlink::{NetlinkError, Socket};
use crate::nft::{Table, Value, delete_table, purge, table_exists};
use crate::policy::{PolicyChange, PolicyState};
use crate::services::compile::{FrontKey, Place};
use crate::services::keys::{HAIRPIN, HOST_PORTS, Key, UNTRACKED};
use crate::services::layout;
use crate::services::proxy::{Entry, Proxy, ProxyChange};
use crate::{Config, Family, HostPort, ProxyMode, iptables};

/// The port that DNS clients ask at.
const DNS_PORT: u16 = 53;

/// The tables, what they are made from, and the socket to the kernel.
pub(crate) struct Rules {
    socket: Socket,
    config: Config,
    mode: ProxyMode,
    dns: Vec<IpAddr>,
    tables: BTreeMap<Family, Table>,
    proxy: Proxy,
    policy: PolicyState,
    /// Addresses of pods that went since the last commit.
    gone: HashSet<IpAddr>,
    /// What the kernel has may differ in any way: replace it whole.
    replace: bool,
    /// The tables are those of the daemon before us: until the cluster's state is known only elements of pods are changed in them, so that Services go
    /// on while we start.
    adopted: bool,
}

impl Rules {
    /// Takes over the tables that are there, or makes them.
    pub(crate) fn new(config: &Config, mut socket: Socket) -> Result<Self, Error> {
        let families: BTreeSet<Family> = config.families().collect();
        let tables = families.iter().map(|family| (*family, layout::table(config, *family))).collect();
        let mode = config.proxy_mode.unwrap_or_else(|| {
            let has = families.iter().all(|family| table_exists(&mut socket, *family, &config.table).is_ok());
            if has { ProxyMode::Nftables } else { ProxyMode::Iptables }
        });
        let mut found = true;
        for family in &families {
            found &= match mode {
                ProxyMode::Nftables => table_exists(&mut socket, *family, &config.table)?,
                ProxyMode::Iptables => iptables::is_there(*family)?,
            };
        }
        let own = if config.dns_port == DNS_PORT { config.dns_ips.clone() } else { Vec::new() };
        let mut this = Self {
            socket,
            config: config.clone(),
            mode,
            dns: own.clone(),
            tables,
            proxy: Proxy::new(&config.node_name, own),
            policy: PolicyState::new(config),
            gone: HashSet::new(),
            replace: !found,
            adopted: found,
        };
        this.untrack_dns();
        if !found {
            this.commit()?;
        }
        this.adopt();
        Ok(this)
    }

    /// Takes the state of Services in; returns those that may have changed.
    pub(crate) fn update_services(&mut self, changes: Vec<ProxyChange>) -> BTreeSet<ObjectKey> {
        let touched = self.proxy.update(changes, &mut self.tables);
        self.untrack_dns();
        touched
    }

    /// Takes the state of policies, pods and namespaces in.
    pub(crate) fn update_policy(&mut self, changes: Vec<PolicyChange>) {
        self.policy.update(changes, &mut self.tables);
    }

    /// The health check node port of a Service, and how many endpoints this node has.
    pub(crate) fn health(&self, key: &ObjectKey) -> Option<(u16, usize)> {
        self.proxy.health(key)
    }

    /// What is known of a Service.
    pub(crate) fn service(&self, key: &ObjectKey) -> Option<&Entry> {
        self.proxy.entry(key)
    }

    /// The pods so far are those that the tables of an earlier daemon have already.
    pub(crate) fn adopt(&mut self) {
        if self.adopted {
            self.tables.values_mut().for_each(Table::committed);
        }
    }

    /// The state of the cluster is known as a whole from now on: the next commit replaces what an earlier daemon left.
    pub(crate) fn known(&mut self) {
        if std::mem::replace(&mut self.adopted, false) {
            self.replace = true;
            self.tables.values_mut().for_each(Table::replace);
        }
    }

    /// Our DNS answers without connection tracking, unless a Service with endpoints stands at its address.
    fn untrack_dns(&mut self) {
        for address in &self.dns {
            let front = FrontKey { place: Place::Services, address: *address, protocol: Protocol::Udp, port: DNS_PORT };
            if let Some(table) = self.tables.get_mut(&Family::of(*address)) {
                let element = Key::default().front(*address, Protocol::Udp, DNS_PORT).element();
                table.set_element(UNTRACKED, element, (!self.proxy.has_front(&front)).then_some(Value::None));
            }
        }
    }

    /// Adds or removes what a local pod needs.
    pub(crate) fn set_pod(&mut self, ips: &[IpAddr], host_ports: &[HostPort], present: bool) {
        if !present {
            self.gone.extend(ips);
        }
        for address in ips {
            let Some(table) = self.tables.get_mut(&Family::of(*address)) else { continue };
            let element = Key::default().address(*address).address(*address).element();
            table.set_element(HAIRPIN, element, present.then_some(Value::None));
            let family = table.family;
            for port in host_ports.iter().filter(|port| applies(port, family)) {
                let host = port.host_ip.filter(|host| !host.is_unspecified()).unwrap_or(family.unspecified());
                let element = Key::default().front(host, port.protocol, port.host_port).element();
                let target = Key::default().endpoint(SocketAddr::new(*address, port.container_port)).data();
                table.set_element(HOST_PORTS, element, present.then_some(target));
            }
        }
    }

    /// Brings the kernel in step. A refused change (somebody else emptied our table) is made good by replacing the table whole.
    pub(crate) fn commit(&mut self) -> Result<(), Error> {
        match self.mode {
            ProxyMode::Nftables => self.commit_tables()?,
            ProxyMode::Iptables => self.commit_chains()?,
        }
        // Now no rule remembers these endpoints anew.
        let forgotten = self.proxy.take_forgotten();
        let in_maps = forgotten.iter().filter(|_| self.mode == ProxyMode::Nftables);
        let maps: BTreeSet<(Family, &'static str)> = in_maps.map(|gone| (gone.family, gone.map)).collect();
        for (family, map) in maps {
            purge(&mut self.socket, family, &self.config.table, map, |key, value| {
                forgotten.iter().any(|gone| {
                    gone.family == family && gone.map == map && key.ends_with(&gone.front) && value == &*gone.endpoint
                })
            })?;
        }
        let stale = Stale { pods: std::mem::take(&mut self.gone), fronts: self.proxy.take_moved() };
        // Nothing was there before the first state: connections are those of an earlier daemon, which knew the same Services.
        if !stale.is_empty() && !self.adopted {
            for family in self.tables.keys() {
                conntrack::forget(&mut self.socket, *family, &stale)?;
            }
        }
        Ok(())
    }

    /// All chains anew, unless they are those of an earlier daemon and the cluster's state is not known yet.
    fn commit_chains(&mut self) -> Result<(), Error> {
        if self.adopted {
            return Ok(());
        }
        for table in self.tables.values_mut() {
            iptables::apply(table.family, &iptables::compile(&self.config, &self.proxy, table))?;
            table.committed();
        }
        Ok(())
    }

    fn commit_tables(&mut self) -> Result<(), NetlinkError> {
        if !self.replace {
            let result = self.tables.values_mut().try_for_each(|table| {
                table.change().commit(&mut self.socket)?;
                table.committed();
                Ok::<(), NetlinkError>(())
            });
            match result {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!(%error, "a rule change was refused; replacing the table"),
            }
        }
        self.replace = true;
        for table in self.tables.values_mut() {
            table.replace();
            table.replacement().commit(&mut self.socket)?;
            table.committed();
        }
        self.replace = false;
        Ok(())
    }

    /// Removes the tables, those of the other mode and family too, which an earlier daemon may have had.
    pub(crate) fn destroy(&mut self) -> Result<(), Error> {
        self.replace = true;
        for family in [Family::V4, Family::V6] {
            match iptables::remove(family) {
                // A host that never used iptables may lack its programs or the kernel's part.
                Err(error) if self.mode == ProxyMode::Nftables => tracing::debug!(%error, "no iptables to clean"),
                result => result?,
            }
            if matches!(table_exists(&mut self.socket, family, &self.config.table), Ok(true)) {
                delete_table(&mut self.socket, family, &self.config.table)?;
            }
        }
        Ok(())
    }
}

/// Whether a host port is reached by addresses of a family.
fn applies(port: &HostPort, family: Family) -> bool {
    port.host_ip.is_none_or(|address| Family::of(address) == family)
}

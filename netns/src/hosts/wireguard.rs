//! WireGuard between nodes: this node's key, its link, and the other nodes as peers, each with its pod ranges behind it.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::Config;
use crate::error::{Error, PathExt};
use crate::netlink::wireguard::{Key, WireGuard};
use crate::netlink::{Batch, NetlinkError, Socket, route};

/// What WireGuard puts around a packet: IPv6 and UDP headers, its own header, and the seal.
pub(super) const OVERHEAD: u32 = 80;

/// This node's key. The private half is never shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct WireGuardKey {
    private: Key,
    public: Key,
}

impl fmt::Debug for WireGuardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireGuardKey").field("public", &self.public).finish_non_exhaustive()
    }
}

impl WireGuardKey {
    /// The key in a file of mode 0600, which is made if it is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let private = match fs::read(path) {
            Ok(bytes) => bytes.try_into().map_err(|_| Error::WireGuardKey { path: path.into() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
            Err(error) => return Err(error).at("read", path),
        };
        Ok(Self { private, public: public_of(&private)? })
    }

    /// What the other nodes are told.
    pub fn public(&self) -> [u8; 32] {
        self.public
    }
}

/// A new key, whole in its file or not there.
fn make(path: &Path) -> Result<Key, Error> {
    let mut key = Key::default();
    let random = Path::new("/dev/urandom");
    fs::File::open(random).and_then(|mut file| file.read_exact(&mut key)).at("read", random)?;
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result.at("remove", &temporary)?,
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
    let written = file.and_then(|mut file| file.write_all(&key).and_then(|()| file.sync_all()));
    written.at("write", &temporary)?;
    fs::rename(&temporary, path).at("write", path)?;
    Ok(key)
}

/// The public half, which the kernel computes: a device in a network namespace of a thread that ends is given the private one.
fn public_of(private: &Key) -> Result<Key, Error> {
    const NAME: &str = "key0";
    thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Unshare { errno })?;
            let mut socket = Socket::route()?;
            let index = link(&mut socket, NAME, 1420)?;
            let mut kernel = WireGuard::open().map_err(|source| Error::NoWireGuard { source })?;
            kernel.set_key(index, private, 0)?;
            Ok(kernel.device(index)?.public)
        };
        let thread = thread::Builder::new().name("wireguard-key".into()).spawn_scoped(scope, work);
        thread.map_err(|source| Error::Thread { source })?.join().expect("the thread does not panic")
    })
}

/// The index of the link, which is made if it is missing.
fn link(socket: &mut Socket, name: &str, mtu: u32) -> Result<u32, Error> {
    super::ensure(socket, name, |batch| route::add_wireguard(batch, name, mtu)).map_err(|error| match error {
        Error::Netlink(source) if source.is(Errno::EOPNOTSUPP) => Error::NoWireGuard { source },
        error => error,
    })
}

/// The node's WireGuard link.
pub(super) struct Tunnel {
    kernel: WireGuard,
    pub(super) link: u32,
    port: u16,
    /// Peers of the daemon before us, of which some nodes may be gone; until the first nodes are known.
    inherited: Vec<Key>,
}

impl Tunnel {
    /// Makes the link, or takes over the one that is there.
    pub(super) fn prepare(
        config: &Config,
        key: &WireGuardKey,
        port: u16,
        mtu: u32,
        socket: &mut Socket,
    ) -> Result<Self, Error> {
        let link = link(socket, &name(config), mtu)?;
        let mut kernel = WireGuard::open().map_err(|source| Error::NoWireGuard { source })?;
        kernel.set_key(link, &key.private, port)?;
        let mut batch = Batch::default();
        route::set_up(&mut batch, link);
        for address in config.families().filter_map(|family| config.gateway(family)) {
            route::add_address(&mut batch, link, address);
        }
        socket.execute(&batch)?;
        let inherited = kernel.device(link)?.peers;
        Ok(Self { kernel, link, port, inherited })
    }

    /// Tells the kernel of a node, or that what it was told before holds no longer.
    pub(super) fn change(
        &mut self,
        old: Option<Key>,
        new: Option<(Key, IpAddr)>,
        behind: &[IpNet],
    ) -> Result<(), NetlinkError> {
        if let Some(old) = old.filter(|old| new.is_none_or(|(new, _)| new != *old)) {
            self.kernel.remove_peer(self.link, &old)?;
        }
        let Some((key, address)) = new else { return Ok(()) };
        self.kernel.set_peer(self.link, &key, SocketAddr::new(address, self.port), behind)
    }

    /// The nodes are known: peers from before that are none of them go.
    pub(super) fn settle(&mut self, known: impl Fn(&Key) -> bool) -> Result<(), NetlinkError> {
        let gone: Vec<Key> = std::mem::take(&mut self.inherited).into_iter().filter(|key| !known(key)).collect();
        gone.iter().try_for_each(|key| self.kernel.remove_peer(self.link, key))
    }
}

/// The link's name.
pub(super) fn name(config: &Config) -> String {
    super::suffixed(config, "wg")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wireguard.key");
        let key = make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&path).unwrap(), key);
        let shown = format!("{:?}", WireGuardKey { private: key, public: [1; 32] });
        assert!(!shown.contains(&format!("{key:?}")) && shown.contains("public"), "{shown}");
        fs::write(&path, "short").unwrap();
        let error = WireGuardKey::open(&path).unwrap_err().to_string();
        assert!(error.contains("is no WireGuard key of 32 bytes"), "{error}");
    }

    #[test]
    fn a_kernel_without_wireguard_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        // On a kernel that has it there is a key, and another start finds the same.
        let open = || WireGuardKey::open(&folder.path().join("wireguard.key"));
        match open() {
            Ok(key) => assert_eq!(open().unwrap(), key),
            Err(error) => {
                assert!(error.to_string().contains("load the module wireguard, or choose another"), "{error}")
            }
        }
    }
}

//! What can go wrong, one variant a step.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::netlink::NetlinkError;
use crate::pods::IpamError;
use crate::{Family, HostPort};

/// A step of the network failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {step} {}: {source}", path.display())]
    Path { step: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot make a network namespace: {} (CAP_SYS_ADMIN is needed)", errno.desc())]
    Unshare { errno: Errno },
    #[error("cannot start a thread: {source}")]
    Thread { source: io::Error },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Ipam(#[from] IpamError),
    #[error("the node has no pod range of family {family:?}")]
    NoRange { family: Family },
    #[error("pod UID {uid:?} is no file name: letters, digits, '-', '_' and '.', at most 128")]
    Uid { uid: String },
    #[error("host port {}/{:?} is taken by pod {owner}", port.host_port, port.protocol)]
    HostPortTaken { port: HostPort, owner: String },
    #[error("a pod's link has no carrier after {waited:?}")]
    NoCarrier { waited: std::time::Duration },
    #[error("CNI plugin {plugin} ({verb}): {message}")]
    Cni { verb: String, plugin: String, message: String },
    #[error("this kernel has no WireGuard ({source}): load the module wireguard, or choose another --network-backend")]
    NoWireGuard { source: NetlinkError },
    #[error("{} is no WireGuard key of 32 bytes: remove it, and a new one is made", path.display())]
    WireGuardKey { path: PathBuf },
    #[error("run {program}: {source}")]
    Program { program: String, source: io::Error },
    #[error("cannot answer DNS at {address}: {source}")]
    Dns { address: std::net::SocketAddr, source: io::Error },
}

/// Adds step and path to an IO result.
pub(crate) trait PathExt<T> {
    fn at(self, step: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> PathExt<T> for io::Result<T> {
    fn at(self, step: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Path { step, path: path.to_owned(), source })
    }
}

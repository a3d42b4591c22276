//! What the server asks of this host: folders, addresses, names, limits.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// An address that no packet is sent to: asking for the route there names the uplink (RFC 5737).
const SOMEWHERE_ELSE: ([u8; 4], u16) = ([192, 0, 2, 1], 9);

/// Makes a folder and its parents, and checks that it can be written.
pub(crate) fn prepare_folder(folder: &Path, mode: u32) -> anyhow::Result<()> {
    let advice = || format!("make the folder {}: choose another, or check who owns its parent", folder.display());
    let existed = folder.exists();
    fs::DirBuilder::new().recursive(true).mode(mode).create(folder).with_context(advice)?;
    if !existed {
        fs::set_permissions(folder, fs::Permissions::from_mode(mode)).with_context(advice)?;
    }
    tempfile::tempfile_in(folder)
        .map(drop)
        .with_context(|| format!("write into the folder {}: it needs room and rights", folder.display()))
}

/// The address of this host that the default route leaves from; loopback without one.
pub(super) fn uplink_address(bound: IpAddr) -> anyhow::Result<IpAddr> {
    if !bound.is_unspecified() {
        return Ok(bound);
    }
    let socket = UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0))).context("find this host's address")?;
    let address = socket.connect(SocketAddr::from(SOMEWHERE_ELSE)).and_then(|()| socket.local_addr());
    Ok(address.map_or(IpAddr::from([127, 0, 0, 1]), |address| address.ip()))
}

/// The name of this host's node: as given, or the host's own in lower case.
pub(crate) fn node_name(given: Option<&str>) -> anyhow::Result<String> {
    if let Some(name) = given {
        return Ok(name.to_owned());
    }
    let name = nix::unistd::gethostname().context("ask for the host's name")?;
    let name = name.to_str().map(str::to_lowercase).unwrap_or_default();
    if name.is_empty() {
        bail!("the host has no name that a node could take: give one with --node-name");
    }
    Ok(name)
}

/// First and last of a range such as `30000-32767`.
pub(super) fn port_range(text: &str) -> anyhow::Result<(u16, u16)> {
    text.split_once('-')
        .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)))
        .filter(|(first, last)| first <= last && *first > 0)
        .ok_or_else(|| anyhow!("--service-node-port-range {text} is not of the form FIRST-LAST"))
}

/// Every watch, stream and container log is a descriptor, so take as many as the host allows.
pub(crate) fn raise_open_files() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")
}

/// Tells systemd that the server is ready (sd_notify(3)), where systemd asked to be told.
pub(super) fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", &path));
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd could not be told that the server is ready");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_have_two_ends_in_order() {
        assert_eq!(port_range("30000-32767").expect("a range"), (30000, 32767));
        for text in ["30000", "2-1", "a-b", "0-5", "1-70000"] {
            assert!(port_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = prepare_folder(&file.path().join("below"), 0o700).expect_err("a file is no folder");
        assert!(format!("{error:#}").contains(file.path().to_str().expect("UTF-8")), "{error:#}");
    }
}

//! What a daemon asks of its host: folders, addresses, names, limits.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
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
pub(crate) fn uplink_address(bound: IpAddr) -> anyhow::Result<IpAddr> {
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

/// Addresses of this host's node: as given, or the one that the default route leaves from.
pub(crate) fn node_ips(given: &[IpAddr], bound: IpAddr) -> anyhow::Result<Vec<IpAddr>> {
    if given.is_empty() { Ok(vec![uplink_address(bound)?]) } else { Ok(given.to_vec()) }
}

/// Addresses of the cluster's DNS: as given, or the tenth of each range of services.
pub(crate) fn cluster_dns(given: &[IpAddr], service_cidr: &str) -> anyhow::Result<Vec<IpAddr>> {
    const PLACE: u8 = 10;
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    let tenth = |text: &str| -> anyhow::Result<IpAddr> {
        let range: IpNet = text.trim().parse().with_context(|| format!("--service-cidr {text} is no address range"))?;
        let address = match range.network() {
            IpAddr::V4(network) => IpAddr::V4((u32::from(network).saturating_add(PLACE.into())).into()),
            IpAddr::V6(network) => IpAddr::V6((u128::from(network).saturating_add(PLACE.into())).into()),
        };
        if range.contains(&address) {
            Ok(address)
        } else {
            bail!("--service-cidr {text} is too small: it has no tenth address for the cluster's DNS (--cluster-dns)")
        }
    };
    service_cidr.split(',').map(tenth).collect()
}

/// Labels such as `disk=ssd`.
pub(crate) fn labels(given: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let pair = |text: &String| match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(anyhow!("--node-label {text} is not of the form KEY=VALUE")),
    };
    given.iter().map(pair).collect()
}

/// Taints such as `gpu=true:NoSchedule`: key, value, effect.
pub(crate) fn taints(given: &[String]) -> anyhow::Result<Vec<(String, String, String)>> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    let taint = |text: &String| {
        let (key_value, effect) = text.rsplit_once(':')?;
        let (key, value) = key_value.split_once('=').unwrap_or((key_value, ""));
        let good = !key.is_empty() && EFFECTS.contains(&effect);
        good.then(|| (key.to_owned(), value.to_owned(), effect.to_owned()))
    };
    given
        .iter()
        .map(|text| taint(text).ok_or_else(|| anyhow!("--node-taint {text} is not of the form KEY=VALUE:EFFECT")))
        .collect()
}

/// First and last of a range such as `30000-32767`.
pub(crate) fn port_range(text: &str) -> anyhow::Result<(u16, u16)> {
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
pub(crate) fn notify_ready() {
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
    fn labels_and_taints_are_taken_apart() {
        assert_eq!(labels(&["a/b=c=d".into()]).expect("a label")["a/b"], "c=d");
        assert!(labels(&["=x".into()]).is_err() && labels(&["x".into()]).is_err());
        let text = |parts: [&str; 3]| parts.map(str::to_owned);
        let taint = |given: &str| taints(&[given.into()]).ok().map(|mut all| all.remove(0));
        assert_eq!(taint("a=b:NoExecute").map(|(k, v, e)| [k, v, e]), Some(text(["a", "b", "NoExecute"])));
        assert_eq!(taint("a:NoSchedule").map(|(k, v, e)| [k, v, e]), Some(text(["a", "", "NoSchedule"])));
        assert!([":NoSchedule", "a=b", "a=b:Never"].into_iter().all(|bad| taint(bad).is_none()));
    }

    #[test]
    fn dns_is_the_tenth_service() {
        let dns = |cidr: &str| cluster_dns(&[], cidr).map(|all| all.iter().map(IpAddr::to_string).collect::<Vec<_>>());
        assert_eq!(dns("10.43.0.0/16,fd00:43::/112").expect("addresses"), ["10.43.0.10", "fd00:43::a"]);
        assert!(dns("10.43.0.0/29").is_err());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = prepare_folder(&file.path().join("below"), 0o700).expect_err("a file is no folder");
        assert!(format!("{error:#}").contains(file.path().to_str().expect("UTF-8")), "{error:#}");
    }
}

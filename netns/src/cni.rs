//! Pods' networks made by CNI plugins (CNI specification 1.1.0), for hosts whose administrator has configured some.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::HostPort;
use crate::error::{Error, PathExt};
use crate::pods::{PodKey, PodNet};
use crate::program;

/// Name of the pod's link.
const LINK: &str = "eth0";
/// The first version with CHECK.
const CHECK_SINCE: (u32, u32) = (0, 4);

/// Where plugins and their configuration are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// Folder of configurations; the first in the order of names counts.
    pub conf_dir: PathBuf,
    /// Folders of plugins, in the order in which they are searched.
    pub bin_dirs: Vec<PathBuf>,
}

/// A list of plugins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct List {
    #[serde(default)]
    cni_version: String,
    name: String,
    #[serde(default)]
    disable_check: bool,
    plugins: Vec<Map<String, Value>>,
}

/// The plugins of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cni {
    bin_dirs: Vec<PathBuf>,
    list: List,
}

/// What is on record of a pod's network: the plugins that made it, whatever the configuration is now, and what they said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    by: Cni,
    result: Value,
}

/// A pod as plugins are told of it.
pub(crate) struct Subject<'a> {
    pub(crate) key: &'a PodKey,
    pub(crate) net: &'a PodNet,
    /// The pinned network namespace.
    pub(crate) namespace: &'a Path,
}

impl Cni {
    /// Reads the host's configuration.
    pub(crate) fn load(config: &CniConfig) -> Result<Self, Error> {
        let folder = &config.conf_dir;
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).at("list", folder)? {
            let path = entry.at("list", folder)?.path();
            if path.extension().is_some_and(|kind| kind == "conflist" || kind == "conf" || kind == "json") {
                files.push(path);
            }
        }
        let none = || io::Error::new(io::ErrorKind::NotFound, "there is no .conflist or .conf file");
        let path = files.into_iter().min().ok_or_else(none).at("find a CNI configuration in", folder)?;
        let mut value: Value =
            serde_json::from_slice(&fs::read(&path).at("read", &path)?).map_err(io::Error::other).at("read", &path)?;
        if value.get("plugins").is_none() {
            // A configuration of one plugin.
            value = json!({"cniVersion": value["cniVersion"], "name": value["name"], "plugins": [value]});
        }
        let list = serde_json::from_value(value).map_err(io::Error::other).at("read", &path)?;
        Ok(Self { bin_dirs: config.bin_dirs.clone(), list })
    }

    /// Whether plugins see to host ports themselves.
    pub(crate) fn has_host_ports(&self) -> bool {
        self.list.plugins.iter().any(|plugin| is_able(plugin, "portMappings"))
    }

    /// Makes a pod's network; what was half made is taken away.
    pub(crate) fn add(&self, pod: &Subject<'_>) -> Result<Made, Error> {
        let mut result = None;
        for plugin in &self.list.plugins {
            match self.run("ADD", plugin, pod, result.as_ref()) {
                Ok(output) => result = Some(output),
                Err(error) => {
                    let made = Made { by: self.clone(), result: result.unwrap_or_default() };
                    if let Err(error) = made.delete(pod) {
                        tracing::warn!(uid = pod.key.uid, %error, "what CNI plugins began is not taken away");
                    }
                    return Err(error);
                }
            }
        }
        Ok(Made { by: self.clone(), result: result.unwrap_or_default() })
    }

    fn run(
        &self,
        verb: &str,
        plugin: &Map<String, Value>,
        pod: &Subject<'_>,
        before: Option<&Value>,
    ) -> Result<Value, Error> {
        let name = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
        let failed = |message: String| Error::Cni { verb: verb.to_owned(), plugin: name.to_owned(), message };
        // A name with a slash would leave the folders of plugins.
        let file = Some(name).filter(|name| !name.is_empty() && !name.contains('/'));
        let file =
            file.and_then(|name| self.bin_dirs.iter().map(|folder| folder.join(name)).find(|file| file.exists()));
        let file = file.ok_or_else(|| failed(format!("there is no such program in {:?}", self.bin_dirs)))?;
        let mut config = plugin.clone();
        config.insert("name".into(), self.list.name.clone().into());
        config.insert("cniVersion".into(), self.list.cni_version.clone().into());
        let runtime = capabilities(plugin, pod.net);
        if !runtime.is_empty() {
            config.insert("runtimeConfig".into(), runtime.into());
        }
        config.remove("capabilities");
        config.extend(before.map(|result| ("prevResult".into(), result.clone())));
        let folders = std::env::join_paths(&self.bin_dirs).map_err(|error| failed(error.to_string()))?;
        let key = pod.key;
        let mut command = Command::new(file);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &key.uid)
            .env("CNI_NETNS", pod.namespace)
            .env("CNI_IFNAME", LINK)
            .env("CNI_PATH", folders)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                    key.namespace, key.name, key.uid, key.uid
                ),
            );
        let output = program::run(&mut command, Value::Object(config).to_string().as_bytes())
            .map_err(|error| failed(error.to_string()))?;
        let said = serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default();
        if !output.status.success() {
            let details = [&said["msg"], &said["details"]].map(|text| text.as_str().unwrap_or_default());
            let log = String::from_utf8_lossy(&output.stderr);
            return Err(failed(
                format!("{}: {} {} {}", output.status, details[0], details[1], log.trim()).trim().into(),
            ));
        }
        Ok(said)
    }
}

impl Made {
    /// Asks the plugins whether a pod's network is as they made it. The first makes the link, without which the pod is cut off; what others
    /// find amiss is reported alone, as some ask for rules that they never make (portmap 1.1 for those of a family that the pod lacks).
    pub(crate) fn check(&self, pod: &Subject<'_>) -> Result<(), Error> {
        let mut version = self.by.list.cni_version.split('.').map_while(|part| part.parse().ok());
        let version: (u32, u32) = (version.next().unwrap_or_default(), version.next().unwrap_or_default());
        if self.by.list.disable_check || version < CHECK_SINCE {
            return Ok(());
        }
        for (place, plugin) in self.by.list.plugins.iter().enumerate() {
            match self.by.run("CHECK", plugin, pod, Some(&self.result)) {
                Err(error) if place > 0 => {
                    tracing::warn!(uid = pod.key.uid, %error, "a pod's network is not as it was made")
                }
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// Takes a pod's network away; what is not there is no error.
    pub(crate) fn delete(&self, pod: &Subject<'_>) -> Result<(), Error> {
        let before = (!self.result.is_null()).then_some(&self.result);
        let plugins = self.by.list.plugins.iter().rev();
        plugins.map(|plugin| self.by.run("DEL", plugin, pod, before).map(drop)).fold(Ok(()), Result::and)
    }

    /// The pod's addresses, the preferred first.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let inside = |address: &&Value| {
            // Links on the host's side have no sandbox.
            let link =
                address["interface"].as_u64().and_then(|n| self.result["interfaces"].get(usize::try_from(n).ok()?));
            link.is_none_or(|link| link["sandbox"].as_str().is_some_and(|sandbox| !sandbox.is_empty()))
        };
        let all = self.result["ips"].as_array().into_iter().flatten().filter(inside);
        all.filter_map(|address| address["address"].as_str()?.parse::<IpNet>().ok()).map(|net| net.addr()).collect()
    }
}

fn is_able(plugin: &Map<String, Value>, capability: &str) -> bool {
    plugin.get("capabilities").is_some_and(|able| able[capability] == true)
}

/// What a plugin wants to know of the pod (conventions of the CNI project).
fn capabilities(plugin: &Map<String, Value>, net: &PodNet) -> Map<String, Value> {
    let mut runtime = Map::new();
    if is_able(plugin, "portMappings") && !net.host_ports.is_empty() {
        let port = |port: &HostPort| {
            json!({"hostPort": port.host_port, "containerPort": port.container_port,
                "protocol": format!("{:?}", port.protocol).to_lowercase(),
                "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default()})
        };
        runtime.insert("portMappings".into(), net.host_ports.iter().map(port).collect());
    }
    let rates = [("ingress", net.ingress_bandwidth_bits), ("egress", net.egress_bandwidth_bits)];
    if is_able(plugin, "bandwidth") && rates.iter().any(|(_, rate)| rate.is_some()) {
        let known = rates.into_iter().filter_map(|(side, rate)| Some((side, rate?)));
        let members = known
            .flat_map(|(side, rate)| [(format!("{side}Rate"), rate.into()), (format!("{side}Burst"), rate.into())]);
        runtime.insert("bandwidth".into(), Value::Object(members.collect()));
    }
    runtime
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_inside_of_the_pod() {
        let result = json!({"interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/x"}],
            "ips": [{"address": "10.1.0.5/16", "interface": 1}, {"address": "10.1.0.1/16", "interface": 0}, {"address": "fd00::5/64"}]});
        let list = List { cni_version: "1.0.0".into(), name: "n".into(), disable_check: false, plugins: Vec::new() };
        let made = Made { by: Cni { bin_dirs: Vec::new(), list }, result };
        assert_eq!(made.addresses(), ["10.1.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
    }

    #[test]
    fn the_first_configuration_in_order_counts() {
        let folder = tempfile::tempdir().unwrap();
        let config = CniConfig { conf_dir: folder.path().into(), bin_dirs: Vec::new() };
        assert!(Cni::load(&config).is_err());
        fs::write(folder.path().join("20-b.conflist"), r#"{"cniVersion":"1.0.0","name":"b","plugins":[]}"#).unwrap();
        fs::write(folder.path().join("10-a.conf"), r#"{"cniVersion":"0.3.1","name":"a","type":"bridge"}"#).unwrap();
        fs::write(folder.path().join("00.txt"), "").unwrap();
        let list = Cni::load(&config).unwrap().list;
        assert_eq!((list.name.as_str(), list.plugins.len()), ("a", 1));
    }
}

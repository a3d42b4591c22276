//! The Container Device Interface: files of vendors say what a container needs for a device that is asked for by name, such
//! as `vendor.com/class=name`. Source: the CDI specification 1.1.
//!
//! Files are read when a container is made, so what a vendor writes counts at once. Of two folders the later one wins; within
//! one a device that two files define is nobody's.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Bytes of one file, and files of one folder.
const MAX_FILE_BYTES: u64 = 16 << 20;
const MAX_FILES: usize = 1024;

/// Why a container does not get a device.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// A name that is not `vendor/class=device`.
    #[error("{0:?} is no name of a CDI device (vendor/class=device)")]
    Name(String),
    /// No file defines the device, or two of one folder do.
    #[error("unresolvable CDI device {name}: {reason}")]
    Unresolvable {
        /// The device.
        name: String,
        /// What the folders hold instead.
        reason: String,
    },
    /// A folder that cannot be read.
    #[error("read CDI files in {}: {source}", path.display())]
    Read {
        /// The folder.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// A device node that the host lacks.
    #[error("device {name} needs {}, which is no device of this host", path.display())]
    NoNode {
        /// The CDI device.
        name: String,
        /// The missing node.
        path: PathBuf,
    },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    additional_gids: Vec<u32>,
    intel_rdt: Option<Value>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: PathBuf,
    host_path: Option<PathBuf>,
    r#type: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: String,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Where a device is defined.
enum Found {
    Once(Box<(File, Device)>),
    Twice(PathBuf),
}

/// Changes an OCI specification as the devices of these names want it, in their order.
///
/// # Errors
/// When a device is not defined, or its node is not there: a container without what it asked for must not start.
pub fn apply(spec: &mut Value, folders: &[PathBuf], names: &[String]) -> Result<(), CdiError> {
    if names.is_empty() {
        return Ok(());
    }
    let known = read(folders)?;
    let mut whole: Vec<String> = Vec::new();
    for name in names {
        let (kind, _) =
            name.split_once('=').filter(|(kind, _)| kind.contains('/')).ok_or_else(|| CdiError::Name(name.clone()))?;
        let unresolvable = |reason: String| CdiError::Unresolvable { name: name.clone(), reason };
        match known.get(name) {
            Some(Found::Once(found)) => {
                let (file, device) = &**found;
                // What a file says of all its devices comes once, before the first of them.
                if !whole.iter().any(|done| done == kind) {
                    edit(spec, name, &file.container_edits)?;
                    whole.push(kind.to_owned());
                }
                edit(spec, name, &device.container_edits)?;
            }
            Some(Found::Twice(folder)) => {
                return Err(unresolvable(format!("more than one file in {} defines it", folder.display())));
            }
            None => {
                let list: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
                return Err(unresolvable(format!("no file in {} defines it", list.join(" or "))));
            }
        }
    }
    Ok(())
}

fn read(folders: &[PathBuf]) -> Result<BTreeMap<String, Found>, CdiError> {
    let mut known = BTreeMap::new();
    for folder in folders {
        let mut here: BTreeMap<String, Found> = BTreeMap::new();
        let failed = |source| CdiError::Read { path: folder.clone(), source };
        for path in files(folder).map_err(failed)? {
            // One bad file must not take the devices of the others away.
            let file = match parse(&path) {
                Ok(file) => file,
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "this CDI file is left out");
                    continue;
                }
            };
            for device in file.devices.clone() {
                let name = format!("{}={}", file.kind, device.name);
                let found = match here.contains_key(&name) {
                    true => Found::Twice(folder.clone()),
                    false => Found::Once(Box::new((File { devices: Vec::new(), ..file.clone() }, device))),
                };
                here.insert(name, found);
            }
        }
        known.extend(here);
    }
    Ok(known)
}

fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "json" || end == "yaml"));
    paths.sort();
    if paths.len() > MAX_FILES { Err(io::Error::other(format!("more than {MAX_FILES} files"))) } else { Ok(paths) }
}

fn parse(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.len() > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    // JSON is YAML too.
    serde_saphyr::from_str(&fs::read_to_string(path)?).map_err(io::Error::other)
}

/// Changes the list at a path in a specification, which is made if there is none.
fn change(spec: &mut Value, path: &[&str], change: impl FnOnce(&mut Vec<Value>)) {
    let place = path.iter().fold(spec, |at, name| &mut at[*name]);
    if !place.is_array() {
        *place = json!([]);
    }
    if let Value::Array(list) = place {
        change(list);
    }
}

fn edit(spec: &mut Value, name: &str, edits: &Edits) -> Result<(), CdiError> {
    for entry in &edits.env {
        let key = entry.split('=').next().unwrap_or(entry);
        change(spec, &["process", "env"], |env| {
            env.retain(|held| held.as_str().and_then(|held| held.split('=').next()) != Some(key));
            env.push(json!(entry));
        });
    }
    for node in &edits.device_nodes {
        let host = node.host_path.as_ref().unwrap_or(&node.path);
        let numbers = match (&node.r#type, node.major, node.minor) {
            (Some(kind), Some(major), Some(minor)) => Some((kind.clone(), major, minor)),
            _ => super::spec::device_numbers(host).map(|(kind, major, minor)| (kind.to_owned(), major, minor)),
        };
        let missing = || CdiError::NoNode { name: name.to_owned(), path: host.clone() };
        let (kind, major, minor) = numbers.ok_or_else(missing)?;
        let mut device = json!({"path": node.path, "type": kind, "major": major, "minor": minor});
        for (field, number) in [("fileMode", node.file_mode), ("uid", node.uid), ("gid", node.gid)] {
            if let Some(number) = number {
                device[field] = json!(number);
            }
        }
        change(spec, &["linux", "devices"], |devices| {
            devices.retain(|held| held["path"] != device["path"]);
            devices.push(device);
        });
        let access = node.permissions.as_deref().unwrap_or("rwm");
        let rule = json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": access});
        change(spec, &["linux", "resources", "devices"], |rules| rules.push(rule));
    }
    for mount in &edits.mounts {
        let bind = ["rbind".to_owned(), "nosuid".to_owned(), "nodev".to_owned()];
        let options = if mount.options.is_empty() { &bind[..] } else { &mount.options };
        let kind = mount.r#type.as_deref().unwrap_or("bind");
        let entry = json!({
            "destination": mount.container_path, "source": mount.host_path, "type": kind, "options": options,
        });
        change(spec, &["mounts"], |mounts| {
            mounts.retain(|held| held["destination"] != entry["destination"]);
            mounts.push(entry);
        });
    }
    for hook in &edits.hooks {
        change(spec, &["hooks", &hook.hook_name], |hooks| hooks.push(json!(hook.rest)));
    }
    let groups = edits.additional_gids.iter().filter(|gid| **gid > 0).map(|gid| json!(gid));
    change(spec, &["process", "user", "additionalGids"], |held| held.extend(groups));
    if let Some(rdt) = &edits.intel_rdt {
        spec["linux"]["intelRdt"] = rdt.clone();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_bring_what_their_files_say() {
        let root = tempfile::tempdir().expect("a folder");
        let folders = ["etc", "run"].map(|name| root.path().join(name));
        folders.iter().for_each(|folder| fs::create_dir(folder).expect("a folder"));
        let write = |path: &str, text: &str| fs::write(root.path().join(path), text).expect("a file");
        write(
            "etc/a.yaml",
            "cdiVersion: 0.6.0\nkind: v.com/gpu\ncontainerEdits: {env: [ALL=1]}\ndevices:\n- name: a\n  containerEdits:\n    env: [A=old]\n- name: b\n",
        );
        write(
            "run/a.json",
            r#"{"cdiVersion": "0.6.0", "kind": "v.com/gpu", "devices": [{"name": "a", "containerEdits": {
                "env": ["A=new"], "additionalGids": [7], "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/null", "permissions": "r"}],
                "mounts": [{"hostPath": "/lib/gpu", "containerPath": "/lib/g", "options": ["ro", "bind"]}],
                "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook"]}]}}]}"#,
        );
        for twin in ["etc/t1.yaml", "etc/t2.yaml"] {
            write(twin, "cdiVersion: 0.6.0\nkind: v.com/twin\ndevices: [{name: x}]\n");
        }
        write("etc/broken.yaml", "kind: [");
        let apply = |names: &[&str]| {
            let mut spec = json!({"process": {"env": ["A=0", "P=1"], "user": {"uid": 0}}, "mounts": []});
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            super::apply(&mut spec, &folders, &names).map(|()| spec).map_err(|error| error.to_string())
        };
        let spec = apply(&["v.com/gpu=a"]).expect("applied");
        assert_eq!(spec["process"]["env"], json!(["P=1", "A=new"]), "the later folder wins");
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([7]));
        assert_eq!(spec["linux"]["devices"], json!([{"path": "/dev/gpu0", "type": "c", "major": 1, "minor": 3}]));
        assert_eq!(
            spec["linux"]["resources"]["devices"],
            json!([{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "r"}])
        );
        assert_eq!(spec["mounts"][0]["options"], json!(["ro", "bind"]));
        assert_eq!(spec["hooks"]["createContainer"], json!([{"path": "/bin/hook", "args": ["hook"]}]));
        assert_eq!(apply(&["v.com/gpu=b"]).expect("applied")["process"]["env"], json!(["A=0", "P=1", "ALL=1"]));
        for (name, wrong) in
            [("v.com/gpu=c", "no file in"), ("v.com/twin=x", "more than one file"), ("gpu", "no name of a CDI device")]
        {
            let error = apply(&[name]).expect_err(name);
            assert!(error.contains(wrong), "{error}");
        }
        assert!(apply(&[]).is_ok());
    }
}

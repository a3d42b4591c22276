//! Who has which devices, in the file and with the words of a kubelet.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use serde_json::{Value, json};

use super::{State, api};
use crate::names::Layout;

/// What one container has of one kind.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) pod: String,
    pub(super) container: String,
    pub(super) resource: String,
    pub(super) devices: BTreeSet<String>,
    /// What the plugin said that the container needs.
    pub(super) answer: api::ContainerAllocateResponse,
}

fn path(layout: &Layout) -> PathBuf {
    layout.device_plugins().join("kubelet_internal_checkpoint")
}

/// Devices without a known memory node are under this key.
const NO_NODE: &str = "-1";

/// Writes all down.
pub(super) fn save(layout: &Layout, state: &State) -> io::Result<()> {
    let entry = |entry: &Entry| {
        json!({
            "PodUID": entry.pod, "ContainerName": entry.container, "ResourceName": entry.resource,
            "DeviceIDs": {NO_NODE: entry.devices}, "AllocResp": STANDARD.encode(entry.answer.encode_to_vec()),
        })
    };
    let entries: Vec<Value> = state.entries.iter().map(entry).collect();
    let known: BTreeMap<_, _> =
        state.resources.iter().map(|(name, resource)| (name, resource.devices.keys().collect::<Vec<_>>())).collect();
    let text = json!({"Data": {"PodDeviceEntries": entries, "RegisteredDevices": known}}).to_string();
    let path = path(layout);
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, &path)
}

type Loaded = (Vec<Entry>, BTreeMap<String, BTreeSet<String>>);

/// Reads what was written; nothing if nothing was.
pub(super) fn load(layout: &Layout) -> io::Result<Loaded> {
    let path = path(layout);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::default()),
        Err(error) => return Err(error),
    };
    let wrong = |what: String| io::Error::other(format!("{}: {what} (remove it to start without)", path.display()));
    let value: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let ids = |list: &Value| -> BTreeSet<String> {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let entry = |value: &Value| {
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        let answer = STANDARD.decode(value["AllocResp"].as_str()?).ok()?;
        Some(Entry {
            pod: text("PodUID")?,
            container: text("ContainerName")?,
            resource: text("ResourceName")?,
            devices: value["DeviceIDs"].as_object()?.values().flat_map(ids).collect(),
            answer: api::ContainerAllocateResponse::decode(&answer[..]).ok()?,
        })
    };
    let data = &value["Data"];
    let entries = data["PodDeviceEntries"].as_array().into_iter().flatten();
    let entries = entries.map(|value| entry(value).ok_or_else(|| wrong("an entry is not whole".into())));
    let known = data["RegisteredDevices"].as_object().into_iter().flatten();
    Ok((entries.collect::<io::Result<_>>()?, known.map(|(name, list)| (name.clone(), ids(list))).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let root = tempfile::tempdir().expect("a folder");
        let layout = Layout::below(root.path());
        fs::create_dir_all(layout.device_plugins()).expect("a folder");
        assert_eq!(load(&layout).expect("nothing yet"), Loaded::default());
        let entry = Entry {
            pod: "u".into(),
            container: "c".into(),
            resource: "v.com/d".into(),
            devices: ["a".to_owned(), "b".to_owned()].into(),
            answer: api::ContainerAllocateResponse {
                envs: [("A".to_owned(), "1".to_owned())].into(),
                ..Default::default()
            },
        };
        let state = State { entries: vec![entry.clone()], ..State::default() };
        save(&layout, &state).expect("saved");
        assert_eq!(load(&layout).expect("loaded").0, [entry]);
        fs::write(path(&layout), "{\"Data\": {\"PodDeviceEntries\": [{}]}}").expect("a file");
        assert!(load(&layout).expect_err("broken").to_string().contains("not whole"));
    }
}

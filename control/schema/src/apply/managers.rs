//! `metadata.managedFields`: reading, writing, order, the bound on updaters.

use serde_json::{Map, Value, json};

use super::set::Set;
use crate::gofmt;

/// Most managers by update that are kept apart; older ones are put together.
pub const MAX_UPDATE_MANAGERS: usize = 10;
/// Name under which old updaters are put together.
const ANCIENT: &str = "ancient-changes";

/// One entry of managed fields.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) manager: String,
    pub(super) applied: bool,
    pub(super) api_version: String,
    pub(super) subresource: String,
    /// RFC 3339, seconds.
    pub(super) time: Option<String>,
    pub(super) set: Set,
}

impl Entry {
    /// Whether both name the same manager: appliers whatever their version, updaters version by version.
    pub(super) fn same(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.applied == other.applied
            && self.subresource == other.subresource
            && (self.applied || self.api_version == other.api_version)
    }

    /// As conflicts name it: `"kubectl" with subresource "status" using v1`.
    pub(super) fn printed(&self) -> String {
        let mut text = gofmt::quote(&self.manager);
        if !self.subresource.is_empty() {
            text.push_str(" with subresource ");
            gofmt::quote_into(&mut text, &self.subresource);
        }
        if !self.applied {
            text.push_str(" using ");
            text.push_str(&self.api_version);
        }
        text
    }
}

/// Reads managed fields; the error says which entry is wrong.
pub(super) fn read(list: &Value) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    for (i, value) in list.as_array().into_iter().flatten().enumerate() {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
        let applied = match text("operation").as_str() {
            "Apply" => true,
            "Update" => false,
            _ => return Err("operation must be `Apply` or `Update`".into()),
        };
        if text("apiVersion").is_empty() {
            return Err("apiVersion must not be empty".into());
        }
        match text("fieldsType").as_str() {
            "FieldsV1" => {}
            "" => return Err(format!("missing fieldsType in managed fields entry {i}")),
            other => {
                return Err(format!("invalid fieldsType {} in managed fields entry {i}", gofmt::quote(other)));
            }
        }
        let fields = value.get("fieldsV1").cloned().unwrap_or_else(|| Value::Object(Map::new()));
        let entry = Entry {
            manager: text("manager"),
            applied,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: value.get("time").and_then(Value::as_str).map(str::to_owned),
            set: Set::from_json(&fields).ok_or("error decoding set")?,
        };
        entries.retain(|other| !other.same(&entry));
        entries.push(entry);
    }
    Ok(entries)
}

/// Writes managed fields in the server's order; `None` when there are none.
pub(super) fn write(mut entries: Vec<Entry>) -> Option<Value> {
    if entries.is_empty() {
        return None;
    }
    entries.sort_by(|a, b| {
        let key = |entry: &Entry| {
            (
                !entry.applied,
                entry.time.clone(),
                entry.manager.clone(),
                entry.api_version.clone(),
                entry.subresource.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    let values = entries.into_iter().map(|entry| {
        let mut value = json!({
            "manager": entry.manager,
            "operation": if entry.applied { "Apply" } else { "Update" },
            "apiVersion": entry.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": entry.set.to_json(),
        });
        if let Some(time) = entry.time {
            value["time"] = time.into();
        }
        if !entry.subresource.is_empty() {
            value["subresource"] = entry.subresource.into();
        }
        value
    });
    Some(values.collect())
}

/// Puts the oldest updaters of each version together until at most [`MAX_UPDATE_MANAGERS`] are left.
pub(super) fn cap(entries: &mut Vec<Entry>) {
    let mut updaters: Vec<Entry> = entries.iter().filter(|entry| !entry.applied).cloned().collect();
    let mut count = updaters.len();
    if count <= MAX_UPDATE_MANAGERS {
        return;
    }
    updaters.sort_by(|a, b| (&a.time, &a.manager, &a.api_version).cmp(&(&b.time, &b.manager, &b.api_version)));
    // The oldest updater seen of each version: it is renamed when a second one joins it.
    let mut oldest: Vec<Entry> = Vec::new();
    for entry in updaters {
        if count <= MAX_UPDATE_MANAGERS {
            return;
        }
        let Some(first) = oldest.iter().find(|first| first.api_version == entry.api_version).cloned() else {
            oldest.push(entry);
            continue;
        };
        let bucket = Entry {
            manager: ANCIENT.into(),
            subresource: String::new(),
            time: None,
            set: Set::default(),
            ..entry.clone()
        };
        if !entries.iter().any(|other| other.same(&bucket))
            && let Some(other) = entries.iter_mut().find(|other| other.same(&first))
        {
            other.manager = ANCIENT.into();
            other.subresource = String::new();
        }
        if let Some(target) = entries.iter_mut().find(|other| other.same(&bucket)) {
            target.set = std::mem::take(&mut target.set).union(&entry.set);
            target.time.clone_from(&entry.time);
        }
        entries.retain(|other| !other.same(&entry) || other.same(&bucket));
        count -= 1;
    }
}

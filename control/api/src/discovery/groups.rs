//! Groups, versions and resources, in the legacy form and in one aggregated document.

use serde_json::{Value, json};

use crate::kinds::{Kind, Subresource};
use crate::registry::Rows;
use crate::server::ApiServer;

/// Groups in the order of the table, each with its versions, the preferred first.
pub(super) fn versions(rows: &Rows) -> Vec<(String, Vec<String>)> {
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for kind in rows.all.iter().filter(|kind| kind.served) {
        let at = match groups.iter().position(|(group, _)| *group == kind.group) {
            Some(at) => at,
            None => {
                groups.push((kind.group.clone(), Vec::new()));
                groups.len() - 1
            }
        };
        if !groups[at].1.contains(&kind.version) {
            groups[at].1.push(kind.version.clone());
        }
    }
    for (_, versions) in &mut groups {
        versions.sort_by(|a, b| rank(b).cmp(&rank(a)).then_with(|| a.cmp(b)));
    }
    groups
}

/// Order of versions: GA before beta before alpha, higher numbers first, anything else last.
pub(crate) fn rank(version: &str) -> (u8, u64, u64) {
    let none = (0, 0, 0);
    let Some(rest) = version.strip_prefix('v') else { return none };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let Ok(major) = rest[..digits].parse() else { return none };
    let (stage, minor) = match &rest[digits..] {
        "" => return (3, major, 0),
        tail if tail.starts_with("beta") => (2, &tail[4..]),
        tail if tail.starts_with("alpha") => (1, &tail[5..]),
        _ => return none,
    };
    minor.parse().map_or(none, |minor| (stage, major, minor))
}

/// `metav1.APIGroup` of each group but core.
pub(super) fn all(api: &ApiServer, rows: &Rows) -> Vec<Value> {
    let mut groups: Vec<(String, Vec<String>)> =
        versions(rows).into_iter().filter(|(group, _)| !group.is_empty()).collect();
    for (group, version) in crate::aggregate::groups(api) {
        match groups.iter_mut().find(|(known, _)| *known == group) {
            Some((_, versions)) if versions.contains(&version) => {}
            Some((_, versions)) => versions.push(version),
            None => groups.push((group, vec![version])),
        }
    }
    groups
        .into_iter()
        .map(|(group, versions)| {
            let entry = |version: &String| json!({"groupVersion": format!("{group}/{version}"), "version": version});
            json!({
                "name": group,
                "versions": versions.iter().map(entry).collect::<Vec<_>>(),
                "preferredVersion": versions.first().map(entry),
            })
        })
        .collect()
}

/// `metav1.APIResourceList` of a group version.
pub(super) fn resources(rows: &Rows, group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for kind in rows.all.iter().filter(|kind| kind.served && kind.group == group && kind.version == version) {
        let mut entry = json!({
            "name": kind.resource, "singularName": kind.singular, "namespaced": kind.namespaced(),
            "kind": kind.kind, "verbs": kind.verbs,
        });
        if !kind.short_names.is_empty() {
            entry["shortNames"] = json!(kind.short_names);
        }
        if !kind.categories.is_empty() {
            entry["categories"] = json!(kind.categories);
        }
        if kind.stored() {
            entry["storageVersionHash"] = storage_version_hash(kind).into();
        }
        list.push(entry);
        for sub in &kind.subresources {
            let mut entry = json!({
                "name": format!("{}/{}", kind.resource, sub.name), "singularName": "",
                "namespaced": kind.namespaced(), "kind": sub.kind, "verbs": sub.verbs,
            });
            if is_foreign(kind, sub) {
                entry["group"] = sub.group.clone().into();
                entry["version"] = sub.version.clone().into();
            }
            list.push(entry);
        }
    }
    if list.is_empty() {
        return None;
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}))
}

fn is_foreign(kind: &Kind, sub: &Subresource) -> bool {
    sub.group != kind.group || sub.version != kind.version
}

/// Changes whenever the version in which objects are stored changes.
fn storage_version_hash(kind: &Kind) -> String {
    use base64::Engine as _;
    use sha2::{Digest as _, Sha256};
    let text = format!("{}/{}/{}", kind.storage_group, kind.storage_version, kind.kind);
    base64::engine::general_purpose::STANDARD.encode(&Sha256::digest(text.as_bytes())[..8])
}

/// `apidiscovery.k8s.io/v2` APIGroupDiscoveryList of core or of all other groups.
pub(super) fn aggregated(api: &ApiServer, rows: &Rows, core: bool) -> Value {
    let mut items: Vec<Value> = versions(rows)
        .into_iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, versions)| {
            let versions: Vec<Value> =
                versions.iter().map(|version| version_discovery(rows, &group, version)).collect();
            let metadata = if group.is_empty() {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    if !core {
        items.extend(crate::aggregate::discovered(api));
    }
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn version_discovery(rows: &Rows, group: &str, version: &str) -> Value {
    let resources: Vec<Value> = rows
        .all
        .iter()
        .filter(|kind| kind.served && kind.group == group && kind.version == version)
        .map(|kind| {
            let mut entry = json!({
                "resource": kind.resource,
                "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
                "scope": if kind.namespaced() { "Namespaced" } else { "Cluster" },
                "singularResource": kind.singular,
                "verbs": kind.verbs,
            });
            if !kind.short_names.is_empty() {
                entry["shortNames"] = json!(kind.short_names);
            }
            if !kind.categories.is_empty() {
                entry["categories"] = json!(kind.categories);
            }
            if !kind.subresources.is_empty() {
                let subs = kind.subresources.iter().map(|sub| {
                    json!({
                        "subresource": sub.name,
                        "responseKind": {"group": sub.group, "version": sub.version, "kind": sub.kind},
                        "verbs": sub.verbs,
                    })
                });
                entry["subresources"] = subs.collect();
            }
            entry
        })
        .collect();
    json!({"version": version, "freshness": "Current", "resources": resources})
}

#[cfg(test)]
mod tests {
    use super::rank;

    #[test]
    fn versions_are_ordered() {
        let mut versions = ["v1beta1", "v2", "foo", "v1", "v1alpha2", "v10", "v2beta3"];
        versions.sort_by_key(|version| std::cmp::Reverse(rank(version)));
        assert_eq!(versions, ["v10", "v2", "v1", "v2beta3", "v1beta1", "v1alpha2", "foo"]);
    }
}

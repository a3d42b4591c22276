//! Objects that every cluster has from its first second: namespaces, roles, priorities, flow control, the service
//! `kubernetes`.
//!
//! They are written straight into the store, as no request made them. Each is created when it is missing and left alone when
//! it is there, so that what an administrator changed stays changed; rules of flow control say themselves who keeps them.

mod own;

mod flow;
mod servers;

use std::sync::Arc;

pub use servers::Servers;

use coracle_store::{Draft, Precondition, Store};
use futures::StreamExt as _;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::kinds::edit::{child, put, unset};
use crate::kinds::{builtin, row};
use crate::server::ApiServer;
use crate::status::Status;

/// What a v1.36 server holds after its first start, by resource.
const OBJECTS: &str = include_str!("objects.json");
/// Writes under way at once, so that they share flushes of the store.
const PARALLEL: usize = 64;

const GROUPS: [(&str, &str, &str); 9] = [
    ("namespaces", "", "Namespace"),
    ("clusterroles", "rbac.authorization.k8s.io", "ClusterRole"),
    ("clusterrolebindings", "rbac.authorization.k8s.io", "ClusterRoleBinding"),
    ("roles", "rbac.authorization.k8s.io", "Role"),
    ("rolebindings", "rbac.authorization.k8s.io", "RoleBinding"),
    ("priorityclasses", "scheduling.k8s.io", "PriorityClass"),
    ("flowschemas", "flowcontrol.apiserver.k8s.io", "FlowSchema"),
    ("prioritylevelconfigurations", "flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration"),
    ("apiservices", "apiregistration.k8s.io", "APIService"),
];

/// Group, resource and an object of it.
type Named = (&'static str, &'static str, Value);

/// Creates what is missing; called when the server starts, before it listens.
pub async fn ensure(api: &Arc<ApiServer>) -> Result<(), Status> {
    let mut all = table(|_| true)?;
    all.extend(kubernetes_service(api));
    all.extend(own::objects());
    create_all(api, all).await?;
    keep_flow_control(api).await?;
    publish_authorities(api).await?;
    if api.config.shared_store {
        return Ok(());
    }
    servers::publish(api.store.as_ref(), &[api.config.advertise].into()).await
}

/// Brings the built-in rules of priority and fairness to what they are to be: without them requests would have no level.
pub(crate) async fn keep_flow_control(api: &Arc<ApiServer>) -> Result<(), Status> {
    let store = api.store.as_ref();
    for (group, resource, object) in table(|group| group == "flowcontrol.apiserver.k8s.io")? {
        let (key, ours) = complete(group, resource, object)?;
        let Some(entry) = store.get(&key).await? else {
            write(store, &key, &ours, Precondition::Absent).await?;
            continue;
        };
        let have: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
        // Whoever writes meanwhile makes a change, which leads here again.
        if let Some(kept) = flow::kept(&have, &ours) {
            write(store, &key, &kept, Precondition::Revision(entry.revision)).await?;
        }
    }
    Ok(())
}

/// The built-in objects of the groups that are wanted.
fn table(wanted: impl Fn(&str) -> bool) -> Result<Vec<Named>, Status> {
    let objects: Map<String, Value> = serde_json::from_str(OBJECTS)
        .map_err(|e| Status::internal(format!("the built-in objects are damaged: {e}")))?;
    let mut all: Vec<Named> = Vec::new();
    for (resource, group, kind) in GROUPS.into_iter().filter(|(_, group, _)| wanted(group)) {
        for o in objects.get(resource).and_then(Value::as_array).into_iter().flatten() {
            let mut o = o.clone();
            let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
            put(&mut o, "kind", kind);
            put(&mut o, "apiVersion", version);
            if resource == "apiservices" {
                put(
                    &mut o,
                    "status",
                    json!({"conditions": [{"type": "Available", "status": "True", "reason": "Local",
                    "message": "Local APIServices are always available",
                    "lastTransitionTime": crate::time::seconds(Timestamp::now())}]}),
                );
            }
            all.push((group, resource, o));
        }
    }
    Ok(all)
}

async fn create_all(api: &Arc<ApiServer>, all: Vec<Named>) -> Result<(), Status> {
    let mut writes = Vec::new();
    for (group, resource, object) in all {
        writes.push(create(api.store.as_ref(), group, resource, object));
    }
    let mut writes = futures::stream::iter(writes).buffer_unordered(PARALLEL);
    while let Some(done) = writes.next().await {
        done?;
    }
    Ok(())
}

/// Makes the default class of volumes if there is none of its name: for whoever runs the provisioner behind it.
///
/// # Errors
/// When the store refuses it.
pub async fn local_storage_class(api: &Arc<ApiServer>) -> Result<(), Status> {
    create(api.store.as_ref(), "storage.k8s.io", "storageclasses", own::local_class()).await.map(drop)
}

/// A cluster role of the table, by name.
pub fn role(name: &str) -> Option<Value> {
    let objects: Map<String, Value> = serde_json::from_str(OBJECTS).ok()?;
    objects.get("clusterroles")?.as_array()?.iter().find(|r| crate::object::name(r) == name).cloned()
}

/// The service `kubernetes`, its range and its address.
fn kubernetes_service(api: &Arc<ApiServer>) -> Vec<(&'static str, &'static str, Value)> {
    let Some(ip) = crate::net::first_address(&api.config.service_cidr) else { return Vec::new() };
    let address = crate::kinds::ipaddress::object(ip, "default", "kubernetes");
    let (ip, family) = (ip.to_string(), if ip.is_ipv4() { "IPv4" } else { "IPv6" });
    let cidrs: Vec<&str> = api.config.service_cidr.split(',').collect();
    let now = crate::time::seconds(Timestamp::now());
    vec![
        (
            "",
            "services",
            json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [family],
                "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": api.config.advertise.port()}]},
            "status": {"loadBalancer": {}}}),
        ),
        (
            "networking.k8s.io",
            "servicecidrs",
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes", "finalizers": ["networking.k8s.io/service-cidr-finalizer"]},
            "spec": {"cidrs": cidrs},
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "",
                "message": "Kubernetes Service CIDR is ready", "lastTransitionTime": now}]}}),
        ),
        ("networking.k8s.io", "ipaddresses", address),
    ]
}

/// Whom aggregated APIs may trust: the CA of clients, and the CA of the certificate with which this server tells them of
/// users. Servers that share a store add theirs to those of the others.
async fn publish_authorities(api: &Arc<ApiServer>) -> Result<(), Status> {
    let words = |list: &[&str]| json!(list).to_string();
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
    "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
    "data": {
        "client-ca-file": api.pki.ca_pem,
        "requestheader-client-ca-file": api.pki.proxy_ca_pem,
        "requestheader-allowed-names": words(&[crate::pki::PROXY_CLIENT]),
        "requestheader-username-headers": words(&["X-Remote-User"]),
        "requestheader-uid-headers": words(&["X-Remote-Uid"]),
        "requestheader-group-headers": words(&["X-Remote-Group"]),
        "requestheader-extra-headers-prefix": words(&["X-Remote-Extra-"]),
    }});
    let (key, mut map) = complete("", "configmaps", map)?;
    let store = api.store.as_ref();
    let Some(entry) = store.get(&key).await? else {
        return write(store, &key, &map, Precondition::Absent).await.map(drop);
    };
    let have: Value = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
    for member in ["client-ca-file", "requestheader-client-ca-file"] {
        let known = have["data"][member].as_str().unwrap_or_default();
        let ours = map["data"][member].as_str().unwrap_or_default().trim();
        map["data"][member] = if known.contains(ours) { known.into() } else { format!("{known}{ours}\n").into() };
    }
    if have["data"] == map["data"] {
        return Ok(());
    }
    map["metadata"] = have["metadata"].clone();
    write(store, &key, &map, Precondition::Revision(entry.revision)).await.map(drop)
}

/// Writes an object; `false`: one of that name is there.
pub async fn create(store: &dyn Store, group: &str, resource: &str, object: Value) -> Result<bool, Status> {
    let (key, object) = complete(group, resource, object)?;
    write(store, &key, &object, Precondition::Absent).await
}

/// Removes an object; one that is not there is as good as removed.
pub async fn delete(store: &dyn Store, group: &str, resource: &str, namespace: &str, name: &str) -> Result<(), Status> {
    let key = kind_of(group, resource)?.key(namespace, name);
    match store.delete(&key, Precondition::Any).await {
        Ok(_) | Err(coracle_store::Error::Conflict { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn kind_of(group: &str, resource: &str) -> Result<Arc<crate::kinds::Kind>, Status> {
    builtin()
        .iter()
        .find(|k| k.is(group, resource) && k.is_storage_version())
        .cloned()
        .ok_or_else(|| Status::internal(format!("no built-in resource {resource} in group {group:?}")))
}

/// Key and whole form: defaults, uid, creation time.
fn complete(group: &str, resource: &str, mut object: Value) -> Result<(String, Value), Status> {
    let kind = kind_of(group, resource)?;
    if let Some(row) = row::find(group, resource) {
        row.apply_defaults(&mut object);
        if row.generation {
            unset(child(&mut object, "metadata"), "generation", 1);
        }
    }
    let meta = child(&mut object, "metadata");
    unset(meta, "uid", uuid::Uuid::new_v4().to_string());
    unset(meta, "creationTimestamp", crate::time::seconds(Timestamp::now()));
    let key = kind.key(crate::object::namespace(&object), crate::object::name(&object));
    Ok((key, object))
}

/// Writes an object; `false`: somebody else did so in the meantime.
async fn write(store: &dyn Store, key: &str, object: &Value, precondition: Precondition) -> Result<bool, Status> {
    let draft = Draft::encode(object).map_err(Status::internal)?;
    match store.put(key, draft, precondition).await {
        Ok(_) => Ok(true),
        Err(coracle_store::Error::Conflict { .. }) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_objects_are_whole_and_valid() {
        let objects: Map<String, Value> = serde_json::from_str(OBJECTS).expect("the table is JSON");
        let mut n = 0;
        for (resource, group, _) in GROUPS {
            let row = row::find(group, resource).expect("each has a row");
            for o in objects[resource].as_array().expect("a list") {
                let (key, whole) = complete(group, resource, o.clone()).expect("completed");
                assert!(key.starts_with("/registry/"), "{key}");
                let errors = row.check(&whole);
                assert!(errors.is_empty(), "{key}: {errors:?}");
                n += 1;
            }
        }
        assert!(n > 180, "{n}");
    }
}

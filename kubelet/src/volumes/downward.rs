//! The downward API: fields of a pod as text, for volumes and (through the public functions) for environments.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, DownwardAPIVolumeFile, Pod, ResourceFieldSelector};
use std::collections::BTreeMap;

use super::error::VolumeError;
use super::payload::{DEFAULT_MODE, FileEntry, Payload, insert, mode};
use super::plugin::{Context, Plugin, Ready};
use super::quantity::Quantity;

/// What a container without a limit may use: the node's allocatable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocatable {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes.
    pub ephemeral_storage_bytes: u64,
}

/// `downwardAPI` volumes.
pub(super) struct DownwardVolume;

#[async_trait]
impl Plugin for DownwardVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~downward-api"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.downward_api else { return Err(context.invalid("it is no downwardAPI")) };
        let mut payload = Payload::new();
        let default = mode(source.default_mode, DEFAULT_MODE);
        add_files(&mut payload, context, source.items.as_deref().unwrap_or_default(), default)?;
        super::mounts::ensure_tmpfs(&context.folder, None)?;
        context.manager.write_payload(context, payload).await?;
        Ok(Ready { read_only: true, ..Ready::at(&context.folder) })
    }

    fn follows_pod(&self) -> bool {
        true
    }
}

/// Adds the files of a downwardAPI volume or projection.
pub(super) fn add_files(
    payload: &mut Payload,
    context: &Context<'_>,
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
) -> Result<(), VolumeError> {
    for item in items {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), None) => {
                field_ref(context.pod, &field.field_path).map_err(|reason| context.invalid(reason))?
            }
            (None, Some(resource)) => {
                let name = resource.container_name.as_deref().unwrap_or_default();
                resource_field_ref(context.pod, name, resource, &context.manager.config.allocatable())
                    .map_err(|reason| context.invalid(reason))?
            }
            _ => {
                return Err(context.invalid(format!("file {:?} needs one of fieldRef and resourceFieldRef", item.path)));
            }
        };
        let entry = FileEntry { bytes: text.into_bytes(), mode: mode(item.mode, default_mode), owner: None };
        insert(payload, &item.path, entry, &context.volume.name)?;
    }
    Ok(())
}

/// The text of a field of the pod's metadata or spec, as volumes show it. (`status.*` and `spec.nodeName` belong to
/// environments, where the pod worker knows them best, but are answered from the object here.)
///
/// # Errors
/// When the path is not one of those that the API allows.
pub fn field_ref(pod: &Pod, path: &str) -> Result<String, String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.strip_suffix("']").and_then(|rest| rest.split_once("['")) {
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return Err(format!("field path {path:?} does not support subscripts")),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let status = pod.status.as_ref();
    let spec = pod.spec.as_ref();
    let text = match path {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "metadata.labels" => Some(lines(meta.labels.as_ref())),
        "metadata.annotations" => Some(lines(meta.annotations.as_ref())),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()),
        "status.hostIP" => status.and_then(|status| status.host_ip.clone()),
        "status.podIP" => status.and_then(|status| status.pod_ip.clone()),
        "status.hostIPs" => status
            .and_then(|status| status.host_ips.as_ref())
            .map(|ips| ips.iter().map(|ip| ip.ip.clone()).collect::<Vec<_>>().join(",")),
        "status.podIPs" => status
            .and_then(|status| status.pod_ips.as_ref())
            .map(|ips| ips.iter().map(|ip| ip.ip.clone()).collect::<Vec<_>>().join(",")),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    };
    Ok(text.unwrap_or_default())
}

/// `key="value"` lines, sorted, quoted as Go's `%q` does.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    lines.join("\n")
}

/// Go's `strconv.Quote`.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\x07' => quoted.push_str("\\a"),
            '\x08' => quoted.push_str("\\b"),
            '\x0c' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\x0b' => quoted.push_str("\\v"),
            control if (control as u32) < 0x20 || control as u32 == 0x7f => {
                quoted.push_str(&format!("\\x{:02x}", control as u32));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// The text of a container's request or limit, in units of the divisor, rounded up. A missing limit of CPU, memory or
/// storage is the node's allocatable.
///
/// # Errors
/// When there is no such container or resource, or a quantity is malformed.
pub fn resource_field_ref(
    pod: &Pod,
    container: &str,
    selector: &ResourceFieldSelector,
    allocatable: &Allocatable,
) -> Result<String, String> {
    let container = find_container(pod, container).ok_or_else(|| format!("container {container} not found"))?;
    let (section, name) = selector
        .resource
        .split_once('.')
        .ok_or_else(|| format!("unsupported container resource: {}", selector.resource))?;
    let resources = container.resources.as_ref();
    let (limits, requests) = (resources.and_then(|r| r.limits.as_ref()), resources.and_then(|r| r.requests.as_ref()));
    let given = match section {
        "limits" => limits.and_then(|limits| limits.get(name)),
        "requests" => requests.and_then(|requests| requests.get(name)),
        _ => return Err(format!("unsupported container resource: {}", selector.resource)),
    };
    let value = match given {
        Some(quantity) => quantity.0.parse::<Quantity>()?,
        None if section == "limits" => match name {
            "cpu" => Quantity::from_milli(i128::from(allocatable.cpu_millis)),
            "memory" => Quantity::whole(i128::from(allocatable.memory_bytes)),
            "ephemeral-storage" => Quantity::whole(i128::from(allocatable.ephemeral_storage_bytes)),
            _ => Quantity::default(),
        },
        None => Quantity::default(),
    };
    let divisor = match selector.divisor.as_ref().map(|divisor| divisor.0.as_str()) {
        None | Some("") | Some("0") => Quantity::whole(1),
        Some(text) => text.parse()?,
    };
    Ok(value.divided_by(divisor).to_string())
}

fn find_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    all().find(|container| container.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"b": "2", "a": "x\"y"}, "annotations": {"k": "line1\nline2"}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "1500m"}, "requests": {"memory": "10Mi"}}}]}
        }))
        .expect("pod")
    }

    #[test]
    fn fields_read_as_a_kubelet_writes_them() {
        let pod = pod();
        assert_eq!(field_ref(&pod, "metadata.labels"), Ok("a=\"x\\\"y\"\nb=\"2\"".into()));
        assert_eq!(field_ref(&pod, "metadata.annotations"), Ok("k=\"line1\\nline2\"".into()));
        assert_eq!(field_ref(&pod, "metadata.labels['b']"), Ok("2".into()));
        assert_eq!(field_ref(&pod, "metadata.labels['none']"), Ok(String::new()));
        assert!(field_ref(&pod, "spec.containers").is_err());
    }

    #[test]
    fn resources_are_divided_and_default_to_the_node() {
        let pod = pod();
        let allocatable = Allocatable { cpu_millis: 4000, memory_bytes: 1 << 30, ephemeral_storage_bytes: 0 };
        let ask = |resource: &str, divisor: Option<&str>| {
            let selector = ResourceFieldSelector {
                resource: resource.into(),
                divisor: divisor.map(|text| k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.into())),
                ..ResourceFieldSelector::default()
            };
            resource_field_ref(&pod, "c", &selector, &allocatable)
        };
        assert_eq!(ask("limits.cpu", None), Ok("2".into()));
        assert_eq!(ask("limits.cpu", Some("1m")), Ok("1500".into()));
        assert_eq!(ask("requests.memory", Some("1Mi")), Ok("10".into()));
        assert_eq!(ask("limits.memory", Some("1Mi")), Ok("1024".into()));
        assert_eq!(ask("requests.cpu", None), Ok("0".into()));
        assert!(ask("bogus", None).is_err());
    }
}

//! A container's environment: services, `envFrom`, `env`, and `$(NAME)` in values, commands and arguments.
//!
//! It stands beside the volumes because it is made of the same objects. Source: kubernetes `pkg/kubelet/kubelet_pods.go`
//! (`makeEnvironmentVariables`), `pkg/kubelet/envvars`, `third_party/forked/golang/expansion`.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, Service};

use super::downward::{field_ref, resource_field_ref};
use super::empty_dir::EmptyDirVolume;
use super::manager::Volumes;
use super::objects::{ObjectData, ObjectKey, ObjectKind};
use super::plugin::Plugin as _;

/// Variables of one container.
const MAX_VARIABLES: usize = 20_000;

/// Why an environment could not be made; the message of `CreateContainerConfigError`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EnvironmentError(String);

impl Volumes {
    /// The environment of a container, in order. `pod` carries the status that `fieldRef`s read (addresses above all);
    /// `services` come from [`service_environment`].
    ///
    /// # Errors
    /// When an object or a key that is not optional is missing, or cannot be asked for.
    pub async fn environment(
        &self,
        pod: &Pod,
        container: &Container,
        services: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, String)>, EnvironmentError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let mut made = Made::default();
        for source in container.env_from.iter().flatten() {
            let (kind, name, optional) = match (&source.config_map_ref, &source.secret_ref) {
                (Some(map), _) => (ObjectKind::ConfigMap, &map.name, map.optional),
                (None, Some(secret)) => (ObjectKind::Secret, &secret.name, secret.optional),
                (None, None) => continue,
            };
            let Some(data) = self.variables(kind, namespace, name, optional).await? else { continue };
            let prefix = source.prefix.as_deref().unwrap_or_default();
            for (key, value) in &data.data {
                let name = format!("{prefix}{key}");
                // As a kubelet does: what cannot be a name or a value is left out.
                match std::str::from_utf8(value) {
                    Ok(text) if is_name(&name) && !text.contains('\0') => made.set(&name, text.to_owned())?,
                    _ => tracing::debug!(namespace, key, "not usable as an environment variable"),
                }
            }
        }
        for variable in container.env.iter().flatten() {
            let value = match (&variable.value, &variable.value_from) {
                (Some(text), _) if !text.is_empty() => {
                    Some(expand_known(text, |name| made.get(name).or_else(|| services.get(name).map(String::as_str))))
                }
                (_, Some(source)) => self.source(pod, namespace, container, source).await?,
                _ => Some(String::new()),
            };
            if let Some(value) = value {
                made.set(&variable.name, value)?;
            }
        }
        let mut environment = made.0;
        let missing: Vec<_> =
            services.iter().filter(|(name, _)| !environment.iter().any(|(known, _)| known == *name)).collect();
        environment.extend(missing.into_iter().map(|(name, value)| (name.clone(), value.clone())));
        Ok(environment)
    }

    /// The value of one `valueFrom`; `None` if it is optional and absent.
    async fn source(
        &self,
        pod: &Pod,
        namespace: &str,
        container: &Container,
        source: &EnvVarSource,
    ) -> Result<Option<String>, EnvironmentError> {
        if let Some(field) = &source.field_ref {
            return field_ref(pod, &field.field_path).map(Some).map_err(EnvironmentError);
        }
        if let Some(resource) = &source.resource_field_ref {
            let name = resource.container_name.as_deref().filter(|name| !name.is_empty()).unwrap_or(&container.name);
            let allocatable = self.allocatable();
            return resource_field_ref(pod, name, resource, &allocatable).map(Some).map_err(EnvironmentError);
        }
        if let Some(file) = &source.file_key_ref {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            // The API takes no other type here.
            let volumes = self.layout().pod(uid).join("volumes").join(EmptyDirVolume.folder());
            let (root, file) = (volumes.join(&file.volume_name), file.clone());
            let read = tokio::task::spawn_blocking(move || super::env_file::read(&root, &file)).await;
            return read.map_err(|error| EnvironmentError(error.to_string()))?.map_err(EnvironmentError);
        }
        let (kind, word, name, key, optional) = match (&source.config_map_key_ref, &source.secret_key_ref) {
            (Some(map), _) => (ObjectKind::ConfigMap, "ConfigMap", &map.name, &map.key, map.optional),
            (None, Some(secret)) => (ObjectKind::Secret, "Secret", &secret.name, &secret.key, secret.optional),
            (None, None) => {
                return Err(EnvironmentError(
                    "this source of an environment variable is not supported on this node".into(),
                ));
            }
        };
        let Some(data) = self.variables(kind, namespace, name, optional).await? else { return Ok(None) };
        match data.data.get(key) {
            Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
            None if optional == Some(true) => Ok(None),
            None => Err(EnvironmentError(format!("couldn't find key {key} in {word} {namespace}/{name}"))),
        }
    }

    async fn variables(
        &self,
        kind: ObjectKind,
        namespace: &str,
        name: &str,
        optional: Option<bool>,
    ) -> Result<Option<Arc<ObjectData>>, EnvironmentError> {
        let key = ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        match self.objects().get(&key).await.map_err(|error| EnvironmentError(error.to_string()))? {
            None if optional != Some(true) => Err(EnvironmentError(format!("{} {name:?} not found", kind.word()))),
            found => Ok(found),
        }
    }
}

/// Variables in order; setting one again changes it where it stands.
#[derive(Default)]
struct Made(Vec<(String, String)>);

impl Made {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), EnvironmentError> {
        if let Some(known) = self.0.iter_mut().find(|(known, _)| known == name) {
            known.1 = value;
            return Ok(());
        }
        if self.0.len() >= MAX_VARIABLES {
            return Err(EnvironmentError(format!("more than {MAX_VARIABLES} environment variables")));
        }
        self.0.push((name.to_owned(), value));
        Ok(())
    }
}

/// Printable ASCII without `=`, as the API allows names of variables.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'=')
}

/// Replaces `$(NAME)` in a command or argument; what is not known stays as it is, `$$` is a dollar.
pub fn expand(text: &str, environment: &[(String, String)]) -> String {
    expand_known(text, |name| {
        environment.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    })
}

fn expand_known<'a>(text: &str, known: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        if let Some(after) = tail.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = tail.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match known(name) {
                Some(value) => expanded.push_str(value),
                None => {
                    expanded.push_str("$(");
                    expanded.push_str(name);
                    expanded.push(')');
                }
            }
            rest = after;
        } else {
            expanded.push('$');
            rest = tail;
        }
    }
    expanded.push_str(rest);
    expanded
}

/// The variables that tell of services: those of the pod's namespace (unless `enableServiceLinks` is false), and always
/// `kubernetes` of the namespace `default`.
pub fn service_environment<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> BTreeMap<String, String> {
    let mut made = BTreeMap::new();
    for service in services {
        let (Some(name), Some(spec)) = (&service.metadata.name, &service.spec) else { continue };
        let of = service.metadata.namespace.as_deref().unwrap_or("default");
        let master = of == "default" && name == "kubernetes";
        if !(master || links && of == namespace) {
            continue;
        }
        let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { continue };
        let Some(first) = spec.ports.iter().flatten().next() else { continue };
        let upper = |text: &str| text.replace('-', "_").to_uppercase();
        let joined = |port: i32| if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
        let prefix = upper(name);
        // A service of the pod's own namespace that is named like the master does not hide it.
        let mut set = |key: String, value: String| {
            if master || !made.contains_key(&key) {
                made.insert(key, value);
            }
        };
        set(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
        set(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
        for port in spec.ports.iter().flatten() {
            if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                set(format!("{prefix}_SERVICE_PORT_{}", upper(name)), port.port.to_string());
            }
        }
        for (index, port) in spec.ports.iter().flatten().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{}", protocol.to_lowercase(), joined(port.port));
            if index == 0 {
                set(format!("{prefix}_PORT"), url.clone());
            }
            let long = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            set(format!("{long}_PROTO"), protocol.to_lowercase());
            set(format!("{long}_PORT"), port.port.to_string());
            set(format!("{long}_ADDR"), ip.to_owned());
            set(long, url);
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn references_expand_as_documented() {
        let environment = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "$(A)".to_owned())];
        for (text, expanded) in [
            ("$(A)-$(B)", "1-$(A)"),
            ("$$(A)", "$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("a$b", "a$b"),
            ("$$$$", "$$"),
        ] {
            assert_eq!(expand(text, &environment), expanded, "{text}");
        }
    }

    #[test]
    fn services_become_variables() {
        let service = |name: &str, namespace: &str, ip: &str| -> Service {
            serde_json::from_value(json!({
                "metadata": { "name": name, "namespace": namespace },
                "spec": { "clusterIP": ip, "ports": [{ "name": "http-main", "port": 80 }, { "port": 53, "protocol": "UDP" }] },
            }))
            .expect("service")
        };
        let all = [
            service("my-web", "ns", "10.0.0.1"),
            service("kubernetes", "default", "10.0.0.2"),
            service("other", "elsewhere", "10.0.0.3"),
            service("headless", "ns", "None"),
        ];
        let made = service_environment(&all, "ns", true);
        for (name, value) in [
            ("MY_WEB_SERVICE_HOST", "10.0.0.1"),
            ("MY_WEB_SERVICE_PORT", "80"),
            ("MY_WEB_SERVICE_PORT_HTTP_MAIN", "80"),
            ("MY_WEB_PORT", "tcp://10.0.0.1:80"),
            ("MY_WEB_PORT_53_UDP", "udp://10.0.0.1:53"),
            ("MY_WEB_PORT_53_UDP_ADDR", "10.0.0.1"),
            ("KUBERNETES_SERVICE_HOST", "10.0.0.2"),
        ] {
            assert_eq!(made.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!made.keys().any(|name| name.starts_with("OTHER") || name.starts_with("HEADLESS")));
        assert!(service_environment(&all, "ns", false).keys().all(|name| name.starts_with("KUBERNETES")));
    }
}

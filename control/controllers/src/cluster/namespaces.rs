//! Namespaces: what is in one that is being deleted goes first, then the namespace.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::kinds::Kind;
use coracle_api::server::ApiServer;
use http::Request;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, own};

/// The finalizer that stands for this controller.
const FINALIZER: &str = "kubernetes";
/// How soon to look again for content that goes at its own pace (pods that end gracefully, finalizers of others).
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(crate) struct Namespaces {
    host: Host,
    api: Arc<ApiServer>,
    namespaces: Arc<Informer<Namespace>>,
}

/// What is left in a namespace.
#[derive(Debug, Default)]
struct Left {
    /// Objects by resource, as `deployments.apps has 2 resource instances`.
    content: Vec<String>,
    /// Finalizers that hold some of them.
    finalizers: std::collections::BTreeMap<String, usize>,
    failures: Vec<String>,
}

impl Namespaces {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { namespaces: host.informer(), api: api.clone(), host }
    }

    /// Deletes all objects of a kind in a namespace and counts what stays.
    async fn empty(&self, kind: &Kind, namespace: &str, left: &mut Left) -> Result<(), Error> {
        let objects = self.api.list(kind, namespace).await.map_err(|status| Error::Invalid(status.to_string()))?;
        if objects.is_empty() {
            return Ok(());
        }
        let root = if kind.group.is_empty() { "/api".into() } else { format!("/apis/{}", kind.group) };
        let path = format!("{root}/{}/namespaces/{namespace}/{}", kind.version, kind.resource);
        let collection = kind.has_verb("deletecollection");
        let paths = if collection {
            vec![path]
        } else {
            objects
                .iter()
                .filter_map(|object| Some(format!("{path}/{}", object["metadata"]["name"].as_str()?)))
                .collect()
        };
        for path in paths {
            let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"});
            let request = Request::delete(path)
                .header(http::header::CONTENT_TYPE, "application/json")
                .body(serde_json::to_vec(&options).unwrap_or_default())
                .map_err(|error| Error::Invalid(error.to_string()))?;
            match self.host.client.request::<Value>(request).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => left.failures.push(format!("{}: {error}", kind.group_resource())),
            }
        }
        let objects = self.api.list(kind, namespace).await.map_err(|status| Error::Invalid(status.to_string()))?;
        if !objects.is_empty() {
            left.content.push(format!("{} has {} resource instances", kind.group_resource(), objects.len()));
            for finalizer in objects.iter().filter_map(|object| object["metadata"]["finalizers"].as_array()).flatten() {
                *left.finalizers.entry(finalizer.as_str().unwrap_or_default().to_owned()).or_default() += 1;
            }
        }
        Ok(())
    }

    async fn report(&self, namespace: &Namespace, left: &Left) -> Result<(), Error> {
        let now = Timestamp::now();
        let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
        let mut changed = namespace.clone();
        let status = changed.status.get_or_insert_default();
        status.phase = Some("Terminating".into());
        let conditions = status.conditions.get_or_insert_default();
        let held: Vec<String> =
            left.finalizers.iter().map(|(name, count)| format!("{name} in {count} resource instances")).collect();
        let rows = [
            (
                "NamespaceDeletionDiscoveryFailure",
                false,
                "ResourcesDiscovered",
                "All resources successfully discovered".to_owned(),
            ),
            (
                "NamespaceDeletionGroupVersionParsingFailure",
                false,
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed".to_owned(),
            ),
            if left.failures.is_empty() {
                (
                    "NamespaceDeletionContentFailure",
                    false,
                    "ContentDeleted",
                    "All content successfully deleted, may be waiting on finalization".to_owned(),
                )
            } else {
                (
                    "NamespaceDeletionContentFailure",
                    true,
                    "ContentDeletionFailed",
                    format!(
                        "Failed to delete all resource types, {} remaining: {}",
                        left.failures.len(),
                        left.failures.join(", ")
                    ),
                )
            },
            if left.content.is_empty() {
                ("NamespaceContentRemaining", false, "ContentRemoved", "All content successfully removed".to_owned())
            } else {
                (
                    "NamespaceContentRemaining",
                    true,
                    "SomeResourcesRemain",
                    format!("Some resources are remaining: {}", left.content.join(", ")),
                )
            },
            if held.is_empty() {
                (
                    "NamespaceFinalizersRemaining",
                    false,
                    "ContentHasNoFinalizers",
                    "All content-preserving finalizers finished".to_owned(),
                )
            } else {
                (
                    "NamespaceFinalizersRemaining",
                    true,
                    "SomeFinalizersRemain",
                    format!("Some content in the namespace has finalizers remaining: {}", held.join(", ")),
                )
            },
        ];
        for (type_, holds, reason, message) in rows {
            let value = if holds { "True" } else { "False" };
            let before = conditions.iter().find(|condition| condition.type_ == type_).cloned();
            if before.as_ref().is_some_and(|before| before.status == value && before.message.as_ref() == Some(&message))
            {
                continue;
            }
            let since = before.filter(|before| before.status == value).and_then(|before| before.last_transition_time);
            conditions.retain(|condition| condition.type_ != type_);
            conditions.push(NamespaceCondition {
                type_: type_.into(),
                status: value.into(),
                reason: Some(reason.into()),
                message: Some(message),
                last_transition_time: Some(since.unwrap_or_else(|| now.clone())),
            });
        }
        if changed.status != namespace.status {
            self.host.replace_status(&Api::all(self.host.client.clone()), &changed).await?;
        }
        Ok(())
    }

    /// Takes this controller's finalizer away; the last one to go takes the namespace along.
    async fn finalize(&self, name: &str) -> Result<(), Error> {
        let api: Api<Namespace> = Api::all(self.host.client.clone());
        let Some(mut namespace) = api.get_opt(name).await.map_err(Error::at("get"))? else { return Ok(()) };
        let finalizers = namespace.spec.get_or_insert_default().finalizers.get_or_insert_default();
        finalizers.retain(|finalizer| finalizer != FINALIZER);
        let body = serde_json::to_vec(&namespace).map_err(|error| Error::Invalid(error.to_string()))?;
        let request = Request::put(format!("/api/v1/namespaces/{name}/finalize"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        match self.host.client.request::<Value>(request).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(Error::at("finalize")(error)),
        }
    }
}

impl Controller for Namespaces {
    const NAME: &'static str = "namespace-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.namespaces, own);
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(namespace) = self.namespaces.get("", &key.name) else { return Ok(Outcome::Done) };
        if namespace.metadata.deletion_timestamp.is_none() {
            return Ok(Outcome::Done);
        }
        let mut left = Left::default();
        let rows = self.api.registry.rows();
        let stored = rows.all.iter().filter(|kind| kind.namespaced() && kind.stored() && kind.is_storage_version());
        // Pods go before what they rest on (KEP-5080).
        let (pods, others): (Vec<_>, Vec<_>) = stored.partition(|kind| kind.is("", "pods"));
        for kind in pods {
            self.empty(kind, &key.name, &mut left).await?;
        }
        if left.content.is_empty() && left.failures.is_empty() {
            for kind in others {
                self.empty(kind, &key.name, &mut left).await?;
            }
        }
        self.report(&namespace, &left).await?;
        if !left.content.is_empty() || !left.failures.is_empty() {
            return Ok(Outcome::After(LOOK_AGAIN));
        }
        let ours = namespace
            .spec
            .as_ref()
            .and_then(|spec| spec.finalizers.as_ref())
            .is_some_and(|held| held.iter().any(|name| name == FINALIZER));
        if ours {
            self.finalize(&namespace.name_any()).await?;
        }
        Ok(Outcome::Done)
    }
}

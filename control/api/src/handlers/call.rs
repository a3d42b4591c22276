//! One request on a resource, past authorisation.

use std::sync::Arc;

use http::HeaderMap;
use http::header::{CONTENT_TYPE, USER_AGENT};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::context::{Context, Operation};
use crate::http::{Format, Media, Query, ReqBody, ResourceRoute};
use crate::kinds::Kind;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;
use crate::wire;

/// Longest field manager, in bytes.
const FIELD_MANAGER_BYTES: usize = 128;

/// What happens with unknown and duplicate fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// One request on a resource.
pub(crate) struct Call {
    pub(crate) api: Arc<ApiServer>,
    pub(crate) user: Arc<UserInfo>,
    pub(crate) kind: Arc<Kind>,
    pub(crate) route: ResourceRoute,
    pub(crate) query: Query,
    pub(crate) media: Media,
    pub(crate) content_type: String,
    pub(crate) now: Timestamp,
    pub(crate) dry_run: bool,
    pub(crate) validation: FieldValidation,
    /// Given by the request; empty when it is not.
    pub(crate) field_manager: String,
    /// What managed fields are written under when none is given: the first word of the User-Agent.
    agent: String,
    pub(crate) warnings: Vec<String>,
    /// The seat among the requests in flight; given back when the handler ends.
    pub(crate) seat: Option<crate::flow::Seat>,
}

impl Call {
    pub(crate) fn new(
        api: Arc<ApiServer>,
        user: Arc<UserInfo>,
        kind: Arc<Kind>,
        route: ResourceRoute,
        query: Query,
        media: Media,
        headers: &HeaderMap,
    ) -> Result<Self, Status> {
        let header = |name| headers.get(name).and_then(|v: &http::HeaderValue| v.to_str().ok()).unwrap_or_default();
        let agent = header(USER_AGENT).split('/').next().unwrap_or_default();
        let agent: String = agent.chars().filter(|c| !c.is_control()).take(FIELD_MANAGER_BYTES).collect();
        let validation = match query.get("fieldValidation") {
            None | Some("Warn") => FieldValidation::Warn,
            Some("Ignore") => FieldValidation::Ignore,
            Some("Strict") => FieldValidation::Strict,
            Some(other) => {
                return Err(Status::bad_request(format!(
                    "fieldValidation: Unsupported value: {other:?}: supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
                )));
            }
        };
        let mut call = Self {
            content_type: header(CONTENT_TYPE).to_owned(),
            field_manager: query.get("fieldManager").unwrap_or_default().to_owned(),
            dry_run: false,
            now: Timestamp::now(),
            warnings: kind.deprecation.iter().cloned().collect(),
            agent,
            validation,
            api,
            user,
            kind,
            route,
            query,
            media,
            seat: None,
        };
        let values: Vec<String> = call.query.all("dryRun").filter(|v| !v.is_empty()).map(str::to_owned).collect();
        call.set_dry_run(&values)?;
        if call.field_manager.len() > FIELD_MANAGER_BYTES {
            return Err(Status::bad_request("fieldManager: Too long: may not be more than 128 bytes"));
        }
        Ok(call)
    }

    /// Takes the `dryRun` of query or options.
    pub(crate) fn set_dry_run(&mut self, values: &[String]) -> Result<(), Status> {
        match values {
            [] => {}
            [all] if all == "All" => self.dry_run = true,
            _ => {
                let shown = values.join(",");
                return Err(Status::new(
                    422,
                    "Invalid",
                    format!(" \"\" is invalid: dryRun: Unsupported value: [{shown:?}]: supported values: \"All\""),
                ));
            }
        }
        Ok(())
    }

    /// Field manager that updates are tracked under.
    pub(crate) fn manager(&self) -> &str {
        if self.field_manager.is_empty() { &self.agent } else { &self.field_manager }
    }

    /// The context for strategies and admission.
    pub(crate) fn context(&self, operation: Operation, name: &str) -> Context {
        let options_kind = match (operation, self.route.verb) {
            (Operation::Create, _) => "CreateOptions",
            (Operation::Delete, _) => "DeleteOptions",
            (_, crate::http::Verb::Patch) => "PatchOptions",
            _ => "UpdateOptions",
        };
        let mut options = json!({"kind": options_kind, "apiVersion": "meta.k8s.io/v1"});
        if self.dry_run {
            options["dryRun"] = json!(["All"]);
        }
        if !self.field_manager.is_empty() {
            options["fieldManager"] = self.field_manager.clone().into();
        }
        if let Some(validation) = self.query.get("fieldValidation") {
            options["fieldValidation"] = validation.into();
        }
        Context {
            api: self.api.clone(),
            user: self.user.clone(),
            kind: self.kind.clone(),
            namespace: self.namespace_of(name),
            name: name.to_owned(),
            subresource: self.route.subresource.clone(),
            operation,
            dry_run: self.dry_run,
            field_manager: self.manager().to_owned(),
            now: self.now,
            options,
            warnings: parking_lot::Mutex::default(),
            annotations: parking_lot::Mutex::default(),
        }
    }

    /// Namespace of the request; requests on a Namespace are in itself, as admission sees it.
    fn namespace_of(&self, name: &str) -> String {
        if self.kind.is("", "namespaces") { name.to_owned() } else { self.route.namespace.clone() }
    }

    /// Key of the object that the path names.
    pub(crate) fn key(&self) -> String {
        self.kind.key(&self.route.namespace, &self.route.name)
    }

    /// Reads and decodes a body that holds an object of `kind`.
    pub(crate) async fn read_object(&mut self, body: ReqBody, kind: &Kind) -> Result<Value, Status> {
        let format = self.body_format()?;
        let bytes = body.read().await?;
        let decoded = wire::decode(&bytes, format, kind)?;
        self.strictness(
            &decoded.strict,
            &format!("{} in version {:?} cannot be handled as a {}: ", kind.kind, kind.version, kind.kind),
        )?;
        Ok(decoded.value)
    }

    /// Format of the request's body.
    pub(crate) fn body_format(&self) -> Result<Format, Status> {
        wire::format_of(&self.content_type)
            .filter(|&format| format != Format::Protobuf || self.kind.crd.is_none())
            .ok_or_else(|| {
                let accepted: &[&str] =
                    if self.kind.crd.is_none() { &crate::http::SERVED } else { &crate::http::SERVED_CUSTOM };
                Status::unsupported_media_type(accepted, &self.content_type)
            })
    }

    /// Unknown and duplicate fields: nothing, a warning each, or an error.
    pub(crate) fn strictness(&mut self, found: &[String], prefix: &str) -> Result<(), Status> {
        match self.validation {
            _ if found.is_empty() => Ok(()),
            FieldValidation::Ignore => Ok(()),
            FieldValidation::Warn => {
                self.warnings.extend_from_slice(found);
                Ok(())
            }
            FieldValidation::Strict => {
                Err(Status::bad_request(format!("{prefix}strict decoding error: {}", found.join(", "))))
            }
        }
    }

    /// Takes the warnings of a context over.
    pub(crate) fn take_warnings(&mut self, ctx: &Context) {
        self.warnings.append(&mut ctx.warnings.lock());
    }

    /// A stored object in the version of the request.
    pub(crate) async fn decode(&self, bytes: &[u8]) -> Result<Value, Status> {
        let value = wire::parse_stored(bytes)?;
        to_version(&self.kind, value).await
    }
}

/// Brings a stored object into the row's version.
pub(crate) async fn to_version(kind: &Kind, value: Value) -> Result<Value, Status> {
    let mut all = all_to_version(kind, vec![value]).await?;
    all.pop().ok_or_else(|| Status::internal("a conversion lost its object"))
}

/// The same for many.
pub(crate) async fn all_to_version(kind: &Kind, mut values: Vec<Value>) -> Result<Vec<Value>, Status> {
    let wanted = kind.api_version();
    if values.iter().any(|value| value.get("apiVersion").and_then(Value::as_str) != Some(wanted.as_str())) {
        values = convert(kind, values, &wanted).await?;
    }
    if kind.differs_when_read {
        values.iter_mut().for_each(|value| wire::default(kind, value));
    }
    Ok(values)
}

/// Brings objects into an `apiVersion` of the same resource.
pub(crate) async fn convert(kind: &Kind, mut values: Vec<Value>, api_version: &str) -> Result<Vec<Value>, Status> {
    match &kind.conversion {
        Some(conversion) => conversion.convert(values, api_version).await,
        None => {
            for value in &mut values {
                value["apiVersion"] = api_version.into();
            }
            Ok(values)
        }
    }
}

/// `apiVersion` in which a row's objects are stored.
pub(crate) fn stored_api_version(kind: &Kind) -> String {
    if kind.storage_group.is_empty() {
        kind.storage_version.clone()
    } else {
        format!("{}/{}", kind.storage_group, kind.storage_version)
    }
}

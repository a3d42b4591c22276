//! One group version that a service serves.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use super::availability::Condition;
use super::documents::Documents;
use crate::http::{ReqBody, Response};
use crate::object;
use crate::outbound::Endpoint;
use crate::proxy::{Way, forward};
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// Time for a service to begin its answer to a request that is no watch and no stream.
const PATIENCE: Duration = Duration::from_secs(60);

/// A group version and the service behind it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Backend {
    /// Name of the APIService.
    pub(super) name: String,
    pub(super) group: String,
    pub(super) version: String,
    pub(super) service: (String, String),
    pub(super) port: u64,
    ca_pem: Vec<u8>,
    verify: bool,
    /// Priorities of group and version, the higher the earlier.
    pub(super) priority: (i64, i64),
    /// How the last check went.
    pub(super) condition: Condition,
    /// What the last good check found.
    pub(super) documents: Arc<Documents>,
}

impl Backend {
    /// From an APIService; `None` when this server serves the version itself.
    pub(super) fn of(service: &Value) -> Option<Self> {
        let spec = &service["spec"];
        let reference = spec.get("service").filter(|reference| reference.is_object())?;
        let ca = object::text(spec, "/caBundle");
        Some(Self {
            name: object::name(service).to_owned(),
            group: object::text(spec, "/group").to_owned(),
            version: object::text(spec, "/version").to_owned(),
            service: (object::text(reference, "/namespace").to_owned(), object::text(reference, "/name").to_owned()),
            port: reference["port"].as_u64().unwrap_or(443),
            // Validation has seen it; what cannot be read is trusted by nobody.
            ca_pem: base64::engine::general_purpose::STANDARD.decode(ca).unwrap_or_else(|_| b"unreadable".to_vec()),
            verify: spec["insecureSkipTLSVerify"].as_bool() != Some(true),
            priority: (
                spec["groupPriorityMinimum"].as_i64().unwrap_or_default(),
                spec["versionPriority"].as_i64().unwrap_or_default(),
            ),
            condition: Condition::unknown(),
            documents: Arc::default(),
        })
    }

    /// One of the service's endpoints.
    pub(super) async fn endpoint(&self, api: &Arc<ApiServer>, path: &str) -> Result<Endpoint, Status> {
        let (namespace, service) = &self.service;
        let (address, port) = crate::proxy::endpoint(api, namespace, service, &self.port.to_string()).await?;
        Ok(Endpoint {
            name: format!("{service}.{namespace}.svc"),
            address,
            port,
            path: path.to_owned(),
            ca_pem: self.ca_pem.clone(),
            verify: self.verify,
        })
    }

    /// Sends a user's request to the service.
    pub(super) async fn forward(
        &self,
        api: &Arc<ApiServer>,
        user: &UserInfo,
        parts: http::request::Parts,
        body: ReqBody,
    ) -> Result<Response, Status> {
        let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        let endpoint = self.endpoint(api, &path).await?;
        let stream = endpoint.connect(api).await.map_err(unreachable)?;
        let host = format!("{}:{}", endpoint.name, self.port);
        let answer = forward(stream, Way { path, host, headers: remote_user(user), base: None }, parts, body);
        tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(unreachable("no answer began in time")))
    }
}

fn unreachable(why: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("error trying to reach service: {why}"))
}

/// The headers that say who asks.
pub(super) fn remote_user(user: &UserInfo) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut add = |name: &str, value: &str| {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    };
    add("x-remote-user", &user.name);
    if !user.uid.is_empty() {
        add("x-remote-uid", &user.uid);
    }
    for group in &user.groups {
        add("x-remote-group", group);
    }
    for (key, values) in &user.extra {
        let name = format!("x-remote-extra-{}", crate::http::encode(key));
        values.iter().for_each(|value| add(&name, value));
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_travel_in_headers() {
        let mut user = UserInfo::new("jane", &["dev", "ops"]);
        user.extra.insert("example.com/tenant".into(), vec!["a".into(), "b".into()]);
        let headers = remote_user(&user);
        assert_eq!(headers["x-remote-user"], "jane");
        assert_eq!(headers.get_all("x-remote-group").iter().count(), 3);
        assert_eq!(headers.get_all("x-remote-extra-example.com%2ftenant").iter().count(), 2);
    }
}

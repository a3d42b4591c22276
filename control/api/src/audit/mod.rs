//! The audit log: who did what, as far as a policy asks for it. Source: `k8s.io/apiserver/pkg/audit`.

mod policy;

mod file;
mod webhook;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::BodyExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::authn::{Acting, user_value};
use crate::http::{ReqBody, Response, Route, full};
use crate::object;
use crate::status::Status;
use crate::user::UserInfo;
use file::{Bounds, Log};
use policy::{Level, Policy, Stage, Verdict};
use tokio_util::sync::CancellationToken;
use webhook::Webhook;

/// Largest answer that is written down whole, in bytes; of a longer one only the code is.
const ANSWER_BYTES: u64 = 3 << 20;

/// What `--audit-policy-file`, `--audit-log-*` and `--audit-webhook-*` say.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The policy; without it nothing is written.
    pub policy: Option<PathBuf>,
    /// The log file.
    pub log: Option<PathBuf>,
    /// Size at which the file is rotated, in megabytes.
    pub max_size_mb: u64,
    /// Old files that stay, 0 for all.
    pub max_backups: usize,
    /// Days that old files stay, 0 for ever.
    pub max_age_days: u64,
    /// Kubeconfig of whoever is sent the events.
    pub webhook: Option<PathBuf>,
    /// Longest time that an event waits for others to be sent with.
    pub webhook_max_wait: Duration,
    /// Pause before events are sent again.
    pub webhook_backoff: Duration,
}

/// The audit log of a server.
pub(crate) struct Audit {
    policy: Policy,
    log: Option<Log>,
    webhook: Option<Webhook>,
}

impl Audit {
    /// Opens policy and log, and the way to the webhook; `None` when nothing is to be written.
    pub(crate) async fn open(
        settings: &Settings,
        shutdown: &CancellationToken,
    ) -> Result<Option<Self>, std::io::Error> {
        let Some(policy) = &settings.policy else { return Ok(None) };
        let wrong = |path: &PathBuf, why: &dyn std::fmt::Display| {
            std::io::Error::other(format!("audit: {}: {why}", path.display()))
        };
        let text = std::fs::read_to_string(policy).map_err(|error| wrong(policy, &error))?;
        let parsed = Policy::parse(&text).map_err(|why| wrong(policy, &why))?;
        let mut audit = Self { policy: parsed, log: None, webhook: None };
        if let Some(path) = &settings.log {
            let bounds = Bounds {
                path: path.clone(),
                size_bytes: settings.max_size_mb.max(1) << 20,
                backups: settings.max_backups,
                age: Duration::from_secs(settings.max_age_days * 24 * 3600),
            };
            audit.log = Some(Log::open(bounds).map_err(|error| wrong(path, &error))?);
        }
        if let Some(file) = &settings.webhook {
            let times = (settings.webhook_max_wait, settings.webhook_backoff);
            let opened = Webhook::open(file, times, shutdown.clone()).await;
            audit.webhook = Some(opened.map_err(|why| wrong(file, &why))?);
        }
        if audit.log.is_none() && audit.webhook.is_none() {
            return Err(wrong(
                policy,
                &"there is nowhere to write to: give --audit-log-path or --audit-webhook-config-file",
            ));
        }
        Ok(Some(audit))
    }

    /// A request by its sender, or by who it acts as; `None` when nothing of it is written down.
    pub(crate) fn begin(
        &self,
        id: &str,
        sender: &UserInfo,
        acting: Option<&Acting>,
        peer: Option<SocketAddr>,
        route: &Route,
        parts: &http::request::Parts,
    ) -> Option<Entry> {
        let verdict = self.policy.judge(acting.map_or(sender, |acting| &acting.user), route);
        if verdict.level == Level::None {
            return None;
        }
        let agent = parts.headers.get(http::header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let mut event = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": verdict.level.as_str(), "auditID": id,
            "requestURI": parts.uri.path_and_query().map(http::uri::PathAndQuery::as_str), "verb": route.verb,
            "user": user_value(sender), "userAgent": agent,
            "sourceIPs": [peer.map_or_else(|| "::1".to_owned(), |peer| peer.ip().to_string())],
            "requestReceivedTimestamp": micros(Timestamp::now()),
        });
        if let Some(acting) = acting {
            event["impersonatedUser"] = user_value(&acting.user);
            if let Some(constraint) = acting.constraint {
                event["authenticationMetadata"] = json!({"impersonationConstraint": constraint});
            }
        }
        if let Some(r) = &route.resource {
            let members = [
                ("resource", &r.resource),
                ("namespace", &r.namespace),
                ("name", &r.name),
                ("apiGroup", &r.group),
                ("apiVersion", &r.version),
                ("subresource", &r.subresource),
            ];
            let members = members.into_iter().filter(|(_, text)| !text.is_empty());
            event["objectRef"] = members.map(|(name, text)| (name.to_owned(), Value::from(text.as_str()))).collect();
        }
        let watch = route.verb == "watch";
        let entry = Entry { event, verdict, watch };
        self.write(&entry, Stage::RequestReceived);
        Some(entry)
    }

    /// Writes down how a request ended, or that its watch has begun. Gives the answer back.
    pub(crate) async fn end(&self, mut entry: Entry, mut response: Response) -> Response {
        let code = response.status().as_u16();
        entry.event["responseStatus"] = json!({"metadata": {}, "code": code});
        let is_json = response
            .headers()
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
        let bounded = hyper::body::Body::size_hint(response.body()).upper().is_some_and(|n| n <= ANSWER_BYTES);
        let failed = code >= 400;
        if is_json && bounded && !entry.watch && (failed || entry.verdict.level == Level::RequestResponse) {
            let (parts, body) = response.into_parts();
            // The body is one of this server's own and whole already.
            let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            if let Ok(mut value) = serde_json::from_slice::<Value>(&bytes) {
                if failed && value["kind"] == "Status" {
                    entry.event["responseStatus"] = value.clone();
                }
                if entry.verdict.level == Level::RequestResponse {
                    entry.strip(&mut value);
                    entry.event["responseObject"] = value;
                }
            }
            response = http::Response::from_parts(parts, full(bytes));
        }
        let stage = if entry.watch && !failed { Stage::ResponseStarted } else { Stage::ResponseComplete };
        self.write(&entry, stage);
        response
    }

    fn write(&self, entry: &Entry, stage: Stage) {
        if entry.verdict.omit_stages.contains(&stage) {
            return;
        }
        let mut event = entry.event.clone();
        event["stage"] = stage.as_str().into();
        event["stageTimestamp"] = micros(Timestamp::now()).into();
        let event = event.to_string();
        if let Some(Err(error)) = self.log.as_ref().map(|log| log.write(event.clone().into_bytes())) {
            tracing::error!(%error, "a request is missing from the audit log");
        }
        if let Some(Err(why)) = self.webhook.as_ref().map(|webhook| webhook.write(event)) {
            tracing::error!(why, "a request is not told to the audit webhook");
        }
    }
}

/// A request that is written down.
pub(crate) struct Entry {
    event: Value,
    verdict: Verdict,
    watch: bool,
}

impl Entry {
    /// Takes the body down when the policy asks for it, and gives it back.
    pub(crate) async fn request(&mut self, body: ReqBody, content_type: &str) -> Result<ReqBody, Status> {
        if self.verdict.level < Level::Request {
            return Ok(body);
        }
        let bytes = body.read().await?;
        let format = crate::wire::format_of(content_type);
        let parsed = format.filter(|_| !bytes.is_empty()).and_then(|format| crate::wire::parse(&bytes, format).ok());
        if let Some(mut parsed) = parsed {
            self.strip(&mut parsed.value);
            self.event["requestObject"] = parsed.value;
        } else if let Ok(patch) = serde_json::from_slice::<Value>(&bytes) {
            self.event["requestObject"] = patch;
        }
        Ok(ReqBody::Whole(bytes))
    }

    /// What authorisation said.
    pub(crate) fn decided(&mut self, allowed: &Result<String, Status>) {
        let (word, reason) = match allowed {
            Ok(reason) => ("allow", reason.as_str()),
            Err(_) => ("forbid", ""),
        };
        self.event["annotations"] =
            json!({"authorization.k8s.io/decision": word, "authorization.k8s.io/reason": reason});
    }

    fn strip(&self, value: &mut Value) {
        if !self.verdict.omit_managed_fields {
            return;
        }
        let one = |value: &mut Value| {
            if let Some(metadata) = value.get_mut("metadata").filter(|metadata| metadata.is_object()) {
                object::remove(metadata, "managedFields");
            }
        };
        value.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten().for_each(one);
        one(value);
    }
}

fn micros(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

//! GET of an object and LIST.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use coracle_store::{Entry, Error, ListOptions};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{self, Outgoing};
use super::call::{Call, all_to_version, to_version};
use super::list;
use crate::http::Response;
use crate::kinds::Kind;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::{Cause, Details, Status};
use crate::wire;

/// Objects that are read at once when a selector picks few of many.
const PAGE: usize = 1000;

/// GET.
pub(super) async fn get(call: &Call) -> Result<Response, Status> {
    if !call.kind.stored() {
        let name = &call.route.name;
        let found = made(call).await?.into_iter().find(|object| crate::object::name(object) == name);
        return answer::shaped(call, 200, found.ok_or_else(|| Status::not_found(&call.kind, name))?);
    }
    revision_for_get(call).await?;
    let entry = call.api.store.get(&call.key()).await?;
    let entry = entry.ok_or_else(|| Status::not_found(&call.kind, &call.route.name))?;
    answer::object(call, 200, Outgoing::Stored(entry.value)).await
}

async fn revision_for_get(call: &Call) -> Result<(), Status> {
    match call.query.get("resourceVersion") {
        None | Some("0") => Ok(()),
        Some(text) => not_in_future(call, parse_revision(text)?).await,
    }
}

/// The selectors of a list, watch or deletecollection.
pub(super) struct Selection {
    kind: Arc<Kind>,
    pub(super) labels: LabelSelector,
    pub(super) fields: FieldSelector,
    /// The one name that can match.
    pub(super) name: Option<String>,
    /// Namespace to look in, empty for all.
    pub(super) namespace: String,
    /// Nothing can match.
    pub(super) nothing: bool,
}

impl Selection {
    pub(super) fn parse(call: &Call) -> Result<Self, Status> {
        let labels = LabelSelector::parse(call.query.get("labelSelector").unwrap_or_default())?;
        let custom = crate::crd::selectable_fields(&call.kind);
        let text = call.query.get("fieldSelector").unwrap_or_default();
        let fields = FieldSelector::parse(text, call.kind.strategy.field_labels(), &custom)?;
        let mut name = fields.exact("metadata.name").map(str::to_owned);
        if !call.route.name.is_empty() {
            name = Some(call.route.name.clone());
        }
        let mut namespace = if call.kind.namespaced() { call.route.namespace.clone() } else { String::new() };
        let mut nothing = false;
        if let Some(wanted) = fields.exact("metadata.namespace") {
            nothing = call.kind.namespaced() && !namespace.is_empty() && namespace != wanted;
            if call.kind.namespaced() && namespace.is_empty() {
                namespace = wanted.to_owned();
            }
        }
        let fields = fields.without("metadata.name").without("metadata.namespace");
        Ok(Self { kind: call.kind.clone(), labels, fields, name, namespace, nothing })
    }

    /// Scope in the store: one key when there is one object that can match.
    pub(super) fn scope(&self, call: &Call) -> String {
        match &self.name {
            Some(name) if !call.kind.namespaced() || !self.namespace.is_empty() => call.kind.key(&self.namespace, name),
            _ => call.kind.key_prefix(&self.namespace),
        }
    }

    /// Whether everything in the scope matches.
    pub(super) fn takes_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty() && (self.name.is_none() || !self.namespace.is_empty())
    }

    /// Whether an object matches.
    pub(super) fn matches(&self, object: &Value) -> bool {
        self.name.as_ref().is_none_or(|name| crate::object::name(object) == name)
            && self.labels.matches_object(object)
            && self.fields.matches_object(object)
    }

    /// Which stored objects match, looked into only as far as the selectors ask. Fields are those of the version that was asked for,
    /// which may have other names than the stored one.
    pub(super) async fn matching(&self, stored: &[&[u8]]) -> Result<Vec<bool>, Status> {
        if self.takes_all() {
            return Ok(vec![true; stored.len()]);
        }
        let heads = stored.iter().map(|bytes| self.matches_head(bytes));
        let mut found = heads.collect::<Result<Vec<bool>, Status>>()?;
        if self.fields.is_empty() {
            return Ok(found);
        }
        if answer::is_answer(&self.kind) {
            for (bytes, chosen) in stored.iter().zip(&mut found) {
                *chosen = *chosen && self.fields.may_match(bytes);
            }
        }
        // Values take many times the memory of what is stored: not all at once.
        for (stored, found) in stored.chunks(PAGE).zip(found.chunks_mut(PAGE)) {
            let chosen = stored.iter().zip(&*found).filter(|&(_, &chosen)| chosen);
            let objects = chosen.map(|(bytes, _)| wire::parse_stored(bytes)).collect::<Result<Vec<_>, _>>()?;
            let mut objects = all_to_version(&self.kind, objects).await?.into_iter();
            for chosen in found.iter_mut().filter(|chosen| **chosen) {
                *chosen = objects.next().is_some_and(|object| self.fields.matches_object(&object));
            }
        }
        Ok(found)
    }

    /// The same for one.
    pub(super) async fn matches_stored(&self, bytes: &[u8]) -> Result<bool, Status> {
        Ok(self.matching(&[bytes]).await?.contains(&true))
    }

    /// Whether name and labels match.
    fn matches_head(&self, bytes: &[u8]) -> Result<bool, Status> {
        #[derive(Deserialize)]
        struct Head {
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        struct Metadata {
            #[serde(default)]
            name: String,
            #[serde(default)]
            labels: Option<std::collections::HashMap<String, String>>,
        }
        if self.labels.is_empty() && self.name.is_none() {
            return Ok(true);
        }
        let head: Head = serde_json::from_slice(bytes).map_err(Status::internal)?;
        let labels = head.metadata.labels.unwrap_or_default();
        Ok(self.name.as_ref().is_none_or(|name| head.metadata.name == *name)
            && self.labels.matches(|key| labels.get(key).map(String::as_str)))
    }
}

/// A place in a paged list, as clients hand it back.
#[derive(serde::Serialize, Deserialize)]
struct Token {
    v: String,
    rv: u64,
    start: String,
}

impl Token {
    fn encode(revision: u64, start: &str) -> String {
        let token = Token { v: "meta.k8s.io/v1".into(), rv: revision, start: start.into() };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).expect("a token is plain data"))
    }

    fn decode(text: &str) -> Result<Self, Status> {
        let wrong = || Status::bad_request("continue key is not valid: the token is malformed");
        let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| wrong())?;
        serde_json::from_slice(&bytes).map_err(|_| wrong())
    }
}

/// Objects of one answer.
pub(super) struct Page {
    pub(super) entries: Vec<Entry>,
    pub(super) revision: u64,
    /// Continue token, when there is more.
    pub(super) next: Option<String>,
    pub(super) remaining: Option<u64>,
}

pub(super) fn parse_revision(text: &str) -> Result<u64, Status> {
    text.parse().map_err(|_| {
        Status::bad_request(format!(
            "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
        ))
    })
}

/// Waits for nothing: a revision that is not there yet is an error that the client may retry.
async fn not_in_future(call: &Call, asked: u64) -> Result<(), Status> {
    let current = call.api.store.revision().await?;
    if asked <= current { Ok(()) } else { Err(too_large(asked, current)) }
}

fn too_large(asked: u64, current: u64) -> Status {
    let message = format!("Too large resource version: {asked}, current: {current}");
    Status::new(504, "Timeout", message).with(Details {
        causes: vec![Cause {
            reason: "ResourceVersionTooLarge".into(),
            message: "Too large resource version".into(),
            ..Cause::default()
        }],
        retry_after_seconds: 1,
        ..Details::default()
    })
}

/// Revision that a list is read at; `None` for the newest.
async fn revision_for_list(call: &Call, paging: bool) -> Result<Option<u64>, Status> {
    let version = call.query.get("resourceVersion");
    let matching = call.query.get("resourceVersionMatch");
    let forbidden = |why: &str| {
        Err(Status::new(
            422,
            "Invalid",
            format!("ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: {why}"),
        ))
    };
    match (matching, version) {
        (Some(_), None) if !call.query.flag("sendInitialEvents") => {
            forbidden("resourceVersionMatch is forbidden unless resourceVersion is provided")
        }
        (Some(_), _) if paging => forbidden("resourceVersionMatch is forbidden when continue is provided"),
        (Some("Exact"), Some("0")) => {
            forbidden("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"")
        }
        (Some("Exact"), Some(text)) => Ok(Some(parse_revision(text)?)),
        (Some("NotOlderThan") | None, Some(text)) => {
            let asked = parse_revision(text)?;
            // Without a match a limited list is of exactly this revision.
            if matching.is_none() && asked > 0 && call.query.get("limit").is_some_and(|limit| limit != "0") {
                return Ok(Some(asked));
            }
            not_in_future(call, asked).await?;
            Ok(None)
        }
        (Some(other), _) if other != "NotOlderThan" => Err(Status::new(
            422,
            "Invalid",
            format!(
                "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
            ),
        )),
        _ => Ok(None),
    }
}

/// Reads the objects that a list asks for.
pub(super) async fn page(call: &Call, selection: &Selection) -> Result<Page, Status> {
    let limit = match call.query.get("limit") {
        None => 0,
        Some(text) => text.parse::<usize>().map_err(|_| {
            Status::bad_request(format!("limit: Invalid value: {text:?}: must be a non-negative integer"))
        })?,
    };
    let token = call.query.get("continue").map(Token::decode).transpose()?;
    let mut revision = match &token {
        Some(_) if call.query.get("resourceVersion").is_some_and(|v| v != "0") => {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        Some(token) => (token.rv > 0).then_some(token.rv),
        None => revision_for_list(call, false).await?,
    };
    let scope = selection.scope(call);
    let mut start_after = token.map(|token| format!("{}{}", call.kind.prefix, token.start));
    let mut entries = Vec::new();
    if selection.nothing {
        let revision = call.api.store.revision().await?;
        return Ok(Page { entries, revision, next: None, remaining: None });
    }
    loop {
        let all = selection.takes_all();
        let wanted = match limit {
            0 => 0,
            limit if all => limit - entries.len(),
            _ => PAGE,
        };
        let options = ListOptions { limit: wanted, start_after: start_after.take(), revision };
        let listing = match call.api.store.list(&scope, options.clone()).await {
            Err(Error::Compacted { .. }) if call.query.get("continue").is_some() => {
                return Err(expired_continue(
                    options.start_after.as_deref().and_then(|key| key.strip_prefix(&call.kind.prefix)),
                ));
            }
            Err(Error::Compacted { requested, oldest }) => {
                return Err(Status::expired(format!(
                    "The provided resource version is too old: {requested} ({oldest})"
                )));
            }
            Err(Error::Future { requested, newest }) => return Err(too_large(requested, newest)),
            other => other?,
        };
        revision = Some(listing.revision);
        let count = listing.entries.len();
        let mut full_at = None;
        let stored: Vec<&[u8]> = listing.entries.iter().map(|entry| &*entry.value).collect();
        let chosen = selection.matching(&stored).await?;
        for (at, (entry, chosen)) in listing.entries.into_iter().zip(chosen).enumerate() {
            if chosen {
                entries.push(entry);
                if limit > 0 && entries.len() == limit && (at + 1 != count || listing.more) {
                    full_at = Some(at);
                    break;
                }
            } else if limit > 0 && at + 1 == count && listing.more {
                start_after = Some(entry.key.to_string());
            }
        }
        let revision = listing.revision;
        if full_at.is_some() {
            let last = entries.last().map(|entry| entry.key.to_string()).unwrap_or_default();
            let start = last.strip_prefix(&call.kind.prefix).unwrap_or_default();
            let remaining = all.then_some(listing.remaining).filter(|&n| n > 0);
            return Ok(Page { next: Some(Token::encode(revision, start)), remaining, entries, revision });
        }
        if !listing.more {
            return Ok(Page { entries, revision, next: None, remaining: None });
        }
        start_after = start_after.or_else(|| entries.last().map(|entry| entry.key.to_string()));
    }
}

/// 410 with a token that goes on at the newest revision.
fn expired_continue(start: Option<&str>) -> Status {
    let mut status = Status::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list without \
         the continue parameter, or use the continue token in this response to retrieve the remainder of the results. \
         Continuing with the provided token results in an inconsistent list - objects that were created, modified, or \
         deleted between the time the first chunk was returned and now may show up in the list.",
    );
    status.continue_token = start.map(|start| Token::encode(0, start));
    status
}

/// LIST.
pub(super) async fn list(call: &Call) -> Result<Response, Status> {
    if !call.kind.stored() {
        let selection = Selection::parse(call)?;
        let mut items = made(call).await?;
        items.retain(|item| !selection.nothing && selection.matches(item));
        return answer::list(call, &items, json!({}));
    }
    let selection = Selection::parse(call)?;
    let page = page(call, &selection).await?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(next) = &page.next {
        metadata["continue"] = next.as_str().into();
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = remaining.into();
    }
    list::respond(call, page.entries, metadata).await
}

/// The objects of a kind that is not stored, as they are now.
async fn made(call: &Call) -> Result<Vec<Value>, Status> {
    call.kind.strategy.answer_list(&call.context(crate::context::Operation::Connect, "")).await
}

/// A stored object in the version of a row.
pub(super) async fn decode_entry(call: &Call, entry: &Entry) -> Result<Value, Status> {
    to_version(&call.kind, wire::parse_stored(&entry.value)?).await
}

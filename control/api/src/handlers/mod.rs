//! The generic request path: authenticate, authorise, find the row, negotiate, run one of the handlers, answer.

mod answer;
mod call;
mod compress;
mod delete;
mod frames;
mod list;
mod managed;
mod patch;
mod read;
mod subresource;
mod update;
mod watch;
mod write;

use std::sync::Arc;
use std::time::Instant;

use http::HeaderValue;
use http::header::{HeaderName, WWW_AUTHENTICATE};

pub(crate) use answer::partial;
pub(crate) use call::{Call, convert};
pub(crate) use delete::{Options, preconditions};
pub(crate) use frames::Frames;
pub(crate) use subresource::{body_kind, selector_text};

use crate::authz::{Attributes, Decision};
use crate::http::{Media, Query, ReqBody, Response, Route, Shape, Verb, status_response};
use crate::kinds::Kind;
use crate::server::{ApiServer, Caller};
use crate::status::Status;
use crate::user::UserInfo;
use crate::{audit, authn, discovery, flow, health, metrics, proxy};

/// Longest list of `Warning` headers of one answer, in bytes; what comes after is left out.
const WARNINGS_BYTES: usize = 4096;

/// A request on its way: what is known of it so far, for the audit log, the metrics and the answer's headers.
struct Exchange {
    audit_id: String,
    route: Route,
    query: Query,
    audit: Option<audit::Entry>,
    /// How priority and fairness classified it.
    schema: Option<Arc<flow::Schema>>,
    kind: Option<Arc<Kind>>,
}

/// Answers one request, whatever it is.
pub(crate) async fn respond(api: Arc<ApiServer>, caller: Caller, request: http::Request<ReqBody>) -> Response {
    let began = Instant::now();
    let accepts_gzip = compress::accepted(request.headers());
    let (parts, body) = request.into_parts();
    let query = Query::parse(parts.uri.query());
    let route = Route::parse(&parts.method, parts.uri.path(), &query);
    let audit_id = uuid::Uuid::new_v4().to_string();
    let dry_run = query.has("dryRun");
    let in_flight = metrics::InFlight::new(&route);
    let mut exchange = Exchange { audit_id, route, query, audit: None, schema: None, kind: None };
    let mut response = match handle(api.clone(), caller, parts, body, &mut exchange).await {
        Ok(response) => response,
        Err(status) => {
            let mut response = status_response(&status);
            if status.code == 401 {
                response
                    .headers_mut()
                    .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"kubernetes-master\""));
            }
            response
        }
    };
    let code = response.status().as_u16();
    metrics::answered(&exchange.route, exchange.kind.as_deref(), dry_run, code, began.elapsed());
    drop(in_flight);
    if let (Some(audit), Some(entry)) = (api.audit.get(), exchange.audit) {
        response = audit.end(entry, response).await;
    }
    if let Some(running) = metrics::LongRunning::new(&exchange.route, exchange.kind.as_deref()) {
        response = proxy::hold(running, response);
    }
    if let Ok(id) = HeaderValue::from_str(&exchange.audit_id) {
        response.headers_mut().insert(HeaderName::from_static("audit-id"), id);
    }
    if let Some(schema) = exchange.schema {
        flow::mark(&schema, response.headers_mut());
    }
    if accepts_gzip { compress::compress(response) } else { response }
}

async fn handle(
    api: Arc<ApiServer>,
    caller: Caller,
    parts: http::request::Parts,
    body: ReqBody,
    exchange: &mut Exchange,
) -> Result<Response, Status> {
    let (route, query) = (&exchange.route, &exchange.query);
    let local = matches!(caller, Caller::Local(_));
    let (sender, acting, peer) = match caller {
        Caller::Local(user) => (user, None, None),
        Caller::Remote { certificate, peer } => {
            let sender = api.authn.authenticate(&api, certificate, &parts.headers, &route.path).await?;
            let asked = attributes(&sender, route, query);
            let acting = authn::impersonate(api.authorizer().as_ref(), &parts.headers, &asked)?;
            (sender, acting, peer)
        }
    };
    let user = acting.as_ref().map_or(&sender, |acting| &acting.user).clone();
    exchange.audit = api
        .audit
        .get()
        .and_then(|audit| audit.begin(&exchange.audit_id, &sender, acting.as_ref(), peer, route, &parts));
    let stays_open = route.resource.as_ref().is_some_and(|r| proxy::stays_open(&r.subresource));
    let schema = if local || stays_open { None } else { api.flow.classify(&user, route) };
    let seat = match schema {
        Some(schema) => Some(api.flow.enter(exchange.schema.insert(schema), &user, route).await?),
        None => None,
    };
    let allowed = authorize(&api, &user, route, query);
    if let Some(entry) = &mut exchange.audit {
        entry.decided(&allowed);
    }
    allowed?;
    if let Some(backend) = crate::aggregate::document_target(&api, route) {
        return crate::aggregate::pass_on(&api, &user, &backend, parts, body).await;
    }
    let Some(resource) = route.resource.clone() else {
        if route.path == crate::node::TUNNEL_PATH {
            return crate::node::open_tunnel(&api, &user, parts);
        }
        return plain(&api, &user, route, &parts, query, body).await;
    };
    if let Some(service) = crate::aggregate::target(&api, &resource.group, &resource.version) {
        return crate::aggregate::pass_on(&api, &user, &service, parts, body).await;
    }
    let kind = api
        .kind(&resource.group, &resource.version, &resource.resource)
        .filter(|kind| kind.served)
        .ok_or_else(Status::no_such_resource)?;
    exchange.kind = Some(Arc::clone(&kind));
    if kind.namespaced() == resource.namespace.is_empty() && kind.resource != "namespaces" {
        let across = matches!(resource.verb, Verb::List | Verb::Watch)
            && resource.namespace.is_empty()
            && resource.name.is_empty();
        // Reviews may be posted without a namespace only when they have none; lists may span all namespaces.
        if !across {
            return Err(Status::no_such_resource());
        }
    }
    let query = std::mem::take(&mut exchange.query);
    if !resource.subresource.is_empty() && proxy::is_streaming(&kind, &resource.subresource) {
        return proxy::connect(&api, user, kind, resource, parts, query, body).await;
    }
    let media = Media::negotiate(&parts.headers, &query, kind.has_protobuf())?;
    // Who has no columns has no table, and what is never stored has no metadata.
    if !kind.stored() && kind.columns.is_empty() && media.shape != Shape::Plain {
        return Err(Status::not_acceptable(&crate::http::SERVED));
    }
    let mut call = Call::new(api, user, kind, resource, query, media, &parts.headers)?;
    call.seat = seat;
    let body = match &mut exchange.audit {
        Some(entry) => entry.request(body, &call.content_type).await?,
        None => body,
    };
    let mut response = dispatch(&mut call, body).await?;
    // Whoever made a definition finds its resource served.
    if crate::crd::is_definition(&call.kind)
        && !matches!(call.route.verb, Verb::Get | Verb::List | Verb::Watch)
        && !call.dry_run
    {
        crate::crd::reload(&call.api).await?;
    }
    warnings(&call, &mut response);
    Ok(response)
}

async fn dispatch(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    if !call.route.subresource.is_empty() {
        return subresource::handle(call, body).await;
    }
    let verb = call.route.verb;
    if !call.kind.has_verb(verb.as_str()) {
        return Err(Status::no_such_method());
    }
    match verb {
        Verb::Get => read::get(call).await,
        Verb::List => read::list(call).await,
        Verb::Watch => watch::watch(call).await,
        Verb::Create if call.route.name.is_empty() => write::create(call, body).await,
        Verb::Create | Verb::Options => Err(Status::no_such_method()),
        Verb::Update => update::replace(call, body).await,
        Verb::Patch => patch::patch(call, body).await,
        Verb::Delete => delete::delete(call, body).await,
        Verb::DeleteCollection => delete::collection(call, body).await,
    }
}

/// Paths that are not about resources.
async fn plain(
    api: &Arc<ApiServer>,
    user: &UserInfo,
    route: &Route,
    parts: &http::request::Parts,
    query: &Query,
    body: ReqBody,
) -> Result<Response, Status> {
    if parts.method != http::Method::GET && parts.method != http::Method::HEAD {
        let _ = body;
        return Err(Status::no_such_resource());
    }
    if let Some(response) = health::answer(api, &route.path, query).await {
        return Ok(response);
    }
    if let Some(response) = api.authn.discovery(api, &route.path) {
        return Ok(response);
    }
    discovery::answer(api, user, &route.path, &parts.headers, query).await
}

/// 403 unless the user may do it.
fn authorize(api: &ApiServer, user: &UserInfo, route: &Route, query: &Query) -> Result<String, Status> {
    let attributes = attributes(user, route, query);
    match api.authorizer().authorize(&attributes) {
        Decision::Allow(reason) => Ok(reason),
        Decision::Deny(reason) | Decision::NoOpinion(reason) => Err(denied(&attributes, &reason)),
    }
}

/// The name that a field selector asks for.
fn selected_name(selector: &str) -> Option<&str> {
    let names = selector.split(',').filter_map(|part| part.strip_prefix("metadata.name="));
    names.map(|name| name.strip_prefix('=').unwrap_or(name)).find(|name| !name.is_empty())
}

fn attributes<'a>(user: &'a UserInfo, route: &'a Route, query: &'a Query) -> Attributes<'a> {
    let none = "";
    let mut attributes = match &route.resource {
        Some(r) => Attributes {
            user,
            verb: r.verb.as_str(),
            is_resource: true,
            group: &r.group,
            version: &r.version,
            resource: &r.resource,
            subresource: &r.subresource,
            namespace: &r.namespace,
            name: &r.name,
            path: &route.path,
        },
        None => Attributes {
            user,
            verb: route.verb,
            is_resource: false,
            group: none,
            version: none,
            resource: none,
            subresource: none,
            namespace: none,
            name: none,
            path: &route.path,
        },
    };
    // Listing or watching one object by its name is asked about that object (apiserver `RequestInfo`).
    if attributes.is_resource
        && attributes.name.is_empty()
        && matches!(attributes.verb, "list" | "watch" | "deletecollection")
    {
        attributes.name = query.get("fieldSelector").and_then(selected_name).unwrap_or_default();
    }
    attributes
}

/// The 403 of an unauthorised request, in the usual words.
pub(crate) fn denied(a: &Attributes<'_>, reason: &str) -> Status {
    let tail = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    let user = &a.user.name;
    if !a.is_resource {
        let message = format!("forbidden: User {user:?} cannot {} path {:?}{tail}", a.verb, a.path);
        return Status::new(403, "Forbidden", message).with(crate::status::Details::default());
    }
    let resource =
        if a.subresource.is_empty() { a.resource.to_owned() } else { format!("{}/{}", a.resource, a.subresource) };
    let scope = if a.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", a.namespace)
    };
    let qualified = if a.group.is_empty() { a.resource.to_owned() } else { format!("{}.{}", a.resource, a.group) };
    let subject = if a.name.is_empty() { qualified } else { format!("{qualified} {:?}", a.name) };
    let message = format!(
        "{subject} is forbidden: User {user:?} cannot {} resource {resource:?} in API group {:?} {scope}{tail}",
        a.verb, a.group
    );
    Status::new(403, "Forbidden", message).with(crate::status::Details {
        name: a.name.into(),
        group: a.group.into(),
        kind: a.resource.into(),
        ..Default::default()
    })
}

/// `Warning` headers, as RFC 7234 has them.
fn warnings(call: &Call, response: &mut Response) {
    let mut left = WARNINGS_BYTES;
    let mut seen: Vec<&str> = Vec::new();
    for sentence in &call.warnings {
        if seen.contains(&sentence.as_str()) {
            continue;
        }
        seen.push(sentence);
        let clean: String = sentence.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let text = format!("299 - \"{}\"", clean.replace('\\', "\\\\").replace('"', "\\\""));
        if text.len() > left {
            break;
        }
        left -= text.len();
        if let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) {
            response.headers_mut().append(http::header::WARNING, value);
        }
    }
}

/// Deletes the pod of an eviction.
pub(crate) async fn delete_pod(call: &mut Call, options: &Options) -> Result<(), Status> {
    let (key, name) = (call.key(), call.route.name.clone());
    delete::one(call, &key, &name, options).await.map(|_| ())
}

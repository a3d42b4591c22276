//! What the server counts, by the names and labels of a real API server.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::http::{Response, Route, Verb, bytes_response};
use crate::kinds::Kind;
use crate::server::ApiServer;

/// Upper bounds of durations, in seconds.
const BUCKETS: [f64; 14] = [0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0];
/// What a request is counted by.
const REQUEST: [&str; 7] = ["verb", "group", "version", "resource", "subresource", "scope", "dry_run"];

struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    durations: HistogramVec,
    rejected: IntCounterVec,
    dispatched: IntCounterVec,
    inflight: IntGaugeVec,
    long_running: IntGaugeVec,
    nominal: IntGaugeVec,
    executing: IntGaugeVec,
    waiting: IntGaugeVec,
    build: IntGaugeVec,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, labels: &[&str]| {
        let made = IntGaugeVec::new(Opts::new(name, help), labels).expect("a valid name");
        add(&registry, &made);
        made
    };
    let counter = |name: &str, help: &str, labels: &[&str]| {
        let made = IntCounterVec::new(Opts::new(name, help).const_label("component", "apiserver"), labels)
            .expect("a valid name");
        add(&registry, &made);
        made
    };
    let seconds =
        HistogramOpts::new("apiserver_request_duration_seconds", "Time to the head of the answer; not of watches.")
            .const_label("component", "apiserver")
            .buckets(BUCKETS.to_vec());
    let durations = HistogramVec::new(seconds, &REQUEST).expect("a valid name");
    add(&registry, &durations);
    let schema = ["flow_schema", "priority_level"];
    Metrics {
        requests: counter(
            "apiserver_request_total",
            "Requests that were answered.",
            &[&REQUEST[..], &["code"]].concat(),
        ),
        durations,
        rejected: counter(
            "apiserver_flowcontrol_rejected_requests_total",
            "Requests turned away by priority and fairness.",
            &[&schema[..], &["reason"]].concat(),
        ),
        dispatched: counter(
            "apiserver_flowcontrol_dispatched_requests_total",
            "Requests let through by priority and fairness.",
            &schema,
        ),
        inflight: gauge("apiserver_current_inflight_requests", "Requests in flight.", &["request_kind"]),
        long_running: gauge("apiserver_longrunning_requests", "Requests that stay open.", &REQUEST[..6]),
        nominal: gauge("apiserver_flowcontrol_nominal_limit_seats", "Seats by shares.", &["priority_level"]),
        executing: gauge("apiserver_flowcontrol_current_executing_seats", "Seats in use.", &["priority_level"]),
        waiting: gauge("apiserver_flowcontrol_current_inqueue_requests", "Requests that wait.", &["priority_level"]),
        build: gauge("kubernetes_build_info", "Version of the API.", &["git_version", "platform"]),
        registry,
    }
});

fn add(registry: &Registry, metric: &(impl Collector + Clone + 'static)) {
    registry.register(Box::new(metric.clone())).expect("names are used once");
}

/// A request in flight, as it is counted.
pub(crate) struct InFlight(&'static str);

impl InFlight {
    pub(crate) fn new(route: &Route) -> Self {
        let reads = route.resource.as_ref().is_none_or(|r| matches!(r.verb, Verb::Get | Verb::List | Verb::Watch));
        let kind = if reads { "readOnly" } else { "mutating" };
        METRICS.inflight.with_label_values(&[kind]).inc();
        Self(kind)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        METRICS.inflight.with_label_values(&[self.0]).dec();
    }
}

/// A request that stays open, as it is counted: a watch, or what is passed on to a node.
pub(crate) struct LongRunning(IntGauge);

impl LongRunning {
    /// `None` for a request that ends by itself.
    pub(crate) fn new(route: &Route, kind: Option<&Kind>) -> Option<Self> {
        let resource = route.resource.as_ref()?;
        let connects = matches!(resource.subresource.as_str(), "attach" | "exec" | "log" | "portforward" | "proxy");
        if resource.verb != Verb::Watch && !connects {
            return None;
        }
        let [verb, group, version, name, subresource, scope] = labels(route, kind);
        let verb = if verb == "WATCH" || subresource == "log" { verb } else { "CONNECT" };
        let gauge = METRICS.long_running.with_label_values(&[verb, group, version, name, subresource, scope]);
        gauge.inc();
        Some(Self(gauge))
    }
}

impl Drop for LongRunning {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts an answer.
pub(crate) fn answered(route: &Route, kind: Option<&Kind>, dry_run: bool, code: u16, took: Duration) {
    let [a, b, c, d, e, f] = labels(route, kind);
    let dry_run = if dry_run { "All" } else { "" };
    let mut digits = [0; 3];
    let code = digits_of(code, &mut digits);
    METRICS.requests.with_label_values(&[a, b, c, d, e, f, dry_run, code]).inc();
    if a != "WATCH" {
        METRICS.durations.with_label_values(&[a, b, c, d, e, f, dry_run]).observe(took.as_secs_f64());
    }
}

/// What a request is counted by, but for `dry_run`. Resources count by name only when there are such: a client cannot make
/// labels.
fn labels<'a>(route: &'a Route, kind: Option<&'a Kind>) -> [&'a str; 6] {
    let resource = route.resource.as_ref();
    let verb = match resource.map(|r| r.verb) {
        Some(Verb::Get) => "GET",
        Some(Verb::List) => "LIST",
        Some(Verb::Watch) => "WATCH",
        Some(Verb::Create) => "POST",
        Some(Verb::Update) => "PUT",
        Some(Verb::Patch) => "PATCH",
        Some(Verb::Delete) => "DELETE",
        Some(Verb::DeleteCollection) => "DELETECOLLECTION",
        None if route.verb == "get" => "GET",
        Some(Verb::Options) | None => "other",
    };
    let scope = match resource {
        None => "",
        Some(r) if !r.name.is_empty() || r.verb == Verb::Create => "resource",
        Some(r) if !r.namespace.is_empty() => "namespace",
        Some(_) => "cluster",
    };
    match (kind, resource) {
        (Some(kind), Some(r)) => {
            let known = kind.subresource(&r.subresource).map(|s| s.name.as_str()).unwrap_or_default();
            [verb, &kind.group, &kind.version, &kind.resource, known, scope]
        }
        _ => [verb, "", "", "", "", scope],
    }
}

/// A status code as text, without an allocation.
fn digits_of(code: u16, digits: &mut [u8; 3]) -> &str {
    for (at, unit) in [100, 10, 1].into_iter().enumerate() {
        digits[at] = b'0' + u8::try_from(code / unit % 10).unwrap_or_default();
    }
    std::str::from_utf8(digits).unwrap_or_default()
}

/// Counts a request that priority and fairness turned away.
pub(crate) fn rejected(schema: &str, level: &str, reason: &str) {
    METRICS.rejected.with_label_values(&[schema, level, reason]).inc();
}

/// Counts one that it let through.
pub(crate) fn dispatched(schema: &str, level: &str) {
    METRICS.dispatched.with_label_values(&[schema, level]).inc();
}

/// `/metrics`.
pub(crate) async fn answer(api: &ApiServer) -> Response {
    for gauge in [&METRICS.nominal, &METRICS.executing, &METRICS.waiting] {
        gauge.reset();
    }
    for level in api.flow.levels() {
        for (gauge, value) in
            [(&METRICS.nominal, level.nominal), (&METRICS.executing, level.in_use), (&METRICS.waiting, level.waiting)]
        {
            gauge.with_label_values(&[level.name.as_str()]).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
    METRICS.build.with_label_values(&[crate::git_version().as_str(), std::env::consts::OS]).set(1);
    let mut text = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&METRICS.registry.gather(), &mut text) {
        tracing::error!(%error, "write the metrics");
    }
    if let Ok(revision) = api.store.revision().await {
        let line = format!(
            "# HELP coracle_store_revision Newest revision of the store.\n# TYPE coracle_store_revision counter\n\
             coracle_store_revision {revision}\n"
        );
        text.extend_from_slice(line.as_bytes());
    }
    bytes_response(200, prometheus::TEXT_FORMAT, text)
}

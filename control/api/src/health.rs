//! `/healthz`, `/livez`, `/readyz`, with `?verbose`, `?exclude` and one path a check; `/version`; `/metrics`.

use std::sync::Arc;

use serde_json::json;

use crate::http::{Query, Response, json_response, text_response};
use crate::server::ApiServer;

/// Version of the API that is served.
pub const KUBERNETES_VERSION: &str = "v1.36.0";

const CHECKS: [&str; 4] = ["ping", "log", "store", "shutdown"];

/// Answers when the path is one of these.
pub(crate) async fn answer(api: &Arc<ApiServer>, path: &str, query: &Query) -> Option<Response> {
    if path == "/version" || path == "/version/" {
        return Some(version());
    }
    if path == "/metrics" {
        return Some(crate::metrics::answer(api).await);
    }
    let trimmed = path.trim_end_matches('/');
    let (name, check) = match trimmed.strip_prefix('/')?.split_once('/') {
        Some((name, check)) => (name, Some(check)),
        None => (trimmed.strip_prefix('/')?, None),
    };
    if !matches!(name, "healthz" | "livez" | "readyz") {
        return None;
    }
    if check.is_some_and(|check| !CHECKS.contains(&check)) {
        return None;
    }
    let excluded: Vec<&str> = query.all("exclude").collect();
    let mut lines = String::new();
    let mut failed = false;
    for one in CHECKS.into_iter().filter(|one| check.is_none_or(|check| check == *one)) {
        // A server that stops is alive, but not ready.
        if one == "shutdown" && name != "readyz" {
            continue;
        }
        if excluded.contains(&one) {
            lines.push_str(&format!("[+]{one} excluded: ok\n"));
            continue;
        }
        match run(api, one).await {
            Ok(()) => lines.push_str(&format!("[+]{one} ok\n")),
            Err(why) => {
                failed = true;
                tracing::warn!(check = one, %why, "health");
                lines.push_str(&format!("[-]{one} failed: reason withheld\n"));
            }
        }
    }
    Some(match (failed, query.has("verbose")) {
        (true, _) => text_response(500, format!("{lines}{name} check failed\n")),
        (false, true) => text_response(200, format!("{lines}{name} check passed\n")),
        (false, false) => text_response(200, "ok"),
    })
}

async fn run(api: &ApiServer, check: &str) -> Result<(), String> {
    match check {
        "store" => api.store.revision().await.map(|_| ()).map_err(|error| error.to_string()),
        "shutdown" if api.shutdown.is_cancelled() => Err("process is shutting down".into()),
        _ => Ok(()),
    }
}

fn version() -> Response {
    let mut parts = KUBERNETES_VERSION.trim_start_matches('v').split('.');
    json_response(
        200,
        &json!({
            "major": parts.next(), "minor": parts.next(),
            "emulationMajor": "1", "emulationMinor": "36", "minCompatibilityMajor": "1", "minCompatibilityMinor": "35",
            "gitVersion": git_version(), "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none", "compiler": "rustc",
            "platform": format!("{}/{}", std::env::consts::OS, arch()),
        }),
    )
}

/// `v1.36.0+coracle0.1.0`, as nodes and `/version` report it.
pub fn git_version() -> String {
    format!("{KUBERNETES_VERSION}+coracle{}", env!("CARGO_PKG_VERSION"))
}

/// The architecture by Go's name.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

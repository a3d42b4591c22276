//! The rows of the built-in kinds, read from `resources.tsv` and `columns.tsv`.

use std::sync::{Arc, OnceLock};

use crate::kinds::{Column, Kind, Scope, Subresource, strategies};

/// group, version, resource, singular, kind, scope, short names, categories, verbs, subresources.
const RESOURCES: &str = include_str!("resources.tsv");
/// group, version, resource, column, type, format, priority.
const COLUMNS: &str = include_str!("columns.tsv");

/// All built-in rows, in the order of the table.
pub fn builtin() -> &'static [Arc<Kind>] {
    static ROWS: OnceLock<Vec<Arc<Kind>>> = OnceLock::new();
    ROWS.get_or_init(|| lines(RESOURCES).map(|line| Arc::new(row(line))).collect())
}

fn lines(table: &'static str) -> impl Iterator<Item = &'static str> {
    table.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn list(field: &str, separator: char) -> Vec<String> {
    field.split(separator).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

fn row(line: &'static str) -> Kind {
    let fields: Vec<&str> = line.split('\t').collect();
    let field = |n: usize| fields.get(n).copied().unwrap_or_default();
    let (shown_group, version, resource, kind) = (field(0), field(1), field(2), field(4));
    let group = if shown_group == "core" { "" } else { shown_group };
    let columns = lines(COLUMNS)
        .map(|line| line.split('\t').collect::<Vec<_>>())
        .filter(|c| c.len() > 6 && c[0] == shown_group && c[1] == version && c[2] == resource)
        .map(|c| Column {
            name: c[3].into(),
            type_: c[4].into(),
            format: c[5].into(),
            description: crate::table::description(group, resource, c[3]).into(),
            priority: c[6].trim().parse().unwrap_or(0),
            json_path: None,
        })
        .collect();
    let stored = list(field(8), ',').iter().any(|verb| verb == "update");
    let (storage_group, storage_version) = match (group, resource) {
        ("events.k8s.io", "events") => ("", "v1"),
        ("autoscaling", "horizontalpodautoscalers") => (group, "v2"),
        _ => (group, version),
    };
    let prefix = match (stored, storage_group) {
        (false, _) => String::new(),
        (true, "") => format!("/registry/{resource}/"),
        (true, _) => format!("/registry/{storage_group}/{resource}/"),
    };
    Kind {
        group: group.into(),
        version: version.into(),
        resource: resource.into(),
        singular: field(3).into(),
        kind: kind.into(),
        list_kind: format!("{kind}List"),
        scope: if field(5) == "Cluster" { Scope::Cluster } else { Scope::Namespaced },
        short_names: list(field(6), ','),
        categories: list(field(7), ','),
        verbs: list(field(8), ','),
        subresources: list(field(9), ';').iter().map(|text| subresource(group, version, text)).collect(),
        columns,
        schema_name: schema_name(group, version, kind),
        schema: OnceLock::new(),
        strategy: strategies::strategy(group, resource),
        prefix,
        storage_version: storage_version.into(),
        storage_group: storage_group.into(),
        conversion: crate::convert::builtin(group, resource),
        crd: None,
        deprecation: deprecation(group, version, resource),
        differs_when_read: false,
        served: true,
    }
}

/// `status(Pod:get,patch,update)`.
fn subresource(group: &str, version: &str, text: &str) -> Subresource {
    let (name, rest) = text.split_once('(').unwrap_or((text, ""));
    let (kind, verbs) = rest.trim_end_matches(')').split_once(':').unwrap_or((rest, ""));
    let (group, version) = match kind {
        "Scale" => ("autoscaling", "v1"),
        "Eviction" => ("policy", "v1"),
        "TokenRequest" => ("authentication.k8s.io", "v1"),
        _ => (group, version),
    };
    Subresource {
        name: name.into(),
        kind: kind.into(),
        group: group.into(),
        version: version.into(),
        verbs: list(verbs, ','),
    }
}

/// Go package of a group's types, as OpenAPI definition names have it.
pub(crate) fn schema_name(group: &str, version: &str, kind: &str) -> String {
    match group {
        "" => format!("io.k8s.api.core.{version}.{kind}"),
        "apiregistration.k8s.io" => format!("io.k8s.kube-aggregator.pkg.apis.apiregistration.{version}.{kind}"),
        "apiextensions.k8s.io" => format!("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.{version}.{kind}"),
        crate::usage::GROUP => format!("io.k8s.metrics.pkg.apis.metrics.{version}.{kind}"),
        _ => {
            let short = group.split('.').next().unwrap_or(group);
            format!("io.k8s.api.{short}.{version}.{kind}")
        }
    }
}

fn deprecation(group: &str, version: &str, resource: &str) -> Option<String> {
    match (group, version, resource) {
        ("", "v1", "componentstatuses") => Some("v1 ComponentStatus is deprecated in v1.19+".into()),
        ("", "v1", "endpoints") => {
            Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".into())
        }
        _ => None,
    }
}

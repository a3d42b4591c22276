//! Paths and operations of resources.

use serde_json::{Map, Value, json};

use super::{Flavour, META, Resource, Subresource};

/// Media types that every answer can have.
const PRODUCES: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const PATCHES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// Query parameters of an action: name, type, what it does.
type Parameter = (&'static str, &'static str, &'static str);
const PRETTY: Parameter = ("pretty", "string", "If 'true', then the output is pretty printed.");
const DRY_RUN: Parameter = ("dryRun", "string", "Says that changes are not to be kept; 'All' runs every stage.");
const FIELD_MANAGER: Parameter = ("fieldManager", "string", "Name of the actor that makes the changes.");
const FIELD_VALIDATION: Parameter =
    ("fieldValidation", "string", "What to do with unknown and duplicate fields: 'Ignore', 'Warn' or 'Strict'.");
const FORCE: Parameter = ("force", "boolean", "Apply takes over fields that others own.");
const LIST: [Parameter; 10] = [
    ("allowWatchBookmarks", "boolean", "Asks for bookmark events."),
    ("continue", "string", "Token of the next page."),
    ("fieldSelector", "string", "Restricts by fields."),
    ("labelSelector", "string", "Restricts by labels."),
    ("limit", "integer", "Most items of a page."),
    ("resourceVersion", "string", "From which version on."),
    ("resourceVersionMatch", "string", "How the version is meant."),
    ("sendInitialEvents", "boolean", "A watch begins with what is."),
    ("timeoutSeconds", "integer", "How long a list or watch may take."),
    ("watch", "boolean", "Watches for changes."),
];
const DELETE: [Parameter; 5] = [
    DRY_RUN,
    ("gracePeriodSeconds", "integer", "Seconds before the object is deleted."),
    ("ignoreStoreReadErrorWithClusterBreakingPotential", "boolean", "Deletes objects that cannot be read."),
    ("orphanDependents", "boolean", "Deprecated: use propagationPolicy."),
    ("propagationPolicy", "string", "How dependents are deleted: 'Orphan', 'Background' or 'Foreground'."),
];

/// One operation before it is written.
struct Operation<'a> {
    verb: &'a str,
    /// `x-kubernetes-action`
    action: &'a str,
    id: String,
    words: String,
    kind: [&'a str; 3],
    body: Option<String>,
    answer: String,
    /// The verb creates or changes, so it may answer 201.
    writes: bool,
}

pub(super) fn add(paths: &mut Map<String, Value>, resource: &Resource<'_>, flavour: Flavour) {
    let root = resource.root();
    let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{root}{scope}/{}", resource.plural);
    let item = format!("{collection}/{{name}}");
    let word = id_words(resource);
    let spaced = if resource.namespaced { "Namespaced" } else { "" };
    let kind = [resource.group, resource.version, resource.kind];
    let (own, list) = (resource.definition(), resource.list_definition());
    let status = format!("{META}Status");
    let serves = |verb: &str| resource.verbs.contains(&verb);
    let operation = |verb, action, id: &str, words: &str, body: Option<&str>, answer: &str| Operation {
        verb,
        action,
        id: format!("{id}{word}{spaced}{}", resource.kind),
        words: format!("{words} {}", resource.kind),
        kind,
        body: body.map(str::to_owned),
        answer: answer.to_owned(),
        writes: matches!(action, "post" | "put" | "patch"),
    };
    let mut put = |path: &str, operation: Operation<'_>| write(paths, path, &operation, flavour);
    if serves("list") {
        put(&collection, operation("get", "list", "list", "list or watch objects of kind", None, &list));
        if resource.namespaced {
            let mut all = operation("get", "list", "list", "list or watch objects of kind", None, &list);
            all.id = format!("list{word}{}ForAllNamespaces", resource.kind);
            put(&format!("{root}/{}", resource.plural), all);
        }
    }
    if serves("create") {
        put(&collection, operation("post", "post", "create", "create a", Some(&own), &own));
    }
    if serves("deletecollection") {
        let options = format!("{META}DeleteOptions");
        put(
            &collection,
            operation(
                "delete",
                "deletecollection",
                "deleteCollection",
                "delete collection of",
                Some(&options),
                &status,
            ),
        );
    }
    if serves("get") {
        put(&item, operation("get", "get", "read", "read the specified", None, &own));
    }
    if serves("update") {
        put(&item, operation("put", "put", "replace", "replace the specified", Some(&own), &own));
    }
    let patch = format!("{META}Patch");
    if serves("patch") {
        put(&item, operation("patch", "patch", "patch", "partially update the specified", Some(&patch), &own));
    }
    if serves("delete") {
        let options = format!("{META}DeleteOptions");
        put(&item, operation("delete", "delete", "delete", "delete a", Some(&options), &status));
    }
    for subresource in &resource.subresources {
        add_subresource(paths, resource, subresource, &item, &word, flavour);
    }
}

fn add_subresource(
    paths: &mut Map<String, Value>,
    resource: &Resource<'_>,
    subresource: &Subresource<'_>,
    item: &str,
    word: &str,
    flavour: Flavour,
) {
    let definition = if subresource.kind == resource.kind {
        Some(resource.definition())
    } else {
        subresource.definition().map(str::to_owned)
    };
    let spaced = if resource.namespaced { "Namespaced" } else { "" };
    let mut title = subresource.name.to_owned();
    if let Some(first) = title.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    for verb in &subresource.verbs {
        let (method, action, id) = match *verb {
            "get" => ("get", "get", "read"),
            "update" => ("put", "put", "replace"),
            "patch" => ("patch", "patch", "patch"),
            "create" => ("post", "post", "create"),
            "delete" => ("delete", "delete", "delete"),
            _ => continue,
        };
        let patch = format!("{META}Patch");
        // Connections (exec, log, proxy) speak bytes.
        let answer = definition.clone().unwrap_or_default();
        let operation = Operation {
            verb: method,
            action: if definition.is_some() { action } else { "connect" },
            id: format!("{id}{word}{spaced}{}{title}", resource.kind),
            words: format!("{id} {} of the specified {}", subresource.name, resource.kind),
            kind: [subresource.group, subresource.version, subresource.kind],
            body: match action {
                "patch" => Some(patch),
                "put" | "post" => definition.clone(),
                _ => None,
            },
            answer,
            writes: matches!(action, "post" | "put" | "patch"),
        };
        write(paths, &format!("{item}/{}", subresource.name), &operation, flavour);
    }
}

/// The group and version in an operation's name: `AppsV1`.
fn id_words(resource: &Resource<'_>) -> String {
    let mut words = String::new();
    let group = if resource.group.is_empty() {
        "core"
    } else {
        resource.group.strip_suffix(".k8s.io").unwrap_or(resource.group)
    };
    for part in group.split('.').chain([resource.version]) {
        let mut chars = part.chars();
        words.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        words.extend(chars);
    }
    words
}

fn parameter((name, ty, words): Parameter, flavour: Flavour) -> Value {
    match flavour {
        Flavour::V2 => json!({"name": name, "in": "query", "description": words, "type": ty, "uniqueItems": true}),
        Flavour::V3 => {
            json!({"name": name, "in": "query", "description": words, "schema": {"type": ty, "uniqueItems": true}})
        }
    }
}

fn path_parameter(name: &str, words: &str, flavour: Flavour) -> Value {
    match flavour {
        Flavour::V2 => {
            json!({"name": name, "in": "path", "description": words, "required": true, "type": "string", "uniqueItems": true})
        }
        Flavour::V3 => {
            json!({"name": name, "in": "path", "description": words, "required": true, "schema": {"type": "string", "uniqueItems": true}})
        }
    }
}

fn write(paths: &mut Map<String, Value>, path: &str, operation: &Operation<'_>, flavour: Flavour) {
    let entry = paths.entry(path.to_owned()).or_insert_with(|| {
        let mut parameters = Vec::new();
        if path.contains("{name}") {
            parameters.push(path_parameter("name", "name of the object", flavour));
        }
        if path.contains("{namespace}") {
            parameters.push(path_parameter(
                "namespace",
                "object name and auth scope, such as for teams and projects",
                flavour,
            ));
        }
        parameters.push(parameter(PRETTY, flavour));
        json!({"parameters": parameters})
    });
    let mut parameters: Vec<Value> = match operation.action {
        "list" => LIST.iter().map(|one| parameter(*one, flavour)).collect(),
        "deletecollection" => LIST.iter().chain(&DELETE).map(|one| parameter(*one, flavour)).collect(),
        "delete" => DELETE.iter().map(|one| parameter(*one, flavour)).collect(),
        "post" | "put" => [DRY_RUN, FIELD_MANAGER, FIELD_VALIDATION].map(|one| parameter(one, flavour)).to_vec(),
        "patch" => [DRY_RUN, FIELD_MANAGER, FIELD_VALIDATION, FORCE].map(|one| parameter(one, flavour)).to_vec(),
        _ => Vec::new(),
    };
    let reference = |definition: &str| json!({"$ref": flavour.reference(definition)});
    let answer = |words: &str| match (flavour, operation.answer.as_str()) {
        (Flavour::V2, "") => json!({"description": words, "schema": {"type": "string"}}),
        (Flavour::V2, definition) => json!({"description": words, "schema": reference(definition)}),
        (Flavour::V3, definition) => {
            let schema = if definition.is_empty() { json!({"type": "string"}) } else { reference(definition) };
            let content: Map<String, Value> =
                PRODUCES.iter().map(|media| ((*media).to_owned(), json!({"schema": schema}))).collect();
            json!({"description": words, "content": content})
        }
    };
    let mut responses = Map::new();
    responses.insert("200".into(), answer("OK"));
    if operation.writes {
        responses.insert("201".into(), answer("Created"));
    }
    if matches!(operation.action, "post" | "delete") {
        responses.insert("202".into(), answer("Accepted"));
    }
    responses.insert("401".into(), json!({"description": "Unauthorized"}));
    let consumes: &[&str] = if operation.action == "patch" { &PATCHES } else { &["*/*"] };
    let [group, version, kind] = operation.kind;
    let mut written = object(json!({
        "description": operation.words,
        "operationId": operation.id,
        "x-kubernetes-action": operation.action,
        "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
        "responses": responses,
    }));
    match (flavour, &operation.body) {
        (Flavour::V2, body) => {
            if let Some(body) = body {
                let required = !body.ends_with(".DeleteOptions");
                let mut one = object(json!({"name": "body", "in": "body", "schema": reference(body)}));
                if required {
                    one.insert("required".into(), true.into());
                }
                parameters.insert(0, Value::Object(one));
            }
            written.insert("consumes".into(), consumes.iter().copied().collect());
            written.insert("produces".into(), PRODUCES.iter().copied().collect());
            written.insert("schemes".into(), json!(["https"]));
        }
        (Flavour::V3, Some(body)) => {
            let content: Map<String, Value> =
                consumes.iter().map(|media| ((*media).to_owned(), json!({"schema": reference(body)}))).collect();
            let required = !body.ends_with(".DeleteOptions");
            let mut request = object(json!({"content": content}));
            if required {
                request.insert("required".into(), true.into());
            }
            written.insert("requestBody".into(), Value::Object(request));
        }
        (Flavour::V3, None) => {}
    }
    if !parameters.is_empty() {
        written.insert("parameters".into(), Value::Array(parameters));
    }
    if let Value::Object(entry) = entry {
        entry.insert(operation.verb.to_owned(), Value::Object(written));
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

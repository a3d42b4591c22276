use super::*;
use crate::schema::definitions;

fn deployment() -> Resource<'static> {
    Resource {
        group: "apps",
        version: "v1",
        plural: "deployments",
        kind: "Deployment",
        list_kind: "DeploymentList",
        namespaced: true,
        verbs: vec!["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"],
        subresources: vec![
            Subresource {
                name: "status",
                group: "apps",
                version: "v1",
                kind: "Deployment",
                verbs: vec!["get", "patch", "update"],
            },
            Subresource {
                name: "scale",
                group: "autoscaling",
                version: "v1",
                kind: "Scale",
                verbs: vec!["get", "patch", "update"],
            },
        ],
        source: Source::Builtin,
    }
}

/// Every reference of a document leads somewhere.
fn check_references(document: &Value, value: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                let pointer = target.trim_start_matches('#');
                assert!(document.pointer(pointer).is_some_and(|found| !found.is_null()), "{target} is missing");
            }
            map.values().for_each(|inner| check_references(document, inner));
        }
        Value::Array(items) => items.iter().for_each(|inner| check_references(document, inner)),
        _ => {}
    }
}

#[test]
fn a_built_in_group_in_both_versions() {
    let resources = [deployment()];
    let (two, three) = (v2(&resources, "v1.36.0"), v3(&resources, "v1.36.0"));
    check_references(&two, &two);
    check_references(&three, &three);
    let spec = &two["definitions"]["io.k8s.api.core.v1.PodSpec"];
    assert_eq!(spec["required"], json!(["containers"]));
    let containers = &spec["properties"]["containers"];
    assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
    assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
    assert!(containers["description"].as_str().is_some_and(|text| text.starts_with("List of containers")));
    assert_eq!(
        two["definitions"]["io.k8s.api.apps.v1.Deployment"]["x-kubernetes-group-version-kind"],
        json!([{"group": "apps", "version": "v1", "kind": "Deployment"}])
    );
    let patch = &three["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
    assert_eq!(patch["operationId"], "patchAppsV1NamespacedDeployment");
    assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Deployment");
    assert!(patch["parameters"].as_array().is_some_and(|all| all.iter().any(|one| one["name"] == "fieldValidation")));
    let metadata = &three["components"]["schemas"]["io.k8s.api.apps.v1.Deployment"]["properties"]["metadata"];
    assert_eq!(metadata["allOf"][0]["$ref"], "#/components/schemas/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta");
    assert!(three["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale"]["get"].is_object());
}

#[test]
fn custom_resources_are_published() {
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "nullable": true, "properties": {
        "port": {"x-kubernetes-int-or-string": true, "type": "string", "description": "where"},
    }}, "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"x": {"type": "string"}}}}});
    let resource = Resource {
        group: "stable.example.com",
        version: "v1",
        plural: "crontabs",
        kind: "CronTab",
        list_kind: "CronTabList",
        namespaced: false,
        verbs: vec!["get", "list"],
        subresources: Vec::new(),
        source: Source::Custom(Some(&schema)),
    };
    let resources = [resource];
    let (two, three) = (v2(&resources, "v1"), v3(&resources, "v1"));
    check_references(&two, &two);
    check_references(&three, &three);
    let definition = &two["definitions"]["com.example.stable.v1.CronTab"];
    assert_eq!(definition["properties"]["spec"], json!({}));
    assert_eq!(
        definition["properties"]["free"],
        json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
    );
    let definition = &three["components"]["schemas"]["com.example.stable.v1.CronTab"];
    assert_eq!(definition["properties"]["spec"], schema["properties"]["spec"]);
    assert_eq!(definition["x-kubernetes-group-version-kind"][0]["kind"], "CronTab");
}

/// The type table says of required fields, field names and kinds what the API types say.
#[test]
fn the_type_table_agrees_with_the_api_types() {
    let docs = Docs::of(|_| true);
    let mut wrong = Vec::new();
    let mut compared = 0;
    for name in definitions() {
        let (Some(theirs), Some(ours)) = (docs.all().get(name), Schema::builtin(name)) else { continue };
        let Some(properties) = theirs.get("properties").and_then(Value::as_object) else { continue };
        compared += 1;
        for (field, schema) in properties {
            let Some(own) = ours.field(field) else {
                wrong.push(format!("{name}.{field} is missing"));
                continue;
            };
            let required = theirs["required"].as_array().is_some_and(|all| all.iter().any(|one| one == field));
            // Those types make every object's metadata and references' names required for their own ease.
            let eased = matches!(field.as_str(), "metadata" | "name" | "eventTime");
            if required != own.required && !eased {
                wrong.push(format!("{name}.{field}: required {required}"));
            }
            let list = own.schema.get().kind == crate::Kind::List || own.schema.get().kind == crate::Kind::StringList;
            if (schema["type"] == "array") != list {
                wrong.push(format!("{name}.{field}: list {}", schema["type"]));
            }
        }
        for field in &ours.fields {
            if !properties.contains_key(field.name.as_ref()) && !matches!(field.name.as_ref(), "apiVersion" | "kind") {
                wrong.push(format!("{name}.{} is not theirs", field.name));
            }
        }
    }
    assert!(compared > 400, "only {compared} types were compared");
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
}

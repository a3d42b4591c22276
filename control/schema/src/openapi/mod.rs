//! OpenAPI v2 and v3 documents in the shape that kubectl and client-go read.
//!
//! Definitions of built-ins come from the schema IR and the API types' own descriptions, those of custom resources from their
//! `openAPIV3Schema`. Paths are made from the list of resources that the server gives.

mod custom;
mod definitions;
mod docs;
pub mod gnostic;
mod paths;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::schema::Schema;
use definitions::Writer;
use docs::Docs;

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// A served resource.
#[derive(Clone, Debug)]
pub struct Resource<'a> {
    /// Empty for the core group.
    pub group: &'a str,
    pub version: &'a str,
    pub plural: &'a str,
    pub kind: &'a str,
    pub list_kind: &'a str,
    pub namespaced: bool,
    /// `get list watch create update patch delete deletecollection`
    pub verbs: Vec<&'a str>,
    pub subresources: Vec<Subresource<'a>>,
    pub source: Source<'a>,
}

/// A subresource and the kind it speaks.
#[derive(Clone, Debug)]
pub struct Subresource<'a> {
    pub name: &'a str,
    /// Group, version and kind of its body.
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub verbs: Vec<&'a str>,
}

/// Where a resource's schema comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Builtin,
    /// A custom resource's `openAPIV3Schema`, if it has one.
    Custom(Option<&'a Value>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    V2,
    V3,
}

impl Flavour {
    pub(crate) fn reference(self, definition: &str) -> String {
        match self {
            Self::V2 => format!("#/definitions/{definition}"),
            Self::V3 => format!("#/components/schemas/{definition}"),
        }
    }
}

/// `/openapi/v2`: all resources in one document. `version` is the server's (`v1.36.0`).
pub fn v2(resources: &[Resource<'_>], version: &str) -> Value {
    let (definitions, paths) = parts(resources, Flavour::V2);
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": version},
        "paths": paths,
        "definitions": definitions,
        "securityDefinitions": {
            "BearerToken": {"description": "Bearer Token authentication", "type": "apiKey", "name": "authorization", "in": "header"}
        },
        "security": [{"BearerToken": []}],
    })
}

/// `/openapi/v3/apis/<group>/<version>`: the resources of one group version.
pub fn v3(resources: &[Resource<'_>], version: &str) -> Value {
    let (definitions, paths) = parts(resources, Flavour::V3);
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {
                "BearerToken": {"description": "Bearer Token authentication", "type": "apiKey", "name": "authorization", "in": "header"}
            }
        },
    })
}

fn parts(resources: &[Resource<'_>], flavour: Flavour) -> (Map<String, Value>, Map<String, Value>) {
    let mut wanted = BTreeSet::new();
    for resource in resources {
        if matches!(resource.source, Source::Builtin) {
            wanted.insert(resource.definition());
        }
        for subresource in &resource.subresources {
            wanted.extend(subresource.definition().map(str::to_owned));
        }
    }
    let metas = [
        "Status",
        "DeleteOptions",
        "ListMeta",
        "ObjectMeta",
        "Patch",
        "WatchEvent",
        "APIResourceList",
        "APIGroup",
        "APIGroupList",
        "APIVersions",
    ];
    wanted.extend(metas.iter().map(|name| format!("{META}{name}")));
    let docs = Docs::of(|name| wanted.contains(name));
    let mut writer = Writer::new(flavour, &docs);
    for resource in resources {
        match resource.source {
            Source::Builtin => {
                writer.add(&resource.definition());
                writer.add(&resource.list_definition());
            }
            Source::Custom(schema) => custom::add(&mut writer, resource, schema),
        }
        for definition in resource.subresources.iter().filter_map(Subresource::definition) {
            writer.add(definition);
        }
    }
    for name in ["Status", "DeleteOptions", "ListMeta", "ObjectMeta", "Patch", "WatchEvent"] {
        writer.add(&format!("{META}{name}"));
    }
    let mut served = Map::new();
    for resource in resources {
        paths::add(&mut served, resource, flavour);
    }
    (writer.finish(), served)
}

impl Resource<'_> {
    /// The definition's name: `io.k8s.api.apps.v1.Deployment`, or the reversed group of a custom resource.
    pub fn definition(&self) -> String {
        self.named(self.kind)
    }

    pub fn list_definition(&self) -> String {
        self.named(self.list_kind)
    }

    fn named(&self, kind: &str) -> String {
        if matches!(self.source, Source::Builtin)
            && let Some(name) = crate::definition_for(self.group, self.version, kind)
        {
            return name.to_owned();
        }
        let mut parts: Vec<&str> = self.group.split('.').rev().filter(|part| !part.is_empty()).collect();
        parts.extend([self.version, kind]);
        parts.join(".")
    }

    /// `/apis/apps/v1` or `/api/v1`.
    fn root(&self) -> String {
        if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        }
    }
}

impl Subresource<'_> {
    fn definition(&self) -> Option<&'static str> {
        crate::definition_for(self.group, self.version, self.kind).filter(|name| Schema::builtin(name).is_some())
    }
}

#[cfg(test)]
mod tests;

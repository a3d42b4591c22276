//! From group, version, kind to the definition that describes it.

use super::builtin;

/// API groups and the packages that hold their types.
const PACKAGES: &[(&str, &str)] = &[
    ("", "io.k8s.api.core"),
    ("admission.k8s.io", "io.k8s.api.admission"),
    ("admissionregistration.k8s.io", "io.k8s.api.admissionregistration"),
    ("apiextensions.k8s.io", "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions"),
    ("apiregistration.k8s.io", "io.k8s.kube-aggregator.pkg.apis.apiregistration"),
    ("apps", "io.k8s.api.apps"),
    ("authentication.k8s.io", "io.k8s.api.authentication"),
    ("authorization.k8s.io", "io.k8s.api.authorization"),
    ("autoscaling", "io.k8s.api.autoscaling"),
    ("batch", "io.k8s.api.batch"),
    ("certificates.k8s.io", "io.k8s.api.certificates"),
    ("coordination.k8s.io", "io.k8s.api.coordination"),
    ("discovery.k8s.io", "io.k8s.api.discovery"),
    ("events.k8s.io", "io.k8s.api.events"),
    ("flowcontrol.apiserver.k8s.io", "io.k8s.api.flowcontrol"),
    ("meta.k8s.io", META),
    ("networking.k8s.io", "io.k8s.api.networking"),
    ("node.k8s.io", "io.k8s.api.node"),
    ("policy", "io.k8s.api.policy"),
    ("rbac.authorization.k8s.io", "io.k8s.api.rbac"),
    ("resource.k8s.io", "io.k8s.api.resource"),
    ("scheduling.k8s.io", "io.k8s.api.scheduling"),
    ("storage.k8s.io", "io.k8s.api.storage"),
];

const META: &str = "io.k8s.apimachinery.pkg.apis.meta";

/// Kinds that every group serves under each of its versions (`DeleteOptions` in `apps/v1`, `autoscaling/v2` and so on).
const IN_EVERY_GROUP: &[&str] = &[
    "CreateOptions",
    "DeleteOptions",
    "GetOptions",
    "ListOptions",
    "PatchOptions",
    "UpdateOptions",
    "WatchEvent",
    "Status",
    "APIGroup",
    "APIGroupList",
    "APIResourceList",
    "APIVersions",
    "List",
    "PartialObjectMetadata",
    "PartialObjectMetadataList",
    "Table",
];

/// The definition name of a built-in kind: `("apps", "v1", "Deployment")` → `io.k8s.api.apps.v1.Deployment`.
pub fn definition_for(group: &str, version: &str, kind: &str) -> Option<&'static str> {
    let package = PACKAGES.binary_search_by(|(name, _)| (*name).cmp(group)).ok().map(|at| PACKAGES[at].1);
    package
        .and_then(|package| builtin::name(&format!("{package}.{version}.{kind}")))
        .or_else(|| if IN_EVERY_GROUP.contains(&kind) { builtin::name(&format!("{META}.v1.{kind}")) } else { None })
}

/// Group and version of a definition: `io.k8s.api.apps.v1.Deployment` → `("apps", "v1")`.
pub fn group_of(definition: &str) -> Option<(&'static str, &str)> {
    let (rest, _) = definition.rsplit_once('.')?;
    let (package, version) = rest.rsplit_once('.')?;
    PACKAGES.iter().find(|(_, name)| *name == package).map(|(group, _)| (*group, version))
}

/// All groups and versions that have built-in definitions.
pub fn group_versions() -> impl Iterator<Item = (&'static str, &'static str)> {
    let mut last = ("", "");
    builtin::definitions().filter_map(group_of).filter(move |found| std::mem::replace(&mut last, *found) != *found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_definitions_by_kind() {
        assert!(PACKAGES.is_sorted());
        assert_eq!(definition_for("apps", "v1", "Deployment"), Some("io.k8s.api.apps.v1.Deployment"));
        assert_eq!(definition_for("", "v1", "Status"), Some("io.k8s.apimachinery.pkg.apis.meta.v1.Status"));
        let options = Some("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions");
        assert_eq!(definition_for("autoscaling", "v2", "DeleteOptions"), options);
        assert_eq!(definition_for("apps", "v2", "Deployment"), None);
        assert_eq!(group_of("io.k8s.api.rbac.v1.Role"), Some(("rbac.authorization.k8s.io", "v1")));
    }
}

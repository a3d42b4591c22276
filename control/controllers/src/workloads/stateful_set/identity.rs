//! What makes a pod of a StatefulSet that one and no other: name, labels, host name, claims.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume};
use kube::ResourceExt;

use crate::common::{pods, revisions};
use crate::machine::controller_reference;

const NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
const INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

fn split(pod: &Pod) -> Option<(&str, i32)> {
    let (parent, ordinal) = pod.metadata.name.as_deref()?.rsplit_once('-')?;
    // As names are written: no sign, no leading zero.
    let number: i32 = ordinal.parse().ok()?;
    (number.to_string() == ordinal).then_some((parent, number))
}

/// The name of the set that a pod is named after.
pub(super) fn parent(pod: &Pod) -> Option<&str> {
    split(pod).map(|(parent, _)| parent)
}

/// The place of a pod in the order.
pub(super) fn ordinal(pod: &Pod) -> Option<i32> {
    split(pod).map(|(_, ordinal)| ordinal)
}

/// The revision that a pod was made from.
pub(super) fn revision(pod: &Pod) -> Option<&str> {
    pod.metadata.labels.as_ref()?.get(revisions::HASH_LABEL).map(String::as_str)
}

/// The labels that a pod of this name has besides those of its template.
pub(super) fn labels(name: &str) -> BTreeMap<String, String> {
    let index = name.rsplit('-').next().unwrap_or_default();
    BTreeMap::from([(NAME_LABEL.to_owned(), name.to_owned()), (INDEX_LABEL.to_owned(), index.to_owned())])
}

/// Whether a pod has the labels that its name asks for.
pub(super) fn matches(pod: &Pod) -> bool {
    let wanted = labels(&pod.name_any());
    wanted.iter().all(|(key, value)| pod.labels().get(key) == Some(value))
}

/// Name of the claim that a pod has from a claim template.
pub(super) fn claim_name(template: &str, pod: &str) -> String {
    format!("{template}-{pod}")
}

/// The pod at this place, from a template of the set's history.
pub(super) fn pod(
    set: &StatefulSet,
    spec: &StatefulSetSpec,
    template: &PodTemplateSpec,
    revision: &str,
    ordinal: i32,
) -> Pod {
    let name = format!("{}-{ordinal}", set.name_any());
    let mut pod = pods::from_template(template, &set.name_any(), controller_reference(set));
    pod.metadata.generate_name = Some(format!("{}-", set.name_any()));
    pod.metadata.namespace = set.namespace();
    let all = pod.metadata.labels.get_or_insert_default();
    all.extend(labels(&name));
    all.insert(revisions::HASH_LABEL.into(), revision.into());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name.clone());
    pod_spec.subdomain = spec.service_name.clone().filter(|service| !service.is_empty());
    let claims: Vec<String> = spec.volume_claim_templates.iter().flatten().map(ResourceExt::name_any).collect();
    let volumes = pod_spec.volumes.get_or_insert_default();
    // A claim takes the place of a volume of the same name.
    volumes.retain(|volume| !claims.contains(&volume.name));
    for claim in claims {
        volumes.push(Volume {
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&claim, &name),
                read_only: Some(false),
            }),
            name: claim,
            ..Volume::default()
        });
    }
    if pod_spec.volumes.as_ref().is_some_and(Vec::is_empty) {
        pod_spec.volumes = None;
    }
    pod.metadata.name = Some(name);
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_set_and_place() {
        let named = |name: &str| Pod {
            metadata: kube::api::ObjectMeta { name: Some(name.into()), ..Default::default() },
            ..Pod::default()
        };
        assert_eq!((parent(&named("a-b-12")), ordinal(&named("a-b-12"))), (Some("a-b"), Some(12)));
        for odd in ["web", "web-x", "web-01", "web-+1", "web-99999999999"] {
            assert_eq!(ordinal(&named(odd)), None, "{odd}");
        }
    }

    #[test]
    fn a_claim_takes_the_place_of_a_volume_of_its_name() {
        let set: StatefulSet = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "n", "uid": "u"},
            "spec": {
                "serviceName": "svc", "selector": {},
                "template": {"spec": {"containers": [], "volumes": [{"name": "data", "emptyDir": {}}, {"name": "x", "emptyDir": {}}]}},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}}],
            },
        }))
        .expect("a set");
        let spec = set.spec.clone().expect("a spec");
        let pod = pod(&set, &spec, &spec.template, "web-abc", 3);
        assert!(matches(&pod));
        let spec = pod.spec.expect("a spec");
        let volumes = spec.volumes.expect("volumes");
        assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("web-3"), Some("svc")));
        assert_eq!(volumes.len(), 2);
        let claim = volumes[1].persistent_volume_claim.as_ref().expect("a claim");
        assert_eq!((volumes[1].name.as_str(), claim.claim_name.as_str()), ("data", "data-web-3"));
    }
}

"""The official Python client: typed objects, patches, a watch, an informer-like list and watch, and an error's reason."""

import threading

from kubernetes import client, config, watch
from kubernetes.client.rest import ApiException

config.load_kube_config()
core, apps, batch = client.CoreV1Api(), client.AppsV1Api(), client.BatchV1Api()

version = client.VersionApi().get_code()
assert (version.major, version.minor.rstrip("+")) == ("1", "36"), version

seen = []


def follow():
    for event in watch.Watch().stream(core.list_namespaced_config_map, "default", label_selector="app=x", timeout_seconds=60):
        seen.append((event["type"], event["object"].metadata.name))
        if event["type"] == "DELETED":
            return


follower = threading.Thread(target=follow)
follower.start()
meta = client.V1ObjectMeta(generate_name="map-", labels={"app": "x"})
made = core.create_namespaced_config_map("default", client.V1ConfigMap(metadata=meta, data={"a": "1"}))
name = made.metadata.name
made.data["b"] = "2"
replaced = core.replace_namespaced_config_map(name, "default", made)
assert replaced.data == {"a": "1", "b": "2"}
try:
    core.replace_namespaced_config_map(name, "default", made)
    raise AssertionError("a stale object was taken")
except ApiException as error:
    assert (error.status, error.reason) == (409, "Conflict"), error
core.patch_namespaced_config_map(name, "default", {"data": {"a": None}})
assert core.read_namespaced_config_map(name, "default").data == {"b": "2"}
core.delete_namespaced_config_map(name, "default")
follower.join(60)
assert [kind for kind, _ in seen] == ["ADDED", "MODIFIED", "MODIFIED", "DELETED"], seen
assert {key for _, key in seen} == {name}

template = client.V1PodTemplateSpec(
    metadata=client.V1ObjectMeta(labels={"app": "d"}),
    spec=client.V1PodSpec(containers=[client.V1Container(name="c", image="hello:1")]),
)
spec = client.V1DeploymentSpec(replicas=1, selector=client.V1LabelSelector(match_labels={"app": "d"}), template=template)
apps.create_namespaced_deployment("default", client.V1Deployment(metadata=client.V1ObjectMeta(name="d"), spec=spec))
scale = apps.read_namespaced_deployment_scale("d", "default")
assert (scale.spec.replicas, scale.status.selector) == (1, "app=d"), scale
apps.patch_namespaced_deployment_scale("d", "default", {"spec": {"replicas": 2}})
assert apps.read_namespaced_deployment("d", "default").spec.replicas == 2
apps.delete_namespaced_deployment("d", "default", propagation_policy="Foreground")

try:
    core.create_namespaced_service("default", client.V1Service(metadata=client.V1ObjectMeta(name="Bad_Name")))
    raise AssertionError("a wrong object was taken")
except ApiException as error:
    assert error.status == 422 and "metadata.name" in error.body, error
page = client.RbacAuthorizationV1Api().list_cluster_role(limit=5)
assert len(page.items) == 5 and page.metadata._continue, page.metadata
print("done")

"""An operator as kopf's documentation writes them: a child object, a status, an event, a finalizer."""

import kopf
import kubernetes


@kopf.on.create("example.com", "v1", "greetings")
def create(spec, name, namespace, body, **_):
    child = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-child"},
        "data": {"text": spec["text"]},
    }
    kopf.adopt(child)
    kubernetes.client.CoreV1Api().create_namespaced_config_map(namespace, child)
    kopf.info(body, reason="Greeted", message="made the child")
    return {"greeted": spec["text"]}


@kopf.on.update("example.com", "v1", "greetings")
def update(spec, name, namespace, **_):
    patch = {"data": {"text": spec["text"]}}
    kubernetes.client.CoreV1Api().patch_namespaced_config_map(f"{name}-child", namespace, patch)
    return {"greeted": spec["text"]}


@kopf.on.delete("example.com", "v1", "greetings")
def delete(name, namespace, **_):
    body = {"metadata": {"name": f"{name}-farewell"}}
    kubernetes.client.CoreV1Api().create_namespaced_config_map(namespace, body)


@kopf.on.login()
def login(**kwargs):
    return kopf.login_via_client(**kwargs)


@kopf.on.startup()
def startup(**_):
    kubernetes.config.load_kube_config()

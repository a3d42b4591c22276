//! Volumes of a CSI driver from claim to file, and over the death of the daemon.

use coracle_testkit::{Image, assert_eventually};
use serde_json::{Value, json};

use crate::csi_driver::{NAME, ZONE};
use crate::process::Plugin;
use crate::support::{Host, PATIENCE_S};

const IMAGE: &str = "docker.io/library/box:1";

pub(crate) fn read(host: &Host, arguments: &[&str]) -> Value {
    serde_json::from_str(&host.get(&[arguments, &["-o", "json"]].concat())).expect("JSON")
}

pub(crate) fn create(host: &Host, objects: &[Value]) {
    let documents: Vec<String> = objects.iter().map(|object| format!("---\n{object}\n")).collect();
    let output = host.apply(&documents.concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn claim(name: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "of-driver", "volumeMode": mode,
            "resources": {"requests": {"storage": "1Mi"}}},
    })
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0, "securityContext": {"fsGroup": 4321},
            "containers": [{
                "name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sleep", "100000"],
                "volumeMounts": [{"name": "files", "mountPath": "/files"}, {"name": "own", "mountPath": "/own"}],
                "volumeDevices": [{"name": "raw", "devicePath": "/dev/raw0"}],
            }],
            "volumes": [
                {"name": "files", "persistentVolumeClaim": {"claimName": "files"}},
                {"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}},
                {"name": "own", "csi": {"driver": NAME, "volumeAttributes": {"size": "small"},
                    "nodePublishSecretRef": {"name": "key"}}},
            ],
        },
    })
}

/// As much of an external provisioner and attacher as is needed: volumes for claims whose node is chosen, and attachments.
fn provide(host: &Host) {
    let list = |kind: &str| read(host, &["get", kind])["items"].as_array().cloned().unwrap_or_default();
    for claim in list("pvc") {
        let annotations = &claim["metadata"]["annotations"];
        if annotations["volume.kubernetes.io/selected-node"] != "n1"
            || annotations["volume.kubernetes.io/storage-provisioner"] != NAME
            || claim["spec"]["volumeName"].is_string()
        {
            continue;
        }
        let secret = json!({"name": "key", "namespace": "default"});
        create(
            host,
            &[json!({
                "apiVersion": "v1", "kind": "PersistentVolume",
                "metadata": {"name": format!("pv-{}", claim["metadata"]["name"].as_str().expect("a name"))},
                "spec": {
                    "capacity": {"storage": "1Mi"}, "accessModes": claim["spec"]["accessModes"], "storageClassName": "of-driver",
                    "persistentVolumeReclaimPolicy": "Retain", "volumeMode": claim["spec"]["volumeMode"],
                    "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": "default",
                        "name": claim["metadata"]["name"], "uid": claim["metadata"]["uid"]},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [
                        {"matchExpressions": [{"key": ZONE, "operator": "In", "values": ["here"]}]}]}},
                    "csi": {"driver": NAME, "volumeHandle": claim["metadata"]["name"], "fsType": "tmpfs",
                        "nodeStageSecretRef": secret},
                },
            })],
        );
    }
    for attachment in list("volumeattachments") {
        if attachment["status"]["attached"] != true {
            let name = attachment["metadata"]["name"].as_str().expect("a name");
            let status = json!({"status": {"attached": true, "attachmentMetadata": {"lun": "7"}}}).to_string();
            host.get(&["patch", "volumeattachment", name, "--subresource", "status", "--type", "merge", "-p", &status]);
        }
    }
}

fn is_running(host: &Host, pod: &str) -> bool {
    host.get(&["get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].ready}"]) == "true"
}

#[test]
fn volumes_of_a_driver_are_staged_published_grown_and_given_back_exactly_once() {
    let mut host = Host::new("csi");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let driver = Plugin::start(&host, NAME);
    let csi_node = |host: &Host| read(host, &["get", "csinode", "n1"])["spec"]["drivers"][0].clone();
    assert_eventually!(
        PATIENCE_S,
        csi_node(&host)["nodeID"] == "node-of-test",
        "{:#}\n{}",
        csi_node(&host),
        host.log()
    );
    assert_eq!(
        (&csi_node(&host)["topologyKeys"], &csi_node(&host)["allocatable"]["count"]),
        (&json!([ZONE]), &json!(7))
    );
    let node = read(&host, &["get", "node", "n1"]);
    assert_eq!(node["metadata"]["labels"][ZONE], "here");
    create(
        &host,
        &[
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"word": "sesame"}}),
            json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": NAME}, "spec": {
            "attachRequired": true, "podInfoOnMount": true, "fsGroupPolicy": "File",
            "volumeLifecycleModes": ["Persistent", "Ephemeral"], "tokenRequests": [{"audience": "vault"}]}}),
            json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "of-driver"},
            "provisioner": NAME, "allowVolumeExpansion": true, "volumeBindingMode": "WaitForFirstConsumer"}),
            claim("files", "Filesystem"),
            claim("raw", "Block"),
            pod("first"),
        ],
    );
    assert_eventually!(
        PATIENCE_S,
        {
            provide(&host);
            is_running(&host, "first")
        },
        "{}\n{}",
        host.get(&["describe", "pod", "first"]),
        host.log()
    );
    let of = |volume: &str, call: &str| {
        driver.calls().into_iter().find(|entry| entry["call"] == call && entry["volume"] == volume).expect("a call")
    };
    assert_eq!(of("files", "stage")["secrets"], json!({"word": "sesame"}));
    assert_eq!(of("files", "stage")["attached"], json!({"lun": "7"}));
    assert_eq!(of("files", "publish")["mode"], json!(7), "a writer of one node");
    let own =
        driver.calls().into_iter().find(|entry| entry["secrets"]["word"] == "sesame" && entry["call"] == "publish");
    let own = own.expect("the pod's own volume");
    assert_eq!(own["context"]["size"], "small");
    assert_eq!(own["context"]["csi.storage.k8s.io/ephemeral"], "true");
    assert_eq!(own["context"]["csi.storage.k8s.io/pod.name"], "first");
    let tokens = own["context"]["csi.storage.k8s.io/serviceAccount.tokens"].as_str().expect("tokens");
    assert!(serde_json::from_str::<Value>(tokens).expect("JSON")["vault"]["token"].is_string(), "{tokens}");
    let shell = |host: &Host, pod: &str, script: &str| host.get(&["exec", pod, "--", "sh", "-c", script]);
    assert_eq!(shell(&host, "first", "stat -c %g /files/asked; test -c /dev/raw0 && echo device"), "4321\ndevice");
    shell(&host, "first", "echo kept > /files/kept");

    // The second pod shares what is staged.
    let mut second = pod("second");
    second["spec"]["volumes"][1] =
        json!({"name": "raw", "persistentVolumeClaim": {"claimName": "raw", "readOnly": true}});
    create(&host, &[second]);
    assert_eventually!(PATIENCE_S, is_running(&host, "second"), "{}", host.get(&["describe", "pod", "second"]));
    assert_eq!(shell(&host, "second", "cat /files/kept"), "kept");
    assert_eq!((driver.count("stage"), driver.count("publish")), (2, 6));
    let in_use =
        |host: &Host| read(host, &["get", "node", "n1"])["status"]["volumesInUse"].as_array().map_or(0, Vec::len);
    assert_eventually!(PATIENCE_S, in_use(&host) == 2, "{}", host.log());
    let summary = || host.get(&["get", "--raw", "/api/v1/nodes/n1/proxy/stats/summary"]);
    assert!(summary().contains("4242"), "the driver's figures are told");

    // The volume grows; its pods run on.
    host.get(&["patch", "pvc", "files", "-p", r#"{"spec":{"resources":{"requests":{"storage":"2Mi"}}}}"#]);
    host.get(&["patch", "pv", "pv-files", "-p", r#"{"spec":{"capacity":{"storage":"2Mi"}}}"#]);
    let capacity = || host.get(&["get", "pvc", "files", "-o", "jsonpath={.status.capacity.storage}"]);
    assert_eventually!(PATIENCE_S, capacity() == "2Mi", "{}\n{}", capacity(), host.log());
    assert_eq!(of("files", "expand")["bytes"], 2 << 20);

    // A killed daemon does nothing twice.
    let before = driver.count("publish");
    host.kill_server();
    host.start();
    assert_eventually!(PATIENCE_S, csi_node(&host)["name"] == NAME && is_running(&host, "first"), "{}", host.log());
    assert_eq!(shell(&host, "first", "cat /files/kept"), "kept");
    assert_eq!((driver.count("stage"), driver.count("publish")), (2, before));

    // One goes, the volume stays for the other; then a pod ends while the daemon is dead.
    host.get(&["delete", "pod", "first", "--wait=false"]);
    assert_eventually!(PATIENCE_S, host.get(&["get", "pods", "-o", "name"]) == "pod/second", "{}", host.log());
    // Without a grace period the pod's object goes before its end on the node is over.
    assert_eventually!(PATIENCE_S, driver.count("unpublish") == 3, "{:#?}", driver.calls());
    assert_eq!(driver.count("unstage"), 0, "another pod has it");
    assert_eq!(shell(&host, "second", "cat /files/kept"), "kept");
    host.get(&["delete", "pod", "second", "--wait=false"]);
    host.kill_server();
    host.start();
    assert_eventually!(PATIENCE_S, host.get(&["get", "pods", "-o", "name"]).is_empty(), "{}", host.log());
    assert_eventually!(PATIENCE_S, driver.count("unstage") >= 2, "{:#?}", driver.calls());
    let attachments = || host.get(&["get", "volumeattachments", "-o", "name"]);
    assert_eventually!(PATIENCE_S, in_use(&host) == 0 && attachments().is_empty(), "{}\n{}", attachments(), host.log());
    let given_back: std::collections::BTreeSet<_> = driver
        .calls()
        .iter()
        .filter(|entry| entry["call"] == "unpublish")
        .map(|entry| entry["volume"].to_string())
        .collect();
    assert_eq!(given_back.len(), 4, "two claims and two volumes of pods: {given_back:?}");

    // A volume of one pod is not for a second, whoever placed it here; one that has ended lets it go.
    let one = |name: &str, more: Value| {
        let mut one = pod(name);
        one["spec"]["volumes"] = json!([{"name": "files", "persistentVolumeClaim": {"claimName": "alone"}}]);
        one["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "files", "mountPath": "/files"}]);
        one["spec"]["containers"][0].as_object_mut().expect("a container").remove("volumeDevices");
        one["spec"].as_object_mut().expect("a specification").extend(more.as_object().expect("fields").clone());
        one
    };
    let mut alone = claim("alone", "Filesystem");
    alone["spec"]["accessModes"] = json!(["ReadWriteOncePod"]);
    create(&host, &[alone, one("holds", json!({}))]);
    assert_eventually!(
        PATIENCE_S,
        {
            provide(&host);
            is_running(&host, "holds")
        },
        "{}",
        host.get(&["describe", "pod", "holds"])
    );
    let mut waits = one("waits", json!({"nodeName": "n1", "restartPolicy": "Never"}));
    waits["spec"]["containers"][0]["command"] = json!(["/bin/true"]);
    create(&host, &[waits]);
    let told = || host.get(&["describe", "pod", "waits"]);
    assert_eventually!(PATIENCE_S, told().contains("ReadWriteOncePod access mode and is already in use"), "{}", told());
    host.get(&["delete", "pod", "holds"]);
    let phase = || host.get(&["get", "pod", "waits", "-o", "jsonpath={.status.phase}"]);
    assert_eventually!(
        PATIENCE_S,
        {
            provide(&host);
            phase() == "Succeeded"
        },
        "{}\n{}",
        told(),
        host.log()
    );
    assert_eventually!(PATIENCE_S, in_use(&host) == 0 && attachments().is_empty(), "{}\n{}", attachments(), host.log());
    host.get(&["delete", "pod", "waits"]);
    drop(driver);
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

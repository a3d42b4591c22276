//! Volumes of a pod against a fake API server and real mounts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_kubelet::Layout;
use coracle_kubelet::images::{ImageStore, ImportSource, StoreOptions};
use coracle_kubelet::volumes::{Allocatable, ObjectCache, VolumeError, Volumes, VolumesConfig};
use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::fake_api::FakeApi;
use crate::host::in_private_mounts;
use crate::images::{Entry, docker_archive, tar_of};

struct Fixture {
    dir: tempfile::TempDir,
    api: FakeApi,
    images: Arc<ImageStore>,
    volumes: Volumes,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("temp folder");
    let layout = Layout::below(dir.path());
    let images = ImageStore::open(&layout.data.join("images"), StoreOptions::default()).expect("store");
    let api = FakeApi::new();
    let allocatable = Arc::new(|| Allocatable { cpu_millis: 2000, memory_bytes: 1 << 30, ephemeral_storage_bytes: 0 });
    let csi = coracle_kubelet::csi::Csi::without_drivers(layout.clone());
    let config = VolumesConfig { layout, images: images.clone(), csi, allocatable };
    let volumes = Volumes::new(config, ObjectCache::new(api.client()));
    tokio::spawn(volumes.clone().run());
    Fixture { dir, api, images, volumes }
}

/// A pod that mounts every one of its volumes.
fn pod(volumes: &[Value], context: Value) -> Arc<Pod> {
    let mounts: Vec<Value> =
        volumes.iter().map(|volume| json!({ "name": volume["name"], "mountPath": format!("/mnt/{}", volume["name"].as_str().expect("name")) })).collect();
    let pod = json!({
        "metadata": { "name": "web", "namespace": "ns", "uid": "uid-1", "labels": { "a": "1" } },
        "spec": {
            "serviceAccountName": "builder",
            "securityContext": context,
            "containers": [{ "name": "c", "volumeMounts": mounts, "resources": { "limits": { "memory": "8Mi" } } }],
            "volumes": volumes,
        },
    });
    Arc::new(serde_json::from_value(pod).expect("pod"))
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn files_follow_their_objects_within_two_seconds() {
    in_private_mounts(|| async {
        let fixture = fixture();
        fixture.api.put(
            "configmaps",
            "ns",
            "settings",
            json!({ "data": { "key": "one", "other": "x" }, "binaryData": { "bin": "AAE=" } }),
        );
        fixture.api.put("secrets", "ns", "hidden", json!({ "data": { "password": "cw==" } }));
        let pod = pod(
            &[
                json!({ "name": "cm", "configMap": { "name": "settings" } }),
                json!({ "name": "items", "configMap": { "name": "settings", "defaultMode": 0o400, "items": [{ "key": "key", "path": "deep/path" }] } }),
                json!({ "name": "secret", "secret": { "secretName": "hidden", "defaultMode": 0o600 } }),
                json!({ "name": "absent", "configMap": { "name": "none", "optional": true } }),
                json!({ "name": "fields", "downwardAPI": { "items": [
                    { "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } },
                    { "path": "memory", "resourceFieldRef": { "containerName": "c", "resource": "limits.memory", "divisor": "1Mi" } },
                ] } }),
            ],
            json!({}),
        );
        let made = fixture.volumes.setup(&pod, None).await.expect("setup");
        let at = |volume: &str, file: &str| made.volumes[volume].path.join(file);
        assert_eq!(
            (read(at("cm", "key")), read(at("items", "deep/path")), read(at("secret", "password"))),
            ("one".into(), "one".into(), "s".into())
        );
        assert_eq!(fs::read(at("cm", "bin")).expect("binary"), [0, 1]);
        assert_eq!(fs::metadata(at("items", "deep/path")).expect("meta").mode() & 0o777, 0o400);
        assert_eq!(read(at("fields", "labels")), "a=\"1\"");
        assert_eq!(read(at("fields", "memory")), "8");
        assert_eq!(
            fs::read_dir(at("absent", ""))
                .expect("folder")
                .filter(|e| !e.as_ref().expect("entry").file_name().to_string_lossy().starts_with(".."))
                .count(),
            0
        );
        let on_disk = fs::metadata(fixture.dir.path()).expect("meta").dev();
        assert_ne!(fs::metadata(at("secret", "password")).expect("meta").dev(), on_disk, "a secret is not on the disk");
        // A change, and one object that comes into being.
        let begin = Instant::now();
        fixture.api.put("configmaps", "ns", "settings", json!({ "data": { "key": "two" } }));
        fixture.api.put("configmaps", "ns", "none", json!({ "data": { "new": "here" } }));
        assert_eventually_async!(
            2,
            read(at("cm", "key")) == "two" && at("absent", "new").exists(),
            "the change arrives"
        );
        assert!(!at("cm", "other").exists());
        assert!(begin.elapsed() < Duration::from_secs(2));
        // Labels.
        let mut changed = Pod::clone(&pod);
        changed.metadata.labels = Some([("a".to_owned(), "2".to_owned())].into());
        fixture.volumes.update(&Arc::new(changed));
        assert_eventually_async!(2, read(at("fields", "labels")) == "a=\"2\"", "labels arrive");
        fixture.volumes.teardown("uid-1").await.expect("teardown");
        assert!(!fixture.dir.path().join("data/kubelet/pods/uid-1/volumes").exists());
        fixture.volumes.teardown("uid-1").await.expect("twice");
    });
}

#[test]
fn tokens_are_projected_and_renewed() {
    in_private_mounts(|| async {
        let fixture = fixture();
        fixture.api.put("configmaps", "ns", "kube-root-ca.crt", json!({ "data": { "ca.crt": "CA" } }));
        // A life of four seconds: renewed after some three.
        let pod = pod(
            &[json!({ "name": "token", "projected": { "defaultMode": 0o644, "sources": [
                { "serviceAccountToken": { "path": "token", "expirationSeconds": 4 } },
                { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
                { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "fieldPath": "metadata.namespace" } }] } },
            ] } })],
            json!({ "runAsUser": 1234, "fsGroup": 4321 }),
        );
        let made = fixture.volumes.setup(&pod, None).await.expect("setup");
        let token = made.volumes["token"].path.join("token");
        assert_eq!(read(token.clone()), "builder-web-1");
        assert_eq!(read(made.volumes["token"].path.join("ca.crt")), "CA");
        assert_eq!(read(made.volumes["token"].path.join("namespace")), "ns");
        let meta = fs::metadata(&token).expect("meta");
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (1234, 4321, 0o640));
        fixture.volumes.setup(&pod, None).await.expect("again");
        assert_eq!(fixture.api.tokens_issued(), 1, "a living token is kept");
        assert_eventually_async!(6, read(token.clone()) == "builder-web-2", "the token is renewed");
        fixture.volumes.teardown("uid-1").await.expect("teardown");
    });
}

#[test]
fn folders_claims_and_images() {
    in_private_mounts(|| async {
        let fixture = fixture();
        let dir = fixture.dir.path();
        let archive = dir.join("image.tar");
        docker_archive(&archive, "host.example/data:1", &[tar_of(&[Entry::File("file", 0o644, b"of an image")])], None);
        fixture.images.import(ImportSource::Path(archive), None).await.expect("import");
        let local = dir.join("local");
        fs::create_dir(&local).expect("mkdir");
        fixture.api.put("persistentvolumeclaims", "ns", "claim", json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": { "volumeName": "pv" }, "status": { "phase": "Bound" } }));
        fixture.api.put(
            "persistentvolumes",
            "",
            "pv",
            json!({
            "apiVersion": "v1", "kind": "PersistentVolume",
            "spec": { "local": { "path": local }, "claimRef": { "uid": "persistentvolumeclaims/ns/claim" } } }),
        );
        let pod = pod(
            &[
                json!({ "name": "disk", "emptyDir": {} }),
                json!({ "name": "memory", "emptyDir": { "medium": "Memory" } }),
                json!({ "name": "host", "hostPath": { "path": dir.join("host"), "type": "DirectoryOrCreate" } }),
                json!({ "name": "claim", "persistentVolumeClaim": { "claimName": "claim" } }),
                json!({ "name": "image", "image": { "reference": "host.example/data:1" } }),
            ],
            json!({ "fsGroup": 4321 }),
        );
        let made = fixture.volumes.setup(&pod, None).await.expect("setup");
        let path = |name: &str| made.volumes[name].path.clone();
        let meta = fs::metadata(path("disk")).expect("meta");
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o2777, 4321));
        let memory = nix::sys::statvfs::statvfs(&path("memory")).expect("statvfs");
        assert_eq!(memory.blocks() * memory.fragment_size(), 8 << 20, "no larger than the pod's memory");
        assert_eq!(path("host"), dir.join("host"));
        assert_eq!(path("claim"), local);
        assert_eq!(read(path("image").join("file")), "of an image");
        assert!(fs::write(path("image").join("file"), "x").is_err(), "an image is read-only");
        assert!(fixture.images.remove("host.example/data:1").await.is_err(), "its image is in use");
        // Set up again, as after a restart: nothing is lost.
        fs::write(path("disk").join("kept"), "x").expect("write");
        fs::write(path("memory").join("kept"), "x").expect("write");
        fixture.volumes.setup(&pod, None).await.expect("again");
        assert!(path("disk").join("kept").exists() && path("memory").join("kept").exists());
        let usage = fixture.volumes.usage("uid-1").await.expect("usage");
        assert_eq!(usage["memory"].capacity_bytes, 8 << 20);
        assert!(
            usage["disk"].used_bytes > 0 && usage["disk"].counts_as_ephemeral && !usage["memory"].counts_as_ephemeral
        );
        // Sub-paths: made, bound, and not led astray.
        std::os::unix::fs::symlink("/etc", path("disk").join("evil")).expect("link");
        let mounts = |sub: Value| -> Vec<k8s_openapi::api::core::v1::VolumeMount> {
            let mut mount = json!({ "name": "disk", "mountPath": "/data" });
            for (key, value) in sub.as_object().expect("object") {
                mount[key] = value.clone();
            }
            vec![serde_json::from_value(mount).expect("mount")]
        };
        let environment = [("POD".to_owned(), "web".to_owned())];
        let ask = |sub: Value| {
            let (volumes, pod, made, environment) =
                (fixture.volumes.clone(), pod.clone(), made.clone(), environment.clone());
            let mounts = mounts(sub);
            async move { volumes.mounts(&pod, &made, "c", &mounts, &environment).await }
        };
        let bound = ask(json!({ "subPathExpr": "logs/$(POD)", "readOnly": true, "recursiveReadOnly": "IfPossible" }))
            .await
            .expect("sub-path")
            .remove(0);
        assert!(bound.readonly && bound.recursive_read_only);
        fs::write(path("disk").join("logs/web/line"), "x").expect("write");
        assert_eq!(read(bound.host_path.join("line")), "x");
        for bad in [json!({ "subPath": "../x" }), json!({ "subPath": "evil" }), json!({ "subPathExpr": "$(NONE)" })] {
            assert!(ask(bad.clone()).await.is_err(), "{bad}");
        }
        fixture.volumes.teardown("uid-1").await.expect("teardown");
        assert!(Path::new("/etc/passwd").exists() && local.exists() && dir.join("host").exists());
        fixture.images.remove("host.example/data:1").await.expect("free again");
    });
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let fixture = fixture();
    let cases = [
        (json!({ "name": "v", "configMap": { "name": "none" } }), "configmap \"none\" not found"),
        (
            json!({ "name": "v", "hostPath": { "path": "/nonexistent-path", "type": "Directory" } }),
            "hostPath type check failed",
        ),
        (
            json!({ "name": "v", "persistentVolumeClaim": { "claimName": "none" } }),
            "persistentvolumeclaim \"none\" not found",
        ),
        (json!({ "name": "v", "csi": { "driver": "x" } }), "CSI driver x does not support volumes that are Ephemeral"),
    ];
    for (volume, message) in cases {
        let error: VolumeError = fixture.volumes.setup(&pod(&[volume], json!({})), None).await.expect_err(message);
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[tokio::test]
async fn environments_come_from_objects_fields_and_services() {
    let fixture = fixture();
    fixture.api.put("configmaps", "ns", "settings", json!({ "data": { "KEY": "of-map", "bad=name": "x" } }));
    fixture.api.put("secrets", "ns", "hidden", json!({ "data": { "password": "cw==" } }));
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "ns", "uid": "u" },
        "spec": { "containers": [{
            "name": "c",
            "resources": { "limits": { "cpu": "250m" } },
            "envFrom": [{ "prefix": "P_", "configMapRef": { "name": "settings" } }, { "configMapRef": { "name": "none", "optional": true } }],
            "env": [
                { "name": "PLAIN", "value": "$(P_KEY)/$(MY_HOST)/$(NONE)" },
                { "name": "SECRET", "valueFrom": { "secretKeyRef": { "name": "hidden", "key": "password" } } },
                { "name": "ABSENT", "valueFrom": { "secretKeyRef": { "name": "hidden", "key": "none", "optional": true } } },
                { "name": "IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
                { "name": "CPU", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu", "divisor": "1m" } } },
                { "name": "EMPTY" },
            ],
        }] },
        "status": { "podIP": "10.1.2.3" },
    }))
    .expect("pod");
    let services = [("MY_HOST".to_owned(), "10.0.0.1".to_owned())].into();
    let container = &pod.spec.as_ref().expect("spec").containers[0];
    let environment = fixture.volumes.environment(&pod, container, &services).await.expect("environment");
    let expected = [
        ("P_KEY", "of-map"),
        ("PLAIN", "of-map/10.0.0.1/$(NONE)"),
        ("SECRET", "s"),
        ("IP", "10.1.2.3"),
        ("CPU", "250"),
        ("EMPTY", ""),
        ("MY_HOST", "10.0.0.1"),
    ];
    assert_eq!(environment, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let mut broken = container.clone();
    broken.env = Some(vec![
        serde_json::from_value(
            json!({ "name": "X", "valueFrom": { "configMapKeyRef": { "name": "settings", "key": "none" } } }),
        )
        .expect("variable"),
    ]);
    let error = fixture.volumes.environment(&pod, &broken, &services).await.expect_err("no such key");
    assert_eq!(error.to_string(), "couldn't find key none in ConfigMap ns/settings");
}

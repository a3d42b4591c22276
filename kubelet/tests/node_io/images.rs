//! Imports, layers, snapshots, refusals.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_kubelet::images::{GcPolicy, ImageError, ImageStore, ImportSource, LayerLimits, StoreOptions};
use coracle_testkit::need;
use nix::mount::{MsFlags, mount};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::host::{in_private_mounts, run};

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// One entry of a hand-made layer.
pub(crate) enum Entry<'a> {
    Folder(&'a str, u32),
    File(&'a str, u32, &'a [u8]),
    Link(&'a str, &'a str),
    Hard(&'a str, &'a str),
    Char(&'a str, u32, u32),
    /// A file with PAX records before it.
    Pax(&'a str, &'a [u8], &'a [(&'a str, &'a [u8])]),
}

/// A tar whose names are written as they are, also the bad ones.
pub(crate) fn tar_of(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str,
                   kind: tar::EntryType,
                   mode: u32,
                   link: Option<&str>,
                   content: &[u8],
                   device: Option<(u32, u32)>| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        // Past the library's own checks: that is the point.
        let raw = header.as_old_mut();
        raw.name[..name.len()].copy_from_slice(name.as_bytes());
        if let Some(link) = link {
            raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
        }
        if let Some((major, minor)) = device {
            header.set_device_major(major).expect("major");
            header.set_device_minor(minor).expect("minor");
        }
        header.set_cksum();
        builder.append(&header, content).expect("append");
    };
    for entry in entries {
        match entry {
            Entry::Folder(name, mode) => add(name, tar::EntryType::Directory, *mode, None, b"", None),
            Entry::File(name, mode, content) => add(name, tar::EntryType::Regular, *mode, None, content, None),
            Entry::Link(name, target) => add(name, tar::EntryType::Symlink, 0o777, Some(target), b"", None),
            Entry::Hard(name, target) => add(name, tar::EntryType::Link, 0o644, Some(target), b"", None),
            Entry::Char(name, major, minor) => {
                add(name, tar::EntryType::Char, 0o666, None, b"", Some((*major, *minor)))
            }
            Entry::Pax(name, content, records) => {
                let mut text = Vec::new();
                for (key, value) in *records {
                    // The length counts itself.
                    let rest = key.len() + value.len() + 3;
                    let mut length = rest + 1;
                    while length != rest + length.to_string().len() {
                        length = rest + length.to_string().len();
                    }
                    text.extend_from_slice(format!("{length} {key}=").as_bytes());
                    text.extend_from_slice(value);
                    text.push(b'\n');
                }
                add("pax", tar::EntryType::XHeader, 0o644, None, &text, None);
                add(name, tar::EntryType::Regular, 0o644, None, content, None);
            }
        }
    }
    builder.into_inner().expect("tar")
}

/// Writes a docker-archive of these layers.
pub(crate) fn docker_archive(path: &Path, name: &str, layers: &[Vec<u8>], diff_ids: Option<Vec<String>>) {
    let diff_ids = diff_ids.unwrap_or_else(|| layers.iter().map(|layer| sha256(layer)).collect());
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["/bin/true"], "Env": ["A=b"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let files: Vec<String> = (0..layers.len()).map(|index| format!("{index}/layer.tar")).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": files }]).to_string();
    let mut members: Vec<(String, Vec<u8>)> =
        vec![("manifest.json".into(), manifest.into()), ("config.json".into(), config.into())];
    members.extend(files.into_iter().zip(layers.iter().cloned()));
    let mut builder = tar::Builder::new(fs::File::create(path).expect("archive"));
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, content.as_slice()).expect("append");
    }
    builder.into_inner().expect("archive").flush().expect("flush");
}

struct Fixture {
    dir: tempfile::TempDir,
    store: Arc<ImageStore>,
}

fn fixture(limits: LayerLimits) -> Fixture {
    let dir = tempfile::tempdir().expect("temp folder");
    let store = ImageStore::open(&dir.path().join("images"), StoreOptions { limits, ..StoreOptions::default() })
        .expect("store");
    Fixture { dir, store }
}

impl Fixture {
    async fn import(&self, layers: &[Vec<u8>]) -> Result<Arc<coracle_kubelet::images::Image>, ImageError> {
        let archive = self.dir.path().join("archive.tar");
        docker_archive(&archive, "test.example/app:v1", layers, None);
        Ok(self.store.import(ImportSource::Path(archive), None).await?.remove(0))
    }

    /// Mounts the image and returns where.
    fn mounted(&self, image: &coracle_kubelet::images::Image) -> PathBuf {
        let snapshot = self.store.snapshot("c1", image).expect("snapshot");
        let root = self.dir.path().join("root");
        fs::create_dir_all(&root).expect("mkdir");
        let options = snapshot.mount_options();
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .expect("overlay mounts");
        root
    }

    fn nothing_left(&self) {
        for folder in ["layers", "staging", "snapshots"] {
            let left: Vec<_> = fs::read_dir(self.dir.path().join("images").join(folder)).expect("folder").collect();
            assert!(left.is_empty(), "{folder} holds {left:?}");
        }
        assert!(self.store.list().expect("list").is_empty());
    }
}

#[test]
fn layers_show_as_overlayfs_means_them() {
    in_private_mounts(|| async {
        let fixture = fixture(LayerLimits::default());
        let low = tar_of(&[
            Entry::Folder("usr/", 0o755),
            Entry::Folder("usr/lib/", 0o750),
            Entry::File("usr/lib/a", 0o644, b"low"),
            Entry::Link("lib", "usr/lib"),
            Entry::File("gone", 0o644, b"x"),
            Entry::Folder("opaque/", 0o755),
            Entry::File("opaque/old", 0o644, b"x"),
            Entry::Folder("replaced/", 0o755),
            Entry::File("replaced/old", 0o644, b"x"),
            Entry::File("linked", 0o600, b"linked"),
            Entry::File("su", 0o4755, b"setuid"),
            Entry::Char("null", 1, 3),
            Entry::Pax(
                "cap",
                b"c",
                &[("SCHILY.xattr.user.note", b"kept"), ("mtime", b"1600000000.5"), ("uid", b"70000")],
            ),
        ]);
        let high = tar_of(&[
            // Its parent is a link of the layer below: the file belongs where that points.
            Entry::File("lib/b", 0o644, b"high"),
            Entry::File(".wh.gone", 0o644, b""),
            Entry::File("opaque/.wh..wh..opq", 0o644, b""),
            Entry::File("opaque/new", 0o644, b"x"),
            Entry::File(".wh.replaced", 0o644, b""),
            Entry::Folder("replaced/", 0o700),
            Entry::Hard("again", "linked"),
            Entry::File("twice", 0o644, b"first"),
            Entry::File("twice", 0o644, b"second"),
        ]);
        let image = fixture.import(&[low, high]).await.expect("import");
        let root = fixture.mounted(&image);
        let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((read("usr/lib/a"), read("usr/lib/b"), read("lib/b")), ("low".into(), "high".into(), "high".into()));
        assert_eq!(
            fs::metadata(root.join("usr/lib")).expect("meta").mode() & 0o7777,
            0o750,
            "an implied parent is as below"
        );
        assert!(
            !root.join("gone").exists() && !root.join("opaque/old").exists() && !root.join("replaced/old").exists()
        );
        assert!(root.join("opaque/new").exists());
        assert_eq!(fs::metadata(root.join("replaced")).expect("meta").mode() & 0o7777, 0o700);
        assert_eq!((read("again"), read("linked"), read("twice")), ("linked".into(), "linked".into(), "second".into()));
        assert_eq!(
            fs::metadata(root.join("again")).expect("meta").ino(),
            fs::metadata(root.join("linked")).expect("meta").ino()
        );
        assert_eq!(fs::metadata(root.join("su")).expect("meta").mode() & 0o7777, 0o4755);
        let null = fs::metadata(root.join("null")).expect("meta");
        assert!(null.file_type().is_char_device() && null.rdev() == nix::sys::stat::makedev(1, 3));
        let cap = fs::metadata(root.join("cap")).expect("meta");
        assert_eq!((cap.uid(), cap.mtime(), cap.mtime_nsec()), (70000, 1_600_000_000, 500_000_000));
        assert_eq!(xattr::get(root.join("cap"), "user.note").expect("xattr").as_deref(), Some(b"kept".as_slice()));
        // Writable, and the layers stay as they were.
        fs::write(root.join("usr/lib/a"), "changed").expect("write");
        assert_eq!(fs::read_to_string(image.layers[0].join("usr/lib/a")).expect("layer"), "low");
        nix::mount::umount(&root).expect("unmount");
    });
}

#[tokio::test]
async fn malicious_layers_are_refused_by_name() {
    let bomb = LayerLimits { bytes: 1 << 20, entries: 100, ratio: 400 };
    let zeros = vec![0; 2 << 20];
    let many: Vec<String> = (0..200).map(|number| format!("f{number}")).collect();
    let many: Vec<Entry<'_>> = many.iter().map(|name| Entry::File(name, 0o644, b"")).collect();
    type Check = fn(&ImageError) -> bool;
    let cases: Vec<(&str, Vec<u8>, Check)> = vec![
        ("path", tar_of(&[Entry::File("../evil", 0o644, b"x")]), |e| matches!(e, ImageError::Escape { .. })),
        ("inner path", tar_of(&[Entry::File("a/../../evil", 0o644, b"x")]), |e| matches!(e, ImageError::Escape { .. })),
        ("hard link", tar_of(&[Entry::Hard("x", "../../../etc/passwd")]), |e| matches!(e, ImageError::Escape { .. })),
        ("missing hard link", tar_of(&[Entry::Hard("x", "etc/passwd")]), |e| matches!(e, ImageError::Entry { .. })),
        ("link loop", tar_of(&[Entry::Link("a", "b"), Entry::Link("b", "a"), Entry::File("a/x", 0o644, b"")]), |e| {
            matches!(e, ImageError::Entry { .. })
        }),
        ("size", tar_of(&[Entry::File("zeros", 0o644, &zeros)]), |e| matches!(e, ImageError::Bomb { .. })),
        ("count", tar_of(&many), |e| matches!(e, ImageError::Bomb { .. })),
        (
            "overlay attribute",
            tar_of(&[Entry::Pax("x", b"", &[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")])]),
            |e| matches!(e, ImageError::Entry { .. }),
        ),
        ("cut", tar_of(&[Entry::File("x", 0o644, &[1; 4096])])[..2048].to_vec(), |e| {
            matches!(e, ImageError::Damaged { .. })
        }),
    ];
    for (what, layer, fits) in cases {
        let fixture = fixture(bomb);
        let error = fixture.import(&[layer]).await.expect_err(what);
        assert!(fits(&error), "{what}: {error}");
        fixture.nothing_left();
    }
    assert!(!Path::new("/evil").exists());
}

#[tokio::test]
async fn a_link_in_a_layer_leads_nowhere_outside() {
    let fixture = fixture(LayerLimits::default());
    let outside = fixture.dir.path().join("outside");
    fs::create_dir(&outside).expect("mkdir");
    let target = outside.to_str().expect("text");
    let layer = tar_of(&[Entry::Link("link", target), Entry::File("link/file", 0o644, b"x")]);
    let image = fixture.import(&[layer]).await.expect("resolved inside the root");
    assert!(fs::read_dir(&outside).expect("folder").next().is_none(), "nothing was written outside");
    assert!(image.layers[0].join(target.trim_start_matches('/')).join("file").exists());
}

#[tokio::test]
async fn a_lying_digest_is_refused() {
    let fixture = fixture(LayerLimits::default());
    let archive = fixture.dir.path().join("archive.tar");
    let layer = tar_of(&[Entry::File("x", 0o644, b"x")]);
    docker_archive(&archive, "x.example/y:1", &[layer], Some(vec![sha256(b"something else")]));
    let error = fixture.store.import(ImportSource::Path(archive), None).await.expect_err("lie");
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
    fixture.nothing_left();
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing() {
    in_private_mounts(|| async {
        let dir = tempfile::tempdir().expect("temp folder");
        let disk = dir.path().join("disk");
        fs::create_dir(&disk).expect("mkdir");
        mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=3m")).expect("tmpfs");
        let store = ImageStore::open(&disk.join("images"), StoreOptions::default()).expect("store");
        let archive = dir.path().join("archive.tar");
        docker_archive(&archive, "x.example/y:1", &[tar_of(&[Entry::File("big", 0o644, &vec![7; 2 << 20])])], None);
        let error = store.import(ImportSource::Path(archive), None).await.expect_err("full");
        assert!(matches!(error, ImageError::DiskFull { .. }), "{error}");
        assert!(error.to_string().contains("disk full"), "{error}");
        assert!(fs::read_dir(disk.join("images/layers")).expect("folder").next().is_none());
        assert!(fs::read_dir(disk.join("images/staging")).expect("folder").next().is_none());
        // Blobs that were complete may stay until pruned; then there is room again.
        store.prune(true).await.expect("prune");
        assert!(fs::read_dir(disk.join("images/blobs/sha256")).expect("folder").next().is_none());
        drop(store);
        nix::mount::umount(&disk).expect("unmount");
    });
}

#[tokio::test]
async fn archives_of_skopeo_and_umoci_are_imported() {
    let (skopeo, umoci) = (need("skopeo", "skopeo"), need("umoci", "umoci"));
    let fixture = fixture(LayerLimits::default());
    let dir = fixture.dir.path();
    let layout = dir.join("layout");
    let image = format!("{}:v1", layout.display());
    run(&umoci, &["init", "--layout", layout.to_str().expect("text")]);
    run(&umoci, &["new", "--image", &image]);
    fs::create_dir_all(dir.join("tree/sub")).expect("mkdir");
    fs::write(dir.join("tree/sub/file"), "from umoci").expect("write");
    run(&umoci, &["insert", "--image", &image, dir.join("tree").to_str().expect("text"), "/opt"]);
    run(&umoci, &["config", "--image", &image, "--config.entrypoint", "/opt/run", "--config.env", "K=v"]);
    // A folder, a tar of it, and docker's form.
    let base = Some("host.example/team/app");
    let from_folder = fixture.store.import(ImportSource::Path(layout.clone()), base).await.expect("folder").remove(0);
    assert_eq!(from_folder.repo_tags, ["host.example/team/app:v1"]);
    assert_eq!(
        from_folder.config.config().as_ref().and_then(|config| config.entrypoint().clone()),
        Some(vec!["/opt/run".to_owned()])
    );
    let oci_tar = dir.join("oci.tar");
    run(
        &skopeo,
        &["copy", "-q", &format!("oci:{image}"), &format!("oci-archive:{}:other.example/app:v2", oci_tar.display())],
    );
    let stream: Box<dyn std::io::Read + Send> = Box::new(fs::File::open(&oci_tar).expect("open"));
    let from_tar = fixture.store.import(ImportSource::Stream(stream), None).await.expect("oci tar").remove(0);
    assert_eq!(from_tar.id, from_folder.id, "the same configuration is the same image");
    let docker_tar = dir.join("docker.tar");
    run(
        &skopeo,
        &[
            "copy",
            "-q",
            &format!("oci:{image}"),
            &format!("docker-archive:{}:host.example/docker:v3", docker_tar.display()),
        ],
    );
    let from_docker = fixture.store.import(ImportSource::Path(docker_tar), None).await.expect("docker tar").remove(0);
    assert_eq!(from_docker.layers, from_folder.layers, "equal layers are unpacked once");
    assert_eq!(fs::read_to_string(from_docker.layers[0].join("opt/sub/file")).expect("file"), "from umoci");
    for name in ["host.example/team/app:v1", "other.example/app:v2", &from_folder.id, &from_folder.id[7..19]] {
        let found = fixture.store.resolve(name).expect(name).expect(name);
        assert_eq!(found.id, from_folder.id, "{name}");
    }
    // And out again: what we export, skopeo reads, digest for digest.
    let exported = dir.join("exported.tar");
    let out = Box::new(fs::File::create(&exported).expect("create"));
    fixture.store.export(vec!["host.example/team/app:v1".into()], out).await.expect("export");
    for transport in ["oci-archive", "docker-archive"] {
        let text = run(
            &skopeo,
            &["inspect", "--config", &format!("{transport}:{}:host.example/team/app:v1", exported.display())],
        );
        assert!(text.contains("/opt/run"), "{text}");
    }
}

#[tokio::test]
async fn removal_respects_use_and_frees_content() {
    let fixture = fixture(LayerLimits::default());
    let image = fixture.import(&[tar_of(&[Entry::File("x", 0o644, b"x")])]).await.expect("import");
    fixture.store.snapshot("c1", &image).expect("snapshot");
    let error = fixture.store.remove("test.example/app:v1").await.expect_err("in use");
    assert!(matches!(error, ImageError::InUse { .. }), "{error}");
    fixture.store.prune(true).await.expect("prune");
    assert!(fixture.store.resolve(&image.id).expect("valid").is_some(), "a used image survives");
    // Another process on the same store: it sees the image, and its removal is seen here.
    let other = ImageStore::open(&fixture.dir.path().join("images"), StoreOptions::default()).expect("store");
    fixture.store.remove_snapshot("c1").expect("remove snapshot");
    let removed = other.remove("test.example/app:v1").await.expect("remove");
    assert_eq!(removed.deleted, std::slice::from_ref(&image.id));
    assert!(removed.freed_bytes > 0);
    fixture.nothing_left();
    assert!(fs::read_dir(fixture.dir.path().join("images/blobs/sha256")).expect("folder").next().is_none());
}

#[tokio::test]
async fn work_that_a_crash_left_is_cleared() {
    let dir = tempfile::tempdir().expect("temp folder");
    let root = dir.path().join("images");
    drop(ImageStore::open(&root, StoreOptions::default()).expect("store"));
    fs::create_dir_all(root.join("staging/dead/layer-1/fs")).expect("mkdir");
    fs::create_dir_all(root.join("layers/7/fs")).expect("mkdir");
    fs::create_dir_all(root.join("snapshots/half/fs")).expect("mkdir");
    let store = ImageStore::open(&root, StoreOptions::default()).expect("store");
    assert!(!root.join("staging/dead").exists());
    store.prune(false).await.expect("prune");
    assert!(!root.join("layers/7").exists() && !root.join("snapshots/half").exists());
}

#[tokio::test]
async fn garbage_is_collected_only_when_and_what_the_policy_says() {
    let fixture = fixture(LayerLimits::default());
    let used = fixture.import(&[tar_of(&[Entry::File("used", 0o644, b"x")])]).await.expect("import");
    fixture.store.snapshot("c1", &used).expect("snapshot");
    let archive = fixture.dir.path().join("other.tar");
    docker_archive(&archive, "test.example/other:v1", &[tar_of(&[Entry::File("other", 0o644, b"y")])], None);
    let other = fixture.store.import(ImportSource::Path(archive), None).await.expect("import").remove(0);
    let young = std::time::Duration::from_secs(3600);
    let full = GcPolicy { high_percent: 0, low_percent: 0, min_age: std::time::Duration::ZERO, max_age: None };
    for kept in [GcPolicy { high_percent: 101, ..full }, GcPolicy { min_age: young, ..full }] {
        assert_eq!(fixture.store.collect_garbage(kept).await.expect("collect").deleted, Vec::<String>::new());
    }
    let removed = fixture.store.collect_garbage(full).await.expect("collect");
    assert_eq!(removed.deleted, std::slice::from_ref(&other.id));
    assert!(fixture.store.resolve(&used.id).expect("valid").is_some());
}

//! Container images made on the spot: an OCI layout in one tar file, from programs of the host.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What goes into the image, and how it starts.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Name and tag that the archive carries, such as `docker.io/library/hello:1`.
    pub tag: String,
    /// Files of the host and where they stand in the image (absolute); all become executable.
    pub files: Vec<(PathBuf, String)>,
    /// Symbolic links of the image: target, then link (absolute).
    pub links: Vec<(String, String)>,
    /// Folders of the image (absolute).
    pub folders: Vec<String>,
    /// The command that a container without one of its own runs.
    pub entrypoint: Vec<String>,
    /// `NAME=value` pairs.
    pub env: Vec<String>,
}

impl Image {
    /// An image with busybox and a link for each of its usual applets, which needs the Debian package busybox-static.
    pub fn busybox(tag: &str) -> Self {
        let applets = [
            "sh", "cat", "echo", "sleep", "ls", "id", "env", "true", "false", "wget", "nslookup", "ip", "nc", "mount",
            "hostname", "head", "seq", "touch", "kill", "stat", "dd", "grep", "ps", "printf", "test", "rm", "mkdir",
            "date", "trap", "yes", "tty", "stty", "chmod", "ping",
        ];
        Self {
            tag: tag.into(),
            files: vec![(crate::need("busybox", "busybox-static"), "/bin/busybox".into())],
            links: applets.iter().map(|name| ("busybox".into(), format!("/bin/{name}"))).collect(),
            folders: vec!["/tmp".into(), "/etc".into(), "/root".into()],
            entrypoint: vec!["/bin/sh".into()],
            env: vec!["PATH=/bin".into()],
        }
    }

    /// Writes the image to `archive` as a tar of an OCI layout (image-spec 1.1).
    ///
    /// # Errors
    /// When a file cannot be read or the archive not be written.
    pub fn write(&self, archive: &Path) -> std::io::Result<()> {
        let layer = self.layer()?;
        let diff_id = digest(&layer);
        let config = serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": self.env},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        }))?;
        let mut listed = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        listed["annotations"] = json!({
            "io.containerd.image.name": self.tag,
            "org.opencontainers.image.ref.name": self.tag,
        });
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [listed],
        }))?;
        let mut tar = tar::Builder::new(std::fs::File::create(archive)?);
        append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        append(&mut tar, "index.json", &index, 0o644)?;
        for blob in [&layer, &config, &manifest] {
            append(&mut tar, &format!("blobs/sha256/{}", hex(blob)), blob, 0o644)?;
        }
        tar.into_inner()?.flush()
    }

    fn layer(&self) -> std::io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for folder in &self.folders {
            let mut header = header(tar::EntryType::Directory, 0, 0o755);
            tar.append_data(&mut header, relative(folder), std::io::empty())?;
        }
        for (source, target) in &self.files {
            let mut bytes = Vec::new();
            std::fs::File::open(source)?.read_to_end(&mut bytes)?;
            append(&mut tar, relative(target), &bytes, 0o755)?;
        }
        for (target, link) in &self.links {
            let mut header = header(tar::EntryType::Symlink, 0, 0o777);
            tar.append_link(&mut header, relative(link), target)?;
        }
        tar.into_inner()
    }
}

fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append<W: Write>(tar: &mut tar::Builder<W>, path: &str, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    tar.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64, mode), path, bytes)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

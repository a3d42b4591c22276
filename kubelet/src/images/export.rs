//! Export as one archive that docker, podman, skopeo and containerd read: an OCI layout with a docker `manifest.json`.

use std::io::{Read, Write};
use std::sync::Arc;

use super::blobs::MAX_DOCUMENT_BYTES;
use super::digest::Digest;
use super::error::{ImageError, IoContext};
use super::import::parse_manifest;
use super::store::ImageStore;

impl ImageStore {
    /// Writes images as a tar archive.
    ///
    /// # Errors
    /// When an image is not in the store or the archive cannot be written.
    pub async fn export(
        self: &Arc<Self>,
        references: Vec<String>,
        out: Box<dyn Write + Send>,
    ) -> Result<(), ImageError> {
        self.blocking(move |store| {
            let _adding = store.layout.adding()?;
            let mut tar = tar::Builder::new(out);
            let mut written = std::collections::BTreeSet::new();
            let mut entries = Vec::new();
            let mut docker = Vec::new();
            for reference in &references {
                let image = store.resolve(reference)?.ok_or_else(|| ImageError::NotFound { reference: reference.clone() })?;
                let manifest_digest: Digest = image.manifest_digest.parse()?;
                let manifest_bytes = store.layout.read_document(&manifest_digest)?;
                let manifest = parse_manifest(&manifest_bytes)?;
                let mut digests = vec![manifest_digest.clone()];
                for blob in manifest.layers().iter().chain([manifest.config()]) {
                    digests.push(Digest::try_from(blob.digest())?);
                }
                for digest in digests {
                    if written.insert(digest.clone()) {
                        store.export_blob(&mut tar, &digest)?;
                    }
                }
                let media_type = manifest
                    .media_type()
                    .as_ref()
                    .map_or_else(|| "application/vnd.oci.image.manifest.v1+json".to_owned(), ToString::to_string);
                let names: Vec<Option<&String>> =
                    if image.repo_tags.is_empty() { vec![None] } else { image.repo_tags.iter().map(Some).collect() };
                for name in names {
                    let mut entry = serde_json::json!({
                        "mediaType": media_type, "digest": manifest_digest.as_str(), "size": manifest_bytes.len(),
                    });
                    if let Some(name) = name {
                        entry["annotations"] = serde_json::json!({
                            "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name,
                        });
                    }
                    entries.push(entry);
                }
                docker.push(serde_json::json!({
                    "Config": blob_path(&Digest::try_from(manifest.config().digest())?),
                    "RepoTags": image.repo_tags,
                    "Layers": manifest.layers().iter()
                        .map(|layer| Digest::try_from(layer.digest()).map(|digest| blob_path(&digest)))
                        .collect::<Result<Vec<_>, _>>()?,
                }));
            }
            let documents = [
                ("oci-layout", serde_json::json!({ "imageLayoutVersion": "1.0.0" })),
                ("index.json", serde_json::json!({
                    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries,
                })),
                ("manifest.json", serde_json::Value::Array(docker)),
            ];
            for (name, document) in documents {
                let bytes = document.to_string().into_bytes();
                debug_assert!(bytes.len() as u64 <= MAX_DOCUMENT_BYTES);
                append(&mut tar, name, bytes.len() as u64, bytes.as_slice())?;
            }
            let mut out = tar.into_inner().step("write", "archive")?;
            out.flush().step("write", "archive")
        })
        .await
    }

    fn export_blob(&self, tar: &mut tar::Builder<Box<dyn Write + Send>>, digest: &Digest) -> Result<(), ImageError> {
        let file = self.layout.open_blob(digest)?;
        let bytes = file.metadata().step("look at", self.layout.blob(digest))?.len();
        append(tar, &blob_path(digest), bytes, file)
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

fn append(
    tar: &mut tar::Builder<Box<dyn Write + Send>>,
    name: &str,
    bytes: u64,
    content: impl Read,
) -> Result<(), ImageError> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes);
    header.set_mode(0o644);
    // The same images give the same archive, byte for byte.
    header.set_mtime(0);
    tar.append_data(&mut header, name, content).step("write", name)
}

//! Import of docker-archives and OCI image layouts, and the last steps that imports and pulls share.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, ImageManifestBuilder, MediaType};
use serde::Deserialize;

use super::archive::Archive;
use super::digest::Digest;
use super::error::ImageError;
use super::layers::{Layer, chain_ids};
use super::layout::Stage;
use super::reference::Reference;
use super::store::{Image, ImageStore};
use super::table::ImageRecord;

/// Layers of one image: more than overlayfs can stack (500).
const MAX_LAYERS: usize = 500;
/// Indexes inside indexes.
const MAX_INDEX_DEPTH: usize = 3;
/// Annotations that name an image in an index.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// Where an import comes from.
pub enum ImportSource {
    /// A tar file (plain, gzip, zstd) or the folder of an OCI layout.
    Path(PathBuf),
    /// A tar stream, for instance standard input.
    Stream(Box<dyn Read + Send>),
}

/// `manifest.json` of a docker-archive.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl ImageStore {
    /// Adds the images of a docker-archive or OCI image layout. `name` is given to the image if the archive holds one
    /// (and completes a bare tag of an OCI layout); names in the archive count besides.
    ///
    /// # Errors
    /// When the source is no image, lies about digests, is malicious, or the disk is full. Nothing half-imported stays.
    pub async fn import(
        self: &Arc<Self>,
        source: ImportSource,
        name: Option<&str>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let name = name.map(str::parse::<Reference>).transpose()?;
        self.blocking(move |store| {
            let _adding = store.layout.adding()?;
            let stage = store.layout.stage()?;
            let archive = match source {
                ImportSource::Path(path) => Archive::open(&path, &stage)?,
                ImportSource::Stream(stream) => Archive::spool(stream, Path::new("standard input"), &stage)?,
            };
            if archive.document("oci-layout")?.is_some() {
                store.import_oci(&archive, &stage, name.as_ref())
            } else if let Some(manifest) = archive.document("manifest.json")? {
                store.import_docker(&archive, &stage, &manifest, name.as_ref())
            } else {
                Err(ImageError::NotAnImage {
                    path: archive.origin().to_owned(),
                    reason: "it has neither manifest.json nor oci-layout".into(),
                })
            }
        })
        .await
    }

    fn import_docker(
        &self,
        archive: &Archive,
        stage: &Stage,
        manifest: &[u8],
        name: Option<&Reference>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let entries: Vec<DockerManifest> =
            serde_json::from_slice(manifest).map_err(|error| ImageError::document("manifest.json", error))?;
        let single = entries.len() == 1;
        let mut images = Vec::new();
        for entry in entries {
            let config_bytes = archive.require(&entry.config)?;
            let config: ImageConfiguration = serde_json::from_slice(&config_bytes)
                .map_err(|error| ImageError::document(entry.config.clone(), error))?;
            let diff_ids = diff_ids(&config)?;
            let files = entry.layers.unwrap_or_default();
            check_layer_count(files.len(), diff_ids.len())?;
            let mut layers: Vec<Descriptor> = Vec::new();
            for file in &files {
                let (path, digest, bytes) = archive.stage(file, None, stage)?;
                let media_type = layer_media_type(&path)?;
                self.layout.adopt_blob(&path, &digest)?;
                layers.push(descriptor(media_type, bytes, &digest)?);
            }
            let config_digest = self.layout.put_document(&config_bytes)?;
            let manifest = ImageManifestBuilder::default()
                .schema_version(2u32)
                .media_type(MediaType::ImageManifest)
                .config(descriptor(MediaType::ImageConfig, config_bytes.len() as u64, &config_digest)?)
                .layers(layers)
                .build()
                .map_err(|error| ImageError::document("manifest", error))?;
            let bytes = serde_json::to_vec(&manifest).map_err(|error| ImageError::document("manifest", error))?;
            let mut names =
                entry.repo_tags.unwrap_or_default().iter().map(|tag| tag.parse()).collect::<Result<Vec<_>, _>>()?;
            names.extend(name.filter(|_| single).cloned());
            images.push(self.assemble(stage, &bytes, &names)?);
        }
        Ok(images)
    }

    fn import_oci(
        &self,
        archive: &Archive,
        stage: &Stage,
        name: Option<&Reference>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let index: ImageIndex = serde_json::from_slice(&archive.require("index.json")?)
            .map_err(|error| ImageError::document("index.json", error))?;
        let single = index.manifests().len() == 1;
        let mut images: Vec<Arc<Image>> = Vec::new();
        for entry in index.manifests() {
            let mut names: Vec<Reference> = named(entry, name)?.into_iter().collect();
            names.extend(name.filter(|_| single && names.is_empty()).cloned());
            let manifest = self.stage_manifest(archive, stage, entry, MAX_INDEX_DEPTH)?;
            images.push(self.assemble(stage, &manifest, &names)?);
        }
        if images.is_empty() {
            return Err(ImageError::NotAnImage {
                path: archive.origin().to_owned(),
                reason: "its index is empty".into(),
            });
        }
        Ok(images)
    }

    /// Brings the blobs of a manifest (of the entry for this host, if it is an index) into the store.
    fn stage_manifest(
        &self,
        archive: &Archive,
        stage: &Stage,
        entry: &Descriptor,
        depth: usize,
    ) -> Result<Vec<u8>, ImageError> {
        let digest = Digest::try_from(entry.digest())?;
        let bytes = archive.require(&blob_name(&digest))?;
        verify(&digest, &bytes)?;
        if let Some(index) = as_index(&bytes) {
            if depth == 0 {
                return Err(ImageError::TooMany { what: "depth of indexes", limit: MAX_INDEX_DEPTH });
            }
            let chosen = for_this_host(&index, digest.as_str())?;
            return self.stage_manifest(archive, stage, chosen, depth - 1);
        }
        let manifest = parse_manifest(&bytes)?;
        for blob in manifest.layers().iter().chain([manifest.config()]) {
            let digest = Digest::try_from(blob.digest())?;
            if self.layout.has_blob(&digest) {
                continue;
            }
            let (path, _, actual) = archive.stage(&blob_name(&digest), Some(&digest), stage)?;
            if actual != blob.size() {
                return Err(ImageError::SizeMismatch { what: digest.to_string(), expected: blob.size(), actual });
            }
            self.layout.adopt_blob(&path, &digest)?;
        }
        Ok(bytes)
    }

    /// The last steps of imports and pulls: all blobs of the manifest are in the store; unpacks what is not unpacked
    /// yet, and registers the image.
    pub(super) fn assemble(
        &self,
        stage: &Stage,
        manifest_bytes: &[u8],
        names: &[Reference],
    ) -> Result<Arc<Image>, ImageError> {
        let manifest = parse_manifest(manifest_bytes)?;
        let id = Digest::try_from(manifest.config().digest())?;
        let config = self.read_config(&id)?;
        let diff_ids = diff_ids(&config)?;
        check_layer_count(manifest.layers().len(), diff_ids.len())?;
        let chain = chain_ids(&diff_ids);
        let mut known = self.layout.read_layers()?;
        let mut below: Vec<Layer> = Vec::new();
        let mut blobs = Vec::new();
        for ((descriptor, diff_id), chain_id) in manifest.layers().iter().zip(&diff_ids).zip(&chain) {
            let digest = Digest::try_from(descriptor.digest())?;
            let layer = match known.remove(chain_id) {
                Some(layer) => layer,
                None => {
                    let content = self.layout.open_blob(&digest)?;
                    self.layout.add_layer(stage, content, diff_id, &below, self.options.limits)?
                }
            };
            below.push(layer);
            blobs.push(digest);
        }
        let manifest_digest = self.layout.put_document(manifest_bytes)?;
        let mut tags = BTreeSet::new();
        let mut digests = BTreeSet::new();
        for name in names {
            tags.extend(name.tagged());
            digests.insert(name.at(name.digest.as_deref().unwrap_or(manifest_digest.as_str())));
        }
        let bytes = manifest.layers().iter().map(Descriptor::size).sum::<u64>() + manifest.config().size();
        let added_at = jiff::Timestamp::now().as_second();
        let record =
            ImageRecord { manifest: manifest_digest, blobs, chain, bytes, tags, digests, added_at, pinned: false };
        self.register(&id, record)
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Checks bytes against the digest they were announced with.
pub(super) fn verify(expected: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
    let mut hasher = expected.hasher();
    hasher.update(bytes);
    let actual = hasher.finish();
    if actual == *expected {
        return Ok(());
    }
    Err(ImageError::DigestMismatch {
        what: "document".into(),
        expected: expected.to_string(),
        actual: actual.to_string(),
    })
}

/// The index in `bytes`, if it is one. Media types are optional in files, so the content decides.
pub(super) fn as_index(bytes: &[u8]) -> Option<ImageIndex> {
    #[derive(Deserialize)]
    struct Probe {
        manifests: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice::<Probe>(bytes).ok()?.manifests?;
    serde_json::from_slice(bytes).ok()
}

pub(super) fn parse_manifest(bytes: &[u8]) -> Result<ImageManifest, ImageError> {
    let manifest: ImageManifest =
        serde_json::from_slice(bytes).map_err(|error| ImageError::document("image manifest", error))?;
    if manifest.layers().len() > MAX_LAYERS {
        return Err(ImageError::TooMany { what: "number of layers", limit: MAX_LAYERS });
    }
    Ok(manifest)
}

fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, ImageError> {
    config.rootfs().diff_ids().iter().map(|id| id.parse()).collect()
}

fn check_layer_count(layers: usize, diff_ids: usize) -> Result<(), ImageError> {
    if layers == diff_ids {
        return Ok(());
    }
    Err(ImageError::document("image", format!("its manifest has {layers} layers, its configuration {diff_ids}")))
}

/// The entry of an index that this host can run: same operating system and architecture; among several (variants of
/// arm) the first that the host's architecture can run, as the index orders them.
pub(super) fn for_this_host<'a>(index: &'a ImageIndex, what: &str) -> Result<&'a Descriptor, ImageError> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    let fits = |entry: &&Descriptor| match entry.platform() {
        Some(platform) => platform.os().to_string() == "linux" && platform.architecture().to_string() == architecture,
        None => false,
    };
    if let Some(entry) = index.manifests().iter().find(fits) {
        return Ok(entry);
    }
    // An index of one entry without a platform leaves no choice.
    if let [only] = index.manifests().as_slice()
        && only.platform().is_none()
    {
        return Ok(only);
    }
    let available: Vec<String> = index
        .manifests()
        .iter()
        .filter_map(|entry| entry.platform().as_ref())
        .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
        .collect();
    Err(ImageError::Platform {
        what: what.to_owned(),
        platform: format!("linux/{architecture}"),
        available: if available.is_empty() { "none with a platform".into() } else { available.join(", ") },
    })
}

/// The name that an entry of an OCI layout's index carries. A bare word is a tag of `base`, or else a name itself.
fn named(entry: &Descriptor, base: Option<&Reference>) -> Result<Option<Reference>, ImageError> {
    let Some(annotations) = entry.annotations() else {
        return Ok(None);
    };
    let Some(text) = NAME_ANNOTATIONS.iter().find_map(|key| annotations.get(*key)) else {
        return Ok(None);
    };
    match base {
        Some(base) if !text.contains(['/', ':', '@']) => format!("{}:{text}", base.name()).parse().map(Some),
        _ => text.parse().map(Some),
    }
}

fn descriptor(media_type: MediaType, bytes: u64, digest: &Digest) -> Result<Descriptor, ImageError> {
    let digest: oci_spec::image::Digest =
        digest.as_str().parse().map_err(|error| ImageError::document("digest", error))?;
    Ok(Descriptor::new(media_type, bytes, digest))
}

fn layer_media_type(path: &Path) -> Result<MediaType, ImageError> {
    use super::error::IoContext;
    let mut magic = [0; 4];
    let mut file = std::fs::File::open(path).step("open", path)?;
    let count = file.read(&mut magic).step("read", path)?;
    Ok(match &magic[..count] {
        [0x1f, 0x8b, ..] => MediaType::ImageLayerGzip,
        [0x28, 0xb5, 0x2f, 0xfd] => MediaType::ImageLayerZstd,
        _ => MediaType::ImageLayer,
    })
}

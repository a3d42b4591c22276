//! Pulling an image: endpoints and credentials in order, layers in parallel, broken downloads resumed.

use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use http::StatusCode;
use http_body_util::BodyExt;
use oci_spec::image::Descriptor;

use super::digest::Digest;
use super::error::{ImageError, IoContext};
use super::import::{as_index, for_this_host, parse_manifest, verify};
use super::layout::Stage as StageFolder;
use super::reference::Reference;
use super::registry::{Credentials, Endpoint, Fetch, Keyring};
use super::store::{Image, ImageStore};

/// Layers fetched at the same time for one image.
const PARALLEL_LAYERS: usize = 4;
/// Attempts for one document or blob before the endpoint is given up.
const MAX_ATTEMPTS: u32 = 5;
/// Wait before the second attempt; doubles each time.
const FIRST_RETRY_MS: u64 = 200;
/// A download that brings nothing for so long is broken.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Indexes inside indexes.
const MAX_INDEX_DEPTH: usize = 3;

/// What a pull is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The blob was there already.
    Exists,
    /// Bytes are coming.
    Downloading,
    /// All bytes are there and have the right digest.
    Downloaded,
}

/// Hears how a pull goes.
pub trait Progress: Send + Sync {
    /// `done` of `total` bytes of the blob `digest`.
    fn blob(&self, digest: &str, stage: Stage, done: u64, total: u64);
    /// All blobs are there; layers are being unpacked.
    fn unpacking(&self) {}
}

/// For callers who do not look.
pub struct NoProgress;

impl Progress for NoProgress {
    fn blob(&self, _: &str, _: Stage, _: u64, _: u64) {}
}

impl ImageStore {
    /// Pulls an image. Credentials of the keyring are tried in order, else those of the configuration, else none; mirrors
    /// in order, then the registry itself.
    ///
    /// # Errors
    /// The error of the last endpoint: unreachable, denied, no such image, lying digests, full disk.
    pub async fn pull(
        self: &Arc<Self>,
        reference: &str,
        keyring: &Keyring,
        progress: Arc<dyn Progress>,
    ) -> Result<Arc<Image>, ImageError> {
        let reference: Reference = reference.parse()?;
        // Pods that start together often want the same image: the first brings it, the others find its blobs there.
        let turn = self.pull_turn(&reference.to_string());
        let _turn = turn.lock().await;
        let endpoints = self.client.endpoints(&reference)?;
        let mut last = None;
        for endpoint in &endpoints {
            // A pod's secrets are for the registry that its image names; a mirror has credentials of its own.
            let own = endpoint.host == reference.host();
            let mut attempts: Vec<Option<Credentials>> = Vec::new();
            if own {
                attempts.extend(keyring.lookup(&reference).into_iter().cloned().map(Some));
                if let Some(providers) = &self.options.providers {
                    attempts.extend(providers.lookup(&reference).await.into_iter().map(Some));
                }
            }
            if attempts.is_empty() {
                attempts.push(self.client.configured_credentials(endpoint, &reference));
            }
            for credentials in attempts {
                match self.pull_from(endpoint, credentials.as_ref(), &reference, &progress).await {
                    Ok(image) => return Ok(image),
                    Err(error) => {
                        tracing::debug!(host = %endpoint.host, image = %reference, %error, "pull failed");
                        let next_credentials = matches!(error, ImageError::Unauthorized { .. });
                        last = Some(error);
                        if !next_credentials {
                            break;
                        }
                    }
                }
            }
            // What is wrong on our side will not get better elsewhere.
            if matches!(last, Some(ImageError::DiskFull { .. } | ImageError::Io { .. })) {
                break;
            }
        }
        Err(last.unwrap_or_else(|| ImageError::Transport {
            host: reference.registry.clone(),
            reason: "no endpoint is configured".into(),
        }))
    }

    fn pull_turn(&self, reference: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut pulling = self.pulling.lock();
        if let Some(turn) = pulling.get(reference).and_then(std::sync::Weak::upgrade) {
            return turn;
        }
        // As many entries as pulls under way.
        pulling.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(tokio::sync::Mutex::default());
        pulling.insert(reference.to_owned(), Arc::downgrade(&turn));
        turn
    }

    async fn pull_from(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
        reference: &Reference,
        progress: &Arc<dyn Progress>,
    ) -> Result<Arc<Image>, ImageError> {
        let fetch = Fetch { endpoint, repository: &reference.repository, credentials };
        let top = self.fetch_manifest(&fetch, reference.selector()).await?;
        let mut named = reference.clone();
        let top_digest = match &reference.digest {
            Some(digest) => {
                let digest: Digest = digest.parse()?;
                verify(&digest, &top)?;
                digest
            }
            None => Digest::of(&top),
        };
        // What the tag meant just now; `imageID` of the pod names the digest of the index, as pulled.
        named.digest = Some(top_digest.to_string());
        let mut bytes = top;
        for depth in 0.. {
            let Some(index) = as_index(&bytes) else { break };
            if depth == MAX_INDEX_DEPTH {
                return Err(ImageError::TooMany { what: "depth of indexes", limit: MAX_INDEX_DEPTH });
            }
            let chosen = Digest::try_from(for_this_host(&index, &reference.to_string())?.digest())?;
            bytes = self.fetch_manifest(&fetch, chosen.as_str()).await?;
            verify(&chosen, &bytes)?;
        }
        let manifest = parse_manifest(&bytes)?;
        let (adding, stage) = self.blocking(|store| Ok((store.layout.adding()?, store.layout.stage()?))).await?;
        let stage = Arc::new(stage);
        let blobs: Vec<Descriptor> = manifest.layers().iter().chain([manifest.config()]).cloned().collect();
        futures::stream::iter(blobs)
            .map(|blob| self.fetch_blob(&fetch, blob, &stage, progress))
            .buffer_unordered(PARALLEL_LAYERS)
            .try_collect::<Vec<()>>()
            .await?;
        progress.unpacking();
        let mut names = vec![named];
        if reference.digest.is_none() {
            names.push(reference.clone());
        }
        self.blocking(move |store| {
            let image = store.assemble_pulled(&stage, &bytes, &names)?;
            drop((adding, stage));
            Ok(image)
        })
        .await
    }

    fn assemble_pulled(
        &self,
        stage: &StageFolder,
        manifest: &[u8],
        names: &[Reference],
    ) -> Result<Arc<Image>, ImageError> {
        // The tag's digest reference is that of what the tag named, which the first entry holds.
        let pinned = &names[..1];
        let image = self.assemble(stage, manifest, pinned)?;
        let Some(tag) = names.get(1).and_then(Reference::tagged) else {
            return Ok(image);
        };
        let id: Digest = image.id.parse()?;
        self.change_table(|table| {
            for (other, image) in &mut table.images {
                if *other == id {
                    image.tags.insert(tag.clone());
                } else {
                    image.tags.remove(&tag);
                }
            }
        })?;
        self.resolve(&image.id)?.ok_or_else(|| ImageError::NotFound { reference: image.id.clone() })
    }

    async fn fetch_manifest(&self, fetch: &Fetch<'_>, selector: &str) -> Result<Vec<u8>, ImageError> {
        let mut attempt = 1;
        loop {
            match self.client.manifest(fetch, selector).await {
                Ok(bytes) => return Ok(bytes.to_vec()),
                Err(error) if attempt < MAX_ATTEMPTS && passing(&error) => back_off(attempt).await,
                Err(error) => return Err(error),
            }
            attempt += 1;
        }
    }

    /// Brings one blob into the store, unless it is there.
    async fn fetch_blob(
        &self,
        fetch: &Fetch<'_>,
        blob: Descriptor,
        stage: &Arc<StageFolder>,
        progress: &Arc<dyn Progress>,
    ) -> Result<(), ImageError> {
        let digest = Digest::try_from(blob.digest())?;
        if self.layout.has_blob(&digest) {
            progress.blob(digest.as_str(), Stage::Exists, blob.size(), blob.size());
            return Ok(());
        }
        let file =
            tempfile::Builder::new().prefix("blob-").tempfile_in(stage.path()).step("create file in", stage.path())?;
        let mut download =
            Download { digest: &digest, total: blob.size(), file, hasher: digest.hasher(), done: 0, progress };
        let mut attempt = 1;
        loop {
            let before = download.done;
            match self.download(fetch, &mut download).await {
                Ok(()) => break,
                Err(error) if passing(&error) => {
                    // Progress earns new patience.
                    attempt = if download.done > before { 1 } else { attempt + 1 };
                    if attempt >= MAX_ATTEMPTS {
                        return Err(error);
                    }
                    tracing::debug!(blob = %digest, done = download.done, %error, "download broke; resuming");
                    back_off(attempt).await;
                }
                Err(error) => return Err(error),
            }
        }
        let Download { file, hasher, done, total, .. } = download;
        if done != total {
            return Err(ImageError::SizeMismatch { what: digest.to_string(), expected: total, actual: done });
        }
        let actual = hasher.finish();
        if actual != digest {
            return Err(ImageError::DigestMismatch {
                what: "blob".into(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        let layout = self.layout.clone();
        let adopted = digest.clone();
        tokio::task::spawn_blocking(move || {
            let (_, path) = file.keep().map_err(|error| ImageError::io("keep", layout.staging(), error.error))?;
            layout.adopt_blob(&path, &adopted)
        })
        .await
        .map_err(|error| ImageError::Task(error.to_string()))??;
        progress.blob(digest.as_str(), Stage::Downloaded, total, total);
        Ok(())
    }

    async fn download(&self, fetch: &Fetch<'_>, download: &mut Download<'_>) -> Result<(), ImageError> {
        let broken = |reason: String| ImageError::Transport { host: fetch.endpoint.host.clone(), reason };
        if download.done == download.total && download.total > 0 {
            return Ok(());
        }
        let response = self.client.blob(fetch, download.digest.as_str(), download.done).await?;
        if download.done > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            download.restart()?;
        }
        let mut body = response.into_body();
        loop {
            let frame = tokio::time::timeout(STALL_TIMEOUT, body.frame())
                .await
                .map_err(|_| broken(format!("nothing came for {} s", STALL_TIMEOUT.as_secs())))?;
            let Some(frame) = frame else { break };
            if let Ok(data) = frame.map_err(|error| broken(error.to_string()))?.into_data() {
                download.write(&data)?;
            }
        }
        if download.done < download.total {
            return Err(broken(format!("the connection ended after {} of {} bytes", download.done, download.total)));
        }
        Ok(())
    }
}

/// A blob on its way into the staging area.
struct Download<'a> {
    digest: &'a Digest,
    total: u64,
    file: tempfile::NamedTempFile,
    hasher: super::digest::Hasher,
    done: u64,
    progress: &'a Arc<dyn Progress>,
}

impl Download<'_> {
    fn restart(&mut self) -> Result<(), ImageError> {
        self.file.as_file().set_len(0).step("truncate", self.file.path())?;
        self.file.seek(SeekFrom::Start(0)).step("rewind", self.file.path())?;
        self.hasher = self.digest.hasher();
        self.done = 0;
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<(), ImageError> {
        let after = self.done + data.len() as u64;
        if after > self.total {
            return Err(ImageError::SizeMismatch {
                what: self.digest.to_string(),
                expected: self.total,
                actual: after,
            });
        }
        // A page-cache write of one frame (tens of kilobytes) is shorter than handing it to another thread.
        let path = self.file.path().to_owned();
        self.file.write_all(data).step("write", path)?;
        self.hasher.update(data);
        self.done = after;
        self.progress.blob(self.digest.as_str(), Stage::Downloading, after, self.total);
        Ok(())
    }
}

/// Whether trying again may help.
fn passing(error: &ImageError) -> bool {
    match error {
        ImageError::Transport { .. } => true,
        ImageError::Registry { status, .. } => *status == 429 || *status == 408 || *status >= 500,
        _ => false,
    }
}

async fn back_off(attempt: u32) {
    tokio::time::sleep(Duration::from_millis(FIRST_RETRY_MS << attempt.min(8))).await;
}

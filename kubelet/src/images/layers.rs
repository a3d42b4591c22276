//! Unpacked layers: one folder each, identified by the chain of layers they stand on.
//!
//! A layer folder has a short number as name, so that a long list of lower directories still fits into the one page of
//! mount options that kernels before 6.5 take.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, Digesting, Hasher};
use super::error::{ImageError, IoContext};
use super::guard::{Guard, LayerLimits};
use super::layout::{Layout, Stage, sync_folder};
use super::merged::Merged;
use super::unpack::{Unpacked, Unpacker};

/// The window that zstd may ask for: 128 MiB, the most that `--long` without further flags makes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Read buffer of a layer file.
const READ_BUFFER_BYTES: usize = 256 << 10;
/// The padding of a last entry and two blocks that mark the end.
const MISSING_END_BYTES: u64 = 511 + 1024;
/// Attempts to find a free number when another process takes them at the same time.
const MAX_NUMBER_ATTEMPTS: usize = 64;

/// `layer.json`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    /// Identifies the content together with everything below: image-spec `config.md#layer-chainid`.
    pub(super) chain_id: Digest,
    /// Digest of the uncompressed tar.
    pub(super) diff_id: Digest,
    /// Chain ID of the layer below.
    pub(super) parent: Option<Digest>,
    /// Bytes of file contents.
    pub(super) bytes: u64,
    /// Entries.
    pub(super) inodes: u64,
}

/// A layer that is there.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) folder: PathBuf,
    pub(super) record: LayerRecord,
}

impl Layer {
    /// The lower directory.
    pub(super) fn fs(&self) -> PathBuf {
        self.folder.join("fs")
    }
}

/// The chain ID of a layer on top of `parent`.
pub(super) fn chain_id(parent: Option<&Digest>, diff_id: &Digest) -> Digest {
    match parent {
        None => diff_id.clone(),
        Some(parent) => Digest::of(format!("{parent} {diff_id}").as_bytes()),
    }
}

/// The chain IDs of layers given by diff ID, lowest first.
pub(super) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(chain_id(chain.last(), diff_id));
    }
    chain
}

impl Layout {
    /// Every unpacked layer by chain ID.
    pub(super) fn read_layers(&self) -> Result<BTreeMap<Digest, Layer>, ImageError> {
        let root = self.layers();
        let mut layers = BTreeMap::new();
        for entry in fs::read_dir(&root).step("read folder", &root)? {
            let folder = entry.step("read folder", &root)?.path();
            let path = folder.join("layer.json");
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // Being removed by another process.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(ImageError::io("read", &path, error)),
            };
            let record: LayerRecord = serde_json::from_slice(&bytes)
                .map_err(|error| ImageError::document(path.display().to_string(), error))?;
            layers.insert(record.chain_id.clone(), Layer { folder, record });
        }
        Ok(layers)
    }

    /// Unpacks a layer (compressed with gzip or zstd or not at all) on top of `below` (lowest first). The uncompressed
    /// content must have the digest `diff_id`. Nothing is left of a layer that fails.
    pub(super) fn add_layer(
        &self,
        stage: &Stage,
        content: impl Read,
        diff_id: &Digest,
        below: &[Layer],
        limits: LayerLimits,
    ) -> Result<Layer, ImageError> {
        let name = diff_id.as_str();
        let parent = below.last().map(|layer| layer.record.chain_id.clone());
        let chain_id = chain_id(parent.as_ref(), diff_id);
        let work = tempfile::Builder::new()
            .prefix("layer-")
            .tempdir_in(stage.path())
            .step("create folder in", stage.path())?;
        let root = work.path().join("fs");
        fs::create_dir(&root).step("create folder", &root)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).step("set mode of", &root)?;
        let top = OwnedFd::from(File::open(&root).step("open", &root)?);
        let mut under = Vec::with_capacity(below.len());
        for layer in below.iter().rev() {
            let path = layer.fs();
            under.push(OwnedFd::from(File::open(&path).step("open", &path)?));
        }
        if let Some(first) = under.first() {
            // A layer need not say what its root is like; then it is as below.
            super::unpack::copy_attributes(first, &top).step("copy attributes of root to", &root)?;
        }
        let unpacked = unpack(name, content, diff_id, Merged::new(top, under), limits)?;
        let record =
            LayerRecord { chain_id, diff_id: diff_id.clone(), parent, bytes: unpacked.bytes, inodes: unpacked.inodes };
        let json = serde_json::to_vec(&record).map_err(|error| ImageError::document("layer.json", error))?;
        let path = work.path().join("layer.json");
        fs::write(&path, json).step("write", &path)?;
        let handle = File::open(work.path()).step("open", work.path())?;
        nix::unistd::syncfs(&handle).step("sync file system of", work.path())?;
        self.publish(work, record)
    }

    fn publish(&self, work: tempfile::TempDir, record: LayerRecord) -> Result<Layer, ImageError> {
        let layers = self.layers();
        // Two pulls of the same layer at once: the first one's result serves both.
        if let Some(layer) = self.read_layers()?.remove(&record.chain_id) {
            return Ok(layer);
        }
        for _ in 0..MAX_NUMBER_ATTEMPTS {
            let mut next = 1;
            for entry in fs::read_dir(&layers).step("read folder", &layers)? {
                let name = entry.step("read folder", &layers)?.file_name();
                next = next.max(name.to_str().and_then(|name| name.parse::<u64>().ok()).map_or(1, |number| number + 1));
            }
            let folder = layers.join(next.to_string());
            // Renaming onto a folder that is not empty fails, so a number is never taken twice.
            match fs::rename(work.path(), &folder) {
                Ok(()) => {
                    // The folder is no longer where its guard would remove it.
                    let _gone = work.keep();
                    sync_folder(&layers)?;
                    return Ok(Layer { folder, record });
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
                Err(error) => return Err(ImageError::io("rename to", &folder, error)),
            }
        }
        Err(ImageError::TooMany { what: "attempts to name a layer folder", limit: MAX_NUMBER_ATTEMPTS })
    }
}

/// Unpacks a stream and checks its digest. The entry point for fuzzing: `merged` may be any empty folder.
fn unpack(
    name: &str,
    content: impl Read,
    diff_id: &Digest,
    merged: Merged,
    limits: LayerLimits,
) -> Result<Unpacked, ImageError> {
    let guard = Guard::new(limits);
    let damaged = |source| ImageError::Damaged { layer: name.to_owned(), source };
    let content = decompress(guard.compressed(content)).map_err(damaged)?;
    let hasher = if diff_id.algorithm() == "sha512" { diff_id.hasher() } else { Hasher::sha256() };
    let mut stream = Digesting::new(guard.unpacked(content), hasher);
    // Some writers (umoci's insert) leave out the last entry's padding and the end marker; other readers do not mind. Content
    // that was cut off is found out by its digest.
    let mut padded = stream.by_ref().chain(io::repeat(0).take(MISSING_END_BYTES));
    let unpacked = Unpacker::new(name, merged).run(&mut padded, &guard)?;
    // Padding behind the end marker belongs to the digest.
    io::copy(&mut stream, &mut io::sink()).map_err(|source| match guard.verdict() {
        Some(reason) => ImageError::Bomb { layer: name.to_owned(), reason: reason.to_owned() },
        None => damaged(source),
    })?;
    let (_, actual, _) = stream.finish();
    if actual != *diff_id {
        return Err(ImageError::DigestMismatch {
            what: format!("uncompressed layer {name}"),
            expected: diff_id.to_string(),
            actual: actual.to_string(),
        });
    }
    tracing::debug!(layer = name, bytes = guard.unpacked_bytes(), "unpacked");
    Ok(unpacked)
}

/// Tells the compression by its first bytes: media types lie too often.
pub(super) fn decompress<'a>(content: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut content = BufReader::with_capacity(READ_BUFFER_BYTES, content);
    let mut magic = Vec::with_capacity(4);
    content.by_ref().take(4).read_to_end(&mut magic)?;
    let whole = io::Cursor::new(magic.clone()).chain(content);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(whole)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::stream::read::Decoder::new(whole)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        _ => Box::new(whole),
    })
}

/// Unpacks an untrusted stream into an empty folder, whatever its digest; for fuzz targets and tests of refusal.
pub fn fuzz_unpack(content: &[u8], folder: &Path) -> Result<(), ImageError> {
    let top = OwnedFd::from(File::open(folder).step("open", folder)?);
    let limits = LayerLimits { bytes: 1 << 20, entries: 1000, ratio: 1000 };
    match unpack("fuzz", content, &Digest::of(b""), Merged::new(top, Vec::new()), limits) {
        Ok(_) | Err(ImageError::DigestMismatch { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

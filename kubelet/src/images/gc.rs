//! Taking away: names, images, and the content that nothing refers to any more.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::digest::Digest;
use super::error::{ImageError, IoContext};
use super::store::ImageStore;
use super::table::Table;

/// What a removal took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that no longer mean anything.
    pub untagged: Vec<String>,
    /// IDs of images that are gone.
    pub deleted: Vec<String>,
    /// Bytes of files that were freed, as disk space.
    pub freed_bytes: u64,
}

/// Disk use of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk of blobs and layers.
    pub used_bytes: u64,
    /// Inodes of blobs and layers.
    pub inodes_used: u64,
    /// Bytes of the file system that holds the store.
    pub capacity_bytes: u64,
    /// Bytes of it that are free for use.
    pub available_bytes: u64,
    /// Its inodes.
    pub inodes: u64,
    /// Its free inodes.
    pub inodes_free: u64,
}

/// When images are collected: the kubelet's `imageGC…` settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GcPolicy {
    /// `imageGCHighThresholdPercent`: from this use of the disk on, images are removed …
    pub high_percent: u64,
    /// `imageGCLowThresholdPercent`: … until this is reached.
    pub low_percent: u64,
    /// `imageMinimumGCAge`: younger ones stay.
    pub min_age: Duration,
    /// `imageMaximumGCAge`: images unused for longer go in any case.
    pub max_age: Option<Duration>,
}

impl Default for GcPolicy {
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(120), max_age: None }
    }
}

impl ImageStore {
    /// Removes unused images, the least recently used first, when the disk is as full as the policy says. What it could not
    /// free shows in [`ImageStore::usage`].
    ///
    /// # Errors
    /// When the disk cannot be looked at or files cannot be removed.
    pub async fn collect_garbage(self: &Arc<Self>, policy: GcPolicy) -> Result<Removed, ImageError> {
        let usage = self.usage().await?;
        let used_percent =
            100 - (usage.available_bytes * 100).checked_div(usage.capacity_bytes).unwrap_or(100).min(100);
        let mut wanted = 0;
        if used_percent >= policy.high_percent {
            let target = usage.capacity_bytes / 100 * (100 - policy.low_percent.min(100));
            wanted = target.saturating_sub(usage.available_bytes);
        }
        let in_use: BTreeSet<String> = self.snapshots()?.into_iter().map(|(_, image)| image).collect();
        let now = jiff::Timestamp::now().as_second();
        let mut candidates: Vec<_> = {
            let last_used = self.last_used.lock();
            let idle = |id: &str| last_used.get(id).unwrap_or(&self.opened_at).elapsed();
            let unused = self.list()?.into_iter().filter(|image| !image.pinned && !in_use.contains(&image.id));
            unused.map(|image| (idle(&image.id), image)).collect()
        };
        candidates.sort_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        let mut removed = Removed::default();
        for (idle, image) in candidates {
            let age = Duration::from_secs(u64::try_from(now.saturating_sub(image.added_at)).unwrap_or(0));
            let too_old = policy.max_age.is_some_and(|limit| idle >= limit && age >= limit);
            let needed = removed.freed_bytes < wanted && age >= policy.min_age && idle >= policy.min_age.min(age);
            if !(too_old || needed) {
                continue;
            }
            match self.remove(&image.id).await {
                Ok(more) => {
                    removed.untagged.extend(more.untagged);
                    removed.deleted.extend(more.deleted);
                    removed.freed_bytes += more.freed_bytes;
                    self.last_used.lock().remove(&image.id);
                }
                // Taken by a container, or removed by somebody else, since we looked.
                Err(ImageError::InUse { .. } | ImageError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Removes a name; with the last name goes the image. Given an ID, removes all names. Refused while a container
    /// uses the image.
    ///
    /// # Errors
    /// When there is no such image, it is in use, or files cannot be removed.
    pub async fn remove(self: &Arc<Self>, reference: &str) -> Result<Removed, ImageError> {
        let reference = reference.to_owned();
        self.blocking(move |store| {
            let _collecting = store.layout.collecting()?;
            let table = store.layout.read_table()?;
            let Some(id) = table.find(&reference)?.cloned() else {
                return Err(ImageError::NotFound { reference });
            };
            let names = names_meant(&table, &id, &reference);
            let image = &table.images[&id];
            let last = image.tags.iter().all(|tag| names.contains(tag));
            if last
                && let Some((container, _)) = store.layout.read_snapshots()?.into_iter().find(|(_, used)| *used == id)
            {
                return Err(ImageError::InUse { reference, container });
            }
            let mut removed = Removed { untagged: names.iter().cloned().collect(), ..Removed::default() };
            store.change_table(|table| {
                if last {
                    table.images.remove(&id);
                } else if let Some(image) = table.images.get_mut(&id) {
                    image.tags.retain(|tag| !names.contains(tag));
                    image.digests.retain(|name| !names.contains(name));
                }
            })?;
            if last {
                removed.deleted.push(id.to_string());
            }
            removed.freed_bytes = store.collect()?;
            Ok(removed)
        })
        .await
    }

    /// Removes images that no container uses: those without a tag, or with `all` every one that is not pinned. Then
    /// removes content that no image refers to.
    ///
    /// # Errors
    /// When files cannot be removed.
    pub async fn prune(self: &Arc<Self>, all: bool) -> Result<Removed, ImageError> {
        self.blocking(move |store| {
            let _collecting = store.layout.collecting()?;
            let used: BTreeSet<Digest> = store.layout.read_snapshots()?.into_iter().map(|(_, image)| image).collect();
            let mut removed = store.change_table(|table| {
                let mut removed = Removed::default();
                table.images.retain(|id, image| {
                    let keep = image.pinned || used.contains(id) || !(all || image.tags.is_empty());
                    if !keep {
                        removed.untagged.extend(image.tags.iter().chain(&image.digests).cloned());
                        removed.deleted.push(id.to_string());
                    }
                    keep
                });
                removed
            })?;
            removed.freed_bytes = store.collect()?;
            Ok(removed)
        })
        .await
    }

    /// Protects an image from collection, or gives it free.
    ///
    /// # Errors
    /// When there is no such image or the table cannot be written.
    pub async fn pin(self: &Arc<Self>, reference: &str, pinned: bool) -> Result<(), ImageError> {
        let reference = reference.to_owned();
        self.blocking(move |store| {
            let _adding = store.layout.adding()?;
            store.change_table(|table| {
                let Some(id) = table.find(&reference)?.cloned() else {
                    return Err(ImageError::NotFound { reference });
                };
                if let Some(image) = table.images.get_mut(&id) {
                    image.pinned = pinned;
                }
                Ok(())
            })?
        })
        .await
    }

    /// How much disk the store takes.
    ///
    /// # Errors
    /// When the folders cannot be read.
    pub async fn usage(self: &Arc<Self>) -> Result<Usage, ImageError> {
        self.blocking(|store| {
            let root = store.layout.root();
            let stat = nix::sys::statvfs::statvfs(root).step("look at file system of", root)?;
            let mut usage = Usage {
                capacity_bytes: stat.blocks() * stat.fragment_size(),
                available_bytes: stat.blocks_available() * stat.fragment_size(),
                inodes: stat.files(),
                inodes_free: stat.files_free(),
                ..Usage::default()
            };
            for folder in [root.join("blobs"), store.layout.layers()] {
                let (bytes, inodes) = disk_usage(&folder)?;
                usage.used_bytes += bytes;
                usage.inodes_used += inodes;
            }
            Ok(usage)
        })
        .await
    }

    /// Removes blobs and layers that nothing refers to, and unfinished snapshots. The caller holds the exclusive lock.
    fn collect(&self) -> Result<u64, ImageError> {
        let table = self.layout.read_table()?;
        let mut blobs: BTreeSet<&Digest> = BTreeSet::new();
        let mut chains: BTreeSet<&Digest> = BTreeSet::new();
        for (id, image) in &table.images {
            blobs.extend([id, &image.manifest]);
            blobs.extend(&image.blobs);
            chains.extend(&image.chain);
        }
        let mut freed = 0;
        for (chain, layer) in self.layout.read_layers()? {
            if !chains.contains(&chain) {
                freed += disk_usage(&layer.folder)?.0;
                // Without its description the folder is no layer any more, should we be interrupted.
                let description = layer.folder.join("layer.json");
                fs::remove_file(&description).step("remove", &description)?;
                fs::remove_dir_all(&layer.folder).step("remove", &layer.folder)?;
            }
        }
        for folder in folders(&self.layout.layers())? {
            if !folder.join("layer.json").exists() {
                freed += disk_usage(&folder)?.0;
                fs::remove_dir_all(&folder).step("remove", &folder)?;
            }
        }
        for algorithm in folders(&self.layout.root().join("blobs"))? {
            let name = algorithm.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for path in folders(&algorithm)? {
                let hex = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let known = format!("{name}:{hex}").parse::<Digest>().is_ok_and(|digest| blobs.contains(&digest));
                if !known {
                    freed += fs::metadata(&path).step("look at", &path)?.blocks() * 512;
                    fs::remove_file(&path).step("remove", &path)?;
                }
            }
        }
        let finished: BTreeSet<String> = self.layout.read_snapshots()?.into_iter().map(|(name, _)| name).collect();
        for path in folders(&self.layout.snapshots())? {
            if !finished.contains(path.file_name().unwrap_or_default().to_string_lossy().as_ref()) {
                fs::remove_dir_all(&path).step("remove", &path)?;
            }
        }
        Ok(freed)
    }
}

fn folders(folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let entries = fs::read_dir(folder).step("read folder", folder)?;
    entries.map(|entry| Ok(entry.step("read folder", folder)?.path())).collect()
}

/// The names of an image that a reference means: one tag, one digest, or (for an ID) all of them.
fn names_meant(table: &Table, id: &Digest, reference: &str) -> BTreeSet<String> {
    let image = &table.images[id];
    if let Ok(reference) = reference.parse::<super::Reference>() {
        let name = match &reference.digest {
            Some(digest) => reference.at(digest),
            None => reference.to_string(),
        };
        if image.tags.contains(&name) {
            // With the last tag of a repository go its digests.
            let mut names: BTreeSet<String> = [name.clone()].into();
            let repository = reference.name();
            let left = image.tags.iter().any(|tag| *tag != name && tag.starts_with(&format!("{repository}:")));
            if !left {
                names
                    .extend(image.digests.iter().filter(|known| known.starts_with(&format!("{repository}@"))).cloned());
            }
            return names;
        }
        if image.digests.contains(&name) && !image.tags.is_empty() {
            return [name].into();
        }
    }
    image.tags.iter().chain(&image.digests).cloned().collect()
}

/// Bytes on disk and inodes of a tree; hard links count once each time they are met.
pub(crate) fn disk_usage(root: &Path) -> Result<(u64, u64), ImageError> {
    let (mut bytes, mut inodes) = (0, 0);
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(ImageError::io("look at", &path, error)),
        };
        bytes += meta.blocks() * 512;
        inodes += 1;
        if meta.is_dir() {
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        pending.push(entry.step("read folder", &path)?.path());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(ImageError::io("read folder", &path, error)),
            }
        }
    }
    Ok((bytes, inodes))
}

//! The store as others see it: names in, images and snapshots out.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

use oci_spec::image::ImageConfiguration;
use parking_lot::Mutex;

use super::digest::Digest;
use super::error::ImageError;
use super::guard::LayerLimits;
use super::layers::Layer;
use super::layout::Layout;
use super::registry::{CredentialProviders, RegistryConfig};
use super::table::{ImageRecord, Table, Version};

/// How a store behaves.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Bounds on layers.
    pub limits: LayerLimits,
    /// Mirrors, credentials and certificates of registries.
    pub registries: RegistryConfig,
    /// Programs that know credentials.
    pub providers: Option<Arc<CredentialProviders>>,
}

/// An image ready to be run.
#[derive(Clone, Debug)]
pub struct Image {
    /// `sha256:…` of the configuration; `imageID` of a container status is one of `repo_digests`, else this.
    pub id: String,
    /// Digest of the image manifest.
    pub manifest_digest: String,
    /// Entry point, environment, user, stop signal, …
    pub config: ImageConfiguration,
    /// Folders of the unpacked layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// Tags, fully qualified.
    pub repo_tags: Vec<String>,
    /// Digest references, fully qualified.
    pub repo_digests: Vec<String>,
    /// Bytes of the compressed content.
    pub size_bytes: u64,
    /// When it was added, Unix seconds.
    pub added_at: i64,
    /// Never collected as garbage.
    pub pinned: bool,
}

/// What is known of the store's content, valid for one version of the table.
struct Cache {
    version: Version,
    table: Arc<Table>,
    layers: BTreeMap<Digest, Layer>,
    images: BTreeMap<Digest, Arc<Image>>,
}

/// The images of a node. Cheap to share; all methods may be called at the same time, also from several processes.
pub struct ImageStore {
    pub(super) layout: Layout,
    pub(super) options: StoreOptions,
    cache: Mutex<Cache>,
    /// Changes of the table within this process take turns; across processes the file lock does the same.
    pub(super) writing: Mutex<()>,
    pub(super) client: super::registry::Client,
    /// One pull of a reference at a time.
    pub(super) pulling: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    /// When a container last took an image, as far as this process knows: the order of garbage collection.
    pub(super) last_used: Mutex<BTreeMap<String, Instant>>,
    pub(super) opened_at: Instant,
}

impl ImageStore {
    /// Opens the store in `root`, making it if needed, and removes what a crash left unfinished.
    ///
    /// # Errors
    /// When the folders cannot be made or the table cannot be read.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Arc<Self>, ImageError> {
        let layout = Layout::open(root)?;
        let table = Arc::new(layout.read_table()?);
        let cache = Cache { version: None, table, layers: layout.read_layers()?, images: BTreeMap::new() };
        let client = super::registry::Client::new(options.registries.clone())?;
        Ok(Arc::new(Self {
            layout,
            options,
            cache: Mutex::new(cache),
            writing: Mutex::new(()),
            client,
            pulling: Mutex::default(),
            last_used: Mutex::default(),
            opened_at: Instant::now(),
        }))
    }

    /// The image that a reference means: a name with tag or digest, or an image ID, complete or shortened.
    /// `Ok(None)` if there is none.
    ///
    /// # Errors
    /// When the reference is malformed or ambiguous, or the store cannot be read.
    pub fn resolve(&self, reference: &str) -> Result<Option<Arc<Image>>, ImageError> {
        let mut cache = self.cache.lock();
        self.refresh(&mut cache)?;
        let table = cache.table.clone();
        match table.find(reference)? {
            Some(id) => self.image(&mut cache, id).map(Some),
            None => Ok(None),
        }
    }

    /// All images, by ID.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn list(&self) -> Result<Vec<Arc<Image>>, ImageError> {
        let mut cache = self.cache.lock();
        self.refresh(&mut cache)?;
        let table = cache.table.clone();
        table.images.keys().map(|id| self.image(&mut cache, id)).collect()
    }

    fn refresh(&self, cache: &mut Cache) -> Result<(), ImageError> {
        let version = self.layout.table_version()?;
        if version.is_some() && version == cache.version {
            return Ok(());
        }
        *cache = Cache {
            version,
            table: Arc::new(self.layout.read_table()?),
            layers: self.layout.read_layers()?,
            images: BTreeMap::new(),
        };
        Ok(())
    }

    fn image(&self, cache: &mut Cache, id: &Digest) -> Result<Arc<Image>, ImageError> {
        if let Some(image) = cache.images.get(id) {
            return Ok(image.clone());
        }
        let Some(record) = cache.table.images.get(id) else {
            return Err(ImageError::NotFound { reference: id.to_string() });
        };
        let config = self.read_config(id)?;
        let layers = record
            .chain
            .iter()
            .map(|chain| match cache.layers.get(chain) {
                Some(layer) => Ok(layer.fs()),
                None => Err(ImageError::document(
                    format!("image {id}"),
                    format!("its layer {chain} is missing; pull it again"),
                )),
            })
            .collect::<Result<_, _>>()?;
        let image = Arc::new(Image {
            id: id.to_string(),
            manifest_digest: record.manifest.to_string(),
            config,
            layers,
            repo_tags: record.tags.iter().cloned().collect(),
            repo_digests: record.digests.iter().cloned().collect(),
            size_bytes: record.bytes,
            added_at: record.added_at,
            pinned: record.pinned,
        });
        cache.images.insert(id.clone(), image.clone());
        Ok(image)
    }

    /// The configuration of an image whose blob is there.
    pub(super) fn read_config(&self, id: &Digest) -> Result<ImageConfiguration, ImageError> {
        let bytes = self.layout.read_document(id)?;
        serde_json::from_slice(&bytes).map_err(|error| ImageError::document(format!("image configuration {id}"), error))
    }

    /// Changes the table on disk. The caller holds the store lock, shared or exclusive.
    pub(super) fn change_table<T>(&self, change: impl FnOnce(&mut Table) -> T) -> Result<T, ImageError> {
        let _turn = self.writing.lock();
        let _others = self.layout.table_turn()?;
        let mut table = self.layout.read_table()?;
        let result = change(&mut table);
        self.layout.write_table(&table)?;
        Ok(result)
    }

    /// Registers an image whose blobs and layers are complete.
    pub(super) fn register(&self, id: &Digest, record: ImageRecord) -> Result<Arc<Image>, ImageError> {
        self.change_table(|table| table.add(id.clone(), record))?;
        self.resolve(id.as_str())?.ok_or_else(|| ImageError::NotFound { reference: id.to_string() })
    }

    /// Runs blocking work of the store away from the async threads.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|error| ImageError::Task(error.to_string()))?
    }
}

//! Images: a content-addressed store with overlayfs snapshots, filled by imports and by pulls from registries.
//!
//! ```text
//! <data-dir>/images/            0700
//!   blobs/<algorithm>/<hex>     manifests, configurations, layers as they came: verified against their names
//!   layers/<number>/fs          one unpacked layer, a lower directory of overlayfs
//!   layers/<number>/layer.json  its chain ID, diff ID, parent and size
//!   snapshots/<container>/      image, fs (upper), work: the writable part of a container
//!   staging/<unique>/           unfinished work, locked by its owner; removed when the owner is gone
//!   images.json                 which names mean which images
//!   lock                        readers-writer lock between adding (shared) and collecting garbage (exclusive)
//! ```
//! Everything appears under its final name by a rename of something complete and synced, so a crash at any instruction
//! leaves the store whole. Several processes may use one store: the daemon, and `coracle image`.

mod error;
mod reference;

mod archive;
mod blobs;
mod digest;
mod export;
mod gc;
mod guard;
mod import;
mod layers;
mod layout;
mod merged;
mod snapshot;
mod store;
mod table;
mod unpack;

pub mod cli;
mod pull;
pub mod registry;

pub use error::ImageError;
pub(crate) use gc::disk_usage;
pub use gc::{GcPolicy, Removed, Usage};
pub use guard::LayerLimits;
pub use import::ImportSource;
pub use layers::fuzz_unpack;
pub use pull::{NoProgress, Progress, Stage};
pub use reference::Reference;
pub use snapshot::Snapshot;
pub use store::{Image, ImageStore, StoreOptions};

//! Where the cluster's state is kept.

use std::sync::Arc;

use anyhow::Context;
use coracle_store::{Embedded, EmbeddedOptions, SharedStore};

use crate::cli::ServerOptions;

/// Opens the store that the options name.
pub(super) async fn open(options: &ServerOptions) -> anyhow::Result<SharedStore> {
    let folder = options.folders.data_dir.join("store");
    // Replaying the log reads and checks every record: work for a thread of its own.
    let opened = tokio::task::spawn_blocking(move || Embedded::open(&folder, EmbeddedOptions::default()));
    Ok(Arc::new(opened.await.context("open the store")?.context("open the store")?))
}

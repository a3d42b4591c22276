//! Where the cluster's state is kept.

use std::sync::Arc;

use anyhow::Context;
use coracle_store::{Embedded, EmbeddedOptions, Etcd, EtcdOptions, SharedStore};

use crate::cli::ServerOptions;

/// Opens the store that the options name.
pub(super) async fn open(options: &ServerOptions) -> anyhow::Result<SharedStore> {
    if let Some(endpoints) = &options.datastore_endpoint {
        let etcd = EtcdOptions {
            ca_file: options.datastore_cafile.clone(),
            cert_file: options.datastore_certfile.clone(),
            key_file: options.datastore_keyfile.clone(),
            ..EtcdOptions::new(endpoints.split(',').map(|endpoint| endpoint.trim().to_owned()).collect())
        };
        return Ok(Arc::new(Etcd::connect(etcd).await.with_context(|| format!("connect to etcd at {endpoints}"))?));
    }
    let folder = options.node.folders.data_dir.join("store");
    // Replaying the log reads and checks every record: work for a thread of its own.
    let embedded =
        EmbeddedOptions { key_file: options.secrets_encryption_key_file.clone(), ..EmbeddedOptions::default() };
    let opened = tokio::task::spawn_blocking(move || Embedded::open(&folder, embedded));
    Ok(Arc::new(opened.await.context("open the store")?.context("open the store")?))
}

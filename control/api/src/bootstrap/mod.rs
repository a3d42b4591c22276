//! Objects that every cluster has from its first second.

use std::sync::Arc;

use crate::server::ApiServer;
use crate::status::Status;

/// Creates what is missing; called when the server starts, before it listens.
pub async fn ensure(_api: &Arc<ApiServer>) -> Result<(), Status> {
    Ok(())
}

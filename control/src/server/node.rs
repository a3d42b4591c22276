//! This host's node.

use std::net::IpAddr;
use std::sync::Arc;

use coracle_api::server::ApiServer;
use tokio_util::sync::CancellationToken;

use super::Parts;
use crate::cli::ServerOptions;

/// Who the node is.
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) ip: IpAddr,
}

pub(super) async fn start(_: &ServerOptions, _: &Arc<ApiServer>, _: Identity, _: &mut Parts, _: &CancellationToken) -> anyhow::Result<()> {
    anyhow::bail!("run it with --disable-agent")
}

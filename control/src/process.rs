//! A daemon of ours: parts that run until a signal comes or one of them ends.

use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::host;

/// Time that blocking work may take after everything else has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The parts of a daemon; the first to end ends it.
#[derive(Default)]
pub(crate) struct Parts {
    running: JoinSet<anyhow::Result<()>>,
    pub(crate) shutdown: CancellationToken,
}

impl Parts {
    /// Runs a part. Its end before shutdown ends the daemon; shutdown drops it wherever it is.
    pub(crate) fn spawn(
        &mut self,
        name: &'static str,
        part: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let shutdown = self.shutdown.clone();
        self.running.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => Ok(()),
                result = part => match result {
                    Err(error) => Err(error.context(name)),
                    Ok(()) if shutdown.is_cancelled() => Ok(()),
                    Ok(()) => Err(anyhow!("the {name} ended by itself")),
                },
            }
        });
    }
}

/// Runs what `start` puts together until SIGTERM or SIGINT. Containers keep running; the next start takes them over.
pub(crate) fn run(start: impl AsyncFnOnce(&mut Parts) -> anyhow::Result<()>) -> anyhow::Result<()> {
    host::raise_open_files()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
    let result = runtime.block_on(serve(start));
    runtime.shutdown_timeout(STOP_TIMEOUT);
    result
}

async fn serve(start: impl AsyncFnOnce(&mut Parts) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut parts = Parts::default();
    let result = tokio::select! {
        started = start(&mut parts) => started,
        _ = terminate.recv() => Err(anyhow!("stopped before it had started")),
        _ = interrupt.recv() => Err(anyhow!("stopped before it had started")),
    };
    let ended = match result {
        Err(error) => Err(error),
        Ok(()) => tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            Some(part) = parts.running.join_next() => {
                part.unwrap_or_else(|error| Err(anyhow!("a part of the daemon ended: {error}")))
            }
        },
    };
    tracing::info!("stopping; containers keep running");
    parts.shutdown.cancel();
    while parts.running.join_next().await.is_some() {}
    ended
}

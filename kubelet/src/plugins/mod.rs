//! Plugins of the node: programs that provide volumes or devices and say so by a socket in a folder that the node watches.
//!
//! What a plugin is for decides who takes it in: each type is a [`Kind`]. One that cannot be taken in is asked again until
//! its socket is gone.

mod folder;
pub mod registration;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::task::{AbortHandle, JoinSet};

pub(crate) use folder::{Socket, follow};

use crate::grpc::Client;

/// First and longest pause before a plugin that could not be taken in is asked again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// A plugin as it introduced itself.
pub(crate) struct Plugin {
    /// Of its driver, e.g. `ebs.csi.aws.com`.
    pub(crate) name: String,
    /// The socket of its service.
    pub(crate) endpoint: PathBuf,
    /// The versions of the service, as the type of plugin writes them.
    pub(crate) versions: Vec<String>,
}

/// A type of plugin.
#[async_trait]
pub(crate) trait Kind: Send + Sync {
    /// The word by which plugins say their type.
    fn word(&self) -> &'static str;
    /// Takes a plugin in, again when it comes by another socket. The message of a refusal goes to the plugin.
    async fn register(&self, plugin: &Plugin) -> Result<(), String>;
    /// The plugin of this name and endpoint is gone; a newer one of the same name stays.
    async fn forget(&self, name: &str, endpoint: &Path);
}

/// Takes plugins in and forgets them as their sockets come and go, until dropped.
///
/// # Errors
/// When the folder cannot be watched.
pub(crate) async fn run(folder: &Path, kinds: Vec<Arc<dyn Kind>>) -> std::io::Result<()> {
    let mut changes = follow(folder)?;
    let kinds: Arc<[_]> = kinds.into();
    let mut known: HashMap<Socket, Taken> = HashMap::new();
    let mut tasks = JoinSet::new();
    while let Some(sockets) = changes.next().await? {
        let gone: Vec<_> = known.keys().filter(|socket| !sockets.contains(*socket)).cloned().collect();
        for (socket, taken) in gone.into_iter().filter_map(|socket| known.remove_entry(&socket)) {
            taken.task.abort();
            let registered = taken.registered.lock().take();
            if let Some((kind, plugin)) = registered {
                tracing::info!(socket = %socket.path.display(), driver = plugin.name, "plugin is gone");
                kind.forget(&plugin.name, &plugin.endpoint).await;
            }
        }
        for socket in sockets {
            if known.contains_key(&socket) {
                continue;
            }
            let registered = Registered::default();
            let task = tasks.spawn(take_in(socket.path.clone(), kinds.clone(), registered.clone()));
            known.insert(socket, Taken { task, registered });
        }
        while tasks.try_join_next().is_some() {}
    }
    Ok(())
}

type Registered = Arc<Mutex<Option<(Arc<dyn Kind>, Plugin)>>>;

struct Taken {
    task: AbortHandle,
    registered: Registered,
}

async fn take_in(socket: PathBuf, kinds: Arc<[Arc<dyn Kind>]>, registered: Registered) {
    let (mut pause, longest) = RETRY;
    let mut told = None;
    loop {
        match introduce(&socket, &kinds, &registered).await {
            Ok(()) => return,
            Err(message) => {
                if told.as_ref() != Some(&message) {
                    tracing::warn!(socket = %socket.display(), message, "plugin is not registered");
                }
                told = Some(message);
            }
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(longest);
    }
}

async fn introduce(socket: &Path, kinds: &[Arc<dyn Kind>], registered: &Registered) -> Result<(), String> {
    let client = Client::connect(socket).await.map_err(|status| status.message().to_owned())?;
    let info = registration::get_info(&client).await?;
    let endpoint = if info.endpoint.is_empty() { socket.to_owned() } else { PathBuf::from(&info.endpoint) };
    let plugin = Plugin { name: info.name, endpoint, versions: info.supported_versions };
    let outcome = match kinds.iter().find(|kind| kind.word() == info.r#type) {
        Some(kind) => {
            let (name, endpoint) = (plugin.name.clone(), plugin.endpoint.clone());
            let outcome = kind.register(&plugin).await;
            if outcome.is_ok() {
                tracing::info!(socket = %socket.display(), driver = name, endpoint = %endpoint.display(), "plugin is registered");
                *registered.lock() = Some((kind.clone(), plugin));
            }
            outcome
        }
        None => Err(format!("plugins of type {:?} are not known to this node", info.r#type)),
    };
    registration::notify(&client, &outcome).await?;
    outcome
}

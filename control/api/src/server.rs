//! The API server: configuration, shared state, and the ways in.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use coracle_store::Store;
use serde_json::Value;

use crate::kinds::Kind;
use crate::node::NodeConnector;
use crate::status::Status;
use crate::user::UserInfo;

/// Settings of a server.
pub struct Config {
    /// Folder of certificates and keys (`<data-dir>/tls`), made with mode 0700.
    pub tls_dir: PathBuf,
    /// Names and addresses for the serving certificate beside the usual ones.
    pub tls_sans: Vec<String>,
    /// Service address range, such as `10.43.0.0/16`.
    pub service_cidr: String,
    /// Pod address range, such as `10.42.0.0/16`.
    pub cluster_cidr: String,
    /// Node port range, first and last.
    pub node_ports: (u16, u16),
    /// DNS domain, such as `cluster.local`.
    pub cluster_domain: String,
    /// Address of the cluster's DNS service.
    pub dns_ip: IpAddr,
    /// Address and port that pods and other hosts reach this server at (endpoints of the service `kubernetes`).
    pub advertise: std::net::SocketAddr,
    /// How kubelets are reached.
    pub nodes: Arc<dyn NodeConnector>,
}

/// The server. Cheap to share; all clients, informers and listeners hang on it.
pub struct ApiServer {
    /// Settings.
    pub config: Config,
    /// The store behind it.
    pub store: Arc<dyn Store>,
}

impl ApiServer {
    /// The row of a resource in a version.
    pub fn kind(&self, _group: &str, _version: &str, _resource: &str) -> Option<Arc<Kind>> {
        None
    }

    /// An object as JSON in its storage version, read from the store (always current).
    pub async fn get(&self, _kind: &Kind, _namespace: &str, _name: &str) -> Result<Option<Value>, Status> {
        Ok(None)
    }

    /// All objects of a kind, of one namespace or (empty) of all, as JSON in their storage version.
    pub async fn list(&self, _kind: &Kind, _namespace: &str) -> Result<Vec<Value>, Status> {
        Ok(Vec::new())
    }
}

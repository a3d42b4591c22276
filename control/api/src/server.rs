//! The API server: configuration, shared state, and the ways in.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};

use coracle_store::{ListOptions, Store};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::admission::{self, Admission};
use crate::authn::Authenticator;
use crate::authz::{self, Authorizer};
use crate::http::{ReqBody, Response, serve};
use crate::informer::{Informer, Informers};
use crate::kinds::Kind;
use crate::node::NodeConnector;
use crate::pki::{Identity, Pki, PkiError, Purpose};
use crate::registry::Registry;
use crate::status::Status;
use crate::user::UserInfo;
use crate::{bootstrap, crd, handlers, in_process};

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
    /// Addresses of the cluster's DNS service: no other Service is given them by itself.
    pub dns_ips: Vec<IpAddr>,
    /// Address and port that pods and other hosts reach this server at (endpoints of the service `kubernetes`).
    pub advertise: SocketAddr,
    /// Other servers have the same store: their addresses stand beside this one's ([`ApiServer::servers`]).
    pub shared_store: bool,
    /// How kubelets are reached.
    pub nodes: Arc<dyn NodeConnector>,
    /// Who is trusted to say who somebody is.
    pub authn: crate::authn::Settings,
    /// Admission plugins that do not run, by name (`--disable-admission-plugins`).
    pub disabled_admission: Vec<String>,
}

/// A server that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Reading or writing the objects that every cluster has.
    #[error("{step}: {status}")]
    Objects {
        /// What was done.
        step: &'static str,
        /// The answer.
        status: Status,
    },
    /// The listener.
    #[error("serve the API: {0}")]
    Listen(#[from] std::io::Error),
}

/// Who stands at the other end of a request.
#[derive(Clone)]
pub enum Caller {
    /// Someone on a connection; the user of a verified client certificate, when there was one.
    Remote {
        /// Who the certificate names.
        certificate: Option<Arc<UserInfo>>,
        /// Address of the other end.
        peer: Option<SocketAddr>,
    },
    /// A part of this process.
    Local(Arc<UserInfo>),
}

/// The server. Cheap to share; all clients, informers and listeners hang on it.
pub struct ApiServer {
    /// Settings.
    pub config: Config,
    /// The store behind it.
    pub store: Arc<dyn Store>,
    /// The live table of kinds.
    pub registry: Registry,
    /// Keys and certificates.
    pub pki: Pki,
    /// Who is who.
    pub authn: Authenticator,
    pub(crate) chain: OnceLock<Vec<Arc<dyn Admission>>>,
    authz: OnceLock<Arc<dyn Authorizer>>,
    pub(crate) audit: OnceLock<crate::audit::Audit>,
    pub(crate) informers: Informers,
    pub(crate) usage: crate::usage::Usage,
    pub(crate) aggregated: crate::aggregate::Aggregated,
    pub(crate) documents: crate::discovery::Documents,
    pub(crate) frames: handlers::Frames,
    pub(crate) flow: crate::flow::Flow,
    /// Definitions are taken in one after the other.
    pub(crate) crd_turn: tokio::sync::Mutex<()>,
    /// Definitions whose objects are being deleted.
    pub(crate) crd_cleanups: parking_lot::Mutex<std::collections::HashSet<String>>,
    me: Weak<ApiServer>,
    pub(crate) shutdown: CancellationToken,
}

impl ApiServer {
    /// Opens keys, builds admission and authorisation, takes in the CRDs and makes the objects that every cluster has.
    /// Background work ends with `shutdown`.
    pub async fn new(
        config: Config,
        store: Arc<dyn Store>,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, StartError> {
        let pki = Pki::open(&config.tls_dir)?;
        let authn = Authenticator::new(&config, &pki)?;
        let api = Arc::new_cyclic(|me| Self {
            registry: Registry::default(),
            pki,
            authn,
            chain: OnceLock::new(),
            authz: OnceLock::new(),
            audit: OnceLock::new(),
            informers: Informers::new(store.clone()),
            usage: crate::usage::Usage::default(),
            aggregated: crate::aggregate::Aggregated::default(),
            documents: crate::discovery::Documents::default(),
            frames: handlers::Frames::default(),
            flow: crate::flow::Flow::default(),
            crd_turn: tokio::sync::Mutex::default(),
            crd_cleanups: parking_lot::Mutex::default(),
            me: me.clone(),
            config,
            store,
            shutdown,
        });
        let step = |step| move |status| StartError::Objects { step, status };
        crd::start(&api).await.map_err(step("read the custom resource definitions"))?;
        api.chain.get_or_init(|| admission::chain(&api));
        api.authz.get_or_init(|| authz::authorizer(&api));
        bootstrap::ensure(&api).await.map_err(step("create the objects of a fresh cluster"))?;
        let compared = crate::kinds::alloc::claims::keep(&api).await;
        compared.map_err(step("compare node ports with services"))?;
        crate::flow::follow(&api).await;
        crate::aggregate::start(&api);
        Ok(api)
    }

    /// Adds this server to those of the store; the others are followed by [`bootstrap::Servers::keep`].
    pub async fn servers(&self) -> Result<bootstrap::Servers, StartError> {
        let mut servers = bootstrap::Servers::new(self);
        let added = servers.round().await;
        added.map_err(|status| StartError::Objects { step: "add this server to the others", status })?;
        Ok(servers)
    }

    /// Writes requests down from now on, as the settings say; called once, before the server listens.
    pub async fn audit(&self, settings: &crate::audit::Settings) -> Result<(), StartError> {
        if let Some(audit) = crate::audit::Audit::open(settings, &self.shutdown).await? {
            self.audit.get_or_init(|| audit);
        }
        Ok(())
    }

    /// The shared handle of this server.
    pub fn shared(&self) -> Arc<Self> {
        self.me.upgrade().expect("whoever borrows the server holds its Arc")
    }

    /// Serves HTTPS until shutdown.
    pub async fn serve_tls(&self, listener: TcpListener) -> Result<(), StartError> {
        let identity = self.pki.identity("serving", "kube-apiserver", &Purpose::Server(self.sans()))?;
        let tls = serve::tls(&identity, &self.pki.ca_pem)?;
        serve::serve(self.shared(), listener, tls, self.shutdown.clone()).await?;
        Ok(())
    }

    /// Names and addresses of the serving certificate.
    fn sans(&self) -> Vec<String> {
        let mut sans: Vec<String> =
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", "::1"]
                .map(str::to_owned)
                .into();
        sans.push(format!("kubernetes.default.svc.{}", self.config.cluster_domain));
        sans.push(self.config.advertise.ip().to_string());
        sans.extend(crate::net::first_address(&self.config.service_cidr).map(|ip| ip.to_string()));
        sans.extend(self.config.tls_sans.iter().cloned());
        sans.dedup();
        sans
    }

    /// The administrator's kubeconfig is written to `path` with mode 0600.
    pub fn write_admin_kubeconfig(&self, path: &std::path::Path, server_url: &str) -> Result<(), StartError> {
        Ok(self.pki.write_kubeconfig(path, server_url, &self.pki.admin()?)?)
    }

    /// A fresh client and server identity for a node's kubelet: `system:node:<name>`.
    pub fn node_identity(&self, node: &str, sans: Vec<String>) -> Result<Identity, StartError> {
        Ok(self.pki.issue(&format!("system:node:{node}"), &Purpose::Both(sans, vec!["system:nodes".into()]))?)
    }

    /// The client identity with which this server reaches kubelets.
    pub fn kubelet_client_identity(&self) -> Result<Identity, StartError> {
        let groups = vec![crate::user::SYSTEM_MASTERS.into()];
        Ok(self.pki.identity("kubelet-client", "kube-apiserver-kubelet-client", &Purpose::Client(groups))?)
    }

    /// The client identity that aggregated APIs and webhooks see.
    pub(crate) fn proxy_identity(&self) -> Result<Identity, PkiError> {
        self.pki.proxy_identity()
    }

    /// A client of this process, without a socket: the same path, the same admission and authorisation.
    pub fn client(&self, user: UserInfo) -> kube::Client {
        kube::Client::new(self.service(user), "default")
    }

    /// The request path as a tower service for one user.
    pub fn service(&self, user: UserInfo) -> in_process::Service {
        in_process::Service::new(self.shared(), Arc::new(user))
    }

    /// The shared decoded cache of a kind.
    pub fn informer<K: crate::informer::Cached>(&self) -> Arc<Informer<K>> {
        let (group, plural) = (K::group(&()), K::plural(&()));
        let prefix = self.registry.find_stored(&group, &plural).map(|kind| kind.prefix.clone());
        self.informers.get(&prefix.unwrap_or_else(|| format!("/registry/{group}/{plural}/")))
    }

    /// Answers one request.
    pub async fn respond(self: &Arc<Self>, caller: Caller, request: http::Request<ReqBody>) -> Response {
        handlers::respond(self.clone(), caller, request).await
    }

    /// The authoriser.
    pub fn authorizer(&self) -> &Arc<dyn Authorizer> {
        self.authz.get_or_init(|| authz::authorizer(&self.shared()))
    }

    /// The row of a resource in a version.
    pub fn kind(&self, group: &str, version: &str, resource: &str) -> Option<Arc<Kind>> {
        self.registry.find(group, version, resource)
    }

    /// An object as JSON in its storage version, read from the store (always current).
    pub async fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Option<Value>, Status> {
        let entry = self.store.get(&kind.key(namespace, name)).await?;
        entry.map(|entry| crate::wire::parse_stored(&entry.value)).transpose()
    }

    /// All objects of a kind, of one namespace or (empty) of all, as JSON in their storage version.
    pub async fn list(&self, kind: &Kind, namespace: &str) -> Result<Vec<Value>, Status> {
        self.each(kind, namespace).await?.collect()
    }

    /// As [`ApiServer::list`], one after the other: values take ten times the memory of what is stored.
    pub async fn each(
        &self,
        kind: &Kind,
        namespace: &str,
    ) -> Result<impl Iterator<Item = Result<Value, Status>> + use<>, Status> {
        let listing = self.store.list(&kind.key_prefix(namespace), ListOptions::default()).await?;
        Ok(listing.entries.into_iter().map(|entry| crate::wire::parse_stored(&entry.value)))
    }
}

//! What the command line accepts. Flags carry the names that k3s users know.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use coracle_kubelet::images::StoreOptions;
use coracle_kubelet::images::registry::{CredentialProviders, RegistryConfig};
use tracing_subscriber::EnvFilter;

use crate::cluster::NetworkBackend;

/// Kubernetes as one small binary on bare metal.
///
/// `coracle server` runs everything on one host: API server, store, scheduler, controllers, node agent, container
/// runtime, service network and DNS. Point kubectl at the kubeconfig it writes.
#[derive(Debug, Parser)]
#[command(name = "coracle", version, max_term_width = 110)]
pub(crate) struct Cli {
    /// What to log: error, warn, info, debug, trace, or a filter such as `info,coracle_kubelet=debug`
    #[arg(long, global = true, default_value = "info", env = "CORACLE_LOG")]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the control plane and, unless told otherwise, this host's node
    Server(Box<ServerOptions>),
    /// Run a node of a cluster whose control plane is elsewhere
    Agent(Box<AgentOptions>),
    /// Make, list and remove the tokens that hosts join with
    Token(crate::token::TokenArgs),
    /// Run this host's containers for a kubelet or crictl: the Container Runtime Interface v1 on a socket
    Cri(Box<crate::cri::CriOptions>),
    /// Tell what this host has and lacks, and what each lack costs
    Check(CheckOptions),
    /// End this host's pods and remove what they leave behind; state and images stay
    Cleanup(Folders),
    /// Pull, import, export and remove container images of this host
    Image(coracle_kubelet::images::cli::ImageArgs),
    /// Save, restore and verify the state of the embedded store
    Snapshot(crate::snapshot::SnapshotArgs),
}

/// Options of `coracle server`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServerOptions {
    #[command(flatten)]
    pub(crate) node: NodeOptions,
    /// Token that hosts may join with at any time, of the form abcdef.0123456789abcdef; see `coracle token` for those that end
    #[arg(long, env = "CORACLE_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Addresses of pods
    #[arg(long, default_value = "10.42.0.0/16", value_name = "CIDR")]
    pub(crate) cluster_cidr: String,
    /// Addresses of services: a range, or one of each family with a comma between, the default one first
    #[arg(long, default_value = "10.43.0.0/16", value_name = "CIDR")]
    pub(crate) service_cidr: String,
    /// Ports of services of type NodePort
    #[arg(long, default_value = "30000-32767", value_name = "FIRST-LAST")]
    pub(crate) service_node_port_range: String,
    /// Addresses of the cluster's DNS; the tenth of each range of services if not given
    #[arg(long, value_delimiter = ',')]
    pub(crate) cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster's names
    #[arg(long, default_value = "cluster.local")]
    pub(crate) cluster_domain: String,
    /// Domain with resolvers of its own, such as `corp.example=192.0.2.1,192.0.2.2:5353`; repeat it for more
    #[arg(long, value_name = "DOMAIN=ADDRESSES", value_parser = crate::cluster::stub_domain)]
    pub(crate) dns_stub_domain: Vec<crate::cluster::StubDomain>,
    /// How packets reach the pods of other hosts
    #[arg(long, alias = "flannel-backend", value_enum, default_value = "host-gw")]
    pub(crate) network_backend: NetworkBackend,
    /// Where the state is kept: the embedded store in the data folder if not given, else etcd (https://host:2379,…)
    #[arg(long, value_name = "URLS")]
    pub(crate) datastore_endpoint: Option<String>,
    /// Certificate authority of etcd (PEM)
    #[arg(long, value_name = "FILE", requires = "datastore_endpoint")]
    pub(crate) datastore_cafile: Option<PathBuf>,
    /// Certificate that etcd asks for (PEM)
    #[arg(long, value_name = "FILE", requires = "datastore_endpoint")]
    pub(crate) datastore_certfile: Option<PathBuf>,
    /// Key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "datastore_endpoint")]
    pub(crate) datastore_keyfile: Option<PathBuf>,
    /// File with 32 random bytes (or 64 hexadecimal digits) to encrypt secrets with in the embedded store
    #[arg(long, value_name = "FILE", conflicts_with = "datastore_endpoint")]
    pub(crate) secrets_encryption_key_file: Option<PathBuf>,
    /// Address the API listens on
    #[arg(long, default_value = "0.0.0.0")]
    pub(crate) bind_address: IpAddr,
    /// Port the API listens on; 0 takes any free one
    #[arg(long, default_value_t = 6443, value_name = "PORT")]
    pub(crate) https_listen_port: u16,
    /// More names and addresses for the API's certificate
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_san: Vec<String>,
    /// Static bearer tokens, one a line: token,user,uid,"group1,group2"
    #[arg(long, value_name = "FILE")]
    pub(crate) token_auth_file: Option<PathBuf>,
    /// Trusted issuers of OpenID Connect tokens and rules for anonymous requests: an AuthenticationConfiguration
    #[arg(long, value_name = "FILE")]
    pub(crate) authentication_config: Option<PathBuf>,
    /// Which requests are written down: an audit.k8s.io/v1 Policy
    #[arg(long, value_name = "FILE")]
    pub(crate) audit_policy_file: Option<PathBuf>,
    /// Where they are written, one JSON object a line
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    pub(crate) audit_log_path: Option<PathBuf>,
    /// Megabytes after which that file is moved aside
    #[arg(long, value_name = "MB", default_value_t = 100)]
    pub(crate) audit_log_maxsize: u64,
    /// How many files moved aside stay; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) audit_log_maxbackup: usize,
    /// How many days they stay; 0 for ever
    #[arg(long, value_name = "DAYS", default_value_t = 0)]
    pub(crate) audit_log_maxage: u64,
    /// Whom they are sent to, in batches: a kubeconfig
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    pub(crate) audit_webhook_config_file: Option<PathBuf>,
    /// Longest time that an event waits for others to be sent with, such as `30s` or `2m`
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    pub(crate) audit_webhook_batch_max_wait: Duration,
    /// Pause before events are sent again; each is half as long again as the one before
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub(crate) audit_webhook_initial_backoff: Duration,
    /// Where the administrator's kubeconfig is written, with mode 0600
    #[arg(long, default_value = "/etc/coracle/kubeconfig.yaml", value_name = "FILE")]
    pub(crate) write_kubeconfig: PathBuf,
    /// Run the control plane alone, no node
    #[arg(long)]
    pub(crate) disable_agent: bool,
    /// Run no controllers: objects stay as they are written
    #[arg(long)]
    pub(crate) disable_controller_manager: bool,
    /// Run no scheduler: pods get a node from somebody else
    #[arg(long)]
    pub(crate) disable_scheduler: bool,
    /// Profiles, plugins and their arguments for the scheduler: a KubeSchedulerConfiguration
    #[arg(long, value_name = "FILE", conflicts_with = "disable_scheduler")]
    pub(crate) scheduler_config: Option<PathBuf>,
    /// Admission plugins that do not run, such as `ServiceAccount`
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub(crate) disable_admission_plugins: Vec<String>,
}

/// Options of a host's node, on a server and on an agent.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeOptions {
    #[command(flatten)]
    pub(crate) folders: Folders,
    #[command(flatten)]
    pub(crate) registries: Registries,
    /// Name of this host's node; the host name, in lower case, if not given
    #[arg(long)]
    pub(crate) node_name: Option<String>,
    /// Addresses that this host's node announces, one of each family; the one with the default route if not given
    #[arg(long, value_delimiter = ',')]
    pub(crate) node_ip: Vec<IpAddr>,
    /// Labels that the node registers with
    #[arg(long, value_delimiter = ',', value_name = "KEY=VALUE")]
    pub(crate) node_label: Vec<String>,
    /// Taints that the node registers with
    #[arg(long, value_delimiter = ',', value_name = "KEY=VALUE:EFFECT")]
    pub(crate) node_taint: Vec<String>,
    /// Port the node's own API listens on; 0 takes any free one
    #[arg(long, default_value_t = 10250, value_name = "PORT")]
    pub(crate) kubelet_port: u16,
    /// What carries the rules of Services and policies out; nftables where the kernel has it, else iptables
    #[arg(long, value_name = "MODE")]
    pub(crate) proxy_mode: Option<crate::cluster::ProxyMode>,
    /// Ranges of local addresses at which node ports are open; at every local address if not given
    #[arg(long, value_delimiter = ',', value_name = "CIDRS")]
    pub(crate) nodeport_addresses: Vec<ipnet::IpNet>,
    /// Let the host's CNI plugins make the pods' networks
    #[arg(long)]
    pub(crate) cni: bool,
    /// Folder of CNI configurations, of which the first counts
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "FOLDER")]
    pub(crate) cni_conf_dir: PathBuf,
    /// Folders of CNI plugins
    #[arg(long, value_delimiter = ',', default_value = "/opt/cni/bin,/usr/lib/cni", value_name = "FOLDERS")]
    pub(crate) cni_bin_dir: Vec<PathBuf>,
    /// Folder of manifests of pods that this node runs whatever the API says (static pods)
    #[arg(long, value_name = "FOLDER")]
    pub(crate) pod_manifest_path: Option<PathBuf>,
    /// Most pods on this node
    #[arg(long, default_value_t = 500, value_name = "NUMBER")]
    pub(crate) max_pods: u32,
    /// Sysctls that pods may set besides the safe ones, such as `kernel.msg*`
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub(crate) allowed_unsafe_sysctls: Vec<String>,
    /// Percent of the disk in use from which on images that nobody uses are removed
    #[arg(long, default_value_t = 85, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) image_gc_high_threshold: u8,
    /// Percent of the disk in use down to which they are
    #[arg(long, default_value_t = 80, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) image_gc_low_threshold: u8,
    /// What the host must keep free, or pods are evicted, such as `memory.available<100Mi,nodefs.available<1Gi`
    #[arg(long, value_delimiter = ',', value_name = "THRESHOLDS")]
    pub(crate) eviction_hard: Vec<coracle_kubelet::config::Threshold>,
    /// What the host should keep free, or pods are evicted after a grace period, such as `memory.available<300Mi`
    #[arg(long, value_delimiter = ',', value_name = "THRESHOLDS", requires = "eviction_soft_grace_period")]
    pub(crate) eviction_soft: Vec<coracle_kubelet::config::Threshold>,
    /// How long each soft threshold may be reached, such as `memory.available=90s`
    #[arg(long, value_delimiter = ',', value_name = "SIGNAL=TIME", value_parser = signal_time)]
    pub(crate) eviction_soft_grace_period: Vec<(String, Duration)>,
    /// Most seconds that a pod gets to end when a soft threshold evicts it
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub(crate) eviction_max_pod_grace_period: u64,
    /// Seconds that pods get to end when the host goes down; 0: it does not wait for them
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub(crate) shutdown_grace_period: u64,
    /// The last part of these seconds, which critical pods have to themselves
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub(crate) shutdown_grace_period_critical_pods: u64,
    /// The same by priority instead: seconds for pods of each priority and above, such as `0=30,1000=20`
    #[arg(long, value_delimiter = ',', value_name = "PRIORITY=SECONDS", value_parser = priority_time, conflicts_with = "shutdown_grace_period", allow_hyphen_values = true)]
    pub(crate) shutdown_grace_period_by_pod_priority: Vec<(i32, Duration)>,
}

/// `1000=20`
fn priority_time(text: &str) -> Result<(i32, Duration), String> {
    let wrong = || format!("{text:?} is not of the form priority=seconds, such as 1000=20");
    let (priority, seconds) = text.split_once('=').ok_or_else(wrong)?;
    let seconds = seconds.parse().map_err(|_| wrong())?;
    Ok((priority.parse().map_err(|_| wrong())?, Duration::from_secs(seconds)))
}

/// `memory.available=90s` or `=2m`.
fn signal_time(text: &str) -> Result<(String, Duration), String> {
    let wrong = || format!("{text:?} is not of the form signal=time, such as memory.available=90s");
    let (signal, length) = text.split_once('=').ok_or_else(wrong)?;
    Ok((signal.to_owned(), time(length).map_err(|_| wrong())?))
}

/// `90s` or `2m`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time such as 90s or 2m");
    let (number, unit) = match text.strip_suffix('s') {
        Some(number) => (number, 1),
        None => (text.strip_suffix('m').ok_or_else(wrong)?, 60),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(number.saturating_mul(unit)))
}

/// Options of `coracle agent`.
#[derive(Clone, Debug, Args)]
pub(crate) struct AgentOptions {
    #[command(flatten)]
    pub(crate) node: NodeOptions,
    /// Servers of the cluster; one is enough, the others are found
    #[arg(long, env = "CORACLE_URL", value_delimiter = ',', required = true, value_name = "https://HOST:PORT")]
    pub(crate) server: Vec<http::Uri>,
    /// What `coracle token create` printed; needed for the first start, and after the node's certificate has ended
    #[arg(long, env = "CORACLE_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    pub(crate) token: Option<String>,
    /// File that holds the token
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificate of the cluster's authority (PEM), for tokens that do not name it
    #[arg(long, value_name = "FILE")]
    pub(crate) server_ca_file: Option<PathBuf>,
    /// Port of loopback at which this host reaches whichever server is alive; 0 takes any free one
    #[arg(long, default_value_t = 6444, value_name = "PORT")]
    pub(crate) lb_server_port: u16,
    /// Address the node's own API listens on
    #[arg(long, default_value = "0.0.0.0")]
    pub(crate) bind_address: IpAddr,
}

/// Where images come from.
#[derive(Clone, Debug, Args)]
pub(crate) struct Registries {
    /// Mirrors, credentials and certificates of registries
    #[arg(long, default_value = "/etc/coracle/registries.yaml", value_name = "FILE")]
    registries: PathBuf,
    /// Programs that know credentials of images: a CredentialProviderConfig (kubelet.config.k8s.io/v1)
    #[arg(long, value_name = "FILE", requires = "image_credential_provider_bin_dir")]
    image_credential_provider_config: Option<PathBuf>,
    /// Folder of these programs
    #[arg(long, value_name = "FOLDER", requires = "image_credential_provider_config")]
    image_credential_provider_bin_dir: Option<PathBuf>,
}

impl Registries {
    /// Reads the files.
    pub(crate) fn load(&self) -> anyhow::Result<StoreOptions> {
        let files = (&self.image_credential_provider_config, &self.image_credential_provider_bin_dir);
        let providers = match files {
            (Some(config), Some(folder)) => Some(Arc::new(CredentialProviders::load(config, folder)?)),
            _ => None,
        };
        Ok(StoreOptions { registries: RegistryConfig::load(&self.registries)?, providers, ..StoreOptions::default() })
    }
}

const DATA_DIR: &str = "/var/lib/coracle";

/// Where state lies.
#[derive(Clone, Debug, Args)]
pub(crate) struct Folders {
    /// Folder of everything that must survive a reboot
    #[arg(long, default_value = DATA_DIR, value_name = "FOLDER")]
    pub(crate) data_dir: PathBuf,
    /// Folder of pods' files and plugins' sockets, as drivers made for a kubelet expect it [default: /var/lib/kubelet,
    /// or `kubelet` below another --data-dir than the default]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) kubelet_dir: Option<PathBuf>,
    /// Folders of CDI files (repeatable); of a device that two of them define the later one counts
    #[arg(long, default_values = ["/etc/cdi", "/var/run/cdi"], value_name = "FOLDER")]
    pub(crate) cdi_spec_dir: Vec<PathBuf>,
    /// Folder of everything that must not
    #[arg(long, default_value = "/run/coracle", value_name = "FOLDER")]
    pub(crate) run_dir: PathBuf,
    /// Folder of the pods' logs
    #[arg(long, default_value = "/var/log/pods", value_name = "FOLDER")]
    pub(crate) pod_log_dir: PathBuf,
    /// Control group of all pods, below the mount of cgroup v2
    #[arg(long, default_value = "kubepods", value_name = "NAME")]
    pub(crate) cgroup_root: PathBuf,
}

impl Folders {
    /// Drivers know `/var/lib/kubelet`; who moves the data, as for several nodes on one host, moves this too.
    pub(crate) fn kubelet_dir(&self) -> PathBuf {
        self.kubelet_dir.clone().unwrap_or_else(|| match self.data_dir == Path::new(DATA_DIR) {
            true => "/var/lib/kubelet".into(),
            false => self.data_dir.join("kubelet"),
        })
    }
}

/// Options of `coracle check`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CheckOptions {
    /// Print JSON instead of lines
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) folders: Folders,
}

/// Sends log lines to standard error, where systemd and a person look for them.
pub(crate) fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log {filter} is no filter"))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    Ok(())
}

//! `coracle-bench`: figures of Coracle beside those of its peers on this machine. It reports and judges nothing.
#![forbid(unsafe_code)]

mod api;
mod api_scale;
mod cluster;
mod dns;
mod hollow;
mod host;
mod kube_apiserver;
mod net;
mod node;
mod oci;
mod peers;
mod pod_start;
mod sched;
mod server;

mod stats;

mod report;
mod svg;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

/// Measure Coracle beside its peers: every peer on PATH takes part, in turns with us.
#[derive(Parser)]
#[command(name = "coracle-bench", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Measure,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, Copy, PartialEq, Subcommand)]
enum Verb {
    /// Containers: corun, runc, crun
    Oci,
    /// Server start, pod create → Ready, idle memory
    PodStart,
    /// The end of pods, many that run, fast logs, probes
    Node,
    /// Requests over TLS: coracle, kube-apiserver with etcd
    Api,
    /// Memory, start and lists with many pods; one change that many watch
    ApiScale,
    /// Leases, a Deployment and its update on many nodes without hosts behind them
    Hollow,
    /// The scheduler alone: pods a second by what they ask for, on 500, 5,000 and 50,000 nodes
    Sched,
    /// Pods' networks, service rules, throughput between pods, and a host that joins
    Net,
    /// The cluster's DNS: coracle, dnsmasq, unbound
    Dns,
    /// Everything but node, api-scale, hollow and sched
    All,
}

#[derive(Subcommand)]
enum Measure {
    #[command(flatten)]
    Verb(Verb),
    /// Run a command and print the peak memory of its largest process in KiB
    #[command(hide = true)]
    PeakRss {
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(Args)]
struct Options {
    /// Write the report as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the report
    #[arg(long, global = true, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The runtime to measure; `corun` beside this program if not given
    #[arg(long, global = true, value_name = "FILE")]
    corun: Option<PathBuf>,
    /// The server to measure; `coracle` beside this program if not given
    #[arg(long, global = true, value_name = "FILE")]
    coracle: Option<PathBuf>,
    /// Runs of each contestant
    #[arg(long, global = true, default_value_t = 50)]
    runs: usize,
    /// Pods made one after the other
    #[arg(long, global = true, default_value_t = 20)]
    pods: usize,
    /// Pods made at once
    #[arg(long, global = true, default_value_t = 30)]
    burst: usize,
    /// Pods that run at once on one node
    #[arg(long, global = true, default_value_t = 500)]
    many: usize,
    /// Rounds of each kind of request, with each contestant
    #[arg(long, global = true, default_value_t = 5)]
    rounds: usize,
    /// Length of a round
    #[arg(long, global = true, default_value_t = 1000)]
    round_ms: u64,
    /// Hollow nodes
    #[arg(long, global = true, default_value_t = 1000)]
    nodes: usize,
    /// Pods of the Deployment on hollow nodes
    #[arg(long, global = true, default_value_t = 3000)]
    replicas: usize,
    /// Run the hollow nodes of this cluster until interrupted, and measure nothing
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Pods that the scheduler places, alone
    #[arg(long, global = true, default_value_t = 10_000)]
    scheduled: usize,
    /// Clusters in which it does, by their nodes
    #[arg(long, global = true, value_delimiter = ',', default_values_t = [500, 5_000, 50_000])]
    clusters: Vec<usize>,
    /// Pods that a server holds; 0 leaves that out
    #[arg(long, global = true, default_value_t = 100_000)]
    held: usize,
    /// Watchers of one change; 0 leaves that out
    #[arg(long, global = true, default_value_t = 10_000)]
    watchers: usize,
    /// Objects that a LIST returns
    #[arg(long, global = true, default_value_t = 10_000)]
    objects: usize,
}

fn main() -> anyhow::Result<()> {
    let Cli { command, options } = Cli::parse();
    let verb = match command {
        Measure::PeakRss { command } => return oci::peak_rss(&command),
        Measure::Verb(verb) => verb,
    };
    let wanted = |one| {
        verb == one || (verb == Verb::All && !matches!(one, Verb::Node | Verb::ApiScale | Verb::Hollow | Verb::Sched))
    };
    if let (Verb::Hollow, Some(kubeconfig)) = (verb, &options.kubeconfig) {
        let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
        return runtime.block_on(hollow::serve(kubeconfig, options.nodes));
    }
    let program = |given: &Option<PathBuf>, name| given.clone().map_or_else(|| peers::beside(name), Ok);
    host::enter()?;
    let mut figures = Vec::new();
    if wanted(Verb::Oci) {
        figures.extend(oci::measure(&program(&options.corun, "corun")?, options.runs).context("oci")?);
    }
    if wanted(Verb::Sched) {
        figures.extend(sched::measure(&options.clusters, options.scheduled, options.rounds).context("sched")?);
    }
    if wanted(Verb::Net) {
        figures.extend(net::measure(options.runs, options.rounds).context("net")?);
    }
    if wanted(Verb::Dns) {
        figures.extend(dns::measure(options.rounds).context("dns")?);
    }
    const BY_SERVER: [Verb; 7] =
        [Verb::PodStart, Verb::Node, Verb::Api, Verb::ApiScale, Verb::Hollow, Verb::Net, Verb::Dns];
    if BY_SERVER.into_iter().any(wanted) {
        let coracle = program(&options.coracle, "coracle")?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
        if wanted(Verb::PodStart) {
            let measured = runtime.block_on(pod_start::measure(&coracle, options.pods, options.burst));
            figures.extend(measured.context("pod-start")?);
        }
        if wanted(Verb::Node) {
            let measured = runtime.block_on(node::measure(&coracle, options.pods, options.many));
            figures.extend(measured.context("node")?);
        }
        if wanted(Verb::Net) {
            figures.push(runtime.block_on(cluster::join(&coracle, options.rounds)).context("join")?);
        }
        if wanted(Verb::Dns) {
            figures.push(runtime.block_on(cluster::follow(&coracle, 100)).context("dns")?);
        }
        if wanted(Verb::ApiScale) {
            let scale = api_scale::Scale { pods: options.held, listed: options.objects, watchers: options.watchers };
            figures.extend(runtime.block_on(api_scale::measure(&coracle, &scale)).context("api-scale")?);
        }
        if wanted(Verb::Hollow) {
            let measured = runtime.block_on(hollow::measure(&coracle, options.nodes, options.replicas));
            figures.extend(measured.context("hollow")?);
        }
        if wanted(Verb::Api) {
            let load = api::Load {
                rounds: options.rounds,
                round: std::time::Duration::from_millis(options.round_ms),
                objects: options.objects,
            };
            figures.extend(runtime.block_on(api::measure(&coracle, &load)).context("api")?);
        }
    }
    let report = report::Report::new(figures)?;
    print!("{report}");
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        std::fs::write(file, svg::draw(&report)).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

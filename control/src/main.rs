//! The `coracle` command: Kubernetes as one binary. Each subcommand is one file.
#![forbid(unsafe_code)]

mod agent;
mod check;
mod cleanup;
mod cli;
mod cluster;
mod cri;
mod host;
mod node;
mod process;
mod server;
mod snapshot;
mod token;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    // The supervisor is started by the node agent with arguments of its own, and must stay small: no argument parser, no
    // runtime, no logger stand between it and its loop.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "supervisor") {
        return match coracle_kubelet::supervisor::main(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("coracle supervisor: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("coracle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Server(options) => {
            cli::log_to_stderr(&cli.log)?;
            server::run(*options)?;
        }
        Command::Agent(options) => {
            cli::log_to_stderr(&cli.log)?;
            agent::run(*options)?;
        }
        Command::Token(arguments) => token::run(arguments)?,
        Command::Check(options) => return Ok(check::run(&options)),
        Command::Cri(options) => {
            cli::log_to_stderr(&cli.log)?;
            cri::run(*options)?;
        }
        Command::Cleanup(folders) => cleanup::run(&folders)?,
        Command::Image(arguments) => image(arguments)?,
        Command::Snapshot(arguments) => snapshot::run(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn image(arguments: coracle_kubelet::images::cli::ImageArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(coracle_kubelet::images::cli::run(arguments, &mut std::io::stdout()))?)
}

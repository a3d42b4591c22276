//! `corun`: the OCI runtime on the command line, in the words of runc.
#![forbid(unsafe_code)]

mod args;
mod console;
mod create;
mod exec;
mod inspect;
mod manage;
mod update;

use anyhow::{Result, anyhow, bail};
use args::{Flags, Invocation};
use coracle_runtime::state::{self, Folder, State};
use coracle_runtime::systemd;
use std::io::Write;
use std::path::{Path, PathBuf};

const DEFAULT_ROOT: &str = "/run/corun";
/// What a failed command ends with, and what a failed `exec` does.
const FAILED: i32 = 1;
const EXEC_FAILED: i32 = 255;
const NO_SUCH_COMMAND: i32 = 3;

/// What every command needs to know.
pub(crate) struct Context {
    pub root: PathBuf,
    pub flags: Flags,
    pub words: Vec<String>,
    /// `--rootless`: whether a cgroup that may not be made is done without; `None` decides by the caller's user.
    pub rootless: Option<bool>,
    /// `--systemd-cgroup`: systemd makes the cgroup.
    pub systemd: bool,
    debug: bool,
    log: Option<PathBuf>,
    format: String,
}

impl Context {
    /// Tells of something that is done otherwise than asked for.
    pub(crate) fn warn(&self, message: &str) {
        tell("warning", message, self.log.as_deref(), &self.format);
    }

    /// Tells of a step that was done, to those who asked for it by `--debug`.
    pub(crate) fn debug(&self, message: &str) {
        if self.debug {
            tell("debug", message, self.log.as_deref(), &self.format);
        }
    }

    /// The container that the command is about.
    pub(crate) fn folder(&self) -> Result<Folder> {
        let id = self.words.first().ok_or_else(|| anyhow!("the id of a container is missing"))?;
        Ok(Folder::of(&self.root, id)?)
    }

    pub(crate) fn container(&self) -> Result<(Folder, State)> {
        let folder = self.folder()?;
        let state = folder.load()?;
        Ok((folder, state))
    }
}

fn main() {
    let line: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if line == [systemd::HOLDER] {
        // A process of our own (see there); nobody reads what it says.
        std::process::exit(i32::from(systemd::Holder::run().is_err()));
    }
    let invocation = match args::parse(line) {
        Ok(invocation) => invocation,
        Err(error) => {
            eprintln!("corun: {}", words(&error));
            let unknown = error.downcast_ref::<args::UnknownCommand>().is_some();
            std::process::exit(if unknown { NO_SUCH_COMMAND } else { FAILED });
        }
    };
    let (log, format) = (
        invocation.global.value("log").map(PathBuf::from),
        invocation.global.value("log-format").unwrap_or("text").to_string(),
    );
    let failed = if invocation.command.is_some_and(|command| command.name == "exec") { EXEC_FAILED } else { FAILED };
    let status = run(invocation).unwrap_or_else(|error| {
        tell("error", &words(&error), log.as_deref(), &format);
        failed
    });
    std::process::exit(status);
}

/// An error with its causes, but for those that it has told itself.
fn words(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        all if all.ends_with(&cause) => told,
        all => format!("{all}: {cause}"),
    })
}

/// Tells the user, and the log file that an engine reads.
fn tell(level: &str, message: &str, log: Option<&Path>, format: &str) {
    let time = state::now();
    let line = if format == "json" {
        serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
    } else {
        format!("time={time:?} level={level} msg={message:?}")
    };
    match level {
        "error" => eprintln!("corun: {message}"),
        "debug" if log.is_none() => eprintln!("{line}"),
        "debug" => {}
        _ => eprintln!("corun: {level}: {message}"),
    }
    let Some(log) = log else { return };
    let written =
        std::fs::OpenOptions::new().append(true).create(true).open(log).and_then(|mut file| writeln!(file, "{line}"));
    if let Err(error) = written {
        eprintln!("corun: cannot write the log {}: {error}", log.display());
    }
}

/// Where containers are remembered: for an unprivileged user below the user's own run folder.
fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(own) if !own.is_empty() && !nix::unistd::geteuid().is_root() => Path::new(&own).join("corun"),
        _ => PathBuf::from(DEFAULT_ROOT),
    }
}

fn run(invocation: Invocation) -> Result<i32> {
    let Invocation { global, command, flags, words, topic } = invocation;
    let Some(command) = command else {
        if let Some(topic) = topic {
            print!("{}", args::help_on(topic));
        } else if global.has("version") {
            println!("corun version {}\nspec: 1.3.0", env!("CARGO_PKG_VERSION"));
        } else {
            print!("{}", args::help());
        }
        return Ok(0);
    };
    let root = global.value("root").map_or_else(default_root, PathBuf::from);
    let rootless = match global.value("rootless") {
        None | Some("auto") => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(other) => bail!("--rootless: {other:?} is not true, false or auto"),
    };
    let context = Context {
        root,
        flags,
        words,
        rootless,
        systemd: global.has("systemd-cgroup"),
        debug: global.has("debug"),
        log: global.value("log").map(PathBuf::from),
        format: global.value("log-format").unwrap_or("text").to_string(),
    };
    context.debug(&format!("corun {} {}", env!("CARGO_PKG_VERSION"), command.name));
    match command.name {
        "create" => create::create(&context),
        "run" => create::run(&context),
        "start" => manage::start(&context),
        "state" => inspect::state(&context),
        "kill" => manage::kill(&context),
        "delete" => manage::delete(&context),
        "exec" => exec::exec(&context),
        "list" => inspect::list(&context),
        "ps" => inspect::ps(&context),
        "pause" => manage::freeze(&context, true),
        "resume" => manage::freeze(&context, false),
        "update" => update::update(&context),
        "events" => inspect::events(&context),
        "spec" => create::spec(&context),
        "features" => {
            println!("{:#}", coracle_runtime::features::document());
            Ok(0)
        }
        other => bail!("{other} is not supported: this runtime does not freeze containers to disk"),
    }
}

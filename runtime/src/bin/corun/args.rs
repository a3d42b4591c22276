//! The command line: runc's commands and flags, in one table. Like runc's, a long flag may have one or two dashes, and its
//! value may follow after `=` or as the next word; flags end at the first word that is none, or at `--`.

use anyhow::{Result, anyhow, bail};
use std::collections::HashMap;

/// A flag: its names (the first one counts) and whether it takes a value.
type Flag = (&'static [&'static str], bool);

/// Flags before the command.
const GLOBAL: &[Flag] = &[
    (&["root"], true),
    (&["log"], true),
    (&["log-format"], true),
    (&["debug"], false),
    (&["systemd-cgroup"], false),
    (&["rootless"], true),
    (&["criu"], true),
    (&["version", "v"], false),
    (&["help", "h"], false),
];

/// A command: name, what it takes, what it does, its flags.
pub(crate) struct Command {
    pub name: &'static str,
    pub usage: &'static str,
    pub about: &'static str,
    flags: &'static [Flag],
}

const CREATE_FLAGS: &[Flag] = &[
    (&["bundle", "b"], true),
    (&["console-socket"], true),
    (&["pidfd-socket"], true),
    (&["pid-file"], true),
    (&["no-pivot"], false),
    (&["no-new-keyring"], false),
    (&["preserve-fds"], true),
];

/// Read, so that the answer is that the command is not supported, and not that a flag is unknown.
const FROZEN_FLAGS: &[Flag] = &[
    (&["bundle", "b"], true),
    (&["console-socket"], true),
    (&["detach", "d"], false),
    (&["pid-file"], true),
    (&["no-subreaper"], false),
    (&["no-pivot"], false),
    (&["image-path"], true),
    (&["work-path"], true),
    (&["parent-path"], true),
    (&["leave-running"], false),
    (&["tcp-established"], false),
    (&["tcp-skip-in-flight"], false),
    (&["link-remap"], false),
    (&["ext-unix-sk"], false),
    (&["shell-job"], false),
    (&["lazy-pages"], false),
    (&["status-fd"], true),
    (&["page-server"], true),
    (&["file-locks"], false),
    (&["pre-dump"], false),
    (&["manage-cgroups-mode"], true),
    (&["empty-ns"], true),
    (&["auto-dedup"], false),
    (&["lsm-profile"], true),
    (&["lsm-mount-context"], true),
];

pub(crate) const COMMANDS: &[Command] = &[
    Command { name: "create", usage: "ID", about: "make a container that waits to be started", flags: CREATE_FLAGS },
    Command { name: "start", usage: "ID", about: "start a created container", flags: &[] },
    Command {
        name: "run",
        usage: "ID",
        about: "make and start a container",
        flags: &[
            (&["bundle", "b"], true),
            (&["console-socket"], true),
            (&["pidfd-socket"], true),
            (&["pid-file"], true),
            (&["no-pivot"], false),
            (&["no-new-keyring"], false),
            (&["preserve-fds"], true),
            (&["detach", "d"], false),
            (&["keep"], false),
            (&["no-subreaper"], false),
        ],
    },
    Command { name: "state", usage: "ID", about: "show the state of a container", flags: &[] },
    Command {
        name: "kill",
        usage: "ID [SIGNAL]",
        about: "send a signal (TERM) to a container",
        flags: &[(&["all", "a"], false)],
    },
    Command {
        name: "delete",
        usage: "ID",
        about: "remove what is left of a container",
        flags: &[(&["force", "f"], false)],
    },
    Command {
        name: "exec",
        usage: "ID COMMAND [ARG...]",
        about: "run a further process in a container",
        flags: &[
            (&["console-socket"], true),
            (&["pidfd-socket"], true),
            (&["cwd"], true),
            (&["env", "e"], true),
            (&["tty", "t"], false),
            (&["user", "u"], true),
            (&["additional-gids", "g"], true),
            (&["process", "p"], true),
            (&["detach", "d"], false),
            (&["pid-file"], true),
            (&["process-label"], true),
            (&["apparmor"], true),
            (&["no-new-privs"], false),
            (&["cap", "c"], true),
            (&["preserve-fds"], true),
            (&["cgroup"], true),
            (&["ignore-paused"], false),
            (&["no-subreaper"], false),
        ],
    },
    Command {
        name: "list",
        usage: "",
        about: "list containers",
        flags: &[(&["format", "f"], true), (&["quiet", "q"], false)],
    },
    Command {
        name: "ps",
        usage: "ID [ps OPTION...]",
        about: "list the processes of a container",
        flags: &[(&["format", "f"], true)],
    },
    Command { name: "pause", usage: "ID", about: "freeze a container", flags: &[] },
    Command { name: "resume", usage: "ID", about: "thaw a container", flags: &[] },
    Command {
        name: "update",
        usage: "ID",
        about: "change the limits of a container",
        flags: &[
            (&["resources", "r"], true),
            (&["blkio-weight"], true),
            (&["cpu-period"], true),
            (&["cpu-quota"], true),
            (&["cpu-burst"], true),
            (&["cpu-share"], true),
            (&["cpu-rt-period"], true),
            (&["cpu-rt-runtime"], true),
            (&["cpu-idle"], true),
            (&["cpuset-cpus"], true),
            (&["cpuset-mems"], true),
            (&["memory"], true),
            (&["memory-reservation"], true),
            (&["memory-swap"], true),
            (&["pids-limit"], true),
            (&["l3-cache-schema"], true),
            (&["mem-bw-schema"], true),
        ],
    },
    Command {
        name: "events",
        usage: "ID",
        about: "show usage and out-of-memory events",
        flags: &[(&["interval"], true), (&["stats"], false)],
    },
    Command {
        name: "spec",
        usage: "",
        about: "write a specification to begin with",
        flags: &[(&["bundle", "b"], true), (&["rootless"], false)],
    },
    Command { name: "features", usage: "", about: "show what this runtime can do", flags: &[] },
    Command { name: "checkpoint", usage: "ID", about: "not supported", flags: FROZEN_FLAGS },
    Command { name: "restore", usage: "ID", about: "not supported", flags: FROZEN_FLAGS },
];

/// Flags given, by their first name, in order.
#[derive(Debug, Default)]
pub(crate) struct Flags(HashMap<&'static str, Vec<String>>);

impl Flags {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|values| values.last().is_some_and(|value| value != "false"))
    }

    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.last().map(String::as_str)
    }

    pub(crate) fn values(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        self.value(name)
            .map(|text| text.parse().map_err(|_| anyhow!("--{name}: {text:?} is not a number in range")))
            .transpose()
    }
}

/// The first word names no command; scripts tell this failure by its status.
#[derive(Debug, thiserror::Error)]
#[error("unknown command {0:?}: see corun --help")]
pub(crate) struct UnknownCommand(String);

/// A command line, taken apart.
pub(crate) struct Invocation {
    pub global: Flags,
    /// `None` when only `--help` or `--version` was asked for.
    pub command: Option<&'static Command>,
    pub flags: Flags,
    pub words: Vec<String>,
    /// The command that help was asked for.
    pub topic: Option<&'static Command>,
}

impl Invocation {
    fn without_command(global: Flags, topic: Option<&'static Command>) -> Self {
        Self { global, command: None, flags: Flags::default(), words: Vec::new(), topic }
    }
}

fn find(name: String) -> Result<&'static Command> {
    Ok(COMMANDS.iter().find(|command| command.name == name).ok_or(UnknownCommand(name))?)
}

pub(crate) fn parse(mut line: Vec<String>) -> Result<Invocation> {
    line.reverse();
    let global = flags(GLOBAL, &mut line)?;
    if global.has("version") || global.has("help") || line.is_empty() {
        return Ok(Invocation::without_command(global, None));
    }
    let name = line.pop().unwrap_or_default();
    if name == "help" {
        let topic = line.pop().map(find).transpose()?;
        return Ok(Invocation::without_command(global, topic));
    }
    let command = find(name)?;
    if line.last().is_some_and(|word| ["-h", "--help", "-help"].contains(&word.as_str())) {
        return Ok(Invocation::without_command(global, Some(command)));
    }
    let mut given = flags(command.flags, &mut line)?;
    let mut words: Vec<String> = line.pop().into_iter().collect();
    // Commands with one word take flags behind it, too, as people type them.
    if !["exec", "ps", "kill"].contains(&command.name) {
        let later = flags(command.flags, &mut line)?;
        given.0.extend(later.0);
    }
    words.extend(line.into_iter().rev());
    Ok(Invocation { global, command: Some(command), flags: given, words, topic: None })
}

/// Takes flags off the (reversed) line.
fn flags(known: &[Flag], line: &mut Vec<String>) -> Result<Flags> {
    let mut found = Flags::default();
    while let Some(word) = line.last() {
        if word == "--" {
            line.pop();
            break;
        }
        if !word.starts_with('-') || word == "-" {
            break;
        }
        let word = line.pop().unwrap_or_default();
        let bare = word.trim_start_matches('-');
        let (name, inline) = bare.split_once('=').map_or((bare, None), |(name, value)| (name, Some(value.to_string())));
        let (names, takes_value) = known
            .iter()
            .find(|(names, _)| names.contains(&name))
            .ok_or_else(|| anyhow!("unknown flag {word:?}: see corun --help"))?;
        let value = match (takes_value, inline) {
            (_, Some(value)) => value,
            (false, None) => "true".to_string(),
            (true, None) => match line.pop() {
                Some(value) => value,
                None => bail!("flag {word:?} needs a value"),
            },
        };
        found.0.entry(names[0]).or_default().push(value);
    }
    Ok(found)
}

pub(crate) fn help_on(command: &Command) -> String {
    let Command { name, usage, about, flags } = command;
    let mut text = format!("corun {name}: {about}\n\nUsage: corun {name} [FLAGS] {usage}\n");
    for (names, value) in *flags {
        let names: Vec<_> =
            names.iter().map(|name| format!("{}{name}", if name.len() == 1 { "-" } else { "--" })).collect();
        text.push_str(&format!("  {}{}\n", names.join(", "), if *value { " VALUE" } else { "" }));
    }
    text
}

pub(crate) fn help() -> String {
    let mut text = String::from(
        "corun: an OCI container runtime\n\nUsage: corun [GLOBAL FLAGS] COMMAND [FLAGS] [WORDS]\n\nCommands:\n",
    );
    for command in COMMANDS {
        text.push_str(&format!("  {:<10} {:<22} {}\n", command.name, command.usage, command.about));
    }
    text.push_str("\ncorun COMMAND --help lists the flags of a command.\n");
    text.push_str("\nGlobal flags:\n  --root FOLDER (/run/corun)  --log FILE  --log-format text|json  --debug  --systemd-cgroup  --version  --help\n");
    text
}

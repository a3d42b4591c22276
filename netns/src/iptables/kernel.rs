//! Chains on their way into the kernel, by `iptables-restore` (`ip6tables-restore`).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::process::Command;

use super::compile::{Chains, HOOKS, PREFIX};
use crate::Family;
use crate::error::Error;

const TABLES: [&str; 4] = ["raw", "mangle", "nat", "filter"];
/// Seconds to wait for another program that changes rules.
const LOCK_SECONDS: &str = "10";

fn program(family: Family, part: &str) -> String {
    let name = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    format!("{name}{part}")
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, Error> {
    let failed = |source: io::Error| Error::Program { program: program.into(), source };
    let output = crate::program::run(Command::new(program).args(arguments), input.as_bytes()).map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(io::Error::other(format!("{}: {said}", output.status))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What the kernel has of us: our chains, and where its own chains jump to them.
#[derive(Default)]
struct Found {
    chains: BTreeSet<(&'static str, String)>,
    hooks: Vec<(&'static str, String)>,
}

fn found(family: Family) -> Result<Found, Error> {
    let listing = run(&program(family, "-save"), &[], "")?;
    let mut found = Found::default();
    let mut table = None;
    for line in listing.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = TABLES.into_iter().find(|known| *known == name);
        }
        let Some(table) = table else { continue };
        let chain = line.strip_prefix(':').and_then(|line| line.split(' ').next());
        if let Some(chain) = chain.filter(|chain| chain.starts_with(PREFIX)) {
            found.chains.insert((table, chain.to_owned()));
        }
        if let Some(rule) = line.strip_prefix("-A ")
            && !rule.starts_with(PREFIX)
            && rule.contains(&format!("-j {PREFIX}"))
        {
            found.hooks.push((table, rule.to_owned()));
        }
    }
    Ok(found)
}

/// Whether there are chains of ours.
pub(crate) fn is_there(family: Family) -> Result<bool, Error> {
    Ok(!found(family)?.chains.is_empty())
}

/// Makes the kernel's chains be these. Each table changes at once.
pub(crate) fn apply(family: Family, chains: &Chains) -> Result<(), Error> {
    let had = found(family)?;
    let mut text = String::new();
    for table in TABLES {
        write_line(&mut text, format_args!("*{table}"));
        let own = || chains.iter().filter(|((of, _), _)| *of == table);
        let stale =
            || had.chains.iter().filter(|(of, name)| *of == table && !chains.contains_key(&(*of, name.clone())));
        // Naming a chain makes or empties it.
        own().for_each(|((_, name), _)| write_line(&mut text, format_args!(":{name} - [0:0]")));
        stale().for_each(|(_, name)| write_line(&mut text, format_args!(":{name} - [0:0]")));
        for (_, hook, chain) in HOOKS.into_iter().filter(|(of, ..)| *of == table) {
            let rule = format!("{hook} -j {chain}");
            if !had.hooks.contains(&(table, rule)) {
                write_line(&mut text, format_args!("-I {hook} -j {chain}"));
            }
        }
        for ((_, name), rules) in own() {
            rules.iter().for_each(|rule| write_line(&mut text, format_args!("-A {name} {rule}")));
        }
        stale().for_each(|(_, name)| write_line(&mut text, format_args!("-X {name}")));
        text.push_str("COMMIT\n");
    }
    restore(family, &text)
}

/// Removes all of ours.
pub(crate) fn remove(family: Family) -> Result<(), Error> {
    let had = found(family)?;
    let mut text = String::new();
    for table in TABLES {
        write_line(&mut text, format_args!("*{table}"));
        let own = || had.chains.iter().filter(|(of, _)| *of == table);
        own().for_each(|(_, name)| write_line(&mut text, format_args!(":{name} - [0:0]")));
        let hooks = had.hooks.iter().filter(|(of, _)| *of == table);
        hooks.for_each(|(_, rule)| write_line(&mut text, format_args!("-D {rule}")));
        own().for_each(|(_, name)| write_line(&mut text, format_args!("-X {name}")));
        text.push_str("COMMIT\n");
    }
    if had.chains.is_empty() { Ok(()) } else { restore(family, &text) }
}

fn restore(family: Family, text: &str) -> Result<(), Error> {
    run(&program(family, "-restore"), &["--noflush", "--wait", LOCK_SECONDS], text).map(drop)
}

fn write_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes all that is written");
}

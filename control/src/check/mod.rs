//! `coracle check`: what this host has and lacks, line by line, and what each lack costs.

mod probes;

use std::fmt::Write as _;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::CheckOptions;

/// How much a lack costs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Grade {
    /// Nothing is lacking.
    Ok,
    /// Pods run; something that a manifest may ask for does not.
    Limited,
    /// No pod can run here.
    Missing,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) subject: &'static str,
    pub(crate) grade: Grade,
    /// What was seen.
    pub(crate) seen: String,
    /// What the lack costs and how to mend it; empty when nothing lacks.
    pub(crate) advice: String,
}

impl Finding {
    pub(crate) fn ok(subject: &'static str, seen: impl Into<String>) -> Self {
        Self { subject, grade: Grade::Ok, seen: seen.into(), advice: String::new() }
    }

    pub(crate) fn lack(
        subject: &'static str,
        grade: Grade,
        seen: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { subject, grade, seen: seen.into(), advice: advice.into() }
    }
}

/// Prints the report; fails when no pod could run here.
pub(crate) fn run(options: &CheckOptions) -> ExitCode {
    let findings = probes::all(options);
    if options.json {
        println!("{}", serde_json::json!(findings));
    } else {
        print!("{}", report(&findings));
    }
    if findings.iter().any(|finding| finding.grade == Grade::Missing) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn report(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.subject.len()).max().unwrap_or_default();
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.grade {
            Grade::Ok => "ok     ",
            Grade::Limited => "limited",
            Grade::Missing => "MISSING",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {:width$}  {}", finding.subject, finding.seen);
        if !finding.advice.is_empty() {
            let _ = writeln!(text, "         {:width$}  → {}", "", finding.advice);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lack_says_what_it_costs() {
        let text = report(&[
            Finding::ok("kernel", "6.18"),
            Finding::lack("nftables", Grade::Missing, "no nft program", "apt-get install nftables"),
        ]);
        assert_eq!(
            text,
            "ok       kernel    6.18\nMISSING  nftables  no nft program\n                   → apt-get install nftables\n"
        );
    }
}

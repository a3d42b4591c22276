//! What was measured, as a table and as JSON.

use std::fmt;

use serde::Serialize;

use crate::stats::{Summary, ratio, summary};

/// Characters of a peer's complaint that the table shows; the JSON has all of it.
const SHOWN_FAILURE_CHARS: usize = 100;

#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) kernel: String,
    pub(crate) cpus: usize,
    pub(crate) figures: Vec<Figure>,
}

/// One quantity, of us and of our peers.
#[derive(Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) rows: Vec<Row>,
}

#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) who: String,
    /// Absent when `failure` tells why.
    pub(crate) summary: Option<Summary>,
    /// This row's samples by those of the first row, which is ours.
    pub(crate) times_ours: Option<Summary>,
    pub(crate) failure: Option<String>,
}

/// Who was measured, and the samples or why there are none.
pub(crate) type Samples = (String, Result<Vec<f64>, String>);

impl Figure {
    /// `measured` begins with ours; samples of one index were taken side by side.
    pub(crate) fn compare(name: impl Into<String>, unit: &'static str, measured: &[Samples]) -> Self {
        let ours = measured.first().and_then(|(_, samples)| samples.as_ref().ok());
        let row = |(index, (who, samples)): (usize, &Samples)| Row {
            who: who.clone(),
            summary: samples.as_ref().ok().and_then(|samples| summary(samples)),
            times_ours: match (index, samples, ours) {
                (1.., Ok(samples), Some(ours)) => ratio(samples, ours),
                _ => None,
            },
            failure: samples.as_ref().err().cloned(),
        };
        Self { name: name.into(), unit, rows: measured.iter().enumerate().map(row).collect() }
    }

    /// A quantity that no peer on this machine has.
    pub(crate) fn ours(name: impl Into<String>, unit: &'static str, samples: Vec<f64>) -> Self {
        Self::compare(name, unit, &[("coracle".into(), Ok(samples))])
    }
}

impl Report {
    pub(crate) fn new(figures: Vec<Figure>) -> anyhow::Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        Ok(Self { kernel, cpus: std::thread::available_parallelism()?.get(), figures })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "Linux {}, {} CPUs; x = times ours, median of interleaved pairs", self.kernel, self.cpus)?;
        for figure in &self.figures {
            writeln!(out, "\n{} ({})", figure.name, figure.unit)?;
            writeln!(
                out,
                "  {:<24}{:>10}{:>10}{:>10}{:>10}{:>8}{:>9}",
                "", "median", "p10", "p90", "p99", "runs", "x"
            )?;
            for row in &figure.rows {
                write!(out, "  {:<24}", row.who)?;
                if let Some(of) = &row.summary {
                    let Summary { median, p10, p90, p99, samples } = of;
                    write!(out, "{median:>10.2}{p10:>10.2}{p90:>10.2}{p99:>10.2}{samples:>8}")?;
                }
                if let Some(times) = &row.times_ours {
                    write!(out, "{:>9.2}", times.median)?;
                }
                if let Some(failure) = &row.failure {
                    let line = failure.lines().next().unwrap_or_default();
                    write!(out, "failed: {}", line.chars().take(SHOWN_FAILURE_CHARS).collect::<String>())?;
                }
                writeln!(out)?;
            }
        }
        Ok(())
    }
}

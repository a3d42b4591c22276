//! What the DNS server counts.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) udp: AtomicU64,
    pub(super) tcp: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) no_error: AtomicU64,
    pub(super) no_name: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) truncated: AtomicU64,
    pub(super) forwarded: AtomicU64,
    pub(super) forward_failed: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) cache_hits: AtomicU64,
    pub(super) cache_misses: AtomicU64,
}

impl Metrics {
    /// The counters in the Prometheus text format.
    pub fn render(&self) -> String {
        let families: [Metric<'_>; 7] = [
            (
                "coracle_dns_requests_total",
                "Questions received.",
                &[("{proto=\"udp\"}", &self.udp), ("{proto=\"tcp\"}", &self.tcp)],
            ),
            (
                "coracle_dns_responses_total",
                "Answers by response code.",
                &[
                    ("{rcode=\"NOERROR\"}", &self.no_error),
                    ("{rcode=\"NXDOMAIN\"}", &self.no_name),
                    ("{rcode=\"SERVFAIL\"}", &self.failed),
                    ("{rcode=\"REFUSED\"}", &self.refused),
                    ("{rcode=\"FORMERR\"}", &self.malformed),
                ],
            ),
            ("coracle_dns_truncated_total", "Answers too long for UDP.", &[("", &self.truncated)]),
            ("coracle_dns_forward_requests_total", "Questions asked of other resolvers.", &[("", &self.forwarded)]),
            (
                "coracle_dns_forward_failures_total",
                "Questions no other resolver answered.",
                &[("", &self.forward_failed)],
            ),
            ("coracle_dns_dropped_total", "Questions dropped at a limit.", &[("", &self.dropped)]),
            (
                "coracle_dns_cache_total",
                "Look-ups of forwarded answers.",
                &[("{result=\"hit\"}", &self.cache_hits), ("{result=\"miss\"}", &self.cache_misses)],
            ),
        ];
        let mut text = String::new();
        for (name, help, values) in families {
            // Writing to a string cannot fail.
            _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for (labels, value) in values {
                _ = writeln!(text, "{name}{labels} {}", value.load(Relaxed));
            }
        }
        text
    }
}

/// Name, help, and the values by labels.
type Metric<'a> = (&'static str, &'static str, &'a [(&'static str, &'a AtomicU64)]);

/// Counts one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

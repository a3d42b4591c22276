//! Failure zones: at which rate nodes of a zone may start to lose their pods. A pure value that a clock is handed to.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Time between two nodes of a zone (`--node-eviction-rate` 0.1 a second).
const NORMAL: Duration = Duration::from_secs(10);
/// The same in a large zone of which much does not answer (`--secondary-node-eviction-rate` 0.01 a second).
const SLOW: Duration = Duration::from_secs(100);
/// A zone with fewer nodes than this is left alone when much of it does not answer (`--large-cluster-size-threshold`).
const LARGE: usize = 50;
/// Share of nodes, in percent, from which on a zone counts as disrupted (`--unhealthy-zone-threshold`).
const UNHEALTHY_PERCENT: usize = 55;
/// When a zone in which nothing may happen is looked at again.
const LATER: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Zones {
    nodes: HashMap<String, (String, bool)>,
    /// Ready and other nodes by zone.
    counts: HashMap<String, (usize, usize)>,
    next: HashMap<String, Instant>,
}

impl Zones {
    /// Notes a node's zone and whether it is ready.
    pub(super) fn put(&mut self, node: &str, zone: String, ready: bool) {
        self.remove(node);
        let (up, down) = self.counts.entry(zone.clone()).or_default();
        *(if ready { up } else { down }) += 1;
        self.nodes.insert(node.to_owned(), (zone, ready));
    }

    /// Forgets a node.
    pub(super) fn remove(&mut self, node: &str) {
        let Some((zone, ready)) = self.nodes.remove(node) else { return };
        let Some((up, down)) = self.counts.get_mut(&zone) else { return };
        *(if ready { &mut *up } else { &mut *down }) -= 1;
        if (*up, *down) == (0, 0) {
            self.counts.remove(&zone);
            self.next.remove(&zone);
        }
    }

    /// Takes a turn in a zone; otherwise says when to ask again.
    pub(super) fn turn(&mut self, zone: &str, now: Instant) -> Option<Duration> {
        let Some(pause) = self.pause(zone) else { return Some(LATER) };
        match self.next.get(zone) {
            Some(next) if *next > now => Some(*next - now),
            _ => {
                self.next.insert(zone.to_owned(), now + pause);
                None
            }
        }
    }

    /// Whether no node answers: then it is this side that is cut off, and nobody is to lose pods for it.
    pub(super) fn are_silent(&self) -> bool {
        self.counts.values().all(|(up, _)| *up == 0)
    }

    /// Time between two turns of a zone; `None` when nothing may happen.
    fn pause(&self, zone: &str) -> Option<Duration> {
        if self.are_silent() {
            return None;
        }
        let (up, down) = self.counts.get(zone).copied().unwrap_or_default();
        let disrupted = up > 0 && down > 2 && down * 100 >= UNHEALTHY_PERCENT * (up + down);
        match disrupted {
            false => Some(NORMAL),
            true if up + down > LARGE => Some(SLOW),
            true => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zones(up: usize, down: usize) -> Zones {
        let mut zones = Zones::default();
        for number in 0..up + down {
            zones.put(&format!("n{number}"), "z".into(), number < up);
        }
        zones
    }

    #[test]
    fn the_rate_falls_with_the_health_of_the_zone() {
        assert_eq!(zones(10, 2).pause("z"), Some(NORMAL));
        assert_eq!(zones(4, 6).pause("z"), None);
        assert_eq!(zones(40, 60).pause("z"), Some(SLOW));
        assert_eq!(zones(0, 5).pause("z"), None, "nobody answers");
        assert_eq!(zones(0, 1).pause("z"), None, "a lone node keeps its pods");
        let mut two = zones(0, 5);
        two.put("elsewhere", "y".into(), true);
        assert_eq!(two.pause("z"), Some(NORMAL), "the zone is gone, others live");
        two.remove("elsewhere");
        assert_eq!(two.pause("z"), None);
    }

    #[test]
    fn nodes_take_turns() {
        let mut zones = zones(10, 3);
        let now = Instant::now();
        assert_eq!(zones.turn("z", now), None);
        assert_eq!(zones.turn("z", now), Some(NORMAL));
        assert_eq!(zones.turn("z", now + NORMAL), None);
    }
}

//! Why no node takes a pod, in the words that users know.

use std::collections::BTreeMap;

use crate::plugins::Rejection;

/// Why no node takes a pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Failure {
    /// How many nodes there are.
    nodes: usize,
    /// How many of them rejected the pod for each reason.
    reasons: BTreeMap<String, usize>,
    /// A reason that holds for all of them.
    everywhere: Option<String>,
    /// The plug-ins that rejected the pod: bits by their place in the table. Events that help none of them help not.
    pub(crate) rejectors: u32,
    /// Nodes, by slot, on which removing pods may help.
    pub(crate) resolvable: Vec<u32>,
    /// What came of the attempt to make room.
    pub(crate) after: String,
    /// Not to be tried again until the node on which room was made is free.
    pub(crate) keeps_nomination: bool,
}

/// `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable`
pub(crate) fn histogram(nodes: usize, reasons: &BTreeMap<String, usize>) -> String {
    let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    format!("0/{nodes} nodes are available: {}.", parts.join(", "))
}

impl Failure {
    pub(crate) fn new<'a>(
        nodes: usize,
        reasons: impl Iterator<Item = (usize, &'a Rejection, usize)>,
        resolvable: Vec<u32>,
    ) -> Self {
        let mut failure = Self { nodes, resolvable, ..Self::default() };
        for (plugin, rejection, count) in reasons {
            failure.rejectors |= 1 << plugin;
            for reason in &rejection.reasons {
                *failure.reasons.entry(reason.clone()).or_default() += count;
            }
        }
        if failure.rejectors == 0 {
            // There was no node to reject it, so each plug-in may let it in.
            failure.rejectors = u32::MAX;
        }
        failure
    }

    pub(crate) fn everywhere(plugin: usize, rejection: Rejection, nodes: usize) -> Self {
        let everywhere = Some(rejection.reasons.join(", "));
        Self { nodes, everywhere, rejectors: 1 << plugin, ..Self::default() }
    }
}

impl std::fmt::Display for Failure {
    /// As users know it: `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable. preemption: …`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.everywhere {
            _ if self.nodes == 0 => return f.write_str("no nodes available to schedule pods"),
            Some(reason) => write!(f, "0/{} nodes are available: {reason}.", self.nodes)?,
            None => f.write_str(&histogram(self.nodes, &self.reasons))?,
        }
        if !self.after.is_empty() {
            write!(f, " {}", self.after)?;
        }
        Ok(())
    }
}

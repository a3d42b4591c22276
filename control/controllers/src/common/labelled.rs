//! Pods found by their labels, without looking at each: pods of one workload mostly have the same.

use std::collections::BTreeMap;

use coracle_api::informer::{Index, Objects};
use coracle_api::server::ApiServer;
use k8s_openapi::api::core::v1::Pod;

type Labels = BTreeMap<String, String>;

/// Pods by namespace and labels, shared by all controllers that select pods.
pub(crate) struct Labelled {
    index: Index<Pod, (String, Labels)>,
}

impl Labelled {
    pub(crate) fn new(api: &ApiServer) -> Self {
        let of = |pod: &Pod| {
            let (namespace, labels) = (pod.metadata.namespace.clone(), pod.metadata.labels.clone());
            vec![(namespace.unwrap_or_default(), labels.unwrap_or_default())]
        };
        Self { index: api.informer::<Pod>().index(of) }
    }

    /// The pods of a namespace whose labels are wanted.
    pub(crate) fn select(&self, namespace: &str, wanted: impl Fn(&Labels) -> bool) -> Objects<Pod> {
        // No name of a namespace has a character below this one.
        let (from, to) = (namespace.to_owned(), format!("{namespace}\0"));
        self.index.select((from, Labels::new())..(to, Labels::new()), |(_, labels)| wanted(labels))
    }
}

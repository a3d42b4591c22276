//! EndpointSlices as the controllers that write them share them: endpoints laid out over slices of a bounded size.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coracle_api::informer::Delta;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, ResourceExt};

use crate::machine::{Error, Host, Key, WorkQueue};

/// Label that names the Service of a slice.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label of slices whose Service has no address of its own.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints of one slice (`--max-endpoints-per-slice`).
const MAX_ENDPOINTS: usize = 100;

/// What endpoints must share to stand in one slice.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Group {
    pub(super) address_type: &'static str,
    /// Name, number, protocol, application protocol of each port.
    pub(super) ports: Vec<(String, i32, String, Option<String>)>,
}

impl Group {
    fn ports(&self) -> Vec<EndpointPort> {
        let port = |(name, port, protocol, app_protocol): &(String, i32, String, Option<String>)| EndpointPort {
            name: Some(name.clone()),
            port: Some(*port),
            protocol: Some(protocol.clone()),
            app_protocol: app_protocol.clone(),
        };
        self.ports.iter().map(port).collect()
    }
}

/// Whether a slice is written by the controller `manager`.
pub(super) fn is_managed(slice: &EndpointSlice, manager: &str) -> bool {
    slice.labels().get(MANAGED_BY).is_some_and(|by| by == manager)
}

/// Queues the Service of a changed slice of `manager`.
pub(super) fn changed(delta: &Delta<EndpointSlice>, manager: &str, queue: &WorkQueue<Key>) {
    for slice in [&delta.old, &delta.new].into_iter().flatten() {
        if let (true, Some(service)) = (is_managed(slice, manager), slice.labels().get(SERVICE_NAME)) {
            queue.add(Key::new(&slice.namespace().unwrap_or_default(), service));
        }
    }
}

/// Makes the slices be those wanted: changes and fills those that exist, makes what is missing, removes what is left over.
pub(super) async fn apply(
    host: &Host,
    model: &EndpointSlice,
    mut existing: Vec<Arc<EndpointSlice>>,
    wanted: BTreeMap<Group, Vec<Endpoint>>,
) -> Result<(), Error> {
    let api: Api<EndpointSlice> = Api::namespaced(host.client.clone(), &model.namespace().unwrap_or_default());
    existing.sort_by_key(|slice| slice.name_any());
    let mut kept = BTreeSet::new();
    for (group, endpoints) in wanted {
        let ports = group.ports();
        let model =
            EndpointSlice { address_type: group.address_type.into(), ports: Some(ports.clone()), ..model.clone() };
        let same: Vec<_> = existing
            .iter()
            .filter(|slice| {
                slice.address_type == group.address_type && slice.ports.as_deref().unwrap_or_default() == ports
            })
            .cloned()
            .collect();
        for (index, (held, share)) in share_out(&same, endpoints).into_iter().enumerate() {
            match held {
                // A slice that holds nothing goes, but for the first.
                Some(_) if share.is_empty() && index > 0 => {}
                Some(held) => {
                    kept.insert(held.name_any());
                    let changed = EndpointSlice {
                        metadata: ObjectMeta {
                            labels: model.metadata.labels.clone(),
                            annotations: model.metadata.annotations.clone().or(held.metadata.annotations.clone()),
                            ..held.metadata.clone()
                        },
                        endpoints: Some(share),
                        ..model.clone()
                    };
                    let same = changed.metadata == held.metadata
                        && changed.endpoints.as_deref().unwrap_or_default()
                            == held.endpoints.as_deref().unwrap_or_default();
                    if !same {
                        host.replace(&api, &changed).await?;
                    }
                }
                None => {
                    let made = host.create(&api, &EndpointSlice { endpoints: Some(share), ..model.clone() }).await?;
                    kept.insert(made.name_any());
                }
            }
        }
    }
    for slice in existing.iter().filter(|slice| !kept.contains(&slice.name_any())) {
        host.delete(&api, &**slice).await?;
    }
    Ok(())
}

/// Shares endpoints out over the slices that exist: what a slice holds and is still wanted stays there, so that a change
/// of one endpoint rewrites one slice; the rest fills gaps, then new slices.
fn share_out(
    existing: &[Arc<EndpointSlice>],
    wanted: Vec<Endpoint>,
) -> Vec<(Option<Arc<EndpointSlice>>, Vec<Endpoint>)> {
    let mut left: BTreeMap<Vec<String>, Endpoint> =
        wanted.into_iter().map(|endpoint| (endpoint.addresses.clone(), endpoint)).collect();
    let mut shares: Vec<_> = existing
        .iter()
        .map(|slice| {
            let kept: Vec<_> =
                slice.endpoints.iter().flatten().filter_map(|held| left.remove(&held.addresses)).collect();
            (Some(slice.clone()), kept)
        })
        .collect();
    let mut left = left.into_values();
    for (_, share) in &mut shares {
        let room = MAX_ENDPOINTS.saturating_sub(share.len());
        share.extend(left.by_ref().take(room));
    }
    loop {
        let share: Vec<_> = left.by_ref().take(MAX_ENDPOINTS).collect();
        if share.is_empty() {
            break;
        }
        shares.push((None, share));
    }
    if shares.is_empty() {
        shares.push((None, Vec::new()));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(number: usize) -> Endpoint {
        Endpoint { addresses: vec![format!("10.42.{}.{}", number / 250, number % 250)], ..Endpoint::default() }
    }

    fn held(name: &str, numbers: impl Iterator<Item = usize>) -> Arc<EndpointSlice> {
        Arc::new(EndpointSlice {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            endpoints: Some(numbers.map(endpoint).collect()),
            ..EndpointSlice::default()
        })
    }

    #[test]
    fn endpoints_stay_in_their_slices_and_new_ones_fill_gaps() {
        let existing = [held("a", 0..100), held("b", 100..150)];
        let shares = share_out(&existing, (1..260).map(endpoint).collect());
        let sizes: Vec<_> = shares.iter().map(|(_, share)| share.len()).collect();
        assert_eq!(sizes, [100, 100, 59]);
        assert!((1..100).all(|number| shares[0].1.contains(&endpoint(number))), "an endpoint moved");
        let all: usize = sizes.iter().sum();
        assert_eq!(all, 259);
    }

    #[test]
    fn a_service_without_pods_keeps_one_empty_slice() {
        assert_eq!(share_out(&[], Vec::new()).len(), 1);
    }
}

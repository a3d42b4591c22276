//! DynamicResources: claims for devices are not allocated yet, so a pod that names some is never placed without them.

use super::{Context, Rejection};
use crate::state::Shape;

pub(super) fn pre_filter(pod: &Shape, _: &Context<'_>) -> Result<(), Rejection> {
    match pod.device_claims.first() {
        None => Ok(()),
        Some(claim) => {
            let words =
                format!("resource claim {:?} needs a scheduler that allocates devices; this one does not", claim.name);
            Err(Rejection::unresolvable(words))
        }
    }
}

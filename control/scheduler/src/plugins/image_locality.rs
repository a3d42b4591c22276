//! ImageLocality: better marks where the pod's images are already, unless they are nowhere else: a single node with a
//! popular image is not to draw all pods.

use super::{Context, MAX_SCORE};
use crate::state::{NodeState, Shape};

/// Images smaller than this are pulled so quickly that they earn nothing (bytes).
const LEAST_BYTES: i64 = 23 << 20;
/// So much an image of a container earns the best mark (bytes).
const MOST_BYTES: i64 = 1000 << 20;

/// The name with a tag, as nodes list it.
fn tagged(image: &str) -> String {
    let has_tag = image.rfind(':') > image.rfind('/');
    if has_tag { image.to_owned() } else { format!("{image}:latest") }
}

pub(super) fn score(pod: &Shape, node: &NodeState, context: &Context<'_>) -> i64 {
    if node.images.is_empty() || context.cache.len() == 0 {
        return 0;
    }
    let present = pod.images.iter().filter_map(|image| {
        let name = tagged(image);
        let size = *node.images.get(&name)?;
        let spread = context.cache.image_nodes(&name) as f64 / context.cache.len() as f64;
        Some((size as f64 * spread) as i64)
    });
    let most = MOST_BYTES * i64::try_from(pod.images.len()).unwrap_or(i64::MAX >> 40);
    let sum = present.sum::<i64>().clamp(LEAST_BYTES, most.max(LEAST_BYTES + 1));
    MAX_SCORE * (sum - LEAST_BYTES) / (most.max(LEAST_BYTES + 1) - LEAST_BYTES)
}

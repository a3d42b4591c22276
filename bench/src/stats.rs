//! What samples say: median, spread, ratios of interleaved pairs. Pure.

use serde::Serialize;

/// A row of samples in three numbers, in the samples' own unit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) samples: usize,
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
}

/// `None` of no samples.
pub(crate) fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        samples: sorted.len(),
        median: percentile(&sorted, 0.5)?,
        p10: percentile(&sorted, 0.1)?,
        p90: percentile(&sorted, 0.9)?,
        p99: percentile(&sorted, 0.99)?,
    })
}

/// `peer[i] / ours[i]` of samples taken side by side, so that a slow minute of the machine hits both.
pub(crate) fn ratio(peer: &[f64], ours: &[f64]) -> Option<Summary> {
    let pairs: Vec<_> =
        peer.iter().zip(ours).filter(|(_, ours)| **ours > 0.0).map(|(peer, ours)| peer / ours).collect();
    summary(&pairs)
}

/// The value below which the part `quantile` (0 to 1) of samples in any order lies; 0 of none.
pub(crate) fn quantile(samples: &[f64], quantile: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, quantile).unwrap_or_default()
}

/// The value below which the part `quantile` (0 to 1) of ascending samples lies, linear between neighbours.
fn percentile(sorted: &[f64], quantile: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = quantile * last as f64;
    let below = position.floor() as usize;
    let (low, high) = (sorted[below], sorted[last.min(below + 1)]);
    Some(low + (high - low) * position.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_interpolates_between_neighbours_whatever_the_order() {
        let of = summary(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((of.samples, of.median), (4, 2.5));
        assert!((of.p10 - 1.3).abs() < 1e-9 && (of.p90 - 3.7).abs() < 1e-9);
        assert_eq!(summary(&[7.0]).unwrap(), Summary { samples: 1, median: 7.0, p10: 7.0, p90: 7.0, p99: 7.0 });
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn a_ratio_is_of_pairs_and_not_of_medians() {
        assert_eq!(ratio(&[2.0, 40.0, 6.0], &[1.0, 10.0, 2.0]).unwrap().median, 3.0);
        assert_eq!(ratio(&[2.0], &[0.0]), None);
    }
}

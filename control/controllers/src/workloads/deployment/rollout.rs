//! The arithmetic of rollouts: how many pods each ReplicaSet of a Deployment should have next. Values to values.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::common::intstr::scaled;

/// How far a rolling update may stray from the wanted number, in pods.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Bounds {
    pub(super) max_surge: i32,
    pub(super) max_unavailable: i32,
}

impl Bounds {
    /// Percentages resolved: surge rounds up, unavailability down, and both cannot be zero.
    pub(super) fn resolve(surge: Option<&IntOrString>, unavailable: Option<&IntOrString>, wanted: i32) -> Self {
        let quarter = IntOrString::String("25%".into());
        let max_surge = scaled(surge.unwrap_or(&quarter), wanted, true).unwrap_or_default();
        let max_unavailable = scaled(unavailable.unwrap_or(&quarter), wanted, false).unwrap_or_default();
        if max_surge == 0 && max_unavailable == 0 {
            return Self { max_surge, max_unavailable: 1 };
        }
        Self { max_surge, max_unavailable: max_unavailable.min(wanted) }
    }
}

/// What a rollout knows of one ReplicaSet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Size {
    /// `spec.replicas`.
    pub(super) wanted: i32,
    /// `status.availableReplicas`.
    pub(super) available: i32,
    /// The wanted number of the Deployment plus surge at the time it was last scaled, from its annotation.
    pub(super) max: i32,
}

/// The size of the new set during a rolling update: as many more as the surge leaves room for.
pub(super) fn grow(new: Size, old_total: i32, wanted: i32, bounds: Bounds) -> i32 {
    if new.wanted >= wanted {
        return wanted;
    }
    let room = wanted + bounds.max_surge - (new.wanted + old_total);
    (new.wanted + room.clamp(0, wanted - new.wanted)).min(wanted)
}

/// The sizes of the old sets (oldest first) during a rolling update: first what is not available anyway, then as much as
/// availability leaves room for.
pub(super) fn shrink(old: &[Size], new: Size, wanted: i32, bounds: Bounds) -> Vec<i32> {
    let mut sizes: Vec<i32> = old.iter().map(|set| set.wanted).collect();
    let total: i32 = new.wanted + sizes.iter().sum::<i32>();
    let least = wanted - bounds.max_unavailable;
    let new_unavailable = (new.wanted - new.available).max(0);
    let mut removable = total - least - new_unavailable;
    if removable <= 0 {
        return sizes;
    }
    for (size, set) in sizes.iter_mut().zip(old) {
        let unhealthy = (set.wanted - set.available).max(0).min(removable);
        *size -= unhealthy;
        removable -= unhealthy;
    }
    let available: i32 = new.available + old.iter().map(|set| set.available).sum::<i32>();
    let mut spare = available - least;
    for (size, set) in sizes.iter_mut().zip(old) {
        let take = (*size).min(set.available).min(spare).max(0);
        *size -= take;
        spare -= take;
    }
    sizes
}

/// The sizes after the Deployment itself was scaled in the middle of a rollout: the change is shared in proportion to
/// the sets' sizes, larger ones first, and what rounding leaves goes to the first. Sets in order of preference.
pub(super) fn proportion(sets: &[Size], wanted: i32, bounds: Bounds) -> Vec<i32> {
    let mut sizes: Vec<i32> = sets.iter().map(|set| set.wanted).collect();
    let total: i32 = sizes.iter().sum();
    let allowed = if wanted > 0 { wanted + bounds.max_surge } else { 0 };
    let change = allowed - total;
    let mut added = 0;
    for (size, set) in sizes.iter_mut().zip(sets) {
        let left = change - added;
        if set.wanted == 0 || left == 0 {
            continue;
        }
        let base = if set.max > 0 { set.max } else { total };
        let share = (f64::from(set.wanted) * f64::from(allowed) / f64::from(base)).round() as i32 - set.wanted;
        let share = if change > 0 { share.clamp(0, left) } else { share.clamp(left, 0) };
        *size += share;
        added += share;
    }
    if let Some(first) = sizes.first_mut() {
        *first = (*first + change - added).max(0);
    }
    sizes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn percent(text: &str) -> IntOrString {
        IntOrString::String(text.into())
    }

    #[test]
    fn bounds_are_never_both_zero() {
        let zero = IntOrString::Int(0);
        assert_eq!(Bounds::resolve(Some(&zero), Some(&percent("1%")), 10), Bounds { max_surge: 0, max_unavailable: 1 });
        assert_eq!(Bounds::resolve(None, None, 10), Bounds { max_surge: 3, max_unavailable: 2 });
        assert_eq!(Bounds::resolve(None, None, 3), Bounds { max_surge: 1, max_unavailable: 0 });
    }

    #[test]
    fn scaling_in_the_middle_keeps_the_proportion() {
        let set = |wanted| Size { wanted, available: wanted, max: 13 };
        // The example of the Deployment documentation: 10 wanted, 3 surge, scaled to 15.
        let bounds = Bounds { max_surge: 3, max_unavailable: 2 };
        let sizes = proportion(&[set(8), set(5)], 15, bounds);
        assert_eq!(sizes, [11, 7]);
        assert_eq!(proportion(&[set(8), set(5)], 0, bounds), [0, 0]);
    }

    proptest! {
        /// Whatever comes up in whatever order, a rollout stays within its bounds and ends.
        #[test]
        fn a_rolling_update_stays_in_bounds_and_ends(
            wanted in 1..20_i32, surge in 0..5_i32, unavailable in 0..5_i32, coming_up in prop::collection::vec(0..4_i32, 200),
        ) {
            let bounds = Bounds::resolve(Some(&IntOrString::Int(surge)), Some(&IntOrString::Int(unavailable)), wanted);
            let mut old = Size { wanted, available: wanted, max: 0 };
            let mut new = Size::default();
            for up in coming_up.iter().chain(&[4; 200]) {
                new.wanted = grow(new, old.wanted, wanted, bounds);
                let [shrunk] = shrink(&[old], new, wanted, bounds)[..] else { panic!("one size for one set") };
                prop_assert!(shrunk <= old.wanted && shrunk >= 0);
                old.wanted = shrunk;
                old.available = old.available.min(shrunk);
                prop_assert!(new.wanted + old.wanted <= wanted + bounds.max_surge, "too many");
                prop_assert!(new.available + old.available >= wanted - bounds.max_unavailable, "too few available");
                new.available = (new.available + up).min(new.wanted);
            }
            prop_assert_eq!((new.wanted, old.wanted), (wanted, 0), "did not end");
        }

        /// Sharing out a change gives exactly the allowed number.
        #[test]
        fn proportions_add_up(sizes in prop::collection::vec(0..30_i32, 1..5), wanted in 0..60_i32, surge in 0..5_i32) {
            let sets: Vec<_> = sizes.iter().map(|&wanted| Size { wanted, available: wanted, max: 0 }).collect();
            prop_assume!(sizes.iter().sum::<i32>() > 0);
            let bounds = Bounds { max_surge: surge, max_unavailable: 0 };
            let allowed = if wanted > 0 { wanted + surge } else { 0 };
            let result = proportion(&sets, wanted, bounds);
            prop_assert!(result.iter().all(|size| *size >= 0));
            prop_assert!(result.iter().sum::<i32>() >= allowed);
        }
    }
}

//! Sets of completion indexes in the form in which a Job's status shows them: `0,2-5`.

use std::fmt;

/// A set of indexes as sorted ranges that neither touch nor overlap, both ends inclusive.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Indexes(Vec<(i32, i32)>);

impl Indexes {
    /// Reads the form of the status; what is at or beyond `limit`, or cannot be read, is left out.
    pub(super) fn parse(text: &str, limit: i32) -> Self {
        let range = |part: &str| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (from.trim().parse().ok()?, to.trim().parse::<i32>().ok()?.min(limit.saturating_sub(1)));
            (0 <= from && from <= to).then_some((from, to))
        };
        Self::merged(text.split(',').filter_map(range).collect())
    }

    fn merged(mut ranges: Vec<(i32, i32)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(i32, i32)> = Vec::with_capacity(ranges.len());
        for (from, to) in ranges {
            match merged.last_mut() {
                Some(last) if from <= last.1.saturating_add(1) => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        Self(merged)
    }

    /// This set and these indexes.
    pub(super) fn with(&self, more: impl IntoIterator<Item = i32>) -> Self {
        let mut ranges = self.0.clone();
        ranges.extend(more.into_iter().map(|index| (index, index)));
        Self::merged(ranges)
    }

    pub(super) fn contains(&self, index: i32) -> bool {
        let after = self.0.partition_point(|(from, _)| *from <= index);
        after > 0 && self.0[after - 1].1 >= index
    }

    pub(super) fn len(&self) -> i32 {
        self.0.iter().map(|(from, to)| to - from + 1).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many of these are in the other set, too.
    pub(super) fn common(&self, other: &Self) -> i32 {
        let overlap = |(from, to): &(i32, i32), (other_from, other_to): &(i32, i32)| {
            (to.min(other_to) - from.max(other_from) + 1).max(0)
        };
        self.0.iter().flat_map(|one| other.0.iter().map(move |two| overlap(one, two))).sum()
    }
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (from, to)) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str(",")?;
            }
            match to - from {
                0 => write!(f, "{from}")?,
                1 => write!(f, "{from},{to}")?,
                _ => write!(f, "{from}-{to}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_form_is_that_of_the_status() {
        assert_eq!(Indexes::default().with([0, 1, 3, 4, 5, 9]).to_string(), "0,1,3-5,9");
        assert_eq!(Indexes::parse("0,1,3-5,9,x,7-6", 9).to_string(), "0,1,3-5");
    }

    proptest! {
        #[test]
        fn a_set_is_what_was_put_in(all in prop::collection::btree_set(0..60_i32, 0..40), more in prop::collection::btree_set(0..60_i32, 0..40)) {
            let set = Indexes::default().with(all.iter().copied());
            prop_assert_eq!(&Indexes::parse(&set.to_string(), 60), &set);
            prop_assert_eq!(set.len() as usize, all.len());
            prop_assert!((0..60).all(|index| set.contains(index) == all.contains(&index)));
            let both: BTreeSet<_> = all.union(&more).copied().collect();
            prop_assert_eq!(set.with(more.iter().copied()), Indexes::default().with(both));
            prop_assert_eq!(set.common(&Indexes::default().with(more.iter().copied())) as usize, all.intersection(&more).count());
        }
    }
}

//! The objects as they are and, with the log of changes, as they were.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use crate::hub::{Past, in_scope};
use crate::{Entry, Error, ListOptions, Listing};

/// The newest version of each object, in key order.
pub(crate) type Objects = BTreeMap<Arc<str>, Entry>;

/// The part of `scope` in `objects` as of one revision that the log `past` still reaches back to.
pub(crate) fn list(objects: &Objects, past: &Past, scope: &str, options: &ListOptions) -> Result<Listing, Error> {
    let revision = options.revision.unwrap_or(past.newest);
    if revision > past.newest {
        return Err(Error::Future { requested: revision, newest: past.newest });
    }
    if revision < past.oldest {
        return Err(Error::Compacted { requested: revision, oldest: past.oldest });
    }
    let start = match options.start_after.as_deref() {
        Some(after) if after >= scope => Bound::Excluded(after),
        _ => Bound::Included(scope),
    };
    let limit = if options.limit == 0 { usize::MAX } else { options.limit };

    // What stood at a key that has changed since: the version before the first of these changes.
    let mut then: HashMap<&str, Option<&Entry>> = HashMap::new();
    for event in past.after(revision) {
        let key: &str = &event.entry.key;
        if in_scope(scope, key) {
            then.entry(key).or_insert(event.prev.as_ref());
        }
    }
    let after_start = |key: &str| match start {
        Bound::Excluded(after) => key > after,
        _ => true,
    };
    let mut removed: Vec<&Entry> = then
        .values()
        .copied()
        .flatten()
        .filter(|entry| after_start(&entry.key) && !objects.contains_key(&entry.key))
        .collect();
    removed.sort_unstable_by(|a, b| a.key.cmp(&b.key));

    let mut removed = removed.into_iter().peekable();
    let mut present = objects
        .range::<str, _>((start, Bound::Unbounded))
        .take_while(|(key, _)| in_scope(scope, key))
        .filter_map(|(key, entry)| match then.get(&**key) {
            Some(then) => *then,
            None => Some(entry),
        })
        .peekable();
    let mut merged = std::iter::from_fn(|| match (present.peek(), removed.peek()) {
        (Some(a), Some(b)) if a.key > b.key => removed.next(),
        (None, Some(_)) => removed.next(),
        _ => present.next(),
    });
    let entries: Vec<Entry> = merged.by_ref().take(limit).cloned().collect();
    let remaining = merged.count() as u64;
    Ok(Listing { entries, revision, more: remaining > 0, remaining })
}

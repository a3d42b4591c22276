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
    let end = last_of(scope);
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
    let mut present = between(objects, start, &end)
        .filter_map(|(key, entry)| match then.get(&**key) {
            Some(then) => *then,
            None => Some(entry),
        })
        .peekable();
    let merged = std::iter::from_fn(|| match (present.peek(), removed.peek()) {
        (Some(a), Some(b)) if a.key > b.key => removed.next(),
        (None, Some(_)) => removed.next(),
        _ => present.next(),
    });
    let entries: Vec<Entry> = merged.take(limit).cloned().collect();
    let remaining = match entries.last() {
        Some(last) if entries.len() == limit => {
            // Counted without a look at the keys: there may be very many.
            let now = between(objects, Bound::Excluded(&last.key), &end).count();
            let made_since =
                then.iter().filter(|(key, then)| then.is_none() && **key > &*last.key && objects.contains_key(**key));
            (now - made_since.count() + removed.count()) as u64
        }
        _ => 0,
    };
    Ok(Listing { entries, revision, more: remaining > 0, remaining })
}

/// Where the keys of `scope` end: before the name that follows the folder's, or with the one key.
fn last_of(scope: &str) -> Bound<String> {
    const AFTER_SLASH: char = '0';
    match scope.strip_suffix('/') {
        Some(folder) => Bound::Excluded(format!("{folder}{AFTER_SLASH}")),
        None => Bound::Included(scope.to_owned()),
    }
}

/// The objects in a range of keys, which may be empty.
fn between<'a>(
    objects: &'a Objects,
    start: Bound<&str>,
    end: &Bound<String>,
) -> std::collections::btree_map::Range<'a, Arc<str>, Entry> {
    let end = match end {
        Bound::Excluded(end) => Bound::Excluded(end.as_str()),
        Bound::Included(end) => Bound::Included(end.as_str()),
        Bound::Unbounded => Bound::Unbounded,
    };
    let empty = match (start, end) {
        (Bound::Excluded(start), Bound::Excluded(end) | Bound::Included(end)) => start >= end,
        _ => false,
    };
    if empty {
        // Of a range that ends before it begins there is no iterator.
        return objects.range::<str, _>((Bound::Included(""), Bound::Excluded("")));
    }
    objects.range::<str, _>((start, end))
}

//! Which report on a pod is the latest: they are written by tasks side by side, and an older one must not have the last word.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The latest report on each pod that is under way; bounded by the writes under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Mutex<Latest>>);

#[derive(Debug, Default)]
struct Latest {
    count: u64,
    by_uid: HashMap<Arc<str>, u64>,
}

/// One report on one pod. From when the next is taken it must write no more.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Turns,
    uid: Arc<str>,
    number: u64,
}

impl Turns {
    /// Begins a report; the reports on a pod are begun in the order of what they say.
    pub(super) fn take(&self, uid: &Arc<str>) -> Turn {
        let mut latest = self.lock();
        latest.count += 1;
        let number = latest.count;
        latest.by_uid.insert(uid.clone(), number);
        Turn { turns: self.clone(), uid: uid.clone(), number }
    }

    fn lock(&self) -> MutexGuard<'_, Latest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// Whether nobody has begun a later report on this pod.
    pub(super) fn is_latest(&self) -> bool {
        self.turns.lock().by_uid.get(&self.uid) == Some(&self.number)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Under one lock: a turn that is taken in between would be forgotten, and never write.
        let mut latest = self.turns.lock();
        if latest.by_uid.get(&self.uid) == Some(&self.number) {
            latest.by_uid.remove(&self.uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_begun_has_the_last_word() {
        let turns = Turns::default();
        let (pod, other) = (Arc::from("pod"), Arc::from("other"));
        let (first, apart) = (turns.take(&pod), turns.take(&other));
        assert!(first.is_latest());
        let second = turns.take(&pod);
        assert!(!first.is_latest() && second.is_latest() && apart.is_latest());
        drop(first);
        assert!(second.is_latest());
        drop((second, apart));
        assert!(turns.lock().by_uid.is_empty());
    }
}

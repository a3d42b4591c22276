//! Linearizability of concurrent compare-and-swap histories on one key.
//!
//! Revisions make the check exact: a successful write names its place in the total order, so it is enough that this
//! order respects real time, that each success built on the version directly before it, and that each read and each
//! refusal tells a version that was current at some moment between its call and its answer.

use std::sync::Arc;
use std::time::Instant;

use coracle_store::{Error, Precondition, Store};
use rand::prelude::*;

use crate::backends::draft;

const KEY: &str = "/registry/leases/ns/contended";
const CLIENTS: usize = 8;
const OPERATIONS: usize = 60;

/// Writers that meet in one group commit win one at a time, so successes are few; fewer would judge nothing.
const LEAST_SUCCESSES: usize = 20;

/// What an operation learned: the version at the key is `now` (0 for none); a write put it there in place of `before`.
struct Operation {
    called: Instant,
    answered: Instant,
    /// The version that a write expected, `None` for one that expected nothing or a read.
    expected: Option<u64>,
    wrote: Option<u64>,
    now: u64,
}

pub(crate) async fn check(store: Arc<dyn Store>) {
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(client as u64);
                let mut known = 0;
                let mut history = Vec::new();
                for _ in 0..OPERATIONS {
                    let called = Instant::now();
                    let choice = random.random_range(0..10);
                    let (expected, wrote, now) = match choice {
                        0..3 => (None, None, store.get(KEY).await.unwrap().map_or(0, |entry| entry.revision)),
                        3..9 => {
                            let precondition =
                                if known == 0 { Precondition::Absent } else { Precondition::Revision(known) };
                            match store.put(KEY, draft("x"), precondition).await {
                                Ok(entry) => (Some(known), Some(entry.revision), entry.revision),
                                Err(Error::Conflict { current, .. }) => {
                                    (None, None, current.map_or(0, |entry| entry.revision))
                                }
                                Err(error) => panic!("{error}"),
                            }
                        }
                        _ => match store.delete(KEY, Precondition::Revision(known)).await {
                            Ok(deleted) => (Some(known), Some(deleted.revision), 0),
                            Err(Error::Conflict { current, .. }) => {
                                (None, None, current.map_or(0, |entry| entry.revision))
                            }
                            Err(error) => panic!("{error}"),
                        },
                    };
                    known = now;
                    history.push(Operation { called, answered: Instant::now(), expected, wrote, now });
                }
                history
            })
        })
        .collect();
    let mut history = Vec::new();
    for client in clients {
        history.extend(client.await.unwrap());
    }
    judge(&history);
}

fn judge(history: &[Operation]) {
    let mut writes: Vec<&Operation> = history.iter().filter(|operation| operation.wrote.is_some()).collect();
    writes.sort_by_key(|write| write.wrote);
    assert!(writes.len() >= LEAST_SUCCESSES, "too few successes to judge by: {}", writes.len());
    let mut version = 0;
    for (index, write) in writes.iter().enumerate() {
        assert_eq!(write.expected, Some(version), "write {:?} did not build on the version before", write.wrote);
        version = write.now;
        if let Some(next) = writes.get(index + 1) {
            assert!(write.called <= next.answered, "write {:?} was called after the one that follows it", write.wrote);
            assert_ne!(write.wrote, next.wrote);
        }
    }
    // A version is current at the earliest from the call of its write, at the latest until the answer of the next one.
    for look in history.iter().filter(|operation| operation.wrote.is_none()) {
        let possible = (0..=writes.len()).any(|count| {
            let version = if count == 0 { 0 } else { writes[count - 1].now };
            let begun = count == 0 || writes[count - 1].called <= look.answered;
            let over = writes.get(count).is_some_and(|next| next.answered < look.called);
            version == look.now && begun && !over
        });
        assert!(possible, "a look saw version {} at a time when it was not current", look.now);
    }
}

#[test]
fn the_judge_sees_a_stale_read() {
    use std::time::Duration;
    let start = Instant::now();
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    let mut history: Vec<Operation> = (0..100)
        .map(|number| Operation {
            called: at(10 * number),
            answered: at(10 * number + 5),
            expected: Some(number),
            wrote: Some(number + 1),
            now: number + 1,
        })
        .collect();
    let look = |now| Operation { called: at(506), answered: at(509), expected: None, wrote: None, now };
    history.push(look(51));
    judge(&history);
    history.push(look(50));
    assert!(std::panic::catch_unwind(|| judge(&history)).is_err(), "a stale read passes");
}

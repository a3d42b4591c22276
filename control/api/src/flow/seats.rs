//! Seats of the priority levels and the queues before them.
//!
//! A level may always use its nominal seats but for those that it lends, and beyond that what the others leave free of theirs, up
//! to its borrowing limit. Who finds no seat waits in the shortest of a few queues that its flow is dealt (shuffle sharding), so
//! that one flow cannot fill them all; the queues of a level are served in turn.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use k8s_openapi::api::flowcontrol::v1::PriorityLevelConfiguration;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::SEATS;

/// How busy a level is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    pub(crate) name: String,
    pub(crate) nominal: usize,
    pub(crate) in_use: usize,
    pub(crate) waiting: usize,
}

/// What became of a request.
pub(super) enum Entry {
    Seat(Seat),
    Wait(oneshot::Receiver<Seat>),
    /// Turned away, for this reason.
    Full(&'static str),
}

/// A seat, given back when dropped.
pub(crate) struct Seat {
    /// `None` once it is given back.
    seats: Option<Arc<Seats>>,
    level: Arc<str>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(seats) = self.seats.take() {
            seats.leave(&self.level);
        }
    }
}

#[derive(Default)]
struct State {
    levels: BTreeMap<Arc<str>, Places>,
}

/// One level.
#[derive(Default)]
struct Places {
    exempt: bool,
    nominal: usize,
    /// Seats that nobody else gets.
    floor: usize,
    /// Seats with all that may be borrowed.
    ceiling: usize,
    queues: Vec<VecDeque<oneshot::Sender<Seat>>>,
    hand: usize,
    queue_length: usize,
    in_use: usize,
    waiting: usize,
    /// Queue that is served next.
    next: usize,
    /// No longer configured; kept until its requests are done.
    gone: bool,
}

#[derive(Default)]
pub(super) struct Seats(Mutex<State>);

fn count(number: Option<i32>, usual: usize) -> usize {
    number.and_then(|n| usize::try_from(n).ok()).unwrap_or(usual)
}

impl Seats {
    /// Takes the levels as they are configured; gives the UID of each.
    pub(super) fn configure(self: &Arc<Self>, levels: &[Arc<PriorityLevelConfiguration>]) -> HashMap<Arc<str>, String> {
        let spec = |level: &PriorityLevelConfiguration| level.spec.clone().unwrap_or_default();
        let shares = |level: &PriorityLevelConfiguration| {
            let spec = spec(level);
            let exempt = spec.exempt.map(|e| count(e.nominal_concurrency_shares, 0));
            spec.limited.map(|l| count(l.nominal_concurrency_shares, 30)).or(exempt).unwrap_or_default()
        };
        let total: usize = levels.iter().map(|level| shares(level)).sum::<usize>().max(1);
        let mut state = self.0.lock();
        state.levels.values_mut().for_each(|places| places.gone = true);
        let mut uids = HashMap::new();
        for level in levels {
            let name: Arc<str> = level.metadata.name.clone().unwrap_or_default().into();
            uids.insert(name.clone(), level.metadata.uid.clone().unwrap_or_default());
            let spec = spec(level);
            let nominal = (SEATS * shares(level)).div_ceil(total);
            let limited = spec.limited.unwrap_or_default();
            let lendable = limited.lendable_percent.or(spec.exempt.and_then(|e| e.lendable_percent));
            let places = state.levels.entry(name).or_default();
            places.gone = false;
            places.exempt = spec.type_ == "Exempt";
            places.nominal = nominal;
            places.floor = nominal - nominal * count(lendable, 0).min(100) / 100;
            places.ceiling = match limited.borrowing_limit_percent {
                None => SEATS,
                Some(percent) => nominal + nominal * count(Some(percent), 0) / 100,
            };
            let queuing = limited.limit_response.filter(|r| r.type_ == "Queue").map(|r| r.queuing.unwrap_or_default());
            let (queues, hand, length) = match &queuing {
                Some(q) => (count(q.queues, 64), count(q.hand_size, 8), count(q.queue_length_limit, 50)),
                None => (0, 0, 0),
            };
            (places.hand, places.queue_length) = (hand.min(queues), length);
            places.resize(queues);
        }
        state.levels.retain(|_, places| !places.gone || places.in_use + places.waiting > 0);
        state.serve(self);
        uids
    }

    /// A seat, a place in a queue, or neither. `flow` is the hash of the request's flow.
    pub(super) fn enter(self: &Arc<Self>, level: &Arc<str>, flow: u64) -> Entry {
        let mut state = self.0.lock();
        let free = state.free(level);
        let Some(places) = state.levels.get_mut(level) else { return Entry::Full("cancelled") };
        if free && places.waiting == 0 {
            places.in_use += 1;
            return Entry::Seat(Seat { seats: Some(Arc::clone(self)), level: Arc::clone(level) });
        }
        let hand = deal(flow, places.queues.len(), places.hand);
        let Some(shortest) = hand.into_iter().min_by_key(|&at| places.queues[at].len()) else {
            return Entry::Full("concurrency-limit");
        };
        let queue = &mut places.queues[shortest];
        if queue.len() >= places.queue_length {
            // Those who gave up stand in the way of nobody.
            let before = queue.len();
            queue.retain(|waiter| !waiter.is_closed());
            places.waiting -= before - queue.len();
            if queue.len() >= places.queue_length {
                return Entry::Full("queue-full");
            }
        }
        let (waiter, called) = oneshot::channel();
        queue.push_back(waiter);
        places.waiting += 1;
        Entry::Wait(called)
    }

    fn leave(self: &Arc<Self>, level: &str) {
        let mut state = self.0.lock();
        if let Some(places) = state.levels.get_mut(level) {
            places.in_use = places.in_use.saturating_sub(1);
            if places.gone && places.in_use + places.waiting == 0 {
                state.levels.remove(level);
            }
        }
        state.serve(self);
    }

    pub(super) fn levels(&self) -> Vec<Level> {
        let state = self.0.lock();
        let level = |(name, p): (&Arc<str>, &Places)| Level {
            name: name.to_string(),
            nominal: p.nominal,
            in_use: p.in_use,
            waiting: p.waiting,
        };
        state.levels.iter().map(level).collect()
    }
}

impl State {
    /// Whether a level may have one more seat.
    fn free(&self, level: &str) -> bool {
        let Some(places) = self.levels.get(level) else { return false };
        if places.exempt || places.in_use < places.floor {
            return true;
        }
        // Seats in use, or held for levels that do not use what only they may have.
        let limited = self.levels.iter().filter(|(_, other)| !other.exempt);
        let taken: usize = limited
            .map(|(name, other)| if **name == *level { other.in_use } else { other.in_use.max(other.floor) })
            .sum();
        places.in_use < places.ceiling && taken < SEATS
    }

    /// Calls whoever may go now.
    fn serve(&mut self, seats: &Arc<Seats>) {
        let waiting = |(_, places): &(&Arc<str>, &Places)| places.waiting > 0;
        let names: Vec<Arc<str>> = self.levels.iter().filter(waiting).map(|(name, _)| Arc::clone(name)).collect();
        for name in names {
            while self.free(&name) {
                let Some(waiter) = self.levels.get_mut(&name).and_then(Places::pop) else { break };
                let seat = Seat { seats: Some(Arc::clone(seats)), level: Arc::clone(&name) };
                match waiter.send(seat) {
                    Ok(()) => self.levels.entry(Arc::clone(&name)).or_default().in_use += 1,
                    // It gave up: it never had the seat, so there is nothing to give back.
                    Err(mut seat) => seat.seats = None,
                }
            }
        }
    }
}

impl Places {
    /// The waiter whose turn it is.
    fn pop(&mut self) -> Option<oneshot::Sender<Seat>> {
        for _ in 0..self.queues.len() {
            let at = self.next % self.queues.len();
            self.next = at + 1;
            if let Some(waiter) = self.queues[at].pop_front() {
                self.waiting -= 1;
                return Some(waiter);
            }
        }
        None
    }

    /// Another number of queues; whoever waits in one that goes moves to one that stays, or is turned away when none does.
    fn resize(&mut self, queues: usize) {
        let moved: Vec<_> = self.queues.drain(queues.min(self.queues.len())..).flatten().collect();
        self.queues.resize_with(queues, VecDeque::new);
        for (at, waiter) in moved.into_iter().enumerate() {
            match queues {
                0 => self.waiting -= 1,
                _ => self.queues[at % queues].push_back(waiter),
            }
        }
    }
}

/// `size` different queues out of `queues`, the same ones each time for the same flow.
fn deal(mut flow: u64, queues: usize, size: usize) -> Vec<usize> {
    let mut hand: Vec<usize> = Vec::with_capacity(size);
    for dealt in 0..size {
        let left = (queues - dealt) as u64;
        let mut card = usize::try_from(flow % left).unwrap_or_default();
        flow /= left;
        // The card counts those that are not in the hand yet.
        for &held in &hand {
            if card >= held {
                card += 1;
            }
        }
        let at = hand.partition_point(|&held| held < card);
        hand.insert(at, card);
    }
    hand
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn level(name: &str, limited: &serde_json::Value) -> Arc<PriorityLevelConfiguration> {
        let value = json!({"metadata": {"name": name, "uid": name}, "spec": {"type": "Limited", "limited": limited}});
        Arc::new(serde_json::from_value(value).expect("a level"))
    }

    fn seats(levels: &[Arc<PriorityLevelConfiguration>]) -> Arc<Seats> {
        let seats = Arc::new(Seats::default());
        seats.configure(levels);
        seats
    }

    fn enter(seats: &Arc<Seats>, level: &str, flow: u64) -> Entry {
        seats.enter(&level.into(), flow)
    }

    fn seat(entry: Entry) -> Option<Seat> {
        match entry {
            Entry::Seat(seat) => Some(seat),
            _ => None,
        }
    }

    #[test]
    fn hands_are_different_queues() {
        for flow in [0, 1, 77, u64::MAX, 0x1234_5678_9abc_def0] {
            let hand = deal(flow, 64, 8);
            assert!(hand.windows(2).all(|pair| pair[0] < pair[1]) && hand.iter().all(|&at| at < 64), "{hand:?}");
            assert_eq!(deal(flow, 8, 8), (0..8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn levels_borrow_what_others_lend_and_no_more() {
        let reject = json!({"type": "Reject"});
        let greedy = level("greedy", &json!({"nominalConcurrencyShares": 10, "limitResponse": reject}));
        let lender = json!({"nominalConcurrencyShares": 20, "lendablePercent": 50, "borrowingLimitPercent": 0, "limitResponse": reject});
        let seats = seats(&[greedy, level("lender", &lender)]);
        let take = |name: &str| (0..SEATS).map_while(|_| seat(enter(&seats, name, 0))).collect::<Vec<_>>();
        let greedy = take("greedy");
        assert_eq!(greedy.len(), 400, "its own third and the half that the other lends");
        assert_eq!(take("lender").len(), 200, "its floor is its own");
        drop(greedy);
        assert_eq!(take("lender").len(), 400, "it borrows nothing");
        assert!(seats.levels().iter().all(|level| level.in_use == 0));
    }

    #[tokio::test]
    async fn queues_are_served_in_turn_and_have_an_end() {
        let queuing = json!({"queues": 8, "handSize": 1, "queueLengthLimit": 2});
        let limited = json!({"nominalConcurrencyShares": 1, "borrowingLimitPercent": 0,
            "limitResponse": {"type": "Queue", "queuing": queuing}});
        let big = level("big", &json!({"nominalConcurrencyShares": 599, "limitResponse": {"type": "Reject"}}));
        let seats = seats(&[level("small", &limited), big]);
        let first = seat(enter(&seats, "small", 0)).expect("the only seat");
        let wait = |flow| match enter(&seats, "small", flow) {
            Entry::Wait(called) => called,
            _ => panic!("flow {flow} does not wait"),
        };
        let (mut a, mut b, mut other) = (wait(0), wait(0), wait(1));
        assert!(matches!(enter(&seats, "small", 0), Entry::Full("queue-full")));
        drop(first);
        let seat_of_a = a.try_recv().expect("the longest waiting goes first");
        assert!(b.try_recv().is_err() && other.try_recv().is_err());
        drop(seat_of_a);
        let seat_of_other = other.try_recv().expect("then the other flow has its turn");
        // Whoever gave up is passed over, and frees its place.
        drop(b);
        let last = wait(0);
        drop(seat_of_other);
        drop(last.await.expect("called"));
        let small = &seats.levels()[1];
        assert_eq!((small.in_use, small.waiting), (0, 0));
        // A level that goes keeps its seats until they are back.
        let held = seat(enter(&seats, "small", 0)).expect("a seat");
        seats.configure(&[]);
        assert_eq!(seats.levels().len(), 1);
        drop(held);
        assert!(seats.levels().is_empty());
    }
}

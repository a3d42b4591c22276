//! Answers of other resolvers, kept as long as they allow (RFC 2308 for those that say no).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use parking_lot::Mutex;

/// Answers kept at once.
const ENTRIES_MAX: usize = 10_000;
/// Longest and shortest times that an answer is kept.
const TTL_MAX_S: u32 = 3600;
const NEGATIVE_TTL_MAX_S: u32 = 30;
/// How many are looked at to find one to give up when the cache is full.
const EVICTION_SAMPLE: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    name: Name,
    kind: RecordType,
    /// The asker wants signatures, or does not want them checked.
    dnssec: (bool, bool),
}

struct Kept {
    code: ResponseCode,
    answers: Vec<Record>,
    authorities: Vec<Record>,
    since: Instant,
    until: Instant,
}

/// The cache.
#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<Key, Kept>>);

fn key(question: &Query, dnssec: (bool, bool)) -> Key {
    Key { name: question.name.to_lowercase(), kind: question.query_type, dnssec }
}

impl Cache {
    /// An answer that is still good, its times counted down, as the response code with answers and authorities.
    pub(super) fn get(
        &self,
        question: &Query,
        dnssec: (bool, bool),
        now: Instant,
    ) -> Option<(ResponseCode, Vec<Record>, Vec<Record>)> {
        let entries = self.0.lock();
        let kept = entries.get(&key(question, dnssec)).filter(|kept| now < kept.until)?;
        let age = u32::try_from(now.saturating_duration_since(kept.since).as_secs()).unwrap_or(u32::MAX);
        let aged = |records: &[Record]| {
            let mut records = records.to_vec();
            records.iter_mut().for_each(|record| record.ttl = record.ttl.saturating_sub(age));
            records
        };
        Some((kept.code, aged(&kept.answers), aged(&kept.authorities)))
    }

    /// Keeps an answer if it may be kept.
    pub(super) fn put(&self, question: &Query, dnssec: (bool, bool), response: &Message, now: Instant) {
        let Some(ttl) = keep_for(response) else { return };
        let mut entries = self.0.lock();
        if entries.len() >= ENTRIES_MAX {
            let oldest =
                entries.iter().take(EVICTION_SAMPLE).min_by_key(|(_, kept)| kept.until).map(|(key, _)| key.clone());
            oldest.map(|oldest| entries.remove(&oldest));
        }
        entries.insert(
            key(question, dnssec),
            Kept {
                code: response.metadata.response_code,
                answers: response.answers.clone(),
                authorities: response.authorities.clone(),
                since: now,
                until: now + Duration::from_secs(ttl.into()),
            },
        );
    }
}

fn keep_for(response: &Message) -> Option<u32> {
    if response.metadata.truncation
        || !matches!(response.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
    {
        return None;
    }
    let least = response.answers.iter().map(|record| record.ttl).min();
    let negative = response.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum).min(NEGATIVE_TTL_MAX_S)),
        _ => None,
    });
    let ttl = match (response.metadata.response_code, least) {
        (ResponseCode::NoError, Some(least)) => least.min(TTL_MAX_S),
        _ => negative?,
    };
    (ttl > 0).then_some(ttl)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::OpCode;
    use hickory_proto::rr::rdata::{A, SOA};

    use super::*;

    fn response(ttl: u32) -> (Query, Message) {
        let question = Query::query(Name::from_ascii("Example.com.").unwrap(), RecordType::A);
        let mut message = Message::response(1, OpCode::Query);
        message.answers.push(Record::from_rdata(question.name.clone(), ttl, RData::A(A::new(192, 0, 2, 1))));
        (question, message)
    }

    #[test]
    fn answers_age_and_die() {
        let cache = Cache::default();
        let now = Instant::now();
        let (question, message) = response(10);
        cache.put(&question, (false, false), &message, now);
        let lower = Query::query(Name::from_ascii("example.COM.").unwrap(), RecordType::A);
        let later = |seconds| {
            cache.get(&lower, (false, false), now + Duration::from_secs(seconds)).map(|(_, answers, _)| answers[0].ttl)
        };
        assert_eq!((later(0), later(4), later(10)), (Some(10), Some(6), None));
        assert!(cache.get(&lower, (true, false), now).is_none());
    }

    #[test]
    fn no_is_kept_for_as_long_as_the_zone_says_and_not_longer_than_half_a_minute() {
        let soa = |ttl, minimum| {
            let name = Name::from_ascii("example.com.").unwrap();
            let soa = SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, minimum);
            Record::from_rdata(name, ttl, RData::SOA(soa))
        };
        for (record, code, kept) in [
            (Some(soa(20, 10)), ResponseCode::NXDomain, Some(10)),
            (Some(soa(5, 10)), ResponseCode::NoError, Some(5)),
            (Some(soa(900, 900)), ResponseCode::NXDomain, Some(NEGATIVE_TTL_MAX_S)),
            (None, ResponseCode::NXDomain, None),
            (Some(soa(20, 10)), ResponseCode::Refused, None),
        ] {
            let mut message = Message::response(1, OpCode::Query);
            message.metadata.response_code = code;
            message.authorities.extend(record);
            assert_eq!(keep_for(&message), kept, "{code}");
        }
    }

    #[test]
    fn failures_and_answers_for_no_time_are_not_kept() {
        let cache = Cache::default();
        let now = Instant::now();
        let (question, mut message) = response(0);
        cache.put(&question, (false, false), &message, now);
        message.answers[0].ttl = 10;
        message.metadata.response_code = ResponseCode::ServFail;
        cache.put(&question, (false, false), &message, now);
        assert!(cache.0.lock().is_empty());
    }

    #[test]
    fn the_cache_stays_within_its_bound() {
        let cache = Cache::default();
        let (_, message) = response(10);
        for n in 0..ENTRIES_MAX + 50 {
            let question = Query::query(Name::from_ascii(format!("n{n}.example.")).unwrap(), RecordType::A);
            cache.put(&question, (false, false), &message, Instant::now());
        }
        assert_eq!(cache.0.lock().len(), ENTRIES_MAX);
    }
}

//! From a datagram to a reply: everything that needs no waiting.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Record};

use super::metrics::{Metrics, count};
use super::zone::{Answer, Zone};

/// The largest answer by UDP without EDNS (RFC 1035), and the one that we offer and send with it (DNS flag day 2020: no fragments).
const PLAIN_MAX_BYTES: u16 = 512;
const EDNS_MAX_BYTES: u16 = 1232;
/// Bytes of a header; less than this has no reply.
const HEADER_BYTES: usize = 12;

/// What to do about a question.
pub(super) enum Step {
    /// Send this, to an asker that takes so many bytes by UDP if it says.
    Reply { message: Message, size: Option<u16> },
    /// Ask elsewhere, and put these records before what comes.
    Forward { request: Message, question: Query, before: Vec<Record> },
    /// Say nothing.
    Silence,
}

/// Takes a question apart and answers it if the cluster can.
pub(super) fn step(zone: &Zone, bytes: &[u8]) -> Step {
    let request = match Message::from_vec(bytes) {
        Ok(request) => request,
        Err(_) if bytes.len() < HEADER_BYTES || bytes[2] & 0x80 != 0 => return Step::Silence,
        Err(_) => {
            let id = u16::from_be_bytes([bytes[0], bytes[1]]);
            let message = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
            return Step::Reply { message, size: None };
        }
    };
    if request.metadata.message_type == MessageType::Response {
        return Step::Silence;
    }
    let size = request.edns.as_ref().map(|edns| edns.max_payload());
    let refuse = |code| Step::Reply { message: reply(&request, code), size };
    if request.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(ResponseCode::BADVERS);
    }
    let [question] = request.queries.as_slice() else { return refuse(ResponseCode::FormErr) };
    if question.query_class != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    match zone.answer(&question.name, question.query_type) {
        Answer::Records { answers, additionals } => {
            let mut message = reply(&request, ResponseCode::NoError);
            message.metadata.authoritative = true;
            if answers.is_empty() {
                message.authorities.push(zone.authority());
            }
            message.answers = answers;
            message.additionals = additionals;
            rotate(&mut message);
            Step::Reply { message, size }
        }
        Answer::NoName => {
            let mut message = reply(&request, ResponseCode::NXDomain);
            message.metadata.authoritative = true;
            message.authorities.push(zone.authority());
            Step::Reply { message, size }
        }
        Answer::Outside { answers, name } => {
            let question = Query::query(name, question.query_type);
            Step::Forward { request, question, before: answers }
        }
        Answer::NotOurs => {
            let question = question.clone();
            Step::Forward { request, question, before: Vec::new() }
        }
    }
}

/// A reply to a request, without records.
pub(super) fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut message = Message::response(request.metadata.id, request.metadata.op_code);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = request.metadata.checking_disabled;
    message.metadata.response_code = code;
    message.queries.clone_from(&request.queries);
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(EDNS_MAX_BYTES).set_version(0).set_rcode_high(code.high());
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        message.set_edns(edns);
    }
    message
}

/// Every asker gets another order, so that clients which take the first address spread.
fn rotate(message: &mut Message) {
    let len = message.answers.len();
    // The request's number is as good as random, and costs nothing.
    let by = usize::from(message.metadata.id) % len.max(1);
    message.answers.rotate_left(by);
}

/// The bytes of a reply, shortened to what the asker takes by UDP (`None`: by TCP).
pub(super) fn encode(message: &Message, request_edns: Option<u16>, udp: bool, metrics: &Metrics) -> Option<Vec<u8>> {
    count(match message.metadata.response_code {
        ResponseCode::NoError => &metrics.no_error,
        ResponseCode::NXDomain => &metrics.no_name,
        ResponseCode::Refused => &metrics.refused,
        ResponseCode::FormErr => &metrics.malformed,
        _ => &metrics.failed,
    });
    let limit = match (udp, request_edns) {
        (false, _) => usize::from(u16::MAX),
        (true, None) => usize::from(PLAIN_MAX_BYTES),
        (true, Some(size)) => usize::from(size.clamp(PLAIN_MAX_BYTES, EDNS_MAX_BYTES)),
    };
    let encode = |message: &Message| match message.to_vec() {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            tracing::debug!(%error, "a DNS answer cannot be written");
            None
        }
    };
    let bytes = encode(message)?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    // Additional records are a courtesy; without them it may fit.
    let mut shorter = message.clone();
    shorter.additionals.clear();
    let bytes = encode(&shorter)?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    count(&metrics.truncated);
    let mut cut = shorter;
    cut.metadata.truncation = true;
    while !cut.answers.is_empty() {
        cut.answers.truncate(cut.answers.len() / 2);
        let bytes = encode(&cut)?;
        if bytes.len() <= limit {
            return Some(bytes);
        }
    }
    cut.authorities.clear();
    encode(&cut)
}
